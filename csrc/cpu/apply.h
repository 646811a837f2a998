// shrink and expand. Every (token, rank) dot product is one chain over k, and every output element one
// chain over terms and rank rows, whatever the tile: a token's delta does not depend on what it is computed beside.
#pragma once

#include "vec.h"

namespace mlora {
namespace MLORA_ISA {
namespace {

#define MLORA_UNROLL _Pragma("GCC unroll 16")

constexpr int kTileRanks = 4;                          // rank rows of A that a tile reads
constexpr int kTilePairs = MLORA_HAVE_AVX512 ? 4 : 2;  // Pairs of each rank row of B that a tile reads for one token

// What to ask for while reading a tile: the tile that will be read after it. A tile is read in an outer loop, over
// Pairs of kTileRanks rows of A or over all rank rows of B, and an inner one, over those rows or over Pairs of the
// row; outer and inner are what each adds to the address, in bytes. The address may lie outside of any buffer.
struct Next {
  uintptr_t at;
  int64_t outer;
  int64_t inner;
};

template <class T>
constexpr int64_t kPairBytes = 2 * W * sizeof(T);

template <class T>
MLORA_INLINE Next next_rows(const T* a, int64_t in) {
  return {reinterpret_cast<uintptr_t>(a), kPairBytes<T>, in * static_cast<int64_t>(sizeof(T))};
}

template <class T>
MLORA_INLINE Next next_columns(const T* b, int64_t out) {
  return {reinterpret_cast<uintptr_t>(b), out * static_cast<int64_t>(sizeof(T)), kPairBytes<T>};
}

constexpr int64_t kFewColumns = 1024;  // sums of a token that expand_few keeps

template <class T>
MLORA_INLINE Next first_tile(const Job& job) {
  const Problem& p = *job.problem;
  if (job.term) return next_rows(static_cast<const T*>(job.term->a) + job.from * p.in, p.in);
  const T* b = static_cast<const T*>(job.segment->terms->b);
  if (!b) return Next{};
  return job.segment->count <= kFewTokens ? next_rows(b + job.from, p.out) : next_columns(b + job.from, p.out);
}

template <class T>
MLORA_INLINE void fetch(const Next& next, int inner) {
  const uintptr_t at = next.at + inner * next.inner;
  MLORA_UNROLL for (int64_t line = 0; line < kPairBytes<T>; line += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(at + line));
  }
}

// Chains are cut into blocks, whose sums are added in order: a long fp32 chain would lose accuracy.
constexpr int64_t kShrinkBlock = 32 * W;

// v[t * stride + r] = scale * (A[r] . x[t])
template <class T, int Tokens, int Ranks, bool Fetch>
MLORA_INLINE void shrink_tile(const T* const* x, const T* a, int64_t in, float scale, float* v, int64_t stride,
                              Next next) {
  constexpr int64_t step = 2 * W;
  vf total[Tokens][Ranks];
  MLORA_UNROLL for (int t = 0; t < Tokens; ++t) {
    MLORA_UNROLL for (int r = 0; r < Ranks; ++r) total[t][r] = zero();
  }
  for (int64_t k = 0; k < in;) {
    const int64_t stop = in - k < kShrinkBlock ? in : k + kShrinkBlock;
    vf acc[Tokens][Ranks];
    MLORA_UNROLL for (int t = 0; t < Tokens; ++t) {
      MLORA_UNROLL for (int r = 0; r < Ranks; ++r) acc[t][r] = zero();
    }
    for (; k + step <= stop; k += step) {
      Operand<T> xs[Tokens];
      MLORA_UNROLL for (int t = 0; t < Tokens; ++t) xs[t] = load_operand<T, false>(x[t] + k, step);
      MLORA_UNROLL for (int r = 0; r < Ranks; ++r) {
        if (Fetch) fetch<T>(next, r);
        const Operand<T> as = load_operand<T, false>(a + r * in + k, step);
        MLORA_UNROLL for (int t = 0; t < Tokens; ++t) acc[t][r] = dot<T>(xs[t], as, acc[t][r]);
      }
      next.at += next.outer;
    }
    if (k < stop) {
      MLORA_UNROLL for (int t = 0; t < Tokens; ++t) {
        const Operand<T> xs = load_operand<T, true>(x[t] + k, stop - k);
        MLORA_UNROLL for (int r = 0; r < Ranks; ++r) {
          acc[t][r] = dot<T>(xs, load_operand<T, true>(a + r * in + k, stop - k), acc[t][r]);
        }
      }
      k = stop;
    }
    MLORA_UNROLL for (int t = 0; t < Tokens; ++t) {
      MLORA_UNROLL for (int r = 0; r < Ranks; ++r) total[t][r] = add(total[t][r], acc[t][r]);
    }
  }
  MLORA_UNROLL for (int t = 0; t < Tokens; ++t) {
    MLORA_UNROLL for (int r = 0; r < Ranks; ++r) v[t * stride + r] = scale * reduce(total[t][r]);
  }
}

template <class T, int Tokens, bool Fetch>
MLORA_INLINE void shrink_tokens(const T* const* x, const Job& job, int t, const Next& after) {
  const Problem& p = *job.problem;
  const int64_t stride = job.segment->ranks;
  const float scale = job.term->scale;
  float* v = job.v + t * stride;
  const T* a = static_cast<const T*>(job.term->a) + job.from * p.in;
  const T* b = static_cast<const T*>(job.term->b) + job.from * p.out;
  int64_t r = job.from;
  for (; r + kTileRanks <= job.to; r += kTileRanks) {
    const T* tile = a;
    a += kTileRanks * p.in;
    if (Fetch && job.fetch_b) {
      const T* end = b + kTileRanks * p.out;
      for (; b < end; b += 64 / sizeof(T)) __builtin_prefetch(b, 0, 2);  // as much as does not fit the first level
    }
    const Next next = r + kTileRanks < job.to ? next_rows(a, p.in) : after;
    shrink_tile<T, Tokens, kTileRanks, Fetch>(x + t, tile, p.in, scale, v + r, stride, next);
  }
  for (; r < job.to; ++r, a += p.in) shrink_tile<T, Tokens, 1, Fetch>(x + t, a, p.in, scale, v + r, stride, after);
}

template <class T>
MLORA_INLINE void shrink(const Job& job, const Next& after) {
  const Problem& p = *job.problem;
  const Segment& s = *job.segment;
  const T* x[kSegmentTokens];
  for (int t = 0; t < s.count; ++t) x[t] = static_cast<const T*>(p.x) + s.tokens[t] * p.x_stride;
  int t = 0;
  if (s.count < 4) {
    shrink_tokens<T, 1, true>(x, job, t++, after);
  } else {
    shrink_tokens<T, 4, true>(x, job, t, after);
    t += 4;
  }
  for (; t + 4 <= s.count; t += 4) shrink_tokens<T, 4, false>(x, job, t, after);
  for (; t < s.count; ++t) shrink_tokens<T, 1, false>(x, job, t, after);
}

// Elements of S, in the lane order of T.
template <class T, class S>
struct Loader;

template <class T>
struct Loader<T, T> {
  template <bool Tail>
  static MLORA_INLINE Pair get(const T* p, int64_t n) {
    return load<Tail>(p, n);
  }
};

#if MLORA_HAVE_BF16
template <>
struct Loader<bf16, float> {
  template <bool Tail>
  static MLORA_INLINE Pair get(const float* p, int64_t) {  // linear's sums are padded to whole Pairs
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const __m512 lo = _mm512_loadu_ps(p), hi = _mm512_loadu_ps(p + W);
    return {_mm512_permutex2var_ps(lo, even, hi), _mm512_permutex2var_ps(lo, odd, hi)};
  }
};
#endif

// Where a segment's rows come from (`from`, `base`) and go to: element pointers and row strides, columns from 0.
template <class T, class S>
struct Rows {
  const S* from;
  int64_t from_stride;
  const T* base;  // null: `from`
  int64_t base_stride;
  T* to;
  int64_t to_stride;
};

// What the segment's shifts and gains do to tokens [t0, t0 + Tokens) and columns [n, n + 2 * W * Pairs), or `left`
// columns if Tail, on top of acc, B^T v; and the sum with the base.
template <class T, class S, int Tokens, int Pairs, bool Tail>
MLORA_INLINE void finish_tile(const Rows<T, S>& rows, const Segment& s, Pair (&acc)[Tokens][Pairs], int t0, int64_t n,
                              int64_t left) {
  constexpr int64_t step = 2 * W;
  for (const Term* term = s.terms; term != s.terms + s.term_count; ++term) {
    if (!term->shift) continue;
    const vf weight = set1(term->weight);
    MLORA_UNROLL for (int i = 0; i < Pairs; ++i) {
      const Pair shift = load<Tail>(static_cast<const T*>(term->shift) + n + i * step, left);
      MLORA_UNROLL for (int t = 0; t < Tokens; ++t) {
        acc[t][i].a = fma(weight, shift.a, acc[t][i].a);
        acc[t][i].b = fma(weight, shift.b, acc[t][i].b);
      }
    }
  }
  MLORA_UNROLL for (int i = 0; i < Pairs; ++i) {
    const int64_t m = n + i * step;
    Pair gain = {zero(), zero()};
    if (s.has_gain) {
      for (const Term* term = s.terms; term != s.terms + s.term_count; ++term) {
        if (!term->gain) continue;
        const Pair g = load<Tail>(static_cast<const T*>(term->gain) + m, left);
        gain.a = fma(set1(term->weight), g.a, gain.a);
        gain.b = fma(set1(term->weight), g.b, gain.b);
      }
    }
    MLORA_UNROLL for (int t = 0; t < Tokens; ++t) {
      const int64_t row = s.tokens[t0 + t];
      Pair y = Loader<T, S>::template get<Tail>(rows.from + row * rows.from_stride + m, left);
      if (s.has_gain) {
        const Pair base = rows.base ? load<Tail>(rows.base + row * rows.base_stride + m, left) : y;
        acc[t][i].a = fma(gain.a, base.a, acc[t][i].a);
        acc[t][i].b = fma(gain.b, base.b, acc[t][i].b);
      }
      if (s.has_output) y = {add(y.a, acc[t][i].a), add(y.b, acc[t][i].b)};
      store<Tail>(rows.to + row * rows.to_stride + m, y, left);
    }
  }
}

// B^T v in registers, then finish_tile. Asks for `after`, or if that is null for what lies `ahead` columns on.
template <class T, class S, int Tokens, int Pairs, bool Tail>
MLORA_INLINE void expand_tile(const Rows<T, S>& rows, const Segment& s, int t0, int64_t out, int64_t n, int64_t left,
                              int64_t ahead, const Next* after) {
  constexpr int64_t step = 2 * W;
  Pair acc[Tokens][Pairs];
  MLORA_UNROLL for (int t = 0; t < Tokens; ++t) {
    MLORA_UNROLL for (int i = 0; i < Pairs; ++i) acc[t][i] = {zero(), zero()};
  }
  const float* v = s.v + t0 * s.ranks;
  for (const Term* term = s.terms; term != s.terms + s.term_count; ++term) {
    const T* b = static_cast<const T*>(term->b) + n;
    Next next = after && term == s.terms ? *after : next_columns(b + ahead, out);
    for (int64_t j = 0; j < term->rank; ++j, b += out, ++v) {
      Pair bs[Pairs];
      MLORA_UNROLL for (int i = 0; i < Pairs; ++i) {
        bs[i] = load<Tail>(b + i * step, left);
        if (t0 == 0) fetch<T>(next, i);
      }
      next.at += next.outer;
      MLORA_UNROLL for (int t = 0; t < Tokens; ++t) {
        const vf weight = set1(v[t * s.ranks]);
        MLORA_UNROLL for (int i = 0; i < Pairs; ++i) {
          acc[t][i].a = fma(weight, bs[i].a, acc[t][i].a);
          acc[t][i].b = fma(weight, bs[i].b, acc[t][i].b);
        }
      }
    }
  }
  finish_tile<T, S, Tokens, Pairs, Tail>(rows, s, acc, t0, n, left);
}

template <class T, class S, int Tokens, int Pairs>
MLORA_INLINE void expand_tokens(const Rows<T, S>& rows, const Segment& s, int t, int64_t out, int64_t from, int64_t to,
                                int64_t ahead, const Next* after) {
  constexpr int64_t step = 2 * W;
  int64_t n = from;
  for (; n + Pairs * step <= to; n += Pairs * step) {
    const Next* next = n + Pairs * step < to ? nullptr : after;
    expand_tile<T, S, Tokens, Pairs, false>(rows, s, t, out, n, step, ahead ? ahead : Pairs * step, next);
  }
  if (Pairs > 1) {
    for (; n + step <= to; n += step) {
      const Next* next = n + step < to ? nullptr : after;
      expand_tile<T, S, Tokens, 1, false>(rows, s, t, out, n, step, ahead ? ahead : step, next);
    }
  }
  if (n < to) expand_tile<T, S, Tokens, 1, true>(rows, s, t, out, n, to - n, ahead, after);
}

// `ahead`: 0, or how many columns further right the caller will read B next. `after` (or null): what it reads then.
template <class T, class S>
MLORA_INLINE void expand_rows(const Rows<T, S>& rows, const Segment& s, int64_t out, int64_t from, int64_t to,
                              int64_t ahead, const Next* after) {
  constexpr int64_t columns = 256;  // a slice of B that stays in the first-level cache for all tokens
  for (int64_t n = from; n < to; n += columns) {
    const int64_t end = n + columns < to ? n + columns : to;
    const Next* next = end < to ? nullptr : after;
    int t = 0;
#if MLORA_HAVE_AVX512
    for (; t + 8 <= s.count; t += 8) expand_tokens<T, S, 8, 1>(rows, s, t, out, n, end, ahead, next);
#endif
    for (; t + 4 <= s.count; t += 4) expand_tokens<T, S, 4, 1>(rows, s, t, out, n, end, ahead, next);
    for (; t < s.count; ++t) expand_tokens<T, S, 1, kTilePairs>(rows, s, t, out, n, end, ahead, next);
  }
}

// sums[t][m] += v[t][r] * b[r][m] for Ranks rank rows of `width` columns, m in the lane order of T; with First, from 0.
template <class T, int Tokens, int Ranks, bool First>
MLORA_INLINE void expand_row_tile(const T* b, int64_t out, int64_t width, const float* v, int64_t ranks,
                                  float (*sums)[kFewColumns], Next next) {
  constexpr int64_t step = 2 * W;
  vf weight[Tokens][Ranks];
  MLORA_UNROLL for (int t = 0; t < Tokens; ++t) {
    MLORA_UNROLL for (int r = 0; r < Ranks; ++r) weight[t][r] = set1(v[t * ranks + r]);
  }
  for (int64_t m = 0; m < width; m += step, next.at += next.outer) {
    const bool tail = width - m < step;
    Pair bs[Ranks];
    MLORA_UNROLL for (int r = 0; r < Ranks; ++r) {
      fetch<T>(next, r);
      bs[r] = tail ? load<true>(b + r * out + m, width - m) : load<false>(b + r * out + m, step);
    }
    MLORA_UNROLL for (int t = 0; t < Tokens; ++t) {
      Pair acc = {zero(), zero()};
      if (!First) acc = {load_sums(sums[t] + m), load_sums(sums[t] + m + W)};
      MLORA_UNROLL for (int r = 0; r < Ranks; ++r) {
        acc.a = fma(weight[t][r], bs[r].a, acc.a);
        acc.b = fma(weight[t][r], bs[r].b, acc.b);
      }
      store_sums(sums[t] + m, acc.a);
      store_sums(sums[t] + m + W, acc.b);
    }
  }
}

template <class T, int Tokens, bool First>
MLORA_INLINE void expand_row_tiles(const T* b, int64_t out, int64_t width, const float* v, int64_t ranks, int64_t rank,
                                   float (*sums)[kFewColumns], const Next& after) {
  int64_t j = 0;
  for (; j + kTileRanks <= rank; j += kTileRanks) {
    const T* tile = b + j * out;
    const Next next = j + kTileRanks < rank ? next_rows(tile + kTileRanks * out, out) : after;
    if (First && j == 0) {
      expand_row_tile<T, Tokens, kTileRanks, true>(tile, out, width, v, ranks, sums, next);
    } else {
      expand_row_tile<T, Tokens, kTileRanks, false>(tile, out, width, v + j, ranks, sums, next);
    }
  }
  for (; j < rank; ++j) {
    if (First && j == 0) {
      expand_row_tile<T, Tokens, 1, true>(b, out, width, v, ranks, sums, after);
    } else {
      expand_row_tile<T, Tokens, 1, false>(b + j * out, out, width, v + j, ranks, sums, after);
    }
  }
}

// As expand_rows, for segments of few tokens: B is read as shrink reads A, some rank rows at a time from end to end,
// with the sums in the first-level cache. That is more arithmetic than sums in registers, but B is one stream. The
// chains of additions are the same, and so the bits.
template <class T, int Tokens>
MLORA_INLINE void expand_few(const Rows<T, T>& rows, const Segment& s, int64_t out, int64_t from, int64_t to,
                             const Next& after) {
  constexpr int64_t step = 2 * W;
  alignas(64) float sums[Tokens][kFewColumns];
  for (int64_t n = from; n < to; n += kFewColumns) {
    const int64_t width = to - n < kFewColumns ? to - n : kFewColumns;
    const float* v = s.v;
    for (const Term* term = s.terms; term != s.terms + s.term_count; v += term->rank, ++term) {
      const T* b = static_cast<const T*>(term->b) + n;
      const Next next = n + kFewColumns < to ? next_rows(static_cast<const T*>(s.terms->b) + n + kFewColumns, out) : after;
      if (v == s.v) {
        expand_row_tiles<T, Tokens, true>(b, out, width, v, s.ranks, term->rank, sums, next);
      } else {
        expand_row_tiles<T, Tokens, false>(b, out, width, v, s.ranks, term->rank, sums, next);
      }
    }
    for (int64_t m = 0; m < width; m += step) {
      Pair acc[Tokens][1] = {};
      if (s.ranks) {
        MLORA_UNROLL for (int t = 0; t < Tokens; ++t) acc[t][0] = {load_sums(sums[t] + m), load_sums(sums[t] + m + W)};
      }
      if (width - m < step) {
        finish_tile<T, T, Tokens, 1, true>(rows, s, acc, 0, n + m, width - m);
      } else {
        finish_tile<T, T, Tokens, 1, false>(rows, s, acc, 0, n + m, step);
      }
    }
  }
}

template <class T>
MLORA_INLINE void expand(const Job& job, const Next& after) {
  const Problem& p = *job.problem;
  T* y = static_cast<T*>(p.y);
  const Rows<T, T> rows{y, p.y_stride, static_cast<const T*>(p.base), p.base_stride, y, p.y_stride};
  static_assert(kFewTokens == 2);
  if (job.segment->count == 1) {
    expand_few<T, 1>(rows, *job.segment, p.out, job.from, job.to, after);
  } else if (job.segment->count == 2) {
    expand_few<T, 2>(rows, *job.segment, p.out, job.from, job.to, after);
  } else {
    expand_rows(rows, *job.segment, p.out, job.from, job.to, 0, after.at ? &after : nullptr);
  }
}

template <class T>
void run(const Job* jobs, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const Next after = i + 1 < count ? first_tile<T>(jobs[i + 1]) : Next{};
    if (jobs[i].term) {
      shrink<T>(jobs[i], after);
    } else {
      expand<T>(jobs[i], after);
    }
  }
}

}  // namespace
}  // namespace MLORA_ISA
}  // namespace mlora
