// merge: a recipe folded into a weight in one pass over it, with one rounding. Every element is a chain over a term's
// rank rows in order, in fp32, then one multiply-add a term and one onto the weight, whatever the tile. A whole matrix is
// one multiply-add onto the weight.
// T is the type of the weight, P that of the arena, in whose terms functions without a T are.
//
// Read where they lie, the rank rows of A are as many pages, which neither the first-level cache (pieces of a column
// share its sets) nor the TLB holds: both factors are packed first, A for all rows of the weight, B for some hundred of them.
#pragma once

#include "vec.h"

namespace mlora {
namespace MLORA_ISA {
namespace {

constexpr int kMergePairs = MLORA_HAVE_AVX512 ? 2 : 1;
constexpr int64_t kTileColumns = 2 * W * kMergePairs;
static_assert(kMergeBlock % kMergeRows == 0 && kMergeColumns % kTileColumns == 0, "tiles fill blocks");

// A step of the chains: kRanks rank rows of A, packed for 2 * W columns, times as many of B, packed for one row of the
// weight in 32 bits. Where it takes one rank row, B carries the term's scale; where it takes pairs of bf16, whose
// products are exact, the scale comes after the chain.
template <class T>
struct Step {
  static constexpr int kRanks = 1;

  template <bool Tail>
  static MLORA_INLINE Pair pack(const T* a, const T*, int64_t left) {
    return load<Tail>(a, left);
  }
  static MLORA_INLINE float pack(T b, T, float scale) { return scale * widen(b); }
  static MLORA_INLINE Pair add(Pair a, float b, Pair acc) {
    const vf all = set1(b);
    return {fma(all, a.a, acc.a), fma(all, a.b, acc.b)};
  }
};

#if MLORA_HAVE_BF16

template <>
struct Step<bf16> {
  static constexpr int kRanks = 2;

