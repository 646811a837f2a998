// Vectors of fp32 and conversions from the storage types, for the ISA that the including file selects.
//
// Elements are handled 2 * W at a time as a Pair whose lane order is whatever loads fastest: for bf16 the even
// elements are in `a` and the odd ones in `b`. Element-wise arithmetic does not see the order, and a dot product
// sees the same order on both sides.
#pragma once

#ifndef MLORA_ISA
#error "define MLORA_ISA and its MLORA_HAVE_* macros first"
#endif

#include <type_traits>

#define MLORA_INLINE inline __attribute__((always_inline))

namespace mlora {
namespace MLORA_ISA {
namespace {

#if MLORA_HAVE_AVX512

constexpr int W = 16;
using vf = __m512;

MLORA_INLINE vf zero() { return _mm512_setzero_ps(); }
MLORA_INLINE vf set1(float s) { return _mm512_set1_ps(s); }
MLORA_INLINE vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
MLORA_INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
MLORA_INLINE vf load_sums(const float* p) { return _mm512_load_ps(p); }
MLORA_INLINE void store_sums(float* p, vf v) { _mm512_store_ps(p, v); }
MLORA_INLINE float reduce(vf v) {
  __m256 h = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehdup_ps(q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehl_ps(q, q)));
}
// The same of four vectors at a time, to the same bits: to[i] = scale * reduce(v[i]).
MLORA_INLINE void reduce_four(const vf (&v)[4], float scale, float* to) {
  const vf ab = _mm512_add_ps(_mm512_shuffle_f32x4(v[0], v[1], 0x44), _mm512_shuffle_f32x4(v[0], v[1], 0xee));
  const vf cd = _mm512_add_ps(_mm512_shuffle_f32x4(v[2], v[3], 0x44), _mm512_shuffle_f32x4(v[2], v[3], 0xee));
  vf q = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  q = _mm512_add_ps(q, _mm512_movehdup_ps(q));
  q = _mm512_add_ps(q, _mm512_shuffle_ps(q, q, 0xee));
  const __m512i lanes = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  _mm_storeu_ps(to, _mm_mul_ps(_mm_set1_ps(scale), _mm512_castps512_ps128(_mm512_permutexvar_ps(lanes, q))));
}

#elif MLORA_HAVE_AVX2

constexpr int W = 8;
using vf = __m256;

MLORA_INLINE vf zero() { return _mm256_setzero_ps(); }
MLORA_INLINE vf set1(float s) { return _mm256_set1_ps(s); }
MLORA_INLINE vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
MLORA_INLINE vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
MLORA_INLINE vf load_sums(const float* p) { return _mm256_load_ps(p); }
MLORA_INLINE void store_sums(float* p, vf v) { _mm256_store_ps(p, v); }
MLORA_INLINE float reduce(vf v) {
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  q = _mm_add_ps(q, _mm_movehdup_ps(q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehl_ps(q, q)));
}

#else

// GCC's vector extension: what the baseline of any machine offers (SSE2, NEON). Built with -ffp-contract=off, so
// that every instantiation rounds alike.
constexpr int W = 4;
typedef float vf __attribute__((vector_size(16)));

MLORA_INLINE vf zero() { return vf{0, 0, 0, 0}; }
MLORA_INLINE vf set1(float s) { return vf{s, s, s, s}; }
MLORA_INLINE vf add(vf a, vf b) { return a + b; }
MLORA_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
MLORA_INLINE vf load_sums(const float* p) { return *reinterpret_cast<const vf*>(p); }
MLORA_INLINE void store_sums(float* p, vf v) { *reinterpret_cast<vf*>(p) = v; }
MLORA_INLINE float reduce(vf v) { return (v[0] + v[2]) + (v[1] + v[3]); }

#endif

struct Pair {
  vf a, b;
};

MLORA_INLINE float from_bits(uint32_t i) {
  float f;
  __builtin_memcpy(&f, &i, 4);
  return f;
}
MLORA_INLINE uint32_t to_bits(float f) {
  uint32_t i;
  __builtin_memcpy(&i, &f, 4);
  return i;
}
MLORA_INLINE float widen(float v) { return v; }
MLORA_INLINE float widen(bf16 v) { return from_bits(static_cast<uint32_t>(v.bits) << 16); }
MLORA_INLINE float widen(bf16_in_order v) { return from_bits(static_cast<uint32_t>(v.bits) << 16); }
MLORA_INLINE float widen(fp16 v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16;
  const uint32_t magnitude = v.bits & 0x7fff;
  if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  if (magnitude < 0x400) return from_bits(sign | to_bits(static_cast<float>(magnitude) * 0x1p-24f));
  return from_bits(sign | ((magnitude << 13) + (112u << 23)));
}

#if MLORA_HAVE_AVX512

MLORA_INLINE uint32_t first(int64_t n) { return n >= 32 ? ~0u : (1u << (n < 0 ? 0 : n)) - 1; }

template <bool Tail>
MLORA_INLINE Pair load(const float* p, int64_t n) {
  if (!Tail) return {_mm512_loadu_ps(p), _mm512_loadu_ps(p + W)};
  const uint32_t m = first(n);
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>(m), p),
          _mm512_maskz_loadu_ps(static_cast<__mmask16>(m >> 16), p + W)};
}

