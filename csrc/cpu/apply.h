// shrink and expand. Every (token, rank) dot product is the same chains over k, and every output element one chain over
// terms and rank rows, whatever the tile: a token's delta does not depend on what it is computed beside.
//
// T is the type of x and y, P that of the arena. Where they differ P is fp32, and all is as if x and y were, too, rounded
// once.
#pragma once

#include "vec.h"

namespace mlora {
namespace MLORA_ISA {
namespace {

#define MLORA_UNROLL _Pragma("GCC unroll 16")

constexpr int kTileRanks = 4;                          // rank rows of A that a tile of four tokens reads
constexpr int kTilePairs = MLORA_HAVE_AVX512 ? 4 : 2;  // Pairs of each rank row of B that a tile reads for one token

template <class T>
constexpr int64_t kPairBytes = 2 * W * sizeof(T);

// Asks for the Pair at p[i], which may lie outside of any buffer.
template <class T>
MLORA_INLINE void prefetch_pair(const T* p, int64_t i) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p) + i * static_cast<int64_t>(sizeof(T));
  MLORA_UNROLL for (int64_t line = 0; line < kPairBytes<T>; line += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(at + line));
  }
}

// Asks for what jobs will read, some KiB before they do: 8 where the parts of adapters are short, and 2 where they are
// long, of which the hardware brings most, and sooner. Kernels that read in the order of memory, a row of A or
// two of B at a time, step on by as many bytes as they read: the hardware brings neighbouring lines up to twice as fast
// as lines here and there, from any level of memory, but starts anew at every row, page and adapter.
template <class T, class P>
class Ahead {
 public:
  MLORA_INLINE Ahead(const Job* job, const Job* end) : job_(job), end_(end) {
    const bool longs = job != end && (job->to - job->from) * job->problem->in * int64_t{sizeof(P)} >= kLong;
    at = next(longs ? kDistance / 4 : kDistance);
  }

  // Four Pairs of the arena were read; or one, or fewer elements; or so many of x or y. `at` is the caller's copy of
  // `at`, in a register.
  MLORA_INLINE void step(uintptr_t& at) { step<4 * kPairBytes<P>>(at); }
  MLORA_INLINE void tail(uintptr_t& at) { step<kPairBytes<P>>(at); }
  MLORA_INLINE void rows(uintptr_t& at) { step<kPairBytes<T>>(at); }

  uintptr_t at;

 private:
  static constexpr int64_t kDistance = 8192;
  static constexpr int64_t kLong = 1 << 17;

  template <int64_t Bytes>
  MLORA_INLINE void step(uintptr_t& at) {
    MLORA_UNROLL for (int64_t line = 0; line < Bytes; line += 64) {
      __builtin_prefetch(reinterpret_cast<const void*>(at + line), 0, 2);
    }
    at += Bytes;
    if (__builtin_expect(at >= stop_, 0)) at = next(at - stop_);
  }

  // The address `beyond` bytes into the next run of neighbouring bytes, or into the one after it if it is shorter.
  __attribute__((noinline)) uintptr_t next(uintptr_t beyond) {
    for (;;) {
      while (rows_ == 0) {
        if (job_ == end_) {  // ask for what is near, which costs little
          stop_ = reinterpret_cast<uintptr_t>(this) + 1024;
          return stop_ - 1024;
        }
        part();
      }
      const uintptr_t at = row_ + beyond;
      stop_ = row_ + width_;
      row_ += stride_;
      --rows_;
      if (at < stop_) return at;
      beyond = at - stop_;
    }
  }

