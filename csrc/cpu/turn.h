// scale_input and turn_output: what the base reads, and what becomes of its output before `apply_`. Every element is one
// chain over terms and the elements of its block, whatever the tile. T is the type of rows, P that of the arena.
#pragma once

#include "vec.h"

namespace mlora {
namespace MLORA_ISA {
namespace {

constexpr int kTurnTokens = 4;
constexpr int64_t kTurnBlock = 64;  // elements of a chain, whose sums are added in order, for accuracy

// Where column n lies among a turn's blocks: it is element k of one of those in the span of columns from `start` on.
struct Place {
  int64_t start, k, lane;

  Place(const Turn& turn, int64_t n) {
    const int64_t within = n % (turn.size * turn.stride);
    start = n - within;
    k = within / turn.stride;
    lane = within % turn.stride;
  }
};

// Element j of the blocks of the 2 * W columns from `place` on, or of `count` if Tail, in the lane order of T.
template <class T, bool Tail>
MLORA_INLINE Pair members(const T* x, const Turn& turn, Place place, int64_t j, int64_t count) {
  const int64_t first = j * turn.stride;
  if (place.lane + count <= turn.stride) return load<Tail>(x + place.start + first + place.lane, count);
  if (turn.stride == 1 && place.k + count <= turn.size) {
    const vf all = set1(widen(x[place.start + first]));
    return {all, all};
  }
  T gathered[2 * W];
  for (int64_t i = 0; i < count; ++i) {
    gathered[i] = x[place.start + first + place.lane];
    if (++place.lane < turn.stride) continue;
    place.lane = 0;
    if (++place.k < turn.size) continue;
    place.k = 0;
    place.start += turn.size * turn.stride;
  }
  return load<Tail>(gathered, count);
}

// Tokens [t0, t0 + Tokens) and columns [n, n + 2 * W), or `left` columns if Tail.
template <class T, class P, bool Output, int Tokens, bool Tail>
MLORA_INLINE void turn_tile(const Problem& p, const Segment& s, int t0, int64_t n, int64_t left) {
  const T* x[Tokens];
  Pair acc[Tokens];
  MLORA_UNROLL for (int t = 0; t < Tokens; ++t) {
    x[t] = static_cast<const T*>(p.x) + s.tokens[t0 + t] * p.x_stride;
    acc[t] = {zero(), zero()};
  }
  for (const Term* term = s.terms; term != s.terms + s.term_count; ++term) {
    const Turn& turn = Output ? term->turn : term->in_turn;
    if (!turn.values) continue;
    const Place place(turn, n);
    const vf weight = set1(term->weight);
    for (int64_t j = 0; j < turn.size;) {
      const int64_t stop = turn.size - j < kTurnBlock ? turn.size : j + kTurnBlock;
      Pair sum[Tokens] = {};
      for (; j < stop; ++j) {
        const Pair values = load<Tail>(static_cast<const P*>(turn.values) + j * p.in + n, left);
        const Pair factor = {fma(weight, values.a, zero()), fma(weight, values.b, zero())};
        MLORA_UNROLL for (int t = 0; t < Tokens; ++t) {
          const Pair other = members<T, Tail>(x[t], turn, place, j, left);
          sum[t] = {fma(factor.a, other.a, sum[t].a), fma(factor.b, other.b, sum[t].b)};
        }
      }
      MLORA_UNROLL for (int t = 0; t < Tokens; ++t) acc[t] = {add(acc[t].a, sum[t].a), add(acc[t].b, sum[t].b)};
    }
  }
  Pair gain = {zero(), zero()};
  if (!Output) {
    for (const Term* term = s.terms; term != s.terms + s.term_count; ++term) {
      if (!term->in_gain) continue;
      const Pair u = load<Tail>(static_cast<const P*>(term->in_gain) + n, left);
      gain = {fma(set1(term->weight), u.a, gain.a), fma(set1(term->weight), u.b, gain.b)};
    }
  }
  MLORA_UNROLL for (int t = 0; t < Tokens; ++t) {
    const int64_t row = s.tokens[t0 + t];
    Pair sum = Output ? load<Tail>(static_cast<const T*>(p.base) + row * p.base_stride + n, left)
                      : load<Tail>(x[t] + n, left);
    if (!Output) sum = {fma(gain.a, sum.a, sum.a), fma(gain.b, sum.b, sum.b)};
    if (Output ? s.turns : s.in_turns) sum = {add(sum.a, acc[t].a), add(sum.b, acc[t].b)};
    store<Tail>(static_cast<T*>(p.y) + row * p.y_stride + n, sum, left);
  }
}

template <class T, class P, bool Output, int Tokens>
MLORA_INLINE void turn_tokens(const Problem& p, const Segment& s, int t, int64_t from, int64_t to) {
  constexpr int64_t step = 2 * W;
  int64_t n = from;
  for (; n + step <= to; n += step) turn_tile<T, P, Output, Tokens, false>(p, s, t, n, step);
  if (n < to) turn_tile<T, P, Output, Tokens, true>(p, s, t, n, to - n);
}

template <class T, class P, bool Output>
MLORA_INLINE void turn(const Problem& p, const Segment& s, int64_t from, int64_t to) {
  constexpr int64_t columns = 256;  // a slice of the turns that stays in the first-level cache for all tokens
  for (int64_t n = from; n < to; n += columns) {
    const int64_t end = n + columns < to ? n + columns : to;
    int t = 0;
    for (; t + kTurnTokens <= s.count; t += kTurnTokens) turn_tokens<T, P, Output, kTurnTokens>(p, s, t, n, end);
    for (; t < s.count; ++t) turn_tokens<T, P, Output, 1>(p, s, t, n, end);
  }
}

// Rows without a part keep their bits.
template <class T>
void copy_rows(const void* from, int64_t stride, const Problem& p, const Segment& s, int64_t begin, int64_t end) {
  for (int t = 0; t < s.count; ++t) {
    __builtin_memcpy(static_cast<T*>(p.y) + s.tokens[t] * p.y_stride + begin,
                     static_cast<const T*>(from) + s.tokens[t] * stride + begin,
                     static_cast<size_t>(end - begin) * sizeof(T));
  }
}

template <class T, class P>
void scale_input(const Problem& p, const Segment& s, int64_t from, int64_t to) {
  if (!s.has_in_gain && !s.in_turns) return copy_rows<T>(p.x, p.x_stride, p, s, from, to);
  turn<typename Beside<T, P>::type, P, false>(p, s, from, to);
}

template <class T, class P>
void turn_output(const Problem& p, const Segment& s, int64_t from, int64_t to) {
  if (!s.turns) return copy_rows<T>(p.base, p.base_stride, p, s, from, to);
  turn<typename Beside<T, P>::type, P, true>(p, s, from, to);
}

}  // namespace
}  // namespace MLORA_ISA
}  // namespace mlora
