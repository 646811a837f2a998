// What a softmax takes beside vec.h: the largest, exponentials, and sums of several vectors at once.
#pragma once

#include "vec.h"

namespace mlora {
namespace MLORA_ISA {
namespace {

typedef int32_t vi __attribute__((vector_size(4 * W)));

constexpr float kLeast = -__builtin_inff();

// b where either is no number.
MLORA_INLINE vf larger(vf a, vf b) { return a > b ? a : b; }

MLORA_INLINE float largest_of(vf v) {
#if MLORA_HAVE_AVX512
  return _mm512_reduce_max_ps(v);
#else
  float most = v[0];
  for (int i = 1; i < W; ++i) most = v[i] > most ? v[i] : most;
  return most;
#endif
}

// to[i] = the sum of the i-th vector's lanes.
MLORA_INLINE void sum_four(vf v0, vf v1, vf v2, vf v3, float* to) {
#if MLORA_HAVE_AVX512
  const __m512 v01 = add(_mm512_unpacklo_ps(v0, v1), _mm512_unpackhi_ps(v0, v1));
  const __m512 v23 = add(_mm512_unpacklo_ps(v2, v3), _mm512_unpackhi_ps(v2, v3));
  const __m512d lo = _mm512_unpacklo_pd(_mm512_castps_pd(v01), _mm512_castps_pd(v23));
  const __m512d hi = _mm512_unpackhi_pd(_mm512_castps_pd(v01), _mm512_castps_pd(v23));
  const __m512 all = add(_mm512_castpd_ps(lo), _mm512_castpd_ps(hi));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
  to[0] = reduce(v0);
  to[1] = reduce(v1);
  to[2] = reduce(v2);
  to[3] = reduce(v3);
#endif
}

// e^x of x <= 0, to 2 ulp; 0 below -87. What is no number stays none.
MLORA_INLINE vf exponential(vf x) {
  const vi low = x < set1(-87);
  const vf y = low ? set1(-87) : x, shift = set1(0x1.8p23f);
  const vf shifted = fma(y, set1(0x1.715476p0f), shift);  // log2(e); the whole number is in the lowest bits
  const vf n = shifted - shift;
  vf r = fma(n, set1(-0x1.63p-1f), y);  // ln(2), in two parts
  r = fma(n, set1(0x1.bd0106p-13f), r);
  vf p = set1(1.9875691500e-4f);  // Cephes' expf
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, r * r, r) + set1(1);
  const vi power = ((vi)shifted << 23) + (127 << 23);
  return low ? zero() : p * (vf)power;
}

// The hyperbolic tangent.
MLORA_INLINE vf tangent(vf x) {
  const vf size = (vf)((vi)x & 0x7fffffff), square = x * x;
  const vf e = exponential(size * set1(-2));
  const vf far = (set1(1) - e) / (set1(1) + e);
  vf p = set1(-5.70498872745e-3f);  // Cephes' tanhf
  p = fma(p, square, set1(2.06390887954e-2f));
  p = fma(p, square, set1(-5.37397155531e-2f));
  p = fma(p, square, set1(1.33314422036e-1f));
  p = fma(p, square, set1(-3.33332819422e-1f));
  const vf near = fma(p * square, x, x);
  return size < set1(0.625f) ? near : x < zero() ? -far : far;
}

}  // namespace
}  // namespace MLORA_ISA
}  // namespace mlora
