// The base product as dot products along the input, for `linear` with kAlong: the weight is read as it lies, a few rows at a
// time, and nothing is transposed, but every output is a sum over lanes. Faster than the order of the library, whose bits
// these sums are not.
//
// Tokens are in tiles of up to kAlongTokens, and the input in blocks of which a tile's part stays in the first-level cache.
// Each output is one chain over the steps of a block, reduced by a fixed tree; the blocks' sums are added in order. So its
// bits depend on its token, its row of the weight and the number of tokens.
#pragma once

#include <cstring>
#include <type_traits>

#include "apply.h"

namespace mlora {
namespace MLORA_ISA {
namespace {

// Calls f with the number of tokens, at most Most, as a constant.
template <int Most = 8, class F>
MLORA_INLINE void with_tokens(int64_t count, const F& f) {
  switch (count) {
#define MLORA_CASE(n) \
  case n: \
    return f(std::integral_constant<int, n < Most ? n : Most>{});
    MLORA_CASE(1) MLORA_CASE(2) MLORA_CASE(3) MLORA_CASE(4) MLORA_CASE(5) MLORA_CASE(6) MLORA_CASE(7)
#undef MLORA_CASE
    default:
      return f(std::integral_constant<int, Most>{});
  }
}

// Elements as they are read: bf16 by pairs where there are dot products of it, else in order, which takes fewer registers
// than its even and odd elements.
template <class T>
using Read = std::conditional_t<MLORA_HAVE_BF16, T, typename Beside<T, float>::type>;

// Inputs of a token as they are packed: as they are where there are dot products of them, else widened.
template <class T>
using Packed = std::conditional_t<std::is_same_v<T, bf16>, T, float>;

// How the tokens and the input of a problem are cut. Packed, x is [block][tile][step][token of the tile][kAlongStep]: with one
// token's inputs after the other's, whose distance is often a power of two, tokens would push each other out of the cache.
template <class T>
struct Along {
  explicit Along(const Problem& p) : tokens(p.tokens), in(p.in), steps(ceil_div(p.in, step)) {
    tiles = ceil_div(tokens, most_tokens);
    tile = ceil_div(tokens, tiles);
    const int64_t most = (tile <= 2 ? 128 : tile <= 4 ? 64 : 32) * int64_t{2} / int64_t{sizeof(Packed<T>)};
    block = ceil_div(steps, ceil_div(steps, most));
  }

  int64_t block_of(int64_t s) const { return s / block * block; }
  int64_t block_steps(int64_t first) const { return steps - first < block ? steps - first : block; }
  int64_t tile_tokens(int64_t q) const { return tokens - q * tile < tile ? tokens - q * tile : tile; }
  // Where the tile's part of the block lies that starts with step `first`.
  int64_t at(int64_t first, int64_t q) const {
    return (first * tokens + q * tile * block_steps(first)) * step;
  }

  static constexpr int64_t step = kAlongStep;
  static constexpr int most_tokens = MLORA_HAVE_AVX512 ? 8 : 6;  // of a tile
  int64_t tokens, in, steps;
  int64_t tiles, tile;  // and how many tokens each but the last has
  int64_t block;        // steps of each but the last

 private:
  static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
};

// Steps [from, to) of all tokens.
template <class T>
void pack_along(const Problem& p, uint32_t* xt, int64_t from, int64_t to) {
  constexpr int64_t step = kAlongStep;
  const Along<T> cut(p);
  for (int64_t t = 0; t < p.tokens; ++t) {
    const T* row = static_cast<const T*>(p.x) + t * p.x_stride;
    const int64_t q = t / cut.tile;
    for (int64_t s = from; s < to; ++s) {
      const int64_t first = cut.block_of(s), left = p.in - s * step;
      Packed<T>* own = reinterpret_cast<Packed<T>*>(xt) + cut.at(first, q) +
                       ((s - first) * cut.tile_tokens(q) + t - q * cut.tile) * step;
      const T* xs = row + s * step;
      T padded[step];
      if (left < step) {
        std::memset(padded, 0, sizeof(padded));
        std::memcpy(padded, xs, left * sizeof(T));
        xs = padded;
      }
      if constexpr (std::is_same_v<T, Packed<T>>) {
        std::memcpy(own, xs, sizeof(padded));
      } else {
        MLORA_UNROLL for (int64_t i = 0; i < step; i += 2 * W) {
          const Pair v = load<false>(xs + i, 2 * W);
          store_sums(own + i, v.a);
          store_sums(own + i + W, v.b);
        }
      }
    }
  }
}

// Asks for lines of kLinearColumns rows, `pitch` bytes apart, from each row in turn: memory gives more to who reads many
// pages at a time than one after the other.
struct Asked {
  uintptr_t at, stop, pitch;

