// The sums over tokens that are the gradients of rank rows, and of gains and shifts. Every element is one chain over at most kSegmentTokens
// tokens of a segment, and the segments' sums are added in order, whatever the tile: an adapter's gradient does not
// depend on what else is in the batch, nor on the number of threads.
#pragma once

#include "vec.h"

namespace mlora {
namespace MLORA_ISA {
namespace {

// A Pair of elements as T's are loaded, in the order of memory.
template <class T>
struct InOrder {
  static MLORA_INLINE Pair of(Pair v) { return v; }
};

#if MLORA_HAVE_AVX512
template <>
struct InOrder<bf16> {
  static MLORA_INLINE Pair of(Pair v) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    return {_mm512_permutex2var_ps(v.a, low, v.b), _mm512_permutex2var_ps(v.a, high, v.b)};
  }
};
#elif MLORA_HAVE_AVX2
template <>
struct InOrder<bf16> {
  static MLORA_INLINE Pair of(Pair v) {
    const vf low = _mm256_unpacklo_ps(v.a, v.b), high = _mm256_unpackhi_ps(v.a, v.b);
    return {_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
  }
};
#endif

constexpr int kGradientRanks = MLORA_HAVE_AVX512 ? 8 : 4;  // rank rows of a tile, each of a Pair of columns

// to[j, n] = sum_t v[t, j] * rows[t][n] for Ranks rank rows and a Pair of columns, or `left` if Tail; or it is added.
template <class T, int Ranks, bool Tail>
MLORA_INLINE void gradient_tile(const T* const* rows, const float* v, int64_t ranks, int32_t count, float* to,
                                int64_t width, int64_t n, int64_t left, bool add_to) {
  Pair acc[Ranks];
  MLORA_UNROLL for (int j = 0; j < Ranks; ++j) acc[j] = {zero(), zero()};
  for (int32_t t = 0; t < count; ++t, v += ranks) {
    const Pair row = load<Tail>(rows[t] + n, left);
    MLORA_UNROLL for (int j = 0; j < Ranks; ++j) {
      const vf weight = set1(v[j]);
      acc[j].a = fma(weight, row.a, acc[j].a);
      acc[j].b = fma(weight, row.b, acc[j].b);
    }
  }
  MLORA_UNROLL for (int j = 0; j < Ranks; ++j) {
    Pair sum = InOrder<T>::of(acc[j]);
    float* at = to + j * width + n;
    if (add_to) {
      const Pair before = load<Tail>(at, left);
      sum = {add(before.a, sum.a), add(before.b, sum.b)};
    }
    store<Tail>(at, sum, left);
  }
}

template <class T, int Ranks>
__attribute__((noinline)) void gradient_columns(const T* const* rows, const float* v, int64_t ranks, int32_t count,
                                                float* to, int64_t width, int64_t n, int64_t end, bool add_to) {
  constexpr int64_t step = 2 * W;
  for (; n + step <= end; n += step) {
    gradient_tile<T, Ranks, false>(rows, v, ranks, count, to, width, n, step, add_to);
  }
  if (n < end) gradient_tile<T, Ranks, true>(rows, v, ranks, count, to, width, n, end - n, add_to);
}

template <class T>
void gradients(const Gradient& g, int64_t from, int64_t to) {
  constexpr int64_t columns = 256 / sizeof(T);  // whose rows stay in the first-level cache for all rank rows
  for (int64_t n = from; n < to; n += columns) {
    const int64_t end = n + columns < to ? n + columns : to;
    for (const GradientPart* part = g.parts; part != g.parts + g.count; ++part) {
      const Segment& s = *part->segment;
      const T* rows[kSegmentTokens];
      for (int32_t t = 0; t < s.count; ++t) rows[t] = static_cast<const T*>(g.rows) + s.tokens[t] * g.stride;
      const bool add_to = part != g.parts;
      int64_t j = 0;
      for (; j + kGradientRanks <= g.rank; j += kGradientRanks) {
        gradient_columns<T, kGradientRanks>(rows, part->v + j, s.ranks, s.count, g.to + j * g.width, g.width, n, end,
                                            add_to);
      }
      for (; j < g.rank; ++j) {
        gradient_columns<T, 1>(rows, part->v + j, s.ranks, s.count, g.to + j * g.width, g.width, n, end, add_to);
      }
    }
  }
}

constexpr int kSumPairs = 4;  // of columns, which one pass over a block's tokens sums

// Of kSegmentTokens tokens at most, of Pairs pairs of columns from n on, of which `left` are there with Tail.
template <class T, int Pairs, bool Tail>
MLORA_INLINE void sum_tile(const ColumnSums& p, int64_t t, int64_t end, int64_t n, int64_t left) {
  constexpr int64_t step = 2 * W;
  const bool add_to = t > 0;
  Pair acc[Pairs];
  MLORA_UNROLL for (int i = 0; i < Pairs; ++i) acc[i] = {zero(), zero()};
  for (; t < end; ++t) {
    const int64_t token = p.tokens ? p.tokens[t] : t;
    const T* l = static_cast<const T*>(p.left) + token * p.left_stride + n;
    const T* r = static_cast<const T*>(p.right) + (p.right ? token * p.right_stride + n : 0);
    MLORA_UNROLL for (int i = 0; i < Pairs; ++i) {
      const Pair a = load<Tail>(l + i * step, left);
      const Pair b = p.right ? load<Tail>(r + i * step, left) : Pair{set1(1), set1(1)};
      acc[i] = {fma(a.a, b.a, acc[i].a), fma(a.b, b.b, acc[i].b)};
    }
  }
  MLORA_UNROLL for (int i = 0; i < Pairs; ++i) {
    Pair sum = InOrder<T>::of(acc[i]);
    float* at = p.to + n + i * step;
    if (add_to) {
      const Pair before = load<Tail>(at, left);
      sum = {add(before.a, sum.a), add(before.b, sum.b)};
    }
    store<Tail>(at, sum, left);
  }
}

template <class T>
void column_sums(const ColumnSums& p, int64_t from, int64_t to) {
  constexpr int64_t step = 2 * W;
  for (int64_t t = 0; t < p.count; t += kSegmentTokens) {
    const int64_t end = t + kSegmentTokens < p.count ? t + kSegmentTokens : p.count;
    int64_t n = from;
    for (; n + kSumPairs * step <= to; n += kSumPairs * step) {
      sum_tile<T, kSumPairs, false>(p, t, end, n, kSumPairs * step);
    }
    for (; n + step <= to; n += step) sum_tile<T, 1, false>(p, t, end, n, step);
    if (n < to) sum_tile<T, 1, true>(p, t, end, n, to - n);
  }
}

}  // namespace
}  // namespace MLORA_ISA
}  // namespace mlora
