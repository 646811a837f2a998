// What models compute between their linears: each in one pass, with the roundings and the order of sums of torch's
// operators, of which the models' own code calls six to nine.
#pragma once

#include "softmax.h"

namespace mlora {
namespace MLORA_ISA {
namespace {

// As type T holds it.
template <class T>
MLORA_INLINE Pair rounded(Pair v) {
  if constexpr (std::is_same_v<T, float>) return v;
  T held[2 * W];
  store_exactly<false>(held, v, 2 * W);
  return load<false>(held, 2 * W);
}

MLORA_INLINE Pair times(Pair v, Pair w) { return {v.a * w.a, v.b * w.b}; }
MLORA_INLINE Pair plus(Pair v, Pair w) { return {v.a + w.a, v.b + w.b}; }

// The sum of the squares of a row of at least kLanes as torch sums fp32 along a contiguous dimension (cascade_sum in its
// SumKernel.cpp, built for AVX2): vectors of kLanes go in turn to four sums, which are added to those of a higher level
// every 2^k rounds; lanes are added at last, in order.
template <class T>
float sum_of_squares(const T* row, int64_t width) {
  using P = typename Beside<T, float>::type;
  constexpr int64_t kLanes = 8, kRound = 4 * kLanes, kVectors = kRound / W;
  constexpr int kLevels = 4;
  const P* x = reinterpret_cast<const P*>(row);
  const int64_t rounds = width / kRound;
  int64_t log = 0;
  while ((int64_t{1} << log) < rounds) ++log;
  const int64_t power = log / kLevels > 4 ? log / kLevels : 4, step = int64_t{1} << power;
  vf sums[kLevels][kVectors];
  MLORA_UNROLL for (int level = 0; level < kLevels; ++level) {
    MLORA_UNROLL for (int k = 0; k < kVectors; ++k) sums[level][k] = zero();
  }
  const auto take = [&](int64_t round) {
    MLORA_UNROLL for (int k = 0; k < kVectors; k += 2) {
      const Pair v = load<false>(x + round * kRound + k * W, 2 * W);
      sums[0][k] = sums[0][k] + v.a * v.a;
      sums[0][k + 1] = sums[0][k + 1] + v.b * v.b;
    }
  };
  int64_t round = 0;
  while (round + step <= rounds) {
    for (int64_t i = 0; i < step; ++i) take(round++);
    for (int level = 1; level < kLevels; ++level) {
      MLORA_UNROLL for (int k = 0; k < kVectors; ++k) {
        sums[level][k] = sums[level][k] + sums[level - 1][k];
        sums[level - 1][k] = zero();
      }
      if (round & ((step - 1) << (level * power))) break;
    }
  }
  while (round < rounds) take(round++);
  alignas(64) float four[kRound];
  MLORA_UNROLL for (int k = 0; k < kVectors; ++k) {
    store_sums(four + k * W, ((sums[0][k] + sums[1][k]) + sums[2][k]) + sums[3][k]);
  }
  int64_t i = rounds * kRound;
  for (; i + kLanes <= width; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) four[lane] += widen(x[i + lane]) * widen(x[i + lane]);
  }
  float sum = 0;
  for (; i < width; ++i) sum += widen(x[i]) * widen(x[i]);
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    sum += ((four[lane] + four[kLanes + lane]) + four[2 * kLanes + lane]) + four[3 * kLanes + lane];
  }
  return sum;
}

template <class T>
void rms_norm(const RmsNorm& n, int64_t from, int64_t to) {
  const T* weight = static_cast<const T*>(n.weight);
  for (int64_t row = from; row < to; ++row) {
    const T* x = static_cast<const T*>(n.x) + row * n.x_stride;
    T* y = static_cast<T*>(n.y) + row * n.width;
    const float mean = sum_of_squares(x, n.width) / static_cast<float>(n.width);
    const vf scale = set1(1 / __builtin_sqrtf(mean + n.eps));
    const auto columns = [&](int64_t i, auto tail, int64_t left) {
      constexpr bool Tail = decltype(tail)::value;
      const Pair held = rounded<T>(times(load<Tail>(x + i, left), {scale, scale}));
      store_exactly<Tail>(y + i, times(load<Tail>(weight + i, left), held), left);
    };
    int64_t i = 0;
    for (; i + 2 * W <= n.width; i += 2 * W) columns(i, std::false_type{}, 2 * W);
    if (i < n.width) columns(i, std::true_type{}, n.width - i);
  }
}

template <class T>
void rotate(const Rotation& r, int64_t from, int64_t to) {
  const int64_t half = r.dim / 2;
  for (int64_t place = from; place < to; ++place) {
    const int64_t batch = place / r.tokens, token = place % r.tokens;
    const T* cos = static_cast<const T*>(r.cos) + batch * r.cos_stride[0] + token * r.cos_stride[1];
    const T* sin = static_cast<const T*>(r.sin) + batch * r.sin_stride[0] + token * r.sin_stride[1];
    for (int64_t head = 0; head < r.heads; ++head) {
      const T* x = static_cast<const T*>(r.x) + batch * r.x_stride[0] + head * r.x_stride[1] + token * r.x_stride[2];
      T* y = static_cast<T*>(r.y) + batch * r.y_stride[0] + head * r.y_stride[1] + token * r.y_stride[2];
      const auto columns = [&](int64_t i, auto tail, int64_t left) {
        constexpr bool Tail = decltype(tail)::value;
        const Pair first = load<Tail>(x + i, left), second = load<Tail>(x + half + i, left);
        const Pair turned = times(second, {set1(-1), set1(-1)});
        const auto sum = [&](Pair own, Pair other, int64_t at) {
          const Pair straight = rounded<T>(times(own, load<Tail>(cos + at, left)));
          store_exactly<Tail>(y + at, plus(straight, rounded<T>(times(other, load<Tail>(sin + at, left)))), left);
        };
        sum(first, turned, i);
        sum(second, first, half + i);
      };
      int64_t i = 0;
      for (; i + 2 * W <= half; i += 2 * W) columns(i, std::false_type{}, 2 * W);
      if (i < half) columns(i, std::true_type{}, half - i);
    }
  }
}

// e^x as Sleef's expf with 1 ulp gives it, which torch calls.
MLORA_INLINE vf exponential_of_any(vf x) {
  const vf shift = set1(0x1.8p23f);
  const vf high = x > set1(104) ? set1(104) : x, y = high < set1(-104) ? set1(-104) : high;
  const vf shifted = y * set1(0x1.715476p0f) + shift;  // rounded to a whole number, as it is without a fused sum
  const vf n = shifted - shift;
  const vf r = fma(n, set1(-1.428606765330187045e-06f), fma(n, set1(-0.693145751953125f), y));
  vf p = set1(0.000198527617612853646278381f);
  p = fma(p, r, set1(0.00139304355252534151077271f));
  p = fma(p, r, set1(0.00833336077630519866943359f));
  p = fma(p, r, set1(0.0416664853692054748535156f));
  p = fma(p, r, set1(0.166666671633720397949219f));
  p = fma(p, r, set1(0.5f));
  p = set1(1) + fma(r * r, p, r);
  const vi whole = (vi)shifted - (vi)shift, half = whole >> 1;
  const vf one = (vf)((half + 127) << 23), other = (vf)((whole - half + 127) << 23);
  return x == x ? p * one * other : x;
}

MLORA_INLINE vf silu(vf x) { return x / (set1(1) + exponential_of_any(zero() - x)); }

template <class T>
void gate(const void* gates, const void* ups, void* ys, int64_t from, int64_t to) {
  const T* g = static_cast<const T*>(gates);
  const T* u = static_cast<const T*>(ups);
  T* y = static_cast<T*>(ys);
  const auto columns = [&](int64_t i, auto tail, int64_t left) {
    constexpr bool Tail = decltype(tail)::value;
    const Pair of = load<Tail>(g + i, left);
    const Pair open = rounded<T>({silu(of.a), silu(of.b)});
    store_exactly<Tail>(y + i, times(open, load<Tail>(u + i, left)), left);
  };
  int64_t i = from;
  for (; i + 2 * W <= to; i += 2 * W) columns(i, std::false_type{}, 2 * W);
  if (i < to) columns(i, std::true_type{}, to - i);
}

}  // namespace
}  // namespace MLORA_ISA
}  // namespace mlora