  MLORA_INLINE void line() {
    __builtin_prefetch(reinterpret_cast<const void*>(at), 0, 2);
    at += pitch;
    if (at >= stop) {
      at -= kLinearColumns * pitch - 64;
      stop += 64;
    }
  }
};

// Parts of W inputs that a step is multiplied in; one of the whole step where there are dot products.
template <class T>
constexpr int kParts = std::is_same_v<T, bf16> ? 1 : kAlongStep / W;

template <class T>  // of a row, in a step
constexpr int64_t kStepBytes = kAlongStep * sizeof(T);

template <class T, bool Tail>
MLORA_INLINE vf load_part(const T* p, int part, int64_t left) {
  const int64_t at = part / 2 * 2 * W;
  const Pair v = load<Tail>(p + at, left - at < 2 * W ? left - at : 2 * W);
  return part % 2 ? v.b : v.a;
}

// Brings the weights nearer that lie `near` elements on. They are in the second-level cache, whose latency the 16 registers
// of AVX2 leave too little work to hide. Not with AVX-512, whose tiles are larger, and were measured without.
template <class T, int Rows>
MLORA_INLINE void bring(const T* rows, int64_t in, int64_t near) {
  if (MLORA_HAVE_AVX512) return;
  MLORA_UNROLL for (int r = 0; r < Rows; ++r) {
    const char* at = reinterpret_cast<const char*>(rows + r * in + near);
    MLORA_UNROLL for (int64_t line = 0; line < kStepBytes<T>; line += 64) __builtin_prefetch(at + line);
  }
}

// acc[r][t] += what the rows and the tokens have in a step. With Fetch, asks for as many lines as it reads.
template <class T, int Rows, int Tokens, bool Fetch, bool Tail>
MLORA_INLINE void along_step(const Packed<T>* x, const T* rows, int64_t in, int64_t near, Asked& asked, int64_t left,
                             vf (&acc)[Rows][Tokens]) {
  constexpr int64_t step = kAlongStep;
  if constexpr (kParts<T> == 1) {
    Operand<T> ws[Rows];
    MLORA_UNROLL for (int r = 0; r < Rows; ++r) {
      ws[r] = load_operand<T, Tail>(rows + r * in, left);
      MLORA_UNROLL for (int64_t line = 0; Fetch && line < kStepBytes<T>; line += 64) asked.line();
    }
    MLORA_UNROLL for (int t = 0; t < Tokens; ++t) {
      const Operand<T> own = load_operand<T, false>(x + t * step, step);
      MLORA_UNROLL for (int r = 0; r < Rows; ++r) acc[r][t] = dot<T>(own, ws[r], acc[r][t]);
    }
  } else {
    MLORA_UNROLL for (int64_t line = 0; Fetch && line < Rows * kStepBytes<T>; line += 64) asked.line();
    bring<T, Rows>(rows, in, near);
    MLORA_UNROLL for (int i = 0; i < kParts<T>; ++i) {
#if MLORA_HAVE_AVX2 && !MLORA_HAVE_AVX512
      asm volatile("" ::: "memory");  // or the compiler loads the next part's operands early, and registers run out
#endif
      vf ws[Rows];
      MLORA_UNROLL for (int r = 0; r < Rows; ++r) ws[r] = load_part<T, Tail>(rows + r * in, i, left);
      MLORA_UNROLL for (int t = 0; t < Tokens; ++t) {
        vf own = load_sums(x + t * step + i * W);
#if MLORA_HAVE_AVX2 && !MLORA_HAVE_AVX512
        if (Rows > 1) asm("" : "+x"(own));  // or it is loaded once a row, and loads are what it waits for
#endif
        MLORA_UNROLL for (int r = 0; r < Rows; ++r) acc[r][t] = fma(own, ws[r], acc[r][t]);
      }
    }
  }
}

// The sums over the lanes of four vectors, by one tree each.
MLORA_INLINE void reduce(const vf (&v)[4], float* to) {
#if MLORA_HAVE_AVX512
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512 lanes = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)));
#elif MLORA_HAVE_AVX2
  const __m256 h = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)));
#else
  for (int i = 0; i < 4; ++i) to[i] = reduce(v[i]);
#endif
}