template <bool Tail>
MLORA_INLINE Pair load(const fp16* p, int64_t n) {
  const uint32_t m = Tail ? first(n) : ~0u;
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(m), p)),
          _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(m >> 16), p + W))};
}

template <bool Tail>
MLORA_INLINE Pair load(const bf16* p, int64_t n) {
  __m512i r = Tail ? _mm512_maskz_loadu_epi16(first(n), p) : _mm512_loadu_si512(p);
  asm("" : "+v"(r));  // or the compiler loads once for each half
  return {_mm512_castsi512_ps(_mm512_slli_epi32(r, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(r, _mm512_set1_epi32(static_cast<int>(0xffff0000))))};
}

MLORA_INLINE vf widen(__m256i r) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(r), 16)); }
template <bool Tail>
MLORA_INLINE Pair load(const bf16_in_order* p, int64_t n) {
  if (!Tail) {
    return {widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))),
            widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + W)))};
  }
  const uint32_t m = first(n);
  return {widen(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(m), p)),
          widen(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(m >> 16), p + W))};
}

template <bool Tail>
MLORA_INLINE void store(float* p, Pair v, int64_t n) {
  const uint32_t m = Tail ? first(n) : ~0u;
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>(m), v.a);
  _mm512_mask_storeu_ps(p + W, static_cast<__mmask16>(m >> 16), v.b);
}

template <bool Tail>
MLORA_INLINE void store(fp16* p, Pair v, int64_t n) {
  const uint32_t m = Tail ? first(n) : ~0u;
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(m), _mm512_cvtps_ph(v.a, kNearest));
  _mm256_mask_storeu_epi16(p + W, static_cast<__mmask16>(m >> 16), _mm512_cvtps_ph(v.b, kNearest));
}

// The rounded bf16 is in the high half of each lane.
MLORA_INLINE __m512i round_bf16(vf v) {
  const __m512i i = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(i, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(i, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), i, _mm512_set1_epi32(0x400000));
}

MLORA_INLINE __m512i narrow_exactly(Pair v) {
  return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(round_bf16(v.a), 16), round_bf16(v.b));
}

#if MLORA_HAVE_BF16

MLORA_INLINE __m512i narrow_in_order(Pair v) { return (__m512i)_mm512_cvtne2ps_pbh(v.b, v.a); }

MLORA_INLINE __m512i narrow(Pair v) {
  // v.a in the low half, v.b in the high one: brought together pair by pair
  const __m512i halves = narrow_in_order(v);
  const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(pairs, halves);
}

#else

MLORA_INLINE __m512i narrow(Pair v) { return narrow_exactly(v); }

MLORA_INLINE __m512i narrow_in_order(Pair v) {
  const __m256i low = _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16(v.a), 16));
  const __m256i high = _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16(v.b), 16));
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

#endif

template <bool Tail>
MLORA_INLINE void store(bf16* p, Pair v, int64_t n) {
  _mm512_mask_storeu_epi16(p, Tail ? first(n) : ~0u, narrow(v));
}

