// merge: a recipe folded into a weight in one pass over it, with one rounding. Every element is one chain over the
// terms' rank rows in order, then one fused multiply-add onto the weight, whatever the tile.
#pragma once

#include "vec.h"

namespace mlora {
namespace MLORA_ISA {
namespace {

constexpr int kMergeRows = kMergeCoefficients;
constexpr int kMergePairs = MLORA_HAVE_AVX512 ? 2 : 1;

// 1 + the in-gains of 2 * W columns.
template <class T, bool Tail>
MLORA_INLINE Pair column_factors(const Segment& s, int64_t k, int64_t left) {
  Pair factor = {set1(1.0f), set1(1.0f)};
  for (int32_t e = 0; s.has_in_gain && e < s.term_count; ++e) {
    if (!s.terms[e].in_gain) continue;
    const Pair u = load<Tail>(static_cast<const T*>(s.terms[e].in_gain) + k, left);
    const vf weight = set1(s.terms[e].weight);
    factor = {fma(weight, u.a, factor.a), fma(weight, u.b, factor.b)};
  }
  return factor;
}

// Rows [n, n + Rows), columns [k, k + 2 * W * Pairs). `v` holds Rows coefficients for each rank row, and after them
// each row's gain.
template <class T, int Rows, int Pairs, bool Tail>
MLORA_INLINE void merge_tile(const MergeProblem& p, const Segment& s, const float* v, int64_t n, int64_t k,
                             int64_t left) {
  constexpr int64_t step = 2 * W;
  Pair acc[Rows][Pairs];
  MLORA_UNROLL for (int r = 0; r < Rows; ++r) {
    MLORA_UNROLL for (int i = 0; i < Pairs; ++i) acc[r][i] = {zero(), zero()};
  }
  for (int32_t e = 0; e < s.term_count; ++e) {
    const T* a = static_cast<const T*>(s.terms[e].a) + k;
    for (int64_t j = 0; j < s.terms[e].rank; ++j, a += p.in, v += Rows) {
      Pair as[Pairs];
      MLORA_UNROLL for (int i = 0; i < Pairs; ++i) as[i] = load<Tail>(a + i * step, left);
      MLORA_UNROLL for (int r = 0; r < Rows; ++r) {
        const vf weight = set1(v[r]);
        MLORA_UNROLL for (int i = 0; i < Pairs; ++i) {
          acc[r][i] = {fma(weight, as[i].a, acc[r][i].a), fma(weight, as[i].b, acc[r][i].b)};
        }
      }
    }
  }
  MLORA_UNROLL for (int i = 0; i < Pairs; ++i) {
    const int64_t m = k + i * step;
    const Pair columns = column_factors<T, Tail>(s, m, left);
    MLORA_UNROLL for (int r = 0; r < Rows; ++r) {
      const int64_t at = (n + r) * p.in + m;
      const Pair w = load<Tail>(static_cast<const T*>(p.source) + at, left);
      const vf gain = set1(v[r]);
      const Pair sum = {fma(w.a, add(columns.a, gain), acc[r][i].a), fma(w.b, add(columns.b, gain), acc[r][i].b)};
      store<Tail>(static_cast<T*>(p.weight) + at, sum, left);
    }
  }
}

// v[j][r] = scale * B[j][n + r] for every rank row, then the rows' gains.
template <class T, int Rows>
MLORA_INLINE void coefficients(const MergeProblem& p, const Segment& s, int64_t n, float* v) {
  float gains[Rows] = {};
  for (int32_t e = 0; e < s.term_count; ++e) {
    const Term& term = s.terms[e];
    const T* b = static_cast<const T*>(term.b) + n;
    for (int64_t j = 0; j < term.rank; ++j, b += p.out) {
      for (int r = 0; r < Rows; ++r) *v++ = term.scale * widen(b[r]);
    }
    if (!term.gain) continue;
    const T* gain = static_cast<const T*>(term.gain) + n;
    for (int r = 0; r < Rows; ++r) gains[r] += term.weight * widen(gain[r]);
  }
  for (int r = 0; r < Rows; ++r) *v++ = gains[r];
}

template <class T, int Rows>
MLORA_INLINE void merge_rows(const MergeProblem& p, const Segment& s, int64_t n, int64_t from, int64_t to, float* v) {
  constexpr int64_t step = 2 * W;
  coefficients<T, Rows>(p, s, n, v);
  int64_t k = from;
  for (; k + kMergePairs * step <= to; k += kMergePairs * step) {
    merge_tile<T, Rows, kMergePairs, false>(p, s, v, n, k, step);
  }
  for (; k + step <= to; k += step) merge_tile<T, Rows, 1, false>(p, s, v, n, k, step);
  if (k < to) merge_tile<T, Rows, 1, true>(p, s, v, n, k, to - k);
}

template <class T>
void merge(const MergeProblem& p, const Segment& s, int64_t from, int64_t to, float* v) {
  // As many columns at a time as leave their part of every A in the second-level cache for all rows.
  constexpr int64_t kCached = 1 << 18;
  const int64_t fit = kCached / static_cast<int64_t>(sizeof(T)) / (s.ranks + 1) / 256 * 256;
  const int64_t columns = fit < 256 ? 256 : fit;
  for (int64_t k = 0; k < p.in; k += columns) {
    const int64_t end = k + columns < p.in ? k + columns : p.in;
    int64_t n = from;
    for (; n + kMergeRows <= to; n += kMergeRows) merge_rows<T, kMergeRows>(p, s, n, k, end, v);
    for (; n < to; ++n) merge_rows<T, 1>(p, s, n, k, end, v);
  }
}

}  // namespace
}  // namespace MLORA_ISA
}  // namespace mlora