// sums[t * kLinearColumns + r] of Rows adjoining rows of the weight over `count` steps, of which the last may be cut to
// `left` inputs. The next call's rows lie `near` elements on. During steps [from, to) it asks for as much as it reads. Not
// inlined, so that its loops have the registers for themselves.
template <class T, int Rows, int Tokens>
__attribute__((noinline)) void along_tile(const Packed<T>* x, const T* rows, int64_t in, int64_t near, int64_t count,
                                          int64_t left, int64_t from, int64_t to, Asked& asked, bool started,
                                          float* sums) {
  constexpr int64_t step = kAlongStep;
  vf acc[Rows][Tokens];
  MLORA_UNROLL for (int r = 0; r < Rows; ++r) {
    MLORA_UNROLL for (int t = 0; t < Tokens; ++t) acc[r][t] = zero();
  }
  Asked own = asked;  // in registers
  const int64_t whole = left < step ? count - 1 : count;
  to = to < whole ? to : whole;
  int64_t s = 0;
  for (; s < from; ++s, x += Tokens * step, rows += step) {
    along_step<T, Rows, Tokens, false, false>(x, rows, in, near, own, step, acc);
  }
  for (; s < to; ++s, x += Tokens * step, rows += step) {
    along_step<T, Rows, Tokens, true, false>(x, rows, in, near, own, step, acc);
  }
  for (; s < whole; ++s, x += Tokens * step, rows += step) {
    along_step<T, Rows, Tokens, false, false>(x, rows, in, near, own, step, acc);
  }
  if (s < count) along_step<T, Rows, Tokens, false, true>(x, rows, in, near, own, left, acc);
  asked = own;
  constexpr int kOutputs = Rows * Tokens;
  MLORA_UNROLL for (int i = 0; i < kOutputs; i += 4) {
    vf of[4];
    MLORA_UNROLL for (int j = 0; j < 4; ++j) {
      const int o = i + j < kOutputs ? i + j : kOutputs - 1;
      of[j] = acc[o % Rows][o / Rows];
    }
    float four[4];
    reduce(of, four);
    MLORA_UNROLL for (int j = 0; j < 4; ++j) {
      if (i + j >= kOutputs) continue;
      float* sum = sums + (i + j) / Rows * kLinearColumns + (i + j) % Rows;
      *sum = started ? *sum + four[j] : four[j];
    }
  }
}

// Rows of the weight at a time, whose sums fit the registers.
constexpr int along_rows(int tokens) {
  if (!MLORA_HAVE_AVX512) return tokens <= 3 ? 4 : 2;
  return tokens <= 2 ? 8 : tokens == 3 ? 4 : 2;
}

// sums[t * kLinearColumns + c] of columns [n, end), at most kLinearColumns, and all tokens. With `more`, the caller goes on
// with the columns after these, which are asked for meanwhile, into the second-level cache: each tile of tokens asks for its
// part of the next block.
template <class T>
MLORA_INLINE void along(const Problem& p, const Packed<T>* x, int64_t n, int64_t end, bool more, float* sums) {
  const Along<T> cut(p);
  const T* weight = static_cast<const T*>(p.weight) + n * p.in;
  for (int64_t first = 0; first < cut.steps; first += cut.block) {
    const int64_t count = cut.block_steps(first), from = first * cut.step, left = p.in - from - (count - 1) * cut.step;
    const bool last = first + count == cut.steps;
    const T* next = weight + (last ? kLinearColumns * p.in : from + count * cut.step);
    const uintptr_t pitch = p.in * sizeof(T);
    Asked asked = {reinterpret_cast<uintptr_t>(next), reinterpret_cast<uintptr_t>(next) + kLinearColumns * pitch, pitch};
    for (int64_t q = 0; q < cut.tiles; ++q) {
      const Packed<T>* tokens = x + cut.at(first, q);
      float* own = sums + q * cut.tile * kLinearColumns;
      const int64_t asks = last && !more ? 0 : count, begin = q * asks / cut.tiles, stop = (q + 1) * asks / cut.tiles;
      const auto columns = [&](auto rows, auto tile, int64_t c) __attribute__((always_inline)) {
        const int64_t near = (c + 2 * rows <= end - n ? rows : -c) * p.in;  // after the last rows the first ones come again
        along_tile<T, rows, tile>(tokens, weight + c * p.in + from, p.in, near, count, left, begin, stop, asked, first > 0,
                                  own + c);
      };
      with_tokens<Along<T>::most_tokens>(cut.tile_tokens(q), [&](auto tile) __attribute__((always_inline)) {
        constexpr int kRows = along_rows(tile);
        int64_t c = 0;
        for (; c + kRows <= end - n; c += kRows) columns(std::integral_constant<int, kRows>(), tile, c);
        for (; c < end - n; ++c) columns(std::integral_constant<int, 1>(), tile, c);
      });
    }
  }
}

}  // namespace
}  // namespace MLORA_ISA
}  // namespace mlora