  // What comes next: of a shrink the input and A, of an expand every term's B and the output, which a delta is not read of.
  void part() {
    const Problem& p = *job_->problem;
    const Segment& s = *job_->segment;
    const int64_t size = sizeof(P), each = sizeof(T), count = job_->to - job_->from, part = part_++;
    rows_ = 1;
    if (job_->term && part == 0) {
      row_ = reinterpret_cast<uintptr_t>(p.x) + s.tokens[0] * p.x_stride * each;
      width_ = p.in * each;
    } else if (job_->term && part == 1) {
      row_ = reinterpret_cast<uintptr_t>(job_->term->a) + job_->from * p.in * size;
      width_ = count * p.in * size;
      rows_ = job_->term->a ? 1 : 0;
    } else if (!job_->term && s.count <= kFewTokens && part < s.term_count) {
      const Term& term = s.terms[part];
      row_ = reinterpret_cast<uintptr_t>(term.b) + job_->from * size;
      width_ = count * size;
      stride_ = p.out * size;
      rows_ = term.b ? term.rank : 0;
    } else if (!job_->term && s.count <= kFewTokens && !s.delta && part < s.term_count + s.count) {
      row_ = reinterpret_cast<uintptr_t>(p.y) + (s.tokens[part - s.term_count] * p.y_stride + job_->from) * each;
      width_ = count * each;
    } else {
      rows_ = part_ = 0;
      ++job_;
    }
    if (rows_ > 1 && width_ == stride_) {
      width_ *= rows_;
      rows_ = 1;
    }
  }

  const Job* job_;
  const Job* end_;
  int64_t part_ = 0;
  int64_t rows_ = 0, width_ = 0, stride_ = 0;
  uintptr_t row_ = 0, stop_ = 0;
};

// A dot product is kChains sums, of which each takes every kChains-th Pair of the input in order, and which are added
// in order after each block, whatever is computed beside it: a long fp32 chain would lose accuracy, and one chain waits
// for itself.
constexpr int64_t kChains = 4;
constexpr int64_t kShrinkBlock = kChains * 32 * W;

// v[r] = scale * (A[r] . x) for `rows` rank rows. Not inlined, so that its loop has the registers for itself.
template <class T, class P>
__attribute__((noinline)) void shrink_one(const T* x, const P* a, int64_t in, int64_t rows, float scale, float* v,
                                          Ahead<T, P>& ahead) {
  constexpr int64_t step = 2 * W;
  uintptr_t at = ahead.at;
  for (int64_t r = 0; r < rows; ++r, a += in) {
    vf total = zero();
    for (int64_t from = 0; from < in; from += kShrinkBlock) {
      const int64_t count = in - from < kShrinkBlock ? in - from : kShrinkBlock;
      const T* xs = x + from;
      const P* as = a + from;
      vf acc[kChains];
      MLORA_UNROLL for (int c = 0; c < kChains; ++c) acc[c] = zero();
      int64_t left = count;
      for (; left >= kChains * step; left -= kChains * step, xs += kChains * step, as += kChains * step) {
        MLORA_UNROLL for (int c = 0; c < kChains; ++c) {
          const Operand<P> own = load_beside<P, false>(xs + c * step, step);
          acc[c] = dot<P>(own, load_operand<P, false>(as + c * step, step), acc[c]);
        }
        ahead.step(at);
      }
      MLORA_UNROLL for (int c = 0; c < kChains; ++c, left -= step, xs += step, as += step) {
        if (left >= step) {
          acc[c] = dot<P>(load_beside<P, false>(xs, step), load_operand<P, false>(as, step), acc[c]);
        } else if (left > 0) {
          acc[c] = dot<P>(load_beside<P, true>(xs, left), load_operand<P, true>(as, left), acc[c]);
        } else {
          break;
        }
        ahead.tail(at);
      }
      MLORA_UNROLL for (int c = 0; c < kChains; ++c) total = add(total, acc[c]);
    }
    v[r] = scale * reduce(total);
  }
  ahead.at = at;
}

