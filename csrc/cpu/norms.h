// Norms of the rows of W + s B A, which is never written. An element is one chain over the rank rows in order, onto W's;
// a row's squares are chains over vectors of columns, whatever the tile.
#pragma once

#include "vec.h"

namespace mlora {
namespace MLORA_ISA {
namespace {

constexpr int kNormPairs = MLORA_HAVE_AVX512 ? 2 : 1;  // of a tile's columns

// Adds to `sums` the squares of Rows rows from `row` on, in Pairs pairs of columns from n on, of which `left` are there
// with Tail. factors: s B, [rank, kNormRows].
template <class T, int Rows, int Pairs, bool Tail>
MLORA_INLINE void norm_tile(const RowNorms& p, const float* factors, int64_t row, int64_t n, int64_t left, Pair* sums) {
  constexpr int64_t step = 2 * W;
  Pair acc[Rows][Pairs];
  MLORA_UNROLL for (int r = 0; r < Rows; ++r) {
    const T* w = static_cast<const T*>(p.weight) + (row + r) * p.stride + n;
    MLORA_UNROLL for (int i = 0; i < Pairs; ++i) acc[r][i] = load<Tail>(w + i * step, left - i * step);
  }
  const float* a = p.a + n;
  for (int64_t j = 0; j < p.rank; ++j, a += p.in, factors += kNormRows) {
    Pair as[Pairs];
    MLORA_UNROLL for (int i = 0; i < Pairs; ++i) as[i] = load<Tail>(a + i * step, left - i * step);
    MLORA_UNROLL for (int r = 0; r < Rows; ++r) {
      const vf factor = set1(factors[r]);
      MLORA_UNROLL for (int i = 0; i < Pairs; ++i) {
        acc[r][i].a = fma(factor, as[i].a, acc[r][i].a);
        acc[r][i].b = fma(factor, as[i].b, acc[r][i].b);
      }
    }
  }
  MLORA_UNROLL for (int r = 0; r < Rows; ++r) {
    MLORA_UNROLL for (int i = 0; i < Pairs; ++i) {
      sums[r].a = fma(acc[r][i].a, acc[r][i].a, sums[r].a);
      sums[r].b = fma(acc[r][i].b, acc[r][i].b, sums[r].b);
    }
  }
}

template <class T, int Rows>
__attribute__((noinline)) void norm_rows(const RowNorms& p, const float* factors, int64_t row) {
  constexpr int64_t step = 2 * W;
  Pair sums[Rows];
  MLORA_UNROLL for (int r = 0; r < Rows; ++r) sums[r] = {zero(), zero()};
  int64_t n = 0;
  for (; n + kNormPairs * step <= p.in; n += kNormPairs * step) {
    norm_tile<T, Rows, kNormPairs, false>(p, factors, row, n, kNormPairs * step, sums);
  }
  for (; n + step <= p.in; n += step) norm_tile<T, Rows, 1, false>(p, factors, row, n, step, sums);
  if (n < p.in) norm_tile<T, Rows, 1, true>(p, factors, row, n, p.in - n, sums);
  for (int r = 0; r < Rows; ++r) p.to[row + r] = __builtin_sqrtf(reduce(add(sums[r].a, sums[r].b)));
}

template <class T>
void row_norms(const RowNorms& p, int64_t from, int64_t to, float* factors) {
  for (int64_t row = from; row < to; row += kNormRows) {
    const int64_t rows = to - row < kNormRows ? to - row : kNormRows;
    for (int64_t r = 0; r < rows; ++r) {
      const float* b = p.b + (row + r) * p.b_row;
      for (int64_t j = 0; j < p.rank; ++j) factors[j * kNormRows + r] = p.scale * b[j * p.b_rank];
    }
    if (rows == kNormRows) {
      norm_rows<T, kNormRows>(p, factors, row);
    } else {
      for (int64_t r = 0; r < rows; ++r) norm_rows<T, 1>(p, factors + r, row + r);
    }
  }
}

}  // namespace
}  // namespace MLORA_ISA
}  // namespace mlora
