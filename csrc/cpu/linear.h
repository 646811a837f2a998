// linear: the base matmul on the weights as they lie, with the delta added before the one rounding.
//
// Lanes are output columns. Each output is one chain of dot-product instructions over pairs of k in order, starting
// from zero at every multiple of kblock; the blocks' sums are added in order. That is what oneDNN does for bf16 on
// avx512_core_bf16, so base rows come out with the library's bits when kblock is the library's. For a single token it
// keeps 16 such chains an output, one a lane, and adds the lanes in a tree: so does base_row.
#pragma once

#include "apply.h"

#if MLORA_HAVE_BF16

namespace mlora {
namespace MLORA_ISA {
namespace {

// 16 x 16 transpose of pairs: to[k][n] = rows[n][k] for k < count.
template <bool Tail>
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
    to[c] = _mm512_shuffle_i32x4(lo01, lo23, 0x88);
    to[8 + c] = _mm512_shuffle_i32x4(lo01, lo23, 0xdd);
    to[4 + c] = _mm512_shuffle_i32x4(hi01, hi23, 0x88);
    to[12 + c] = _mm512_shuffle_i32x4(hi01, hi23, 0xdd);
  }
}

// sums[t * kLinearColumns + c] for Tokens tokens and 16 * Groups columns; rows are those columns' rows of the weight.
template <int Tokens, int Groups>
void base_tile(const uint32_t* xt, const uint32_t* const* rows, int64_t pairs, int64_t block, int64_t ahead,
               float* sums) {
  vf acc[Groups][Tokens];
  MLORA_UNROLL for (int g = 0; g < Groups; ++g) {
    MLORA_UNROLL for (int t = 0; t < Tokens; ++t) acc[g][t] = zero();
  }
  __m512i columns[Groups][16];
  int64_t stop = block < pairs ? block : pairs;
  bool first_block = true;
  for (int64_t k = 0; k < pairs;) {
    const int64_t count = stop - k < 16 ? stop - k : 16;
    MLORA_UNROLL for (int g = 0; g < Groups; ++g) {
      for (int i = 0; i < 16; ++i) __builtin_prefetch(rows[16 * g + i] + k + ahead);
      if (count == 16) {
        transpose<false>(rows + 16 * g, k, count, columns[g]);
      } else {
        transpose<true>(rows + 16 * g, k, count, columns[g]);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t* x = xt + (k + i) * kLinearTokens;
      MLORA_UNROLL for (int g = 0; g < Groups; ++g) {
        const __m512bh w = (__m512bh)columns[g][i];
        MLORA_UNROLL for (int t = 0; t < Tokens; ++t) {
          acc[g][t] = _mm512_dpbf16_ps(acc[g][t], w, (__m512bh)_mm512_set1_epi32(static_cast<int>(x[t])));
        }
      }
    }
    k += count;
    if (k == stop) {
      MLORA_UNROLL for (int g = 0; g < Groups; ++g) {
        MLORA_UNROLL for (int t = 0; t < Tokens; ++t) {
          float* to = sums + t * kLinearColumns + 16 * g;
          _mm512_storeu_ps(to, first_block ? acc[g][t] : _mm512_add_ps(_mm512_loadu_ps(to), acc[g][t]));
          acc[g][t] = zero();
        }
      }
      first_block = false;
      stop = stop + block < pairs ? stop + block : pairs;
    }
  }
}

template <int Tokens>
MLORA_INLINE void base_columns(const uint32_t* xt, const uint32_t* const* rows, int64_t pairs, int64_t block,
                               int64_t ahead, float* sums) {
  if (Tokens <= 8) {
    base_tile<Tokens, 2>(xt, rows, pairs, block, ahead, sums);
  } else {
    base_tile<Tokens, 1>(xt, rows, pairs, block, ahead, sums);
    base_tile<Tokens, 1>(xt, rows + 16, pairs, block, ahead, sums + 16);
  }
}

// sums[c] for one token and the columns whose weight rows are given.
template <bool Tail>
MLORA_INLINE void base_row_step(const bf16* x, const bf16* const* rows, int64_t k, int64_t left, vf* acc) {
  const Operand<bf16> xs = load_operand<bf16, Tail>(x + k, left);
  MLORA_UNROLL for (int c = 0; c < 8; ++c) {
    acc[c] = dot<bf16>(xs, load_operand<bf16, Tail>(rows[c] + k, left), acc[c]);
  }
}

constexpr int64_t kRowAhead = 1024;  // elements of a weight row: covers the latency of memory

inline void base_row(const bf16* x, const bf16* const* rows, int64_t in, int64_t block, float* sums) {
  constexpr int64_t step = 2 * W;
  for (int64_t start = 0; start < in; start += block) {
    const int64_t stop = start + block < in ? start + block : in;
    vf acc[8];
    MLORA_UNROLL for (int c = 0; c < 8; ++c) acc[c] = zero();
    int64_t k = start;
    for (; k + step <= stop; k += step) {
      MLORA_UNROLL for (int c = 0; c < 8; ++c) __builtin_prefetch(rows[c] + k + kRowAhead);
      base_row_step<false>(x, rows, k, step, acc);
    }
    if (k < stop) base_row_step<true>(x, rows, k, stop - k, acc);
    MLORA_UNROLL for (int c = 0; c < 8; ++c) sums[c] = start == 0 ? reduce(acc[c]) : sums[c] + reduce(acc[c]);
  }
}

void pack(const Problem& p, uint32_t* xt) {
  if (p.tokens == 1) return;
  const int64_t pairs = p.in / 2;
  for (int64_t t0 = 0; t0 < p.tokens; t0 += kLinearTokens, xt += pairs * kLinearTokens) {
    const uint32_t* rows[16];
    const int64_t last = p.tokens - 1;
    for (int64_t i = 0; i < 16; ++i) {
      const int64_t t = t0 + i < last ? t0 + i : last;
      rows[i] = reinterpret_cast<const uint32_t*>(static_cast<const bf16*>(p.x) + t * p.x_stride);
    }
    int64_t k = 0;
    for (; k + 16 <= pairs; k += 16) transpose<false>(rows, k, 16, reinterpret_cast<__m512i*>(xt + k * 16));
    if (k < pairs) {
      __m512i columns[16];
      transpose<true>(rows, k, pairs - k, columns);
      for (int64_t i = 0; k + i < pairs; ++i) _mm512_storeu_si512(xt + (k + i) * 16, columns[i]);
    }
  }
}

void linear(const Problem& p, const uint32_t* xt, const Segment* segments, int64_t segment_count, float* sums,
            int64_t from, int64_t to) {
  const int64_t pairs = p.in / 2, block = p.kblock / 2;
  const bf16* bias = static_cast<const bf16*>(p.bias);
  for (int64_t n = from; n < to; n += kLinearColumns) {
    const int64_t end = n + kLinearColumns < to ? n + kLinearColumns : to;
    const bf16* rows[kLinearColumns];
    const uint32_t* pair_rows[kLinearColumns];
    for (int64_t c = 0; c < kLinearColumns; ++c) {
      rows[c] = static_cast<const bf16*>(p.weight) + (n + c < p.out ? n + c : p.out - 1) * p.in;
      pair_rows[c] = reinterpret_cast<const uint32_t*>(rows[c]);
    }
    const int64_t ahead = kLinearColumns * pairs;
    if (p.tokens == 1) {
      for (int64_t c = 0; c < kLinearColumns; c += 8) {
        base_row(static_cast<const bf16*>(p.x), rows + c, p.in, p.kblock, sums + c);
      }
    }
    for (int64_t t = 0; t < p.tokens && p.tokens > 1; t += kLinearTokens) {
      const uint32_t* x = xt + t * pairs;
      float* y = sums + t * kLinearColumns;
      switch (p.tokens - t < kLinearTokens ? p.tokens - t : kLinearTokens) {
#define MLORA_CASE(count) \
  case count: \
    base_columns<count>(x, pair_rows, pairs, block, ahead, y); \
    break;
        MLORA_CASE(1) MLORA_CASE(2) MLORA_CASE(3) MLORA_CASE(4) MLORA_CASE(5) MLORA_CASE(6) MLORA_CASE(7)
        MLORA_CASE(8) MLORA_CASE(9) MLORA_CASE(10) MLORA_CASE(11) MLORA_CASE(12) MLORA_CASE(13) MLORA_CASE(14)
        MLORA_CASE(15) MLORA_CASE(16)
#undef MLORA_CASE
      }
    }
    if (bias) {
      float wide[kLinearColumns] = {};
      for (int64_t c = n; c < end; ++c) {
        const uint32_t bits = static_cast<uint32_t>(bias[c].bits) << 16;
        __builtin_memcpy(wide + (c - n), &bits, 4);
      }
      for (int64_t t = 0; t < p.tokens; ++t) {
        float* y = sums + t * kLinearColumns;
        for (int64_t c = 0; c < kLinearColumns; c += W) {
          _mm512_storeu_ps(y + c, _mm512_add_ps(_mm512_loadu_ps(y + c), _mm512_loadu_ps(wide + c)));
        }
      }
    }
    const Rows<bf16, float> io{sums - n, kLinearColumns, nullptr, 0, static_cast<bf16*>(p.y), p.y_stride};
    for (int64_t s = 0; s < segment_count; ++s) expand_rows(io, segments[s], p.out, n, end, 2 * kLinearColumns, nullptr);
  }
}

}  // namespace
}  // namespace MLORA_ISA
}  // namespace mlora

#endif
