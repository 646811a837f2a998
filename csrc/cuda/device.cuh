// What the kernels ask of the device, under names that csrc/emulation provides as well, so that the same sources
// build with nvcc and with a host compiler.
#pragma once

#include <cstdint>

#ifdef MLORA_EMULATION
#include "emulation.h"
#define MLORA_NOINLINE __attribute__((noinline))
#else
#define MLORA_NOINLINE __noinline__
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include "../common.h"

namespace mlora {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

struct __align__(16) Vector {  // one 16-byte access
  uint32_t word[4];
};

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;

#ifdef MLORA_EMULATION

using emulation::cluster_rank;
using emulation::cluster_size;
using emulation::cluster_sync;
using emulation::fail;
using emulation::launch;
using emulation::peer;
using emulation::shared_memory;

inline Vector load_vector(const void* p) {
  Vector v;
  emulation::load16(&v, p);
  return v;
}
inline void store_vector(void* p, const Vector& v) { emulation::store16(p, &v); }

template <class T>
T* global(T* p) {
  return p;
}
template <class T>
T* opaque(T* p) {
  return p;
}

inline float half_to_float(uint16_t bits) { return emulation::half_to_float(bits); }
inline uint16_t float_to_half(float value) { return emulation::float_to_half(value); }
inline float float_from_bits(uint32_t bits) { return emulation::bit_cast<float>(bits); }
inline uint32_t bits_from_float(float value) { return emulation::bit_cast<uint32_t>(value); }

#else

// A block's shared memory, one S; its contents are undefined at the start.
template <class S>
__device__ __forceinline__ S& shared_memory() {
  __shared__ __align__(16) unsigned char memory[sizeof(S)];
  return *reinterpret_cast<S*>(memory);
}

// Below sm_90 there are no clusters: every block is one of its own.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ int cluster_size() {
  int size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
// A barrier of all threads of the cluster, after which they see each other's shared memory.
__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}
// `p`, an address in this block's shared memory, in block `rank` of the cluster.
template <class T>
__device__ __forceinline__ const T* peer(const T* p, int rank) {
  uint64_t address;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(p), "r"(rank));
  return reinterpret_cast<const T*>(address);
}
#else
__device__ __forceinline__ int cluster_rank() { return 0; }
__device__ __forceinline__ int cluster_size() { return 1; }
__device__ __forceinline__ void cluster_sync() { __syncthreads(); }
template <class T>
__device__ __forceinline__ const T* peer(const T* p, int) {
  return p;
}
#endif

// Stops the launch with an error: for what the host cannot see without waiting for the device.
__device__ __forceinline__ void fail(const char*) { __trap(); }

__device__ __forceinline__ Vector load_vector(const void* p) {
  const uint4 v = *static_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
// An instruction by name: of a plain assignment the compiler sometimes makes four.
__device__ __forceinline__ void store_vector(void* p, const Vector& v) {
  __stwb(static_cast<uint4*>(p), make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]));
}

// An address in global memory: the compiler does not know of one that was passed to a function or lay in shared memory.
template <class T>
__device__ __forceinline__ T* global(T* p) {
  __builtin_assume(__isGlobal(p));
  return p;
}
// Of which the compiler does not see what it is made from, so as not to hold that in registers across a loop.
template <class T>
__device__ __forceinline__ T* opaque(T* p) {
  asm("" : "+l"(p));
  return p;
}