// v[t * stride + r] = scale * (A[r] . x[t]), for four tokens and Ranks rank rows: chain after chain, since all of them
// would not fit the registers.
template <class T, class P, int Ranks, bool First>
__attribute__((noinline)) void shrink_four(const T* const* x, const P* a, int64_t in, float scale, float* v,
                                           int64_t stride, Ahead<T, P>& ahead) {
  constexpr int64_t step = 2 * W;
  uintptr_t at = ahead.at;
  vf total[4][Ranks];
  MLORA_UNROLL for (int t = 0; t < 4; ++t) {
    MLORA_UNROLL for (int r = 0; r < Ranks; ++r) total[t][r] = zero();
  }
  for (int64_t from = 0; from < in; from += kShrinkBlock) {
    const int64_t stop = in - from < kShrinkBlock ? in : from + kShrinkBlock;
    for (int64_t c = 0; c < kChains; ++c) {
      vf acc[4][Ranks];
      MLORA_UNROLL for (int t = 0; t < 4; ++t) {
        MLORA_UNROLL for (int r = 0; r < Ranks; ++r) acc[t][r] = zero();
      }
      int64_t k = from + c * step;
      for (; k + step <= stop; k += kChains * step) {
        Operand<P> xs[4];
        MLORA_UNROLL for (int t = 0; t < 4; ++t) xs[t] = load_beside<P, false>(x[t] + k, step);
        MLORA_UNROLL for (int r = 0; r < Ranks; ++r) {
          const Operand<P> as = load_operand<P, false>(a + r * in + k, step);
          MLORA_UNROLL for (int t = 0; t < 4; ++t) acc[t][r] = dot<P>(xs[t], as, acc[t][r]);
        }
        if (First) ahead.step(at);
      }
      if (k < stop) {
        MLORA_UNROLL for (int t = 0; t < 4; ++t) {
          const Operand<P> xs = load_beside<P, true>(x[t] + k, stop - k);
          MLORA_UNROLL for (int r = 0; r < Ranks; ++r) {
            acc[t][r] = dot<P>(xs, load_operand<P, true>(a + r * in + k, stop - k), acc[t][r]);
          }
        }
      }
      MLORA_UNROLL for (int t = 0; t < 4; ++t) {
        MLORA_UNROLL for (int r = 0; r < Ranks; ++r) total[t][r] = add(total[t][r], acc[t][r]);
      }
    }
  }
  MLORA_UNROLL for (int t = 0; t < 4; ++t) {
    if constexpr (Ranks == 4) {
      reduce_four(total[t], scale, v + t * stride);
    } else {
      MLORA_UNROLL for (int r = 0; r < Ranks; ++r) v[t * stride + r] = scale * reduce(total[t][r]);
    }
  }
  ahead.at = at;
}

// Tokens [t, t + Tokens) of a job; with First, what it reads is not in the caches yet.
template <class T, class P, int Tokens, bool First>
MLORA_INLINE void shrink_tokens(const T* const* x, const Job& job, int t, Ahead<T, P>& ahead) {
  const Problem& p = *job.problem;
  const int64_t stride = job.segment->ranks;
  const float scale = job.term->scale;
  float* v = job.v + t * stride;
  const P* a = static_cast<const P*>(job.term->a) + job.from * p.in;
  const P* b = static_cast<const P*>(job.term->b) + job.from * p.out;
  if (Tokens == 1 && !job.fetch_b) return shrink_one(x[t], a, p.in, job.to - job.from, scale, v + job.from, ahead);
  for (int64_t r = job.from; r < job.to;) {
    const int64_t rows = job.to - r < kTileRanks ? job.to - r : kTileRanks;
    if (First && job.fetch_b) {
      const P* end = b + rows * p.out;
      for (; b < end; b += 64 / sizeof(P)) __builtin_prefetch(b, 0, 2);  // as much as does not fit the first level
    }
    if (Tokens == 1) {
      shrink_one(x[t], a, p.in, rows, scale, v + r, ahead);
    } else if (rows == kTileRanks) {
      shrink_four<T, P, kTileRanks, First>(x + t, a, p.in, scale, v + r, stride, ahead);
    } else {
      for (int64_t j = 0; j < rows; ++j) {
        shrink_four<T, P, 1, First>(x + t, a + j * p.in, p.in, scale, v + r + j, stride, ahead);
      }
    }
    r += rows;
    a += rows * p.in;
  }
}

