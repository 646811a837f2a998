// Kernels with one bug each, which the emulation has to catch: run with the bug's name; "none" has none.

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>

#include "device.cuh"

namespace {

constexpr int kThreads = 64;

enum Bug {
  kNone,
  kNoBarrier,           // reads another thread's value without waiting for it
  kNoBarrierAfterRead,  // overwrites what another thread may still read
  kNoClusterBarrier,    // reads a peer that may not have written
  kWarpOnly,            // a shuffle is no barrier of memory
  kUninitialised,
  kDivergentShuffle,
  kOtherShuffle,  // lanes meet in different shuffles
  kDivergentBarrier,
  kBeyondShared,
  kBeyondGlobal,
  kUnaligned,
};

struct Shared {
  float a[kThreads], b[kThreads];
};

__global__ void kernel(float* to, const float* from, int bug) {
  Shared& s = mlora::shared_memory<Shared>();
  const int thread = static_cast<int>(threadIdx.x), other = (thread + 1) % kThreads;
  if (bug != kUninitialised || thread) s.a[thread] = from[bug == kBeyondGlobal ? thread + 1 : thread];
  if (bug != kNoBarrier && bug != kWarpOnly) __syncthreads();
  if (bug == kWarpOnly) (void)__shfl_xor_sync(mlora::kAllLanes, 0, 1);
  float value = bug == kWarpOnly ? s.a[thread ^ 1] : s.a[other];
  if (bug != kNoBarrierAfterRead) __syncthreads();
  s.a[thread] = value;
  if (bug == kNoClusterBarrier) {
    __syncthreads();
  } else {
    mlora::cluster_sync();
  }
  value += *mlora::peer(&s.a[thread], mlora::cluster_size() - 1);
  if (bug != kDivergentShuffle || thread % 3) value += __shfl_xor_sync(mlora::kAllLanes, value, 1);
  if (bug == kOtherShuffle) {
    if (thread % 2) {
      value += __shfl_xor_sync(mlora::kAllLanes, value, 2);
    } else {
      value += __shfl_xor_sync(mlora::kAllLanes, value, 2);
    }
  }
  if (bug == kBeyondShared) value += s.b[kThreads + thread];
  if (bug != kDivergentBarrier || thread) __syncthreads();
  if (bug == kUnaligned) value += mlora::float_from_bits(mlora::load_vector(from + 1).word[0]);
  to[blockIdx.x * kThreads + thread] = value;
  mlora::cluster_sync();
}

}  // namespace

int main(int count, char** argument) {
  const char* names[] = {"none", "no barrier", "no barrier after read", "no cluster barrier", "warp only",
                         "uninitialised", "divergent shuffle", "other shuffle", "divergent barrier", "beyond shared",
                         "beyond global", "unaligned"};
  int bug = -1;
  for (int i = 0; i < 12 && count > 1; ++i) bug = std::string(names[i]) == argument[1] ? i : bug;
  if (bug < 0) return 2;
  constexpr int kBlocks = 4;
  float* to = static_cast<float*>(std::calloc(kBlocks * kThreads, sizeof(float)));
  float* from = static_cast<float*>(std::calloc(kThreads, sizeof(float)));
  int result = 0;
  for (int i = 0; i < 3; ++i) {  // in each order of the threads
    try {
      mlora::launch(kernel, kBlocks, kThreads, 2, nullptr, to, static_cast<const float*>(from), bug);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s\n", error.what());
      result = 1;
    }
  }
  std::free(to);
  std::free(from);
  return result;
}
