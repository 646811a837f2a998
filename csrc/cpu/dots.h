// The base product in the order in which torch multiplies 16-bit matrices where no library does, for `linear` with kDots: on
// processors without AVX-512 both bf16 and fp16, elsewhere fp16.
//
// An output is a dot product: kDotChains vectors of fp32 sums, of which each takes every kDotChains-th vector of the input,
// and which are added as a tree, and then their lanes. What is left of the input, less than a vector for each chain, has one
// more chain, whose sum is added at last. (ATen/native/cpu/ReducedPrecisionFloatGemvFastPathKernel.cpp.)
//
// For many tokens chains are summed one after the other, for a tile of rows and tokens, so that what is loaded is used for as
// many products as the registers hold sums. For few, which wait for the weight, a row's chains are summed together, so that it is
// read in order.
#pragma once

#include "along.h"

#if MLORA_HAVE_AVX2

namespace mlora {
namespace MLORA_ISA {
namespace {

constexpr int kDotChains = 8;
constexpr int64_t kDotGroup = kDotChains * W;  // inputs of which each chain takes one vector
constexpr int64_t kDotBlock = 2048 / kDotGroup;  // groups whose part of a tile of the weight stays in the first-level cache

// How the tokens and the input of a problem are cut. Packed, x is widened: a tile's [block][chains summed
// together][group][chain][token][W], and behind them what is left of the input, [vector][token][W].
struct Dots {
  explicit Dots(const Problem& p) : in(p.in), tokens(p.tokens), groups(in / kDotGroup), rest((in - groups * kDotGroup) / W) {
    tiles = (tokens + most_tokens - 1) / most_tokens;
    tile = (tokens + tiles - 1) / tiles;
    together = tokens == 1 ? kDotChains : tiles <= 2 ? 4 : 1;
  }

  int64_t block_groups(int64_t first) const { return groups - first < kDotBlock ? groups - first : kDotBlock; }
  int64_t tile_tokens(int64_t q) const { return tokens - q * tile < tile ? tokens - q * tile : tile; }

