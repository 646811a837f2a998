// The CUDA constructs that csrc/cuda uses, on the CPU, for tests: the threads of a cluster are fibers of one host
// thread. A fiber runs until it has to wait, so threads are as far apart as barriers allow; launches take turns at
// running them in order, in reverse and shuffled.
//
// What fails a launch, by throwing std::runtime_error from it:
//   a barrier or a warp operation that some thread never reaches, or reaches elsewhere (a divergent shuffle);
//   with csrc/emulation/hooks.cpp, a shared byte that is read before it is written, or that one thread accesses and
//   another writes with no barrier between; fail().
// Shared memory starts as NaN and is a heap block of the exact size, so that AddressSanitizer sees what lies beyond.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;

// Those of the fiber that runs.
inline dim3 threadIdx, blockIdx, gridDim, blockDim;

namespace emulation {

// Runs body() for every thread of every block. Throws std::runtime_error if one did what CUDA forbids.
void run(int64_t grid, int block, int cluster, const std::function<void()>& body);

void* shared_block(size_t bytes);  // this block's shared memory
const void* peer_block(const void* p, int rank);
void block_barrier(int line);
bool block_or(bool value, int line);
void cluster_barrier(int line);
// Leaves `value` for the warp, waits for all lanes of `mask`, and returns what `source` left.
uint64_t exchange(unsigned mask, uint64_t value, int source, char kind, int line);
unsigned ballot(unsigned mask, bool value, int line);
int lane();
int cluster_rank();
int cluster_size();
[[noreturn]] void fail(const char* message);

// 16 bytes in one access, at an address that CUDA requires to be a multiple of 16.
void load16(void* to, const void* from);
void store16(void* to, const void* from);

float half_to_float(uint16_t bits);
uint16_t float_to_half(float value);

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class S>
S& shared_memory() {
  return *static_cast<S*>(shared_block(sizeof(S)));
}
template <class T>
const T* peer(const T* p, int rank) {
  return static_cast<const T*>(peer_block(p, rank));
}
inline void cluster_sync(int line = __builtin_LINE()) { cluster_barrier(line); }

template <class... Parameters, class... Args>
cudaError_t launch(void (*kernel)(Parameters...), int64_t grid, int block, int cluster, cudaStream_t, Args... args) {
  run(grid, block, cluster, [&] { kernel(args...); });
  return cudaSuccess;
}

template <class T>
T shuffle(unsigned mask, T value, int source, char kind, int line) {
  static_assert(sizeof(T) == 4);
  return bit_cast<T>(static_cast<uint32_t>(exchange(mask, bit_cast<uint32_t>(value), source, kind, line)));
}

}  // namespace emulation

inline void __syncthreads(int line = __builtin_LINE()) { emulation::block_barrier(line); }
inline bool __syncthreads_or(int value, int line = __builtin_LINE()) { return emulation::block_or(value, line); }
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  emulation::exchange(mask, 0, emulation::lane(), 'w', line);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int line = __builtin_LINE()) {
  return emulation::shuffle(mask, value, source & 31, 's', line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int by, int line = __builtin_LINE()) {
  const int lane = emulation::lane();
  return emulation::shuffle(mask, value, lane < by ? lane : lane - by, 'u', line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int by, int line = __builtin_LINE()) {
  return emulation::shuffle(mask, value, emulation::lane() ^ by, 'x', line);
}
inline unsigned __ballot_sync(unsigned mask, bool value, int line = __builtin_LINE()) {
  return emulation::ballot(mask, value, line);
}
inline int __ffs(int value) { return __builtin_ffs(value); }