template <bool Tail>
MLORA_INLINE void store(bf16_in_order* p, Pair v, int64_t n) {
  _mm512_mask_storeu_epi16(p, Tail ? first(n) : ~0u, narrow_in_order(v));
}

// As torch rounds, also where instructions for bf16 take subnormal numbers for zero.
template <bool Tail, class T>
MLORA_INLINE void store_exactly(T* p, Pair v, int64_t n) {
  if constexpr (std::is_same_v<T, bf16>) {
    _mm512_mask_storeu_epi16(p, Tail ? first(n) : ~0u, narrow_exactly(v));
  } else {
    store<Tail>(p, v, n);
  }
}

// Stores that leave the caches alone and need not read a line first; p is a multiple of 64 bytes.
MLORA_INLINE void stream(float* p, Pair v) {
  _mm512_stream_ps(p, v.a);
  _mm512_stream_ps(p + W, v.b);
}
MLORA_INLINE void stream(fp16* p, Pair v) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v.a, kNearest));
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p + W), _mm512_cvtps_ph(v.b, kNearest));
}
MLORA_INLINE void stream(bf16* p, Pair v) { _mm512_stream_si512(reinterpret_cast<__m512i*>(p), narrow(v)); }
MLORA_INLINE void stream(bf16_in_order* p, Pair v) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), narrow_in_order(v));
}
MLORA_INLINE void fence() { _mm_sfence(); }  // of streamed stores

#else

#if MLORA_HAVE_AVX2

MLORA_INLINE Pair load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + W)}; }
MLORA_INLINE Pair load(const fp16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + W)))};
}
MLORA_INLINE Pair load(const bf16* p) {
  const __m256i r = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(r, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(r, _mm256_set1_epi32(static_cast<int>(0xffff0000))))};
}
MLORA_INLINE vf widen(__m128i r) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(r), 16)); }
MLORA_INLINE Pair load(const bf16_in_order* p) {
  return {widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + W)))};
}