__device__ __forceinline__ float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ __forceinline__ uint16_t float_to_half(float value) {
  return __half_as_ushort(__float2half_rn(value));
}
__device__ __forceinline__ float float_from_bits(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t bits_from_float(float value) { return __float_as_uint(value); }

// kernel<<<grid, block>>>(args...) in clusters of `cluster` blocks, which `grid` is a multiple of.
template <class... Parameters, class... Args>
cudaError_t launch(void (*kernel)(Parameters...), int64_t grid, int block, int cluster, cudaStream_t stream,
                   Args... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(static_cast<unsigned>(block));
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

#endif

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(f16 value) { return half_to_float(value.bits); }
__device__ __forceinline__ float to_float(bf16 value) { return float_from_bits(uint32_t{value.bits} << 16); }

// f(T{}, P{}) of the element types of rows and of the arena.
template <class F>
auto with_types(Types types, const F& f) {
  switch (types) {
    case kFloats:
      return f(float{}, float{});
    case kHalves:
      return f(f16{}, f16{});
    case kBFloats:
      return f(bf16{}, bf16{});
    case kHalvesByFloats:
      return f(f16{}, float{});
    default:
      return f(bf16{}, float{});
  }
}

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float value) {
  return {float_to_half(value)};
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float value) {  // to nearest, ties to even
  const uint32_t bits = bits_from_float(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

__device__ __forceinline__ bool aligned(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

__device__ __forceinline__ uint32_t raw_bits(float value) { return bits_from_float(value); }
__device__ __forceinline__ uint32_t raw_bits(f16 value) { return value.bits; }
__device__ __forceinline__ uint32_t raw_bits(bf16 value) { return value.bits; }
template <class T>
__device__ __forceinline__ T from_raw(uint32_t bits) {
  return {static_cast<uint16_t>(bits)};
}
template <>
__device__ __forceinline__ float from_raw<float>(uint32_t bits) {
  return float_from_bits(bits);
}

// N neighbouring elements as they lie in memory, to be in flight while others are computed with.
template <class T, int N>
struct Elements {
  static constexpr int kEach = 16 / sizeof(T);  // elements a vector
  static constexpr int kVectors = N / kEach;
  Vector vector[kVectors];

  // Where element i lies in its vector: the word, and the bits to shift it by.
  static constexpr __device__ int word_of(int i) { return i % kEach * static_cast<int>(sizeof(T)) / 4; }
  static constexpr __device__ int shift_of(int i) { return i * static_cast<int>(sizeof(T)) % 4 * 8; }

  __device__ __forceinline__ void unpack(float* to) const {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = to_float(from_raw<T>(vector[i / kEach].word[word_of(i)] >> shift_of(i)));
  }
};

template <class T>
using Eight = Elements<T, 8>;

// p[0:N], aligned.
template <int N = 8, class T>
__device__ __forceinline__ Elements<T, N> load_whole(const T* p) {
  Elements<T, N> e;
#pragma unroll
  for (int i = 0; i < e.kVectors; ++i) e.vector[i] = load_vector(global(p) + i * e.kEach);
  return e;
}

// Element by element, for what cannot be had whole. Functions of their own: the rare case must not cost the other
// registers.
template <int N, class T>
MLORA_NOINLINE __device__ Elements<T, N> load_narrow(const T* p, int count) {
  Elements<T, N> e = {};
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < count) e.vector[i / e.kEach].word[e.word_of(i)] |= raw_bits(global(p)[i]) << e.shift_of(i);
  }
  return e;
}
template <int N, class T>
MLORA_NOINLINE __device__ void store_narrow(T* p, int count, Elements<T, N> e) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < count) global(p)[i] = from_raw<T>(e.vector[i / e.kEach].word[e.word_of(i)] >> e.shift_of(i));
  }
}

// p[0:count] and zeros; whole vectors where the address allows. Nothing is read if count <= 0.
template <int N = 8, class T>
__device__ __forceinline__ Elements<T, N> load(const T* p, int count) {
  return count >= N && aligned(p) ? load_whole<N>(p) : load_narrow<N>(p, count);
}

template <class T, int N>
__device__ __forceinline__ void load(const T* p, int count, float (&to)[N]) {
  load<N>(p, count).unpack(to);
}

template <class T, int N>
__device__ __forceinline__ void store(T* p, int count, const float (&from)[N]) {
  Elements<T, N> e = {};
#pragma unroll
  for (int i = 0; i < N; ++i) {
    e.vector[i / e.kEach].word[e.word_of(i)] |= raw_bits(from_float<T>(from[i])) << e.shift_of(i);
  }
  if (count >= N && aligned(p)) {
#pragma unroll
    for (int i = 0; i < e.kVectors; ++i) store_vector(global(p) + i * e.kEach, e.vector[i]);
  } else {
    store_narrow(p, count, e);
  }
}

// 32-bit words in global memory, as the compiler is to know wherever the address comes from.
struct Words {
  const int32_t* first;
  __device__ __forceinline__ int32_t operator[](int32_t i) const { return global(first)[i]; }
};

// A plan in device memory; the layout is that of mlora/ops/layout.py.
struct Plan {
  int32_t rows, routes, terms, length;  // length: tokens of a row
  Words row_start, row_order, term_start, term_slot, term_weight;

  // Only what keeps the kernel inside of the plan and the tokens is checked: whoever built the plan vouches for its
  // rows and slots, and for the table.
  __device__ __forceinline__ Plan(const int32_t* plan, int64_t size, int64_t tokens)
      : rows(plan[0]), routes(plan[1]), terms(plan[2]) {
    if (rows <= 0 || routes <= 0) {
      rows = routes = 0;
      return;
    }
    if (kPlanHeader + 2 * (int64_t{routes} + 1) + rows + 2 * int64_t{terms} > size || terms < 0) {
      fail("mlora: the plan is longer than its buffer");
    }
    length = static_cast<int32_t>(tokens) / rows;
    if (int64_t{length} * rows != tokens) fail("mlora: the tokens do not divide into the plan's rows");
    row_start = {plan + kPlanHeader};
    row_order = {row_start.first + routes + 1};
    term_start = {row_order.first + rows};
    term_slot = {term_start.first + routes + 1};
    term_weight = {term_slot.first + terms};
  }

  // The token at a position in the order of routes.
  __device__ __forceinline__ int32_t token(int32_t position) const {
    return row_order[position / length] * length + position % length;
  }
  __device__ __forceinline__ float weight(int term) const {
    return float_from_bits(static_cast<uint32_t>(term_weight[term]));
  }
};

__device__ __forceinline__ const int64_t* table_row(const int64_t* table, int slot) {
  return global(table) + int64_t{slot} * kTableWidth;
}
__device__ __forceinline__ float table_scale(const int64_t* row) {
  return float_from_bits(static_cast<uint32_t>(row[kScale]));
}

}  // namespace mlora
