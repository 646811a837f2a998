// linear: the base matmul on the weights as they lie, with the delta added before the one rounding.
#pragma once

#include "along.h"
#include "blocks.h"
#include "dots.h"
#include "lanes.h"

namespace mlora {
namespace MLORA_ISA {
namespace {

// Whether linear computes in blocks.
template <class T>
constexpr bool kBlocks = std::is_same_v<T, float> ? MLORA_HAVE_AVX2 : MLORA_HAVE_BF16 && std::is_same_v<T, bf16>;

// Whether it does in torch's own order.
template <class T>
constexpr bool kDotted = MLORA_HAVE_AVX2 && sizeof(T) == 2;

template <class T>
void pack(const Problem& p, uint32_t* xt, int64_t from, int64_t to) {
#if MLORA_HAVE_AVX2
  if constexpr (kBlocks<T>) {
    if (p.kblock > 0) return pack_blocks<T>(p, xt, from, to);
  }
  if constexpr (kDotted<T>) {
    if (p.kblock == kDots) return pack_dots<typename Beside<T, float>::type>(p, reinterpret_cast<float*>(xt), from, to);
  }
#endif
  pack_along<Read<T>>(p, xt, from, to);
}

// Whether the sum starts from the bias, as MKL's does, or ends with it, as oneDNN's.
template <class T>
constexpr bool kBiasFirst = sizeof(T) == 4;

template <bool First>
MLORA_INLINE void add_bias(const float* bias, int64_t tokens, float* sums) {
  for (int64_t t = 0; t < tokens; ++t, sums += kLinearColumns) {
    for (int64_t c = 0; c < kLinearColumns; c += W) {
      const vf b = load_sums(bias + c);
      store_sums(sums + c, First ? b : add(load_sums(sums + c), b));
    }
  }
}

// Columns [from, to) of a segment's tokens: its delta, with what else it does, on top of the base's sums.
template <class P, class T>
MLORA_INLINE void add_delta(const Rows<T, float>& io, const Segment& s, int64_t from, int64_t to) {
  constexpr int64_t step = 2 * W;
  for (int t = 0; t < s.count; ++t) {
    const float* delta = s.delta + t * s.delta_stride;
    for (int64_t n = from; n < to; n += step) {
      Pair acc[1][1] = {{{load_sums(delta + n), load_sums(delta + n + W)}}};
      if (to - n < step) {
        finish_tile<P, T, float, 1, 1, true>(io, s, acc, t, n, to - n);
      } else {
        finish_tile<P, T, float, 1, 1, false>(io, s, acc, t, n, step);
      }
    }
  }
}

// Bytes of an input that is packed for kAlong.
template <class T>
constexpr int64_t packed() {
  return sizeof(Packed<Read<T>>);
}

// The base product of columns [n, n + kLinearColumns) in blocks.
template <class T>
MLORA_INLINE void in_blocks(const Problem& p, const uint32_t* xt, int64_t n, uint32_t* panel, bool started, float* sums) {
#if MLORA_HAVE_AVX2
  if constexpr (kBlocks<T>) base<T>(p, xt, n, panel, started, sums);
#endif
}

// And in torch's own order.
template <class T>
MLORA_INLINE void in_dots(const Problem& p, const uint32_t* xt, int64_t n, int64_t end, bool more, float* sums) {
#if MLORA_HAVE_AVX2
  if constexpr (kDotted<T>) dots<typename Beside<T, float>::type>(p, reinterpret_cast<const float*>(xt), n, end, more, sums);
#endif
}

template <class T, class P>
void linear(const Problem& p, const uint32_t* xt, const Segment* segments, int64_t segment_count, uint32_t* panel,
            float* sums, int64_t from, int64_t to) {
  const T* bias = static_cast<const T*>(p.bias);
  for (int64_t n = from; n < to; n += kLinearColumns) {
    const int64_t end = n + kLinearColumns < to ? n + kLinearColumns : to;
    alignas(64) float wide[kLinearColumns] = {};
    for (int64_t c = n; bias && c < end; ++c) wide[c - n] = widen(bias[c]);
    const bool before = bias && kBiasFirst<T> && p.kblock > 0;
    if (before) add_bias<true>(wide, p.tokens, sums);
    if (p.kblock == kAlong) {
      along<Read<T>>(p, reinterpret_cast<const Packed<Read<T>>*>(xt), n, end, end < to, sums);
    } else if (p.kblock == kDots) {
      in_dots<T>(p, xt, n, end, end < to, sums);
    } else {
      in_blocks<T>(p, xt, n, panel, before, sums);
    }
    if (bias && !before) add_bias<false>(wide, p.tokens, sums);
    using Y = typename Beside<T, P>::type;
    const Rows<Y, float> io{sums - n, kLinearColumns, nullptr, 0, static_cast<Y*>(p.y), p.y_stride};
    for (const Segment* s = segments; s != segments + segment_count; ++s) {
      if (s->delta) {
        add_delta<P>(io, *s, n, end);
      } else {
        expand_rows<P>(io, *s, p.out, n, end, 2 * kLinearColumns);
      }
    }
  }
}

}  // namespace
}  // namespace MLORA_ISA
}  // namespace mlora
