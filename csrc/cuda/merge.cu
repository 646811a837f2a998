// merge_: W <- S * (1 + sum_i w_i (gain_i + in_gain_i)) + sum_i w_i scale_i B_i^T A_i, where gains scale rows and input
// gains columns of the source S, which may be W. One pass: read once, summed in fp32, rounded once, written once. T is the
// type of S and W, P that of the arena.

#include "device.cuh"
#include "kernels.h"

namespace mlora {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 64;   // rows and columns of W that a block takes
constexpr int kChunk = 16;  // rank rows staged at a time

struct Shared {
  float a[kChunk][kTile], b[kChunk][kTile];
  float gain[2][kTile];  // of rows, of columns
};

// to[0:64] = scale * from[0:count], zeros beyond, by eight lanes.
template <class P>
__device__ __forceinline__ void stage(const P* from, int64_t count, float scale, int lane, float* to) {
  float value[8];
  load(from + lane * 8, count - lane * 8, value);
#pragma unroll
  for (int i = 0; i < 8; ++i) to[lane * 8 + i] = scale * value[i];
}

template <class T, class P>
__global__ void __launch_bounds__(kThreads, 3) merge_kernel(const __grid_constant__ MergeArgs args) {
  Shared& s = shared_memory<Shared>();
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t tiles = (args.in + kTile - 1) / kTile;
  const int64_t first_row = blockIdx.x / tiles * kTile, first_column = blockIdx.x % tiles * kTile;
  const int64_t rows_left = args.out - first_row, columns_left = args.in - first_column;
  const P* arena = static_cast<const P*>(args.arena);

  if (thread < kTile / 4) {  // the gains, of eight rows or columns a thread
    const bool input = thread >= kTile / 8;
    const int at = thread % (kTile / 8) * 8;
    const int64_t first = input ? first_column : first_row, left = input ? columns_left : rows_left;
    float sum[8] = {};
#pragma unroll 1
    for (int32_t e = 0; e < args.terms; ++e) {
      const int64_t part = table_row(args.table, args.slots[e])[input ? kInGain : kGain];
      if (part < 0) continue;
      float gain[8];
      load(arena + part + first + at, left - at, gain);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i] = fmaf(args.weights[e], gain[i], sum[i]);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) s.gain[input][at + i] = sum[i];
  }

  // Eight columns of two rows a thread, kTile / 2 rows apart.
  const int row = static_cast<int>(threadIdx.x / 8), column = static_cast<int>(threadIdx.x % 8) * 8;
  float acc[2][8] = {};
  for (int32_t e = 0; e < args.terms; ++e) {
    const int64_t* entry = table_row(args.table, args.slots[e]);
    const float scale = args.weights[e] * table_scale(entry);
    const int64_t rank = entry[kRank];
    for (int64_t from = 0; from < rank; from += kChunk) {
      __syncthreads();  // nobody works with the chunk before this one any more
      const int r = thread % (kChunk * 8) / 8, lane = thread % 8;
      if (from + r < rank) {  // A by the first half of the threads, B by the second
        if (thread < kChunk * 8) {
          stage(arena + entry[kA] + (from + r) * args.in + first_column, columns_left, 1.0f, lane, s.a[r]);
        } else {
          stage(arena + entry[kB] + (from + r) * args.out + first_row, rows_left, scale, lane, s.b[r]);
        }
      }
      __syncthreads();
      const int count = rank - from < kChunk ? static_cast<int>(rank - from) : kChunk;
#pragma unroll 2
      for (int j = 0; j < count; ++j) {
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          const float b = s.b[j][row + t * (kTile / 2)];
#pragma unroll
          for (int i = 0; i < 8; ++i) acc[t][i] = fmaf(b, s.a[j][column + i], acc[t][i]);
        }
      }
    }
  }
  __syncthreads();  // the gains are there, whatever the ranks
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    const int at = row + t * (kTile / 2);
    if (at >= rows_left) break;
    const int64_t offset = (first_row + at) * args.in + first_column + column;
    float w[8];
    load(static_cast<const T*>(args.source) + offset, columns_left - column, w);
#pragma unroll
    for (int i = 0; i < 8; ++i) w[i] += fmaf(s.gain[0][at] + s.gain[1][column + i], w[i], acc[t][i]);
    store(static_cast<T*>(args.weight) + offset, columns_left - column, w);
  }
}

template <class T, class P>
cudaError_t launch_typed(const MergeArgs& args, cudaStream_t stream) {
  const int64_t grid = ((args.out + kTile - 1) / kTile) * ((args.in + kTile - 1) / kTile);
  return launch(merge_kernel<T, P>, grid, kThreads, 1, stream, args);
}

}  // namespace

cudaError_t launch_merge(Types types, const MergeArgs& args, cudaStream_t stream) {
  return with_types(types, [&](auto t, auto p) { return launch_typed<decltype(t), decltype(p)>(args, stream); });
}

}  // namespace mlora