  // The lane order of load<bf16>: even columns, then odd ones.
  template <bool Tail>
  static MLORA_INLINE Pair pack(const bf16* a0, const bf16* a1, int64_t left) {
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    const uint32_t m = Tail ? first(left) : ~0u;
    const __m512i low = _mm512_maskz_loadu_epi16(m, a0), next = _mm512_maskz_loadu_epi16(a1 ? m : 0, a1 ? a1 : a0);
    return {_mm512_castsi512_ps(_mm512_or_si512(_mm512_andnot_si512(high, low), _mm512_slli_epi32(next, 16))),
            _mm512_castsi512_ps(_mm512_or_si512(_mm512_srli_epi32(low, 16), _mm512_and_si512(high, next)))};
  }
  static MLORA_INLINE float pack(bf16 b0, bf16 b1, float) {
    return from_bits(static_cast<uint32_t>(b1.bits) << 16 | b0.bits);
  }
  static MLORA_INLINE Pair add(Pair a, float b, Pair acc) {
    const __m512bh all = (__m512bh)set1(b);
    return {_mm512_dpbf16_ps(acc.a, (__m512bh)a.a, all), _mm512_dpbf16_ps(acc.b, (__m512bh)a.b, all)};
  }
};

#endif

// 1 + the in-gains of 2 * W columns.
template <class P, bool Tail>
MLORA_INLINE Pair column_factors(const Segment& s, int64_t k, int64_t left) {
  Pair factor = {set1(1.0f), set1(1.0f)};
  for (int32_t e = 0; s.has_in_gain && e < s.term_count; ++e) {
    if (!s.terms[e].in_gain) continue;
    const Pair u = load<Tail>(static_cast<const P*>(s.terms[e].in_gain) + k, left);
    const vf weight = set1(s.terms[e].weight);
    factor = {fma(weight, u.a, factor.a), fma(weight, u.b, factor.b)};
  }
  return factor;
}

MLORA_INLINE bool is_whole(const Term& term) { return term.rank && !(term.a && term.b); }

// Columns [m, m + 2 * W) of row n of a whole matrix: a piece of A, or where A is the identity, one across the rows of B.
template <class P, bool Tail>
MLORA_INLINE Pair whole_columns(const MergeProblem& p, const Term& term, int64_t n, int64_t m, int64_t left) {
  if (term.a) return load<Tail>(static_cast<const P*>(term.a) + n * p.in + m, left);
  P across[2 * W] = {};
  const int64_t count = Tail && left < 2 * W ? left : 2 * W;
  for (int64_t i = 0; i < count; ++i) across[i] = static_cast<const P*>(term.b)[(m + i) * p.out + n];
  return load<false>(across, 2 * W);
}

// Rows [n, n + rows) of at most kMergeRows, columns [k, k + kTileColumns), of which `left` are there with `Tail`.
//   a: packed, [steps, kTileColumns].
//   b: packed, [steps, kMergeBlock], from row n on, and after it the rows' gains.
template <class T, class P, bool Tail>
MLORA_INLINE void merge_tile(const MergeProblem& p, const Segment& s, const float* a, const float* b, int64_t n,
                             int64_t rows, int64_t k, int64_t left) {
  constexpr int64_t step = 2 * W;
  constexpr bool kScaleLast = Step<P>::kRanks > 1;
  Pair acc[kMergeRows][kMergePairs], sums[kMergeRows][kMergePairs];
  MLORA_UNROLL for (int r = 0; r < kMergeRows; ++r) {
    MLORA_UNROLL for (int i = 0; i < kMergePairs; ++i) acc[r][i] = {zero(), zero()};
  }
  bool summed = false;
  for (int32_t e = 0; e < s.term_count; ++e) {
    const Term& term = s.terms[e];
    if (kScaleLast && e && term.scale != s.terms[e - 1].scale) {
      const vf scale = set1(s.terms[e - 1].scale);
      MLORA_UNROLL for (int r = 0; r < kMergeRows; ++r) {
        MLORA_UNROLL for (int i = 0; i < kMergePairs; ++i) {
          const Pair old = summed ? sums[r][i] : Pair{zero(), zero()};
          sums[r][i] = {fma(scale, acc[r][i].a, old.a), fma(scale, acc[r][i].b, old.b)};
          acc[r][i] = {zero(), zero()};
        }
      }
      summed = true;
    }
    if (is_whole(term)) continue;
    for (int64_t j = 0; j < term.rank; j += Step<P>::kRanks, a += kTileColumns, b += kMergeBlock) {
      Pair as[kMergePairs];
      MLORA_UNROLL for (int i = 0; i < kMergePairs; ++i) as[i] = load<false>(a + i * step, step);
      MLORA_UNROLL for (int r = 0; r < kMergeRows; ++r) {
        MLORA_UNROLL for (int i = 0; i < kMergePairs; ++i) acc[r][i] = Step<P>::add(as[i], b[r], acc[r][i]);
      }
    }
  }
  const bool gains = s.has_gain || s.has_in_gain;
  const vf scale = set1(kScaleLast && s.term_count ? s.terms[s.term_count - 1].scale : 1.0f);
  MLORA_UNROLL for (int i = 0; i < kMergePairs; ++i) {
    const int64_t m = k + i * step, there = left - i * step;
    const Pair columns = column_factors<P, Tail>(s, m, there);
    MLORA_UNROLL for (int r = 0; r < kMergeRows; ++r) {
      if (r >= rows) continue;
      const int64_t at = (n + r) * p.in + m;
      Pair w = load<Tail>(static_cast<const T*>(p.source) + at, there);
      if (gains) {
        const vf gain = set1(b[r]);
        w = {fma(w.a, add(columns.a, gain), zero()), fma(w.b, add(columns.b, gain), zero())};
      }
      if (summed) w = {add(w.a, sums[r][i].a), add(w.b, sums[r][i].b)};
      w = {fma(scale, acc[r][i].a, w.a), fma(scale, acc[r][i].b, w.b)};
      for (int32_t e = 0; s.both_ranks < s.ranks && e < s.term_count; ++e) {
        if (!is_whole(s.terms[e])) continue;
        const vf all = set1(s.terms[e].scale);
        const Pair d = whole_columns<P, Tail>(p, s.terms[e], n + r, m, there);
        w = {fma(all, d.a, w.a), fma(all, d.b, w.b)};
      }
      T* to = static_cast<T*>(p.weight) + at;
      if (!Tail && p.stream) {
        stream(to, w);
      } else {
        store<Tail>(to, w, there);
      }
    }
  }
}

// Columns [k, k + kTileColumns) of every A; returns where the packed ones end. Those that are not there are zeros.
template <class P, bool Tail>
MLORA_INLINE float* pack_columns(const MergeProblem& p, const Segment& s, int64_t k, int64_t left, float* to) {
  for (int32_t e = 0; e < s.term_count; ++e) {
    if (is_whole(s.terms[e])) continue;
    const P* a = static_cast<const P*>(s.terms[e].a) + k;
    for (int64_t j = 0; j < s.terms[e].rank; j += Step<P>::kRanks, a += Step<P>::kRanks * p.in) {
      const P* next = j + 1 < s.terms[e].rank ? a + p.in : nullptr;
      for (int64_t m = 0; m < kTileColumns; m += 2 * W, to += 2 * W) {
        store<false>(to, Step<P>::template pack<Tail>(a + m, next ? next + m : nullptr, left - m), 2 * W);
      }
    }
  }
  return to;
}

// Rows [n, n + rows) of every B, [steps, kMergeBlock], then their gains.
template <class P>
MLORA_INLINE void pack_rows(const MergeProblem& p, const Segment& s, int64_t n, int64_t rows, float* to) {
  float gains[kMergeBlock] = {};
  for (int32_t e = 0; e < s.term_count; ++e) {
    const Term& term = s.terms[e];
    const P* b = static_cast<const P*>(term.b) + n;
    for (int64_t j = 0; !is_whole(term) && j < term.rank; j += Step<P>::kRanks, b += Step<P>::kRanks * p.out, to += kMergeBlock) {
      const P* next = j + 1 < term.rank ? b + p.out : nullptr;
      for (int64_t r = 0; r < rows; ++r) to[r] = Step<P>::pack(b[r], next ? next[r] : P{}, term.scale);
    }
    if (!term.gain) continue;
    const P* gain = static_cast<const P*>(term.gain) + n;
    for (int64_t r = 0; r < rows; ++r) gains[r] += term.weight * widen(gain[r]);
  }
  for (int64_t r = 0; r < rows; ++r) to[r] = gains[r];
}

template <class T, class P>
void merge(const MergeProblem& p, const Segment& s, int64_t from, int64_t to, float* scratch) {
  using Weight = typename Beside<T, P>::type;
  int64_t steps = 0;
  for (int32_t e = 0; e < s.term_count; ++e) {
    if (!is_whole(s.terms[e])) steps += (s.terms[e].rank + Step<P>::kRanks - 1) / Step<P>::kRanks;
  }
  const int64_t columns = merge_columns(p.in, s.both_ranks);
  float *const a = scratch, *const b = scratch + columns * steps;
  for (int64_t k0 = 0; k0 < p.in; k0 += columns) {
    const int64_t end = k0 + columns < p.in ? k0 + columns : p.in;
    const int64_t whole = k0 + (end - k0) / kTileColumns * kTileColumns;
    float* packed = a;
    for (int64_t k = k0; k < whole; k += kTileColumns) packed = pack_columns<P, false>(p, s, k, kTileColumns, packed);
    if (whole < end) pack_columns<P, true>(p, s, whole, end - whole, packed);
    for (int64_t n0 = from; n0 < to; n0 += kMergeBlock) {
      const int64_t last = n0 + kMergeBlock < to ? n0 + kMergeBlock : to;
      pack_rows<P>(p, s, n0, last - n0, b);
      for (int64_t n = n0; n < last; n += kMergeRows) {
        const int64_t rows = last - n < kMergeRows ? last - n : kMergeRows;
        const float *ak = a, *bn = b + (n - n0);
        for (int64_t k = k0; k < whole; k += kTileColumns, ak += kTileColumns * steps) {
          merge_tile<Weight, P, false>(p, s, ak, bn, n, rows, k, kTileColumns);
        }
        if (whole < end) merge_tile<Weight, P, true>(p, s, ak, bn, n, rows, whole, end - whole);
      }
    }
  }
  if (p.stream) fence();
}

}  // namespace
}  // namespace MLORA_ISA
}  // namespace mlora
