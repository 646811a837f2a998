// scale_input: y = x * (1 + sum_i w_i in_gain_i) + sum_i w_i (in_turn_i - I) x over the terms of each row's recipe; and
// turn_output: y = base + sum_i w_i (turn_i - I) x. Rows without such parts are copied.

#include "device.cuh"
#include "kernels.h"

namespace mlora {
namespace {

constexpr int kThreads = 128;
constexpr int32_t kChain = 64;  // elements of a block that are added up in one go; a longer chain would lose accuracy

// sum[i] += weight * sum_j values[j, k + i] * element j of the block of column k + i, of `left` columns.
template <class T>
__device__ __forceinline__ void add_turn(const T* values, int64_t shape, float weight, const T* x, int64_t width,
                                         int32_t k, int32_t left, float* sum) {
  const int32_t size = static_cast<int32_t>(turn_size(shape)), stride = static_cast<int32_t>(turn_stride(shape));
  int32_t first[8];  // of the column's block
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    first[i] = k + i - (k + i) / stride % size * stride;
  }
  for (int32_t j = 0; j < size;) {
    const int32_t stop = size - j < kChain ? size : j + kChain;
    float chain[8] = {};
#pragma unroll 1
    for (; j < stop; ++j) {
      float part[8];
      load_eight(values + j * width + k, left, part);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i < left) chain[i] = fmaf(weight * part[i], to_float(x[first[i] + j * stride]), chain[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] += chain[i];
  }
}

// Blocks of a multiprocessor: as many as leave the registers that are needed. sm_120 runs fewer threads.
template <class T>
constexpr int blocks() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
  return sizeof(T) == 4 ? 3 : 4;
#else
  return sizeof(T) == 4 ? 5 : 6;
#endif
}

template <class T, bool kOutput>
__global__ void __launch_bounds__(kThreads, blocks<T>()) turn_kernel(const __grid_constant__ TurnArgs args) {
  const Plan plan(args.plan, args.plan_size, args.tokens);
  const T* arena = static_cast<const T*>(args.arena);
  for (int32_t position = static_cast<int32_t>(blockIdx.x); position < args.tokens; position += gridDim.x) {
    int64_t token = position;
    int32_t first = 0, last = 0;  // terms
    if (plan.routes > 0) {
      token = plan.token(position);
      const int32_t row = position / plan.length;
      if (row < plan.row_start[plan.routes]) {
        int32_t low = 0, high = plan.routes;  // row_start[low] <= row < row_start[high]
        while (high - low > 1) {
          const int32_t middle = (low + high) / 2;
          (plan.row_start[middle] <= row ? low : high) = middle;
        }
        first = plan.term_start[low];
        last = plan.term_start[low + 1];
      }
    }
    const T* x = static_cast<const T*>(args.x) + token * args.x_stride;
    for (int32_t k = static_cast<int32_t>(threadIdx.x) * 8; k < args.width; k += kThreads * 8) {
      const int32_t left = args.width - k < 8 ? static_cast<int32_t>(args.width) - k : 8;
      float value[8];
      load_eight(kOutput ? static_cast<const T*>(args.base) + token * args.base_stride + k : x + k, left, value);
      if (!kOutput) {
        float gain[8] = {};
#pragma unroll 1  // more loads at a time take more registers than there are
        for (int32_t e = first; e < last; ++e) {
          const int64_t offset = table_row(args.table, plan.term_slot[e])[kInGain];
          if (offset < 0) continue;
          float part[8];
          load_eight(arena + offset + k, left, part);
#pragma unroll
          for (int i = 0; i < 8; ++i) gain[i] = fmaf(plan.weight(e), part[i], gain[i]);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) value[i] = fmaf(gain[i], value[i], value[i]);
      }
#pragma unroll 1
      for (int32_t e = first; e < last; ++e) {
        const int64_t* row = table_row(args.table, plan.term_slot[e]);
        const int64_t turn = row[kOutput ? kTurn : kInTurn], shape = row[kOutput ? kTurnShape : kInTurnShape];
        if (turn >= 0) add_turn(arena + turn, shape, plan.weight(e), x, args.width, k, left, value);
      }
      store_eight(static_cast<T*>(args.y) + token * args.width + k, left, value);
    }
  }
}

template <class T, bool kOutput>
cudaError_t launch_typed(const TurnArgs& args, const DeviceShape& shape, cudaStream_t stream) {
  const int64_t most = int64_t{shape.multiprocessors} * 8;
  return launch(turn_kernel<T, kOutput>, args.tokens < most ? args.tokens : most, kThreads, 1, stream, args);
}

}  // namespace

cudaError_t launch_scale_input(Type type, const TurnArgs& args, const DeviceShape& shape, cudaStream_t stream) {
  return with_type(type, [&](auto t) { return launch_typed<decltype(t), false>(args, shape, stream); });
}

cudaError_t launch_turn_output(Type type, const TurnArgs& args, const DeviceShape& shape, cudaStream_t stream) {
  return with_type(type, [&](auto t) { return launch_typed<decltype(t), true>(args, shape, stream); });
}

}  // namespace mlora
