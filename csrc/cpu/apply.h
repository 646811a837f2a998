// shrink, expand and scale_input. Every (token, rank) dot product is one chain over k, and every output element one
// chain over terms and rank rows, whatever the tile: a token's delta does not depend on what it is computed beside.
#pragma once

#include "vec.h"

namespace mlora {
namespace MLORA_ISA {
namespace {

#define MLORA_UNROLL _Pragma("GCC unroll 16")

template <class T>
constexpr int64_t kShrinkAhead = 2048 / sizeof(T);  // elements of A to prefetch ahead: covers the latency of memory

// Chains are cut into blocks, whose sums are added in order: a long fp32 chain would lose accuracy.
constexpr int64_t kShrinkBlock = 32 * W;

// v[t * stride + r] = scale * (A[r] . x[t])
template <class T, int Tokens, int Ranks>
MLORA_INLINE void shrink_tile(const T* const* x, const T* a, int64_t in, float scale, float* v, int64_t stride) {
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
        const T* row = a + r * in + k;
        __builtin_prefetch(row + kShrinkAhead<T>);
        const Operand<T> as = load_operand<T, false>(row, step);
        MLORA_UNROLL for (int t = 0; t < Tokens; ++t) acc[t][r] = dot<T>(xs[t], as, acc[t][r]);
      }
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

template <class T, int Tokens>
MLORA_INLINE void shrink_tokens(const T* const* x, const T* a, int64_t in, float scale, float* v, int64_t stride,
                                int64_t from, int64_t to) {
  int64_t r = from;
  for (; r + 4 <= to; r += 4) shrink_tile<T, Tokens, 4>(x, a + r * in, in, scale, v + r, stride);
  for (; r < to; ++r) shrink_tile<T, Tokens, 1>(x, a + r * in, in, scale, v + r, stride);
}

template <class T>
void shrink(const Problem& p, const Segment& s, const Term& term, float* v, int64_t from, int64_t to) {
  const T* a = static_cast<const T*>(term.a);
  const T* x[kSegmentTokens];
  for (int t = 0; t < s.count; ++t) x[t] = static_cast<const T*>(p.x) + s.tokens[t] * p.x_stride;
  int t = 0;
  for (; t + 4 <= s.count; t += 4) {
    shrink_tokens<T, 4>(x + t, a, p.in, term.scale, v + t * s.ranks, s.ranks, from, to);
  }
  for (; t < s.count; ++t) {
    shrink_tokens<T, 1>(x + t, a, p.in, term.scale, v + t * s.ranks, s.ranks, from, to);
  }
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

// Tokens [t0, t0 + Tokens) of the segment, columns [n, n + 2 * W * Pairs), or `left` columns if Tail.
template <class T, class S, int Tokens, int Pairs, bool Tail>
MLORA_INLINE void expand_tile(const Rows<T, S>& rows, const Segment& s, int t0, int64_t out, int64_t n, int64_t left) {
  constexpr int64_t step = 2 * W;
  Pair acc[Tokens][Pairs];
  MLORA_UNROLL for (int t = 0; t < Tokens; ++t) {
    MLORA_UNROLL for (int i = 0; i < Pairs; ++i) acc[t][i] = {zero(), zero()};
  }
  const float* v = s.v + t0 * s.ranks;
  for (const Term* term = s.terms; term != s.terms + s.term_count; ++term) {
    const T* b = static_cast<const T*>(term->b) + n;
    for (int64_t j = 0; j < term->rank; ++j, b += out, ++v) {
      Pair bs[Pairs];
      MLORA_UNROLL for (int i = 0; i < Pairs; ++i) {
        bs[i] = load<Tail>(b + i * step, left);
        if (Tokens == 1 && !Tail) __builtin_prefetch(b + (2 * Pairs + i) * step);
      }
      MLORA_UNROLL for (int t = 0; t < Tokens; ++t) {
        const vf weight = set1(v[t * s.ranks]);
        MLORA_UNROLL for (int i = 0; i < Pairs; ++i) {
          acc[t][i].a = fma(weight, bs[i].a, acc[t][i].a);
          acc[t][i].b = fma(weight, bs[i].b, acc[t][i].b);
        }
      }
    }
    if (term->shift) {
      const vf weight = set1(term->weight);
      MLORA_UNROLL for (int i = 0; i < Pairs; ++i) {
        const Pair shift = load<Tail>(static_cast<const T*>(term->shift) + n + i * step, left);
        MLORA_UNROLL for (int t = 0; t < Tokens; ++t) {
          acc[t][i].a = fma(weight, shift.a, acc[t][i].a);
          acc[t][i].b = fma(weight, shift.b, acc[t][i].b);
        }
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

template <class T, class S, int Tokens, int Pairs>
MLORA_INLINE void expand_tokens(const Rows<T, S>& rows, const Segment& s, int t, int64_t out, int64_t from, int64_t to) {
  constexpr int64_t step = 2 * W;
  int64_t n = from;
  for (; n + Pairs * step <= to; n += Pairs * step) expand_tile<T, S, Tokens, Pairs, false>(rows, s, t, out, n, step);
  if (Pairs > 1) {
    for (; n + step <= to; n += step) expand_tile<T, S, Tokens, 1, false>(rows, s, t, out, n, step);
  }
  if (n < to) expand_tile<T, S, Tokens, 1, true>(rows, s, t, out, n, to - n);
}

template <class T, class S>
MLORA_INLINE void expand_rows(const Rows<T, S>& rows, const Segment& s, int64_t out, int64_t from, int64_t to) {
  constexpr int64_t columns = 256;  // a slice of B that stays in the first-level cache for all tokens
  for (int64_t n = from; n < to; n += columns) {
    const int64_t end = n + columns < to ? n + columns : to;
    int t = 0;
#if MLORA_HAVE_AVX512
    for (; t + 8 <= s.count; t += 8) expand_tokens<T, S, 8, 1>(rows, s, t, out, n, end);
#endif
    for (; t + 4 <= s.count; t += 4) expand_tokens<T, S, 4, 1>(rows, s, t, out, n, end);
    for (; t < s.count; ++t) expand_tokens<T, S, 1, MLORA_HAVE_AVX512 ? 4 : 2>(rows, s, t, out, n, end);
  }
}

template <class T>
void expand(const Problem& p, const Segment& s, int64_t from, int64_t to) {
  T* y = static_cast<T*>(p.y);
  const Rows<T, T> rows{y, p.y_stride, static_cast<const T*>(p.base), p.base_stride, y, p.y_stride};
  expand_rows(rows, s, p.out, from, to);
}

template <class T, bool Tail>
MLORA_INLINE void scale_input_tile(const T* x, T* y, const Segment& s, int64_t k, int64_t left) {
  Pair gain = {zero(), zero()};
  for (const Term* term = s.terms; term != s.terms + s.term_count; ++term) {
    if (!term->in_gain) continue;
    const Pair u = load<Tail>(static_cast<const T*>(term->in_gain) + k, left);
    gain.a = fma(set1(term->weight), u.a, gain.a);
    gain.b = fma(set1(term->weight), u.b, gain.b);
  }
  const Pair v = load<Tail>(x + k, left);
  store<Tail>(y + k, {fma(gain.a, v.a, v.a), fma(gain.b, v.b, v.b)}, left);
}

template <class T>
void scale_input(const Problem& p, const Segment& s) {
  constexpr int64_t step = 2 * W;
  for (int t = 0; t < s.count; ++t) {
    const T* x = static_cast<const T*>(p.x) + s.tokens[t] * p.x_stride;
    T* y = static_cast<T*>(p.y) + s.tokens[t] * p.y_stride;
    if (!s.has_in_gain) {
      __builtin_memcpy(y, x, static_cast<size_t>(p.in) * sizeof(T));
      continue;
    }
    int64_t k = 0;
    for (; k + step <= p.in; k += step) scale_input_tile<T, false>(x, y, s, k, step);
    if (k < p.in) scale_input_tile<T, true>(x, y, s, k, p.in - k);
  }
}

}  // namespace
}  // namespace MLORA_ISA
}  // namespace mlora
