// The base product in the order of libraries on AVX-512, for `linear` with a kblock.
//
// Lanes are output columns, or tokens where they nearly fill a vector. What lies in 32 bits of an input row, a pair of
// bf16 or one float, is a unit. Each output is one chain over units in order, of dot products of pairs or of FMAs,
// starting from zero at every multiple of kblock; the blocks' sums are added in order. That is what oneDNN does for bf16
// on avx512_core_bf16 and MKL for fp32 from some tokens on, so base rows come out with the library's bits when kblock is
// the library's. For a single bf16 token oneDNN keeps 16 such chains an output, one a lane, and adds the lanes in a tree:
// so does base_row.
#pragma once

#include "along.h"

#if MLORA_HAVE_AVX512

namespace mlora {
namespace MLORA_ISA {
namespace {

// Asks for what the next columns read: into the second-level cache, since so much does not fit the first one, which waits
// for a few lines at a time only.
MLORA_INLINE void prefetch_far(const void* at) { __builtin_prefetch(at, 0, 2); }

// 16 x 16 transpose of units: to[Stride * k][n] = rows[n][k] for k < count.
template <bool Tail, int Stride = 1>
MLORA_INLINE void transpose(const uint32_t* const* rows, int64_t k, int64_t count, __m512i* to) {
  const __mmask16 mask = static_cast<__mmask16>(first(count));
  __m512i a[16], b[16];
  MLORA_UNROLL for (int i = 0; i < 16; ++i) {
    a[i] = Tail ? _mm512_maskz_loadu_epi32(mask, rows[i] + k) : _mm512_loadu_si512(rows[i] + k);
  }
  MLORA_UNROLL for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  MLORA_UNROLL for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  // Lane L of a[4 g + c] now holds column 4 L + c of rows 4 g .. 4 g + 3.
  MLORA_UNROLL for (int c = 0; c < 4; ++c) {
    const __m512i lo01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88), hi01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
    const __m512i lo23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
    const __m512i hi23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
    to[Stride * c] = _mm512_shuffle_i32x4(lo01, lo23, 0x88);
    to[Stride * (8 + c)] = _mm512_shuffle_i32x4(lo01, lo23, 0xdd);
    to[Stride * (4 + c)] = _mm512_shuffle_i32x4(hi01, hi23, 0x88);
    to[Stride * (12 + c)] = _mm512_shuffle_i32x4(hi01, hi23, 0xdd);
  }
}

template <class T>
constexpr int64_t kUnit = 4 / sizeof(T);  // inputs of a unit

// One step of 16 chains: units of the lanes, which are columns or tokens, with one of the other side.
template <class T>
vf chain(vf acc, __m512i lanes, const uint32_t* one);

template <>
MLORA_INLINE vf chain<float>(vf acc, __m512i lanes, const uint32_t* one) {
  return fma(_mm512_castsi512_ps(lanes), _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(*one))), acc);
}

#if MLORA_HAVE_BF16
template <>
MLORA_INLINE vf chain<bf16>(vf acc, __m512i lanes, const uint32_t* one) {
  return _mm512_dpbf16_ps(acc, (__m512bh)lanes, (__m512bh)_mm512_set1_epi32(static_cast<int>(*one)));
}
#endif