// v = scale * x, of an A that is the identity.
template <class T>
__attribute__((noinline)) void shrink_identity(const T* const* x, const Job& job) {
  const Segment& s = *job.segment;
  for (int t = 0; t < s.count; ++t) {
    float* v = job.v + t * s.ranks;
    for (int64_t r = job.from; r < job.to; ++r) v[r] = job.term->scale * widen(x[t][r]);
  }
}

template <class T, class P>
MLORA_INLINE void shrink(const Job& job, Ahead<T, P>& ahead) {
  const Problem& p = *job.problem;
  const Segment& s = *job.segment;
  const T* x[kSegmentTokens];
  for (int t = 0; t < s.count; ++t) x[t] = static_cast<const T*>(p.x) + s.tokens[t] * p.x_stride;
  for (int64_t k = 0; k < p.in; k += 2 * W) ahead.rows(ahead.at);
  if (!job.term->a) return shrink_identity(x, job);
  int t = 0;
  if (s.count < 4) {
    shrink_tokens<T, P, 1, true>(x, job, t++, ahead);
  } else {
    shrink_tokens<T, P, 4, true>(x, job, t, ahead);
    t += 4;
  }
  Ahead<T, P> none(nullptr, nullptr);
  for (; t + 4 <= s.count; t += 4) shrink_tokens<T, P, 4, false>(x, job, t, none);
  for (; t < s.count; ++t) shrink_tokens<T, P, 1, false>(x, job, t, none);
}