MLORA_INLINE void store(float* p, Pair v) {
  _mm256_storeu_ps(p, v.a);
  _mm256_storeu_ps(p + W, v.b);
}
MLORA_INLINE void store(fp16* p, Pair v) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v.a, kNearest));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + W), _mm256_cvtps_ph(v.b, kNearest));
}
MLORA_INLINE __m256i round_bf16(vf v) {
  const __m256i i = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(i, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(i, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(i, _mm256_set1_epi32(0x400000));
  return _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
}
MLORA_INLINE void store(bf16* p, Pair v) {
  const __m256i even = _mm256_srli_epi32(round_bf16(v.a), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_blend_epi16(even, round_bf16(v.b), 0xaa));
}
MLORA_INLINE void store(bf16_in_order* p, Pair v) {
  const __m256i low = _mm256_srli_epi32(round_bf16(v.a), 16), high = _mm256_srli_epi32(round_bf16(v.b), 16);
  const __m256i mixed = _mm256_packus_epi32(low, high);  // a half of each, and then the others
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(mixed, 0xd8));
}

#else

MLORA_INLINE void narrow(float f, float* p) { *p = f; }
MLORA_INLINE void narrow(float f, bf16* p) {
  const uint32_t i = to_bits(f);
  p->bits = static_cast<uint16_t>((f != f ? (i | 0x400000) : i + 0x7fff + (i >> 16 & 1)) >> 16);
}
MLORA_INLINE void narrow(float f, bf16_in_order* p) {
  bf16 rounded;
  narrow(f, &rounded);
  p->bits = rounded.bits;
}
MLORA_INLINE void narrow(float f, fp16* p) {
  const uint32_t i = to_bits(f);
  const uint32_t sign = i >> 16 & 0x8000;
  const uint32_t magnitude = i & 0x7fffffff;
  uint32_t h;
  if (magnitude > 0x7f800000) {
    h = 0x7e00 | (magnitude >> 13 & 0x3ff);
  } else if (magnitude >= 0x477ff000) {  // rounds to 65536 or more
    h = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: let the fp32 adder round at 2^-24
    h = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
  } else {
    h = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  p->bits = static_cast<uint16_t>(sign | h);
}

template <class T>
MLORA_INLINE Pair load(const T* p) {
  Pair v;
  for (int i = 0; i < W; ++i) {
    v.a[i] = widen(p[i]);
    v.b[i] = widen(p[i + W]);
  }
  return v;
}
template <class T>
MLORA_INLINE void store(T* p, Pair v) {
  for (int i = 0; i < W; ++i) {
    narrow(v.a[i], p + i);
    narrow(v.b[i], p + i + W);
  }
}

#endif

template <bool Tail, class T>
MLORA_INLINE Pair load(const T* p, int64_t n) {
  if (!Tail) return load(p);
  T copy[2 * W] = {};
  for (int64_t i = 0; i < n; ++i) copy[i] = p[i];
  return load(copy);
}

template <bool Tail, class T>
MLORA_INLINE void store(T* p, Pair v, int64_t n) {
  if (!Tail) return store(p, v);
  T copy[2 * W];
  store(copy, v);
  for (int64_t i = 0; i < n; ++i) p[i] = copy[i];
}

template <bool Tail, class T>
MLORA_INLINE void store_exactly(T* p, Pair v, int64_t n) {
  store<Tail>(p, v, n);
}

template <class T>
MLORA_INLINE void stream(T* p, Pair v) {
  store(p, v);
}
MLORA_INLINE void fence() {}

#endif

// 2 * W floats in the lane order of T.
template <class T, bool Tail>
MLORA_INLINE Pair load_as(const float* p, int64_t n) {
  const Pair v = load<Tail>(p, n);
#if MLORA_HAVE_AVX512
  if (std::is_same<T, bf16>::value) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    return {_mm512_permutex2var_ps(v.a, even, v.b), _mm512_permutex2var_ps(v.a, odd, v.b)};
  }
#elif MLORA_HAVE_AVX2
  if (std::is_same<T, bf16>::value) {  // the halves of each register hold a part of both sides
    const __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(v.a, v.b, 0x88));
    const __m256d odd = _mm256_castps_pd(_mm256_shuffle_ps(v.a, v.b, 0xdd));
    return {_mm256_castpd_ps(_mm256_permute4x64_pd(even, 0xd8)), _mm256_castpd_ps(_mm256_permute4x64_pd(odd, 0xd8))};
  }
#endif
  return v;
}

// 2 * W elements of one side of a dot product, for a step of it in type T.
template <class T>
struct Operand {
  Pair v;
};

template <class T, bool Tail>
MLORA_INLINE Operand<T> load_operand(const T* p, int64_t n) {
  return {load<Tail>(p, n)};
}

template <class T>
MLORA_INLINE vf dot(const Operand<T>& x, const Operand<T>& a, vf acc) {
  return fma(x.v.b, a.v.b, fma(x.v.a, a.v.a, acc));
}

#if MLORA_HAVE_BF16

template <>
struct Operand<bf16> {
  __m512i v;
};

template <>
MLORA_INLINE Operand<bf16> load_operand<bf16, false>(const bf16* p, int64_t) {
  return {_mm512_loadu_si512(p)};
}
template <>
MLORA_INLINE Operand<bf16> load_operand<bf16, true>(const bf16* p, int64_t n) {
  return {_mm512_maskz_loadu_epi16(first(n), p)};
}
template <>
MLORA_INLINE vf dot<bf16>(const Operand<bf16>& x, const Operand<bf16>& a, vf acc) {
  return _mm512_dpbf16_ps(acc, (__m512bh)x.v, (__m512bh)a.v);
}

#endif

// Of x, for a dot product with elements of type P.
template <class P, bool Tail, class T>
MLORA_INLINE Operand<P> load_beside(const T* x, int64_t n) {
  if constexpr (std::is_same<T, P>::value) {
    return load_operand<P, Tail>(x, n);
  } else {
    return {load<Tail>(x, n)};
  }
}

#if !MLORA_HAVE_AVX512
MLORA_INLINE void reduce_four(const vf (&v)[4], float scale, float* to) {
  for (int i = 0; i < 4; ++i) to[i] = scale * reduce(v[i]);
}
#endif

}  // namespace
}  // namespace MLORA_ISA
}  // namespace mlora