// sums[t * kLinearColumns + c] for Tokens tokens and kLinearColumns columns; rows are those columns' of the weight.
template <class T, int Tokens>
void base_tile(const uint32_t* xt, const uint32_t* const* rows, int64_t units, int64_t block, int64_t ahead,
               bool first_block, float* sums) {
  vf acc[2][Tokens];
  MLORA_UNROLL for (int t = 0; t < Tokens; ++t) acc[0][t] = acc[1][t] = zero();
  __m512i columns[2][16];
  int64_t stop = block < units ? block : units;
  for (int64_t k = 0; k < units;) {
    const int64_t count = stop - k < 16 ? stop - k : 16;
    MLORA_UNROLL for (int g = 0; g < 2; ++g) {
      for (int i = 0; i < 16; ++i) prefetch_far(rows[16 * g + i] + k + ahead);
      if (count == 16) {
        transpose<false>(rows + 16 * g, k, count, columns[g]);
      } else {
        transpose<true>(rows + 16 * g, k, count, columns[g]);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t* x = xt + (k + i) * kLinearTokens;
      MLORA_UNROLL for (int g = 0; g < 2; ++g) {
        MLORA_UNROLL for (int t = 0; t < Tokens; ++t) acc[g][t] = chain<T>(acc[g][t], columns[g][i], x + t);
      }
    }
    k += count;
    if (k == stop) {
      MLORA_UNROLL for (int g = 0; g < 2; ++g) {
        MLORA_UNROLL for (int t = 0; t < Tokens; ++t) {
          float* to = sums + t * kLinearColumns + 16 * g;
          _mm512_storeu_ps(to, first_block ? acc[g][t] : _mm512_add_ps(_mm512_loadu_ps(to), acc[g][t]));
          acc[g][t] = zero();
        }
      }
      first_block = false;
      stop = stop + block < units ? stop + block : units;
    }
  }
}

// As base_tile, for up to 16 tokens and 16 columns, with tokens in the lanes: the weight needs no transposing, but
// takes a broadcast for each dot product. It is copied 16 units at a time, a row of the next ones with each unit,
// because its lines are read 16 times and rows that lie a power of two apart would push each other out of the
// first-level cache.
// What is asked for ahead goes to the second-level cache for the same reason. With `started`, sums hold what the
// columns' sums start from, the same for every token.
template <class T>
void base_lanes(const uint32_t* xt, const uint32_t* const* rows, int64_t units, int64_t block, int64_t ahead,
                bool started, float* sums) {
  alignas(64) uint32_t copies[2][16][16];
  alignas(64) float total[16][16];
  vf acc[16];
  MLORA_UNROLL for (int c = 0; c < 16; ++c) acc[c] = zero();
  const auto copy = [&](int64_t row, int64_t k, __mmask16 mask, uint32_t (*to)[16]) {
    _mm512_store_si512(to[row], _mm512_maskz_loadu_epi32(mask, rows[row] + k));
    __builtin_prefetch(rows[row] + k + ahead, 0, 2);
  };
  for (int64_t c = 0; c < 16; ++c) copy(c, 0, static_cast<__mmask16>(first(units)), copies[0]);
  int64_t stop = block < units ? block : units;
  for (int64_t c = 0; started && c < 16; ++c) _mm512_store_ps(total[c], _mm512_set1_ps(sums[c]));
  int side = 0;
  for (int64_t k = 0; k < units; side ^= 1) {
    const int64_t count = stop - k < 16 ? stop - k : 16, next = k + count;
    const __mmask16 mask = static_cast<__mmask16>(first(units - next));
    const uint32_t(*columns)[16] = copies[side];
    int64_t i = 0;
    for (; i < count; ++i) {
      copy(i, next, mask, copies[side ^ 1]);
      const __m512i x = _mm512_load_si512(xt + (k + i) * kLinearTokens);
      MLORA_UNROLL for (int c = 0; c < 16; ++c) acc[c] = chain<T>(acc[c], x, &columns[c][i]);
    }
    for (; i < 16; ++i) copy(i, next, mask, copies[side ^ 1]);
    k = next;
    if (k == stop) {
      MLORA_UNROLL for (int c = 0; c < 16; ++c) {
        _mm512_store_ps(total[c], started ? add(_mm512_load_ps(total[c]), acc[c]) : acc[c]);
        acc[c] = zero();
      }
      started = true;
      stop = stop + block < units ? stop + block : units;
    }
  }
  const uint32_t* of[16];
  for (int c = 0; c < 16; ++c) of[c] = reinterpret_cast<const uint32_t*>(total[c]);
  transpose<false, kLinearColumns / 16>(of, 0, 16, reinterpret_cast<__m512i*>(sums));
}

// Asks for the units of the weight that the next panel is made of, line by line from each of its rows in turn, while this
// panel is computed with: asked for all at once they would be waited for.
class NextPanel {
 public:
  // `rows` and what lies `ahead` of them, `units` of it, asked for in `times` calls.
  MLORA_INLINE NextPanel(const uint32_t* const* rows, int64_t ahead, int64_t units, int64_t times)
      : rows_(rows), ahead_(ahead), lines_((units + 15) / 16 * kLinearColumns), each_((lines_ + times - 1) / times) {}

  MLORA_INLINE void ask() {
    const int64_t stop = line_ + each_ < lines_ ? line_ + each_ : lines_;
    for (; line_ < stop; ++line_) {
      __builtin_prefetch(rows_[line_ % kLinearColumns] + ahead_ + line_ / kLinearColumns * 16, 0, 2);
    }
  }

 private:
  const uint32_t* const* rows_;
  int64_t ahead_, lines_, each_, line_ = 0;
};

// As base_tile, from a panel, kLinearColumns columns of `count` units, for several tiles of tokens. The chains start from
// what `from` holds, or from zero, and go to `to`, with what `plus` holds added; both may be null.
template <class T, int Tokens>
void panel_tile(const uint32_t* xt, const __m512i* panel, int64_t count, const float* from, const float* plus, float* to,
                NextPanel& next) {
  vf acc[2][Tokens];
  MLORA_UNROLL for (int t = 0; t < Tokens; ++t) {
    MLORA_UNROLL for (int g = 0; g < 2; ++g) {
      acc[g][t] = from ? _mm512_loadu_ps(from + t * kLinearColumns + 16 * g) : zero();
    }
  }
  for (int64_t i = 0; i < count;) {
    next.ask();
    for (const int64_t stop = i + 16 < count ? i + 16 : count; i < stop; ++i, xt += kLinearTokens) {
      MLORA_UNROLL for (int t = 0; t < Tokens; ++t) {
        MLORA_UNROLL for (int g = 0; g < 2; ++g) acc[g][t] = chain<T>(acc[g][t], panel[2 * i + g], xt + t);
      }
    }
  }
  MLORA_UNROLL for (int t = 0; t < Tokens; ++t) {
    MLORA_UNROLL for (int g = 0; g < 2; ++g) {
      const int64_t at = t * kLinearColumns + 16 * g;
      _mm512_storeu_ps(to + at, plus ? add(_mm512_loadu_ps(plus + at), acc[g][t]) : acc[g][t]);
    }
  }
}

#if MLORA_HAVE_BF16

// sums[c] for one token and the columns whose weight rows are given.
template <bool Tail>
MLORA_INLINE void base_row_step(const bf16* x, const bf16* const* rows, int64_t k, int64_t left, vf* acc) {
  const Operand<bf16> xs = load_operand<bf16, Tail>(x + k, left);
  MLORA_UNROLL for (int c = 0; c < 8; ++c) {
    acc[c] = dot<bf16>(xs, load_operand<bf16, Tail>(rows[c] + k, left), acc[c]);
  }
}

inline void base_row(const bf16* x, const bf16* const* rows, int64_t in, int64_t block, float* sums) {
  constexpr int64_t step = 2 * W;
  for (int64_t start = 0; start < in; start += block) {
    const int64_t stop = start + block < in ? start + block : in;
    vf acc[8];
    MLORA_UNROLL for (int c = 0; c < 8; ++c) acc[c] = zero();
    int64_t k = start;
    for (; k + step <= stop; k += step) {
      MLORA_UNROLL for (int c = 0; c < 8; ++c) prefetch_far(rows[c] + k + kLinearColumns * in);
      base_row_step<false>(x, rows, k, step, acc);
    }
    if (k < stop) base_row_step<true>(x, rows, k, stop - k, acc);
    MLORA_UNROLL for (int c = 0; c < 8; ++c) sums[c] = start == 0 ? reduce(acc[c]) : sums[c] + reduce(acc[c]);
  }
}

#endif

template <class T>
constexpr bool kRowChains = sizeof(T) == 2;  // a single token is base_row's

template <class T>
void pack_blocks(const Problem& p, uint32_t* xt, int64_t from, int64_t to) {
  if (p.tokens == 1 && kRowChains<T>) return;
  const int64_t units = p.in / kUnit<T>, groups = (units + 15) / 16, last = p.tokens - 1;
  while (from < to) {
    const int64_t tile = from / groups, stop = (tile + 1) * groups < to ? (tile + 1) * groups : to;
    const uint32_t* rows[16];
    for (int64_t i = 0; i < 16; ++i) {
      const int64_t t = tile * kLinearTokens + i < last ? tile * kLinearTokens + i : last;
      rows[i] = reinterpret_cast<const uint32_t*>(static_cast<const T*>(p.x) + t * p.x_stride);
    }
    uint32_t* tokens = xt + tile * units * kLinearTokens;
    for (int64_t k = from % groups * 16; from < stop; ++from, k += 16) {
      if (k + 16 <= units) {
        transpose<false>(rows, k, 16, reinterpret_cast<__m512i*>(tokens + k * 16));
        continue;
      }
      __m512i columns[16];
      transpose<true>(rows, k, units - k, columns);
      for (int64_t i = 0; k + i < units; ++i) _mm512_storeu_si512(tokens + (k + i) * 16, columns[i]);
    }
  }
}

// The base product of columns [n, n + kLinearColumns), all tokens; with `started`, added to what sums hold.
template <class T>
MLORA_INLINE void base(const Problem& p, const uint32_t* xt, int64_t n, uint32_t* memory, bool started, float* sums) {
  __m512i* panel = reinterpret_cast<__m512i*>(memory);
  const T* rows[kLinearColumns];
  for (int64_t c = 0; c < kLinearColumns; ++c) {
    rows[c] = static_cast<const T*>(p.weight) + (n + c < p.out ? n + c : p.out - 1) * p.in;
  }
#if MLORA_HAVE_BF16
  if constexpr (kRowChains<T>) {
    if (p.tokens == 1) {
      for (int64_t c = 0; c < kLinearColumns; c += 8) {
        base_row(static_cast<const T*>(p.x), rows + c, p.in, p.kblock, sums + c);
      }
      return;
    }
  }
#endif
  const uint32_t* unit_rows[kLinearColumns];
  for (int64_t c = 0; c < kLinearColumns; ++c) unit_rows[c] = reinterpret_cast<const uint32_t*>(rows[c]);
  const int64_t units = p.in / kUnit<T>, block = p.kblock / kUnit<T>;
  constexpr int64_t half = kLinearTokens / 2;  // two groups of columns by so many tokens fit the registers
  if (p.tokens <= half) {
    with_tokens(p.tokens, [&](auto tokens) {
      base_tile<T, tokens>(xt, unit_rows, units, block, kLinearColumns * units, !started, sums);
    });
    return;
  }
  if (p.tokens <= kLinearTokens) {
    for (int64_t g = 0; g < kLinearColumns; g += 16) {
      base_lanes<T>(xt, unit_rows + g, units, block, 16 * units, started, sums + g);
    }
    return;
  }
  float* chains = sums + (p.tokens + kLinearTokens - 1) / kLinearTokens * kLinearTokens * kLinearColumns;
  const int64_t most = panel_units(p.tokens);
  for (int64_t k = 0; k < units;) {
    const int64_t first = k / block * block, stop = first + block < units ? first + block : units;
    const int64_t count = stop - k < most ? stop - k : most;
    for (int64_t i = 0; i < count; i += 16) {
      MLORA_UNROLL for (int g = 0; g < 2; ++g) {
        const uint32_t* const* of = unit_rows + 16 * g;
        if (count - i >= 16) {
          transpose<false, 2>(of, k + i, 16, panel + 2 * i + g);
        } else {
          transpose<true, 2>(of, k + i, count - i, panel + 2 * i + g);
        }
      }
    }
    const bool goes_on = k > first, ends = k + count == stop;
    const int64_t after = k + count < units ? k + count : kLinearColumns * units, wanted = units - k - count;
    NextPanel next(unit_rows, after, 0 < wanted && wanted < most ? wanted : most,
                   (p.tokens + half - 1) / half * ((count + 15) / 16));
    for (int64_t t = 0; t < p.tokens; t += half) {
      const uint32_t* x = xt + t / kLinearTokens * kLinearTokens * units + k * kLinearTokens + t % kLinearTokens;
      float* own = chains + t * kLinearColumns;
      float* total = sums + t * kLinearColumns;
      with_tokens(p.tokens - t, [&](auto tokens) {
        panel_tile<T, tokens>(x, panel, count, goes_on ? own : nullptr, ends && (first || started) ? total : nullptr,
                              ends ? total : own, next);
      });
    }
    k += count;
  }
}

}  // namespace
}  // namespace MLORA_ISA
}  // namespace mlora

#endif