// Elements of S, which is T or float, in the lane order of T. Floats are linear's sums, padded to whole Pairs.
template <class T, bool Tail, class S>
MLORA_INLINE Pair load_from(const S* p, int64_t n) {
  if constexpr (std::is_same<T, S>::value) {
    return load<Tail>(p, n);
  } else {
    return load_as<T, false>(p, 2 * W);
  }
}

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
template <class P, class T, class S, int Tokens, int Pairs, bool Tail>
MLORA_INLINE void finish_tile(const Rows<T, S>& rows, const Segment& s, Pair (&acc)[Tokens][Pairs], int t0, int64_t n,
                              int64_t left) {
  constexpr int64_t step = 2 * W;
  for (const Term* term = s.terms; term != s.terms + s.term_count; ++term) {
    if (!term->shift) continue;
    const vf weight = set1(term->weight);
    MLORA_UNROLL for (int i = 0; i < Pairs; ++i) {
      const Pair shift = load<Tail>(static_cast<const P*>(term->shift) + n + i * step, left);
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
        const Pair g = load<Tail>(static_cast<const P*>(term->gain) + m, left);
        gain.a = fma(set1(term->weight), g.a, gain.a);
        gain.b = fma(set1(term->weight), g.b, gain.b);
      }
    }
    MLORA_UNROLL for (int t = 0; t < Tokens; ++t) {
      const int64_t row = s.tokens[t0 + t];
      Pair y = load_from<T, Tail>(rows.from + row * rows.from_stride + m, left);
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

// B^T v in registers, then finish_tile. Asks for what lies `ahead` columns on.
template <class P, class T, class S, int Tokens, int Pairs, bool Tail>
MLORA_INLINE void expand_tile(const Rows<T, S>& rows, const Segment& s, int t0, int64_t out, int64_t n, int64_t left,
                              int64_t ahead) {
  constexpr int64_t step = 2 * W;
  Pair acc[Tokens][Pairs];
  MLORA_UNROLL for (int t = 0; t < Tokens; ++t) {
    MLORA_UNROLL for (int i = 0; i < Pairs; ++i) acc[t][i] = {zero(), zero()};
  }
  const float* v = s.v + t0 * s.ranks;
  for (const Term* term = s.terms; term != s.terms + s.term_count; ++term) {
    if (__builtin_expect(!term->b, 0)) {  // the identity, or no rank rows
      if (term->rank) {
        MLORA_UNROLL for (int i = 0; i < Pairs; ++i) {
          MLORA_UNROLL for (int t = 0; t < Tokens; ++t) {
            const Pair own = load_as<T, Tail>(v + t * s.ranks + n + i * step, left);
            acc[t][i] = {add(acc[t][i].a, own.a), add(acc[t][i].b, own.b)};
          }
        }
      }
      v += term->rank;
      continue;
    }
    const P* b = static_cast<const P*>(term->b) + n;
    for (int64_t j = 0; j < term->rank; ++j, b += out, ++v) {
      Pair bs[Pairs];
      MLORA_UNROLL for (int i = 0; i < Pairs; ++i) {
        bs[i] = load<Tail>(b + i * step, left);
        if (t0 == 0) prefetch_pair(b, i * step + ahead);
      }
      MLORA_UNROLL for (int t = 0; t < Tokens; ++t) {
        const vf weight = set1(v[t * s.ranks]);
        MLORA_UNROLL for (int i = 0; i < Pairs; ++i) {
          acc[t][i].a = fma(weight, bs[i].a, acc[t][i].a);
          acc[t][i].b = fma(weight, bs[i].b, acc[t][i].b);
        }
      }
    }
  }
  finish_tile<P, T, S, Tokens, Pairs, Tail>(rows, s, acc, t0, n, left);
}

template <class P, class T, class S, int Tokens, int Pairs>
MLORA_INLINE void expand_tokens(const Rows<T, S>& rows, const Segment& s, int t, int64_t out, int64_t from, int64_t to,
                                int64_t ahead) {
  constexpr int64_t step = 2 * W;
  int64_t n = from;
  for (; n + Pairs * step <= to; n += Pairs * step) {
    expand_tile<P, T, S, Tokens, Pairs, false>(rows, s, t, out, n, step, ahead ? ahead : Pairs * step);
  }
  if (Pairs > 1) {
    for (; n + step <= to; n += step) {
      expand_tile<P, T, S, Tokens, 1, false>(rows, s, t, out, n, step, ahead ? ahead : step);
    }
  }
  if (n < to) expand_tile<P, T, S, Tokens, 1, true>(rows, s, t, out, n, to - n, ahead);
}

// `ahead`: 0, or how many columns further right the caller will read B next.
template <class P, class T, class S>
MLORA_INLINE void expand_rows(const Rows<T, S>& rows, const Segment& s, int64_t out, int64_t from, int64_t to,
                              int64_t ahead) {
  constexpr int64_t columns = 256;  // a slice of B that stays in the first-level cache for all tokens
  for (int64_t n = from; n < to; n += columns) {
    const int64_t end = n + columns < to ? n + columns : to;
    int t = 0;
#if MLORA_HAVE_AVX512
    for (; t + 8 <= s.count; t += 8) expand_tokens<P, T, S, 8, 1>(rows, s, t, out, n, end, ahead);
#endif
    for (; t + 4 <= s.count; t += 4) expand_tokens<P, T, S, 4, 1>(rows, s, t, out, n, end, ahead);
    for (; t < s.count; ++t) expand_tokens<P, T, S, 1, kTilePairs>(rows, s, t, out, n, end, ahead);
  }
}

// sums[t * stride + m] += v[t][r] * b[r][m] for Ranks rank rows of `width` columns, m in their lane order; with First,
// from 0.
template <class T, class P, int Tokens, int Ranks, bool First>
MLORA_INLINE void expand_ranks(const P* b, int64_t out, int64_t width, const float* v, int64_t ranks, float* sums,
                               int64_t stride, Ahead<T, P>& ahead, uintptr_t& at) {
  constexpr int64_t step = 2 * W;
  constexpr int kSteps = 4 / Ranks;
  vf weight[Tokens][Ranks];
  MLORA_UNROLL for (int t = 0; t < Tokens; ++t) {
    MLORA_UNROLL for (int r = 0; r < Ranks; ++r) weight[t][r] = set1(v[t * ranks + r]);
  }
  const auto columns = [&](int64_t m, auto tail, int64_t left) __attribute__((always_inline)) {
    Pair bs[Ranks];
    MLORA_UNROLL for (int r = 0; r < Ranks; ++r) bs[r] = load<tail()>(b + r * out + m, left);
    MLORA_UNROLL for (int t = 0; t < Tokens; ++t) {
      float* to = sums + t * stride + m;
      Pair acc = {zero(), zero()};
      if (!First) acc = {load_sums(to), load_sums(to + W)};
      MLORA_UNROLL for (int r = 0; r < Ranks; ++r) {
        acc.a = fma(weight[t][r], bs[r].a, acc.a);
        acc.b = fma(weight[t][r], bs[r].b, acc.b);
      }
      store_sums(to, acc.a);
      store_sums(to + W, acc.b);
    }
  };
  int64_t m = 0;
  for (; m + kSteps * step <= width; m += kSteps * step) {
    MLORA_UNROLL for (int i = 0; i < kSteps; ++i) columns(m + i * step, std::false_type(), step);
    ahead.step(at);
  }
  for (; m + step <= width; m += step) {
    columns(m, std::false_type(), step);
    MLORA_UNROLL for (int r = 0; r < Ranks; ++r) ahead.tail(at);
  }
  if (m < width) columns(m, std::true_type(), width - m);
}

// The same of an identity: sums[t * stride + m] += v[t][m].
template <class T, int Tokens>
__attribute__((noinline)) void expand_identity(int64_t width, const float* v, int64_t ranks, bool first, float* sums,
                                               int64_t stride) {
  constexpr int64_t step = 2 * W;
  MLORA_UNROLL for (int t = 0; t < Tokens; ++t) {
    for (int64_t m = 0; m < width; m += step) {
      const float* own = v + t * ranks + m;
      float* to = sums + t * stride + m;
      Pair sum = width - m < step ? load_as<T, true>(own, width - m) : load_as<T, false>(own, step);
      if (!first) sum = {add(sum.a, load_sums(to)), add(sum.b, load_sums(to + W))};
      store_sums(to, sum.a);
      store_sums(to + W, sum.b);
    }
  }
}

// The same for all rank rows of a term. Not inlined, so that its loops have the registers for themselves.
template <class T, class P, int Tokens>
__attribute__((noinline)) void expand_term(const P* b, int64_t out, int64_t width, const float* v, int64_t ranks,
                                           int64_t rank, bool first, float* sums, int64_t stride,
                                           Ahead<T, P>& ahead) {
  uintptr_t at = ahead.at;
  int64_t j = 0;
  if (first && rank >= 2) {
    expand_ranks<T, P, Tokens, 2, true>(b, out, width, v, ranks, sums, stride, ahead, at);
    j = 2;
  } else if (first && rank == 1) {
    expand_ranks<T, P, Tokens, 1, true>(b, out, width, v, ranks, sums, stride, ahead, at);
    j = 1;
  }
  for (; j + 2 <= rank; j += 2) {
    expand_ranks<T, P, Tokens, 2, false>(b + j * out, out, width, v + j, ranks, sums, stride, ahead, at);
  }
  if (j < rank) expand_ranks<T, P, Tokens, 1, false>(b + j * out, out, width, v + j, ranks, sums, stride, ahead, at);
  ahead.at = at;
}

// y += sums, in their lane order. Not inlined, so that its loop has the registers for itself.
template <class T, class P>
__attribute__((noinline)) void add_sums(T* y, const float* sums, int64_t width, Ahead<T, P>& ahead) {
  constexpr int64_t step = 2 * W;
  uintptr_t at = ahead.at;
  const auto columns = [&](int64_t m, auto tail, int64_t left) __attribute__((always_inline)) {
    const Pair base = load<tail()>(y + m, left);
    store<tail()>(y + m, {add(base.a, load_sums(sums + m)), add(base.b, load_sums(sums + m + W))}, left);
    ahead.rows(at);
  };
  int64_t m = 0;
  for (; m + step <= width; m += step) columns(m, std::false_type(), step);
  if (m < width) columns(m, std::true_type(), width - m);
  ahead.at = at;
}

// sums[t * stride + m] = B^T v of a job's columns, from the first on, for segments of few tokens: B is read in the order of
// memory, or nearly, two rank rows at a time, with the sums in the first-level cache. That is more arithmetic than sums in
// registers. The chains of additions are the same, and so the bits. Writes whole Pairs.
template <int Tokens, class T, class P>
MLORA_INLINE void expand_sums(const Job& job, float* sums, int64_t stride, Ahead<T, P>& ahead) {
  const Segment& s = *job.segment;
  const int64_t out = job.problem->out, width = job.to - job.from;
  const float* v = s.v;
  for (const Term* term = s.terms; term != s.terms + s.term_count; v += term->rank, ++term) {
    if (!term->b) {
      if (term->rank) expand_identity<T, Tokens>(width, v + job.from, s.ranks, v == s.v, sums, stride);
      continue;
    }
    expand_term<T, P, Tokens>(static_cast<const P*>(term->b) + job.from, out, width, v, s.ranks, term->rank, v == s.v,
                              sums, stride, ahead);
  }
}

// As expand_rows, for segments of few tokens.
template <class T, class P, int Tokens>
MLORA_INLINE void expand_few(const Rows<T, T>& rows, const Job& job, Ahead<T, P>& ahead) {
  constexpr int64_t step = 2 * W;
  const Segment& s = *job.segment;
  const int64_t width = job.to - job.from;
  alignas(64) float sums[Tokens][kFewColumns];
  expand_sums<Tokens>(job, sums[0], kFewColumns, ahead);
  if (s.ranks && !s.has_gain && !s.has_shift) {
    MLORA_UNROLL for (int t = 0; t < Tokens; ++t) {
      add_sums(rows.to + s.tokens[t] * rows.to_stride + job.from, sums[t], width, ahead);
    }
    return;
  }
  for (int64_t m = 0; m < width; m += step) {
    Pair acc[Tokens][1] = {};
    if (s.ranks) {
      MLORA_UNROLL for (int t = 0; t < Tokens; ++t) acc[t][0] = {load_sums(sums[t] + m), load_sums(sums[t] + m + W)};
    }
    if (width - m < step) {
      finish_tile<P, T, T, Tokens, 1, true>(rows, s, acc, 0, job.from + m, width - m);
    } else {
      finish_tile<P, T, T, Tokens, 1, false>(rows, s, acc, 0, job.from + m, step);
    }
    MLORA_UNROLL for (int t = 0; t < Tokens; ++t) ahead.rows(ahead.at);
  }
}

template <class T, class P>
MLORA_INLINE void expand(const Job& job, Ahead<T, P>& ahead) {
  const Problem& p = *job.problem;
  if (float* delta = job.segment->delta) {
    const int64_t stride = job.segment->delta_stride;
    if (job.segment->count == 1) return expand_sums<1>(job, delta + job.from, stride, ahead);
    return expand_sums<2>(job, delta + job.from, stride, ahead);
  }
  T* y = static_cast<T*>(p.y);
  const Rows<T, T> rows{y, p.y_stride, static_cast<const T*>(p.base), p.base_stride, y, p.y_stride};
  static_assert(kFewTokens == 2);
  if (job.segment->count > kFewTokens) return expand_rows<P>(rows, *job.segment, p.out, job.from, job.to, 0);
  if (job.segment->count == 1) {
    expand_few<T, P, 1>(rows, job, ahead);
  } else {
    expand_few<T, P, 2>(rows, job, ahead);
  }
}

template <class T, class P>
void run(const Job* jobs, int64_t count) {
  Ahead<typename Beside<T, P>::type, P> ahead(jobs, jobs + count);
  for (const Job* job = jobs; job != jobs + count; ++job) {
    if (job->term) {
      shrink(*job, ahead);
    } else {
      expand(*job, ahead);
    }
  }
}

}  // namespace
}  // namespace MLORA_ISA
}  // namespace mlora
