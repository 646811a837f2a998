// The base product in the order of libraries on AVX2, for `linear` with a kblock: fp32, as MKL adds it.
//
// Each output is one chain of FMAs over the inputs in order, starting from zero at every multiple of kblock; the blocks' sums
// are added in order. Lanes are tokens, so that the weight is read as it lies, an element at a time for all lanes.
#pragma once

#include "along.h"

#if MLORA_HAVE_AVX2 && !MLORA_HAVE_AVX512

namespace mlora {
namespace MLORA_ISA {
namespace {

// xt[tile, input, t] of groups [from, to) of 16 inputs, of all tiles one after the other; the last tile repeats its last token.
template <class T>
void pack_blocks(const Problem& p, uint32_t* xt, int64_t from, int64_t to) {
  const int64_t groups = (p.in + 15) / 16;
  for (; from < to; ++from) {
    const int64_t tile = from / groups, k = from % groups * 16, end = k + 16 < p.in ? k + 16 : p.in;
    float* own = reinterpret_cast<float*>(xt) + tile * p.in * kLinearTokens;
    for (int64_t i = 0; i < kLinearTokens; ++i) {
      const int64_t t = tile * kLinearTokens + i < p.tokens ? tile * kLinearTokens + i : p.tokens - 1;
      const float* row = static_cast<const float*>(p.x) + t * p.x_stride;
      for (int64_t j = k; j < end; ++j) own[j * kLinearTokens + i] = row[j];
    }
  }
}

// totals[r][t] of a block of `count` inputs: what it holds and the chains, or with First the chains alone. Asks for the weight's
// elements `ahead` unless that is 0. Not inlined, so that its loop has the registers for itself.
template <int Rows, int Vectors>
__attribute__((noinline)) void lanes_tile(const float* xt, const float* rows, int64_t in, int64_t count, int64_t ahead,
                                          bool first, float* totals) {
  vf acc[Rows][Vectors];
  MLORA_UNROLL for (int r = 0; r < Rows; ++r) {
    MLORA_UNROLL for (int v = 0; v < Vectors; ++v) acc[r][v] = zero();
  }
  for (int64_t k = 0; k < count;) {
    MLORA_UNROLL for (int r = 0; r < Rows; ++r) {
      if (ahead) __builtin_prefetch(rows + r * in + k + ahead, 0, 2);
    }
    for (const int64_t stop = k + 16 < count ? k + 16 : count; k < stop; ++k, xt += kLinearTokens) {
      vf x[Vectors];
      MLORA_UNROLL for (int v = 0; v < Vectors; ++v) x[v] = load_sums(xt + v * W);
      MLORA_UNROLL for (int r = 0; r < Rows; ++r) {
        const vf w = set1(rows[r * in + k]);
        MLORA_UNROLL for (int v = 0; v < Vectors; ++v) acc[r][v] = fma(x[v], w, acc[r][v]);
      }
    }
  }
  MLORA_UNROLL for (int r = 0; r < Rows; ++r) {
    MLORA_UNROLL for (int v = 0; v < Vectors; ++v) {
      float* to = totals + r * kLinearTokens + v * W;
      store_sums(to, first ? acc[r][v] : add(load_sums(to), acc[r][v]));
    }
  }
}

// The base product of columns [n, n + kLinearColumns), all tokens; with `started`, added to what sums hold.
template <class T>
MLORA_INLINE void base(const Problem& p, const uint32_t* xt, int64_t n, uint32_t*, bool started, float* sums) {
  const int64_t left = p.out - n, columns = left < kLinearColumns ? left : kLinearColumns;
  const int64_t tiles = (p.tokens + kLinearTokens - 1) / kLinearTokens;
  float* totals = sums + tiles * kLinearTokens * kLinearColumns;  // [tile][column][token]
  const float* weight = static_cast<const float*>(p.weight) + n * p.in;
  if (started) {
    for (int64_t t = 0; t < tiles * kLinearTokens; ++t) {
      float* to = totals + t / kLinearTokens * kLinearTokens * kLinearColumns + t % kLinearTokens;
      const float* from = sums + (t < p.tokens ? t : 0) * kLinearColumns;
      for (int64_t c = 0; c < columns; ++c) to[c * kLinearTokens] = from[c];
    }
  }
  for (int64_t k = 0; k < p.in; k += p.kblock) {
    const int64_t count = p.in - k < p.kblock ? p.in - k : p.kblock;
    for (int64_t q = 0; q < tiles; ++q) {
      const float* x = reinterpret_cast<const float*>(xt) + (q * p.in + k) * kLinearTokens;
      float* own = totals + q * kLinearTokens * kLinearColumns;
      const int64_t ahead = q ? 0 : kLinearColumns * p.in;
      const auto tile = [&](auto rows, auto vectors, int64_t c) __attribute__((always_inline)) {
        lanes_tile<rows, vectors>(x, weight + c * p.in + k, p.in, count, ahead, k == 0 && !started,
                                  own + c * kLinearTokens);
      };
      constexpr std::integral_constant<int, 1> one;
      constexpr std::integral_constant<int, 2> two;
      const bool half = p.tokens - q * kLinearTokens <= W;
      const int64_t most = half ? 8 : 6;  // rows whose sums fit the registers
      for (int64_t c = 0, groups = (columns + most - 1) / most; groups > 0; --groups) {
        const int64_t rows = (columns - c + groups - 1) / groups;
        if (half) {
          with_tokens<8>(rows, [&](auto each) __attribute__((always_inline)) { tile(each, one, c); });
        } else {
          with_tokens<6>(rows, [&](auto each) __attribute__((always_inline)) { tile(each, two, c); });
        }
        c += rows;
      }
    }
  }
  for (int64_t t = 0; t < p.tokens; ++t) {
    const float* from = totals + t / kLinearTokens * kLinearTokens * kLinearColumns + t % kLinearTokens;
    for (int64_t c = 0; c < columns; ++c) sums[t * kLinearColumns + c] = from[c * kLinearTokens];
  }
}

}  // namespace
}  // namespace MLORA_ISA
}  // namespace mlora

#endif
