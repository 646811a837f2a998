// Dropout by a counter: which elements are kept depends on a key, and on where they are.
#pragma once

#include "vec.h"

namespace mlora {
namespace MLORA_ISA {
namespace {

constexpr int64_t kLanes = 16;  // counters at once, of which each gives four columns

// Philox4x32-10 (Salmon et al. 2011) of the counters (first + i, c1, c2, c3): words[w][i] is that of column 4 i + w.
MLORA_INLINE void philox(uint32_t first, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1,
                         uint32_t (*words)[kLanes]) {
  for (int64_t i = 0; i < kLanes; ++i) {
    words[0][i] = first + static_cast<uint32_t>(i);
    words[1][i] = c1;
    words[2][i] = c2;
    words[3][i] = c3;
  }
  for (int round = 0; round < 10; ++round, k0 += 0x9e3779b9u, k1 += 0xbb67ae85u) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const uint64_t a = uint64_t{0xd2511f53u} * words[0][i], b = uint64_t{0xcd9e8d57u} * words[2][i];
      words[0][i] = static_cast<uint32_t>(b >> 32) ^ words[1][i] ^ k0;
      words[1][i] = static_cast<uint32_t>(b);
      words[2][i] = static_cast<uint32_t>(a >> 32) ^ words[3][i] ^ k1;
      words[3][i] = static_cast<uint32_t>(a);
    }
  }
}

// y = scale * x for `left` columns, at most 2 * W.
template <class T, bool Tail>
MLORA_INLINE void scaled(const T* x, T* y, vf scale, int64_t left) {
  const Pair from = load<Tail>(x, left);
  store<Tail>(y, Pair{fma(from.a, scale, zero()), fma(from.b, scale, zero())}, left);
}

template <class T>
void drop(const Drop& d, int64_t from, int64_t to) {
  for (int64_t t = from; t < to; ++t) {
    const int32_t* place = d.places + t / d.length * kPlaceWidth;
    const T* x = static_cast<const T*>(d.x) + t * d.x_stride;
    T* y = static_cast<T*>(d.y) + t * d.width;
    if (place[kWho] < 0) {
      __builtin_memcpy(y, x, static_cast<size_t>(d.width) * sizeof(T));
      continue;
    }
    const uint32_t* odds = reinterpret_cast<const uint32_t*>(d.odds + place[kWho] * kOddsWidth);
    const vf scale = set1(static_cast<float>(0x1p32 / (0x1p32 - static_cast<double>(odds[kThreshold]))));
    const uint32_t position = static_cast<uint32_t>(place[kPosition] + t % d.length);
    for (int64_t n = 0; n < d.width; n += 4 * kLanes) {
      const int64_t count = d.width - n < 4 * kLanes ? d.width - n : 4 * kLanes;
      alignas(64) uint32_t words[4][kLanes];
      philox(static_cast<uint32_t>(n / 4), position, static_cast<uint32_t>(place[kRow]),
             static_cast<uint32_t>(place[kStep]), odds[kKey], odds[kKey + 1], words);
      T kept[4 * kLanes] = {};
      __builtin_memcpy(kept, x + n, static_cast<size_t>(count) * sizeof(T));
      for (int64_t i = 0; i < kLanes; ++i) {
        for (int64_t w = 0; w < 4; ++w) kept[4 * i + w] = words[w][i] < odds[kThreshold] ? T{} : kept[4 * i + w];
      }
      int64_t i = 0;
      for (; i + 2 * W <= count; i += 2 * W) scaled<T, false>(kept + i, y + n + i, scale, 2 * W);
      if (i < count) scaled<T, true>(kept + i, y + n + i, scale, count - i);
    }
  }
}

}  // namespace
}  // namespace MLORA_ISA
}  // namespace mlora