  static constexpr int most_tokens = MLORA_HAVE_AVX512 ? 6 : 3;
  int64_t in, tokens;
  int64_t groups, rest;  // and vectors after the last group
  int64_t tiles, tile;   // and how many tokens each but the last has
  int64_t together;      // chains
};

// Steps [from, to) of kAlongStep inputs of all tokens.
template <class T>
void pack_dots(const Problem& p, float* xt, int64_t from, int64_t to) {
  const Dots cut(p);
  for (int64_t t = 0; t < p.tokens; ++t) {
    const T* row = static_cast<const T*>(p.x) + t * p.x_stride;
    const int64_t q = t / cut.tile, count = cut.tile_tokens(q);
    float* own = xt + q * cut.tile * cut.in + (t - q * cut.tile) * W;
    for (int64_t v = from * kAlongStep / W; v < to * kAlongStep / W; v += 2) {
      const Pair values = load<false>(row + v * W, 2 * W);
      const int64_t group = v / kDotChains, first = group / kDotBlock * kDotBlock;
      const int64_t chain = v % kDotChains, with = chain % cut.together;
      // Of the vector's inputs and the next one's: where in the tile they are, in vectors of each token.
      const bool whole = group < cut.groups;
      const int64_t apart = whole && cut.together == 1 ? cut.block_groups(first) : 1;
      int64_t at = v;
      if (whole) {
        at = first * kDotChains + (chain - with) * cut.block_groups(first) + (group - first) * cut.together + with;
      }
      store_sums(own + at * count * W, values.a);
      store_sums(own + (at + apart) * count * W, values.b);
    }
  }
}

#if MLORA_HAVE_AVX512
MLORA_INLINE vf load_vector(const fp16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
MLORA_INLINE vf load_vector(const bf16_in_order* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
#else
MLORA_INLINE vf load_vector(const fp16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
MLORA_INLINE vf load_vector(const bf16_in_order* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
#endif

// acc[i][r][t] += what rows and tokens have in one vector of the input each, of `Chains` adjoining ones.
template <class T, int Chains, int Rows, int Tokens>
MLORA_INLINE void dot_vectors(const float* x, const T* rows, int64_t in, vf (&acc)[Chains][Rows][Tokens]) {
  MLORA_UNROLL for (int i = 0; i < Chains; ++i) {
    vf xs[Tokens];
    MLORA_UNROLL for (int t = 0; t < Tokens; ++t) {
      xs[t] = load_sums(x + (i * Tokens + t) * W);
#if !MLORA_HAVE_AVX512
      if (Rows > 1) asm("" : "+x"(xs[t]));  // or it is loaded once a row, and loads are what it waits for
#endif
    }
    MLORA_UNROLL for (int r = 0; r < Rows; ++r) {
      const vf w = load_vector(rows + r * in + i * W);
      MLORA_UNROLL for (int t = 0; t < Tokens; ++t) acc[i][r][t] = fma(xs[t], w, acc[i][r][t]);
    }
  }
}

// The sum over the lanes, whose halves are added until one is left.
MLORA_INLINE float halved(vf v) {
#if MLORA_HAVE_AVX512
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
#else
  const __m256 h = v;
#endif
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}

// sums[t * kLinearColumns + r] of Rows adjoining rows of the weight, Chains at a time. The next call's rows lie `near`
// elements on, if it reads others. During groups [from, to) it asks for as much as it reads. Not inlined, so that its loops have
// the registers for themselves.
template <class T, int Chains, int Rows, int Tokens>
__attribute__((noinline)) void dot_tile(const Dots& cut, const float* x, const T* rows, int64_t near, int64_t from,
                                        int64_t to, Asked& asked, float* sums) {
  const int64_t in = cut.in;
  alignas(64) float chains[kDotChains][Rows][Tokens][W];
  Asked own = asked;  // in registers
  const auto each = [](const auto& f) __attribute__((always_inline)) {
    MLORA_UNROLL for (int i = 0; i < Chains; ++i) {
      MLORA_UNROLL for (int r = 0; r < Rows; ++r) {
        MLORA_UNROLL for (int t = 0; t < Tokens; ++t) f(i, r, t);
      }
    }
  };
  for (int64_t first = 0; first < cut.groups; first += kDotBlock) {
    const int64_t count = cut.block_groups(first);
    for (int i = 0; i < kDotChains; i += Chains) {
      vf acc[Chains][Rows][Tokens];
      each([&](int c, int r, int t) __attribute__((always_inline)) {
        acc[c][r][t] = first ? load_sums(chains[i + c][r][t]) : zero();
      });
      const T* at = rows + first * kDotGroup + i * W;
      int64_t g = 0;
      if (i == 0) {  // which brings the weights of all chains
        for (; g < count; ++g, x += Chains * Tokens * W, at += kDotGroup) {
          for (int64_t k = 0; near && k < kDotGroup; k += kAlongStep) bring<T, Rows>(at + k, in, near);
          if (from <= first + g && first + g < to) {
            for (int64_t line = 0; line < Rows * kDotGroup * int64_t{sizeof(T)}; line += 64) own.line();
          }
          dot_vectors<T, Chains, Rows, Tokens>(x, at, in, acc);
        }
      }
      for (; g < count; ++g, x += Chains * Tokens * W, at += kDotGroup) {
        dot_vectors<T, Chains, Rows, Tokens>(x, at, in, acc);
      }
      each([&](int c, int r, int t) __attribute__((always_inline)) { store_sums(chains[i + c][r][t], acc[c][r][t]); });
    }
  }
  asked = own;
  vf rest[1][Rows][Tokens];
  MLORA_UNROLL for (int r = 0; r < Rows; ++r) {
    MLORA_UNROLL for (int t = 0; t < Tokens; ++t) rest[0][r][t] = zero();
  }
  for (int64_t v = 0; v < cut.rest; ++v, x += Tokens * W) {
    dot_vectors<T, 1, Rows, Tokens>(x, rows + cut.groups * kDotGroup + v * W, in, rest);
  }
  MLORA_UNROLL for (int r = 0; r < Rows; ++r) {
    MLORA_UNROLL for (int t = 0; t < Tokens; ++t) {
      vf sum[kDotChains];
      MLORA_UNROLL for (int i = 0; i < kDotChains; ++i) sum[i] = cut.groups ? load_sums(chains[i][r][t]) : zero();
      MLORA_UNROLL for (int half = kDotChains / 2; half > 0; half /= 2) {
        MLORA_UNROLL for (int i = 0; i < half; ++i) sum[i] = add(sum[i], sum[half + i]);
      }
      sums[t * kLinearColumns + r] = halved(sum[0]) + halved(rest[0][r][t]);
    }
  }
}

// sums[t * kLinearColumns + c] of columns [n, end), at most kLinearColumns, and all tokens. With `more`, the caller goes on
// with the columns after these, which are asked for meanwhile.
template <class T>
MLORA_INLINE void dots(const Problem& p, const float* x, int64_t n, int64_t end, bool more, float* sums) {
  const Dots cut(p);
  const T* weight = static_cast<const T*>(p.weight) + n * p.in;
  const uintptr_t pitch = p.in * sizeof(T), next = reinterpret_cast<uintptr_t>(weight) + kLinearColumns * pitch;
  Asked asked = {next, next + kLinearColumns * pitch, pitch};
  const int64_t asks = more ? cut.groups : 0;
  const auto columns = [&](auto chains, auto rows, auto tokens, int64_t c, int64_t q) __attribute__((always_inline)) {
    dot_tile<T, chains, rows, tokens>(cut, x + q * cut.tile * p.in, weight + c * p.in, q + 1 < cut.tiles ? 0 : rows * p.in,
                                      q * asks / cut.tiles, (q + 1) * asks / cut.tiles, asked,
                                      sums + q * cut.tile * kLinearColumns + c);
  };
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 4> four;
  constexpr std::integral_constant<int, kDotChains> all;
  for (int64_t c = 0, rows = 0; c < end - n; c += rows) {
    rows = cut.together == 1 && c + four <= end - n ? four : one;
    for (int64_t q = 0; q < cut.tiles; ++q) {
      with_tokens<Dots::most_tokens>(cut.tile_tokens(q), [&](auto tokens) __attribute__((always_inline)) {
        if (rows == four) return columns(one, four, tokens, c, q);
        if (cut.together == 1) return columns(one, one, tokens, c, q);
        if constexpr (tokens() == 1) {
          if (cut.tokens == 1) return columns(all, one, one, c, q);
        }
        columns(four, one, tokens, c, q);
      });
    }
  }
}

}  // namespace
}  // namespace MLORA_ISA
}  // namespace mlora

#endif
