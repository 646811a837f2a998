// scale_input: y = x * (1 + sum_i w_i in_gain_i) over the terms of each row's recipe; rows without one are copied.

#include "device.cuh"
#include "kernels.h"

namespace mlora {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads, 4) scale_input_kernel(const __grid_constant__ ScaleInputArgs args) {
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
    T* y = static_cast<T*>(args.y) + token * args.in;
    for (int64_t k = threadIdx.x * 8; k < args.in; k += kThreads * 8) {
      float gain[8] = {}, value[8];
      for (int32_t e = first; e < last; ++e) {
        const int64_t* row = table_row(args.table, plan.term_slot[e]);
        if (row[kInGain] < 0) continue;
        float part[8];
        load_eight(arena + row[kInGain] + k, args.in - k, part);
#pragma unroll
        for (int i = 0; i < 8; ++i) gain[i] = fmaf(plan.weight(e), part[i], gain[i]);
      }
      load_eight(x + k, args.in - k, value);
#pragma unroll
      for (int i = 0; i < 8; ++i) value[i] = fmaf(gain[i], value[i], value[i]);
      store_eight(y + k, args.in - k, value);
    }
  }
}

template <class T>
cudaError_t launch_typed(const ScaleInputArgs& args, const DeviceShape& shape, cudaStream_t stream) {
  const int64_t most = int64_t{shape.multiprocessors} * 8;
  return launch(scale_input_kernel<T>, args.tokens < most ? args.tokens : most, kThreads, 1, stream, args);
}

}  // namespace

cudaError_t launch_scale_input(Type type, const ScaleInputArgs& args, const DeviceShape& shape, cudaStream_t stream) {
  return with_type(type, [&](auto t) { return launch_typed<decltype(t)>(args, shape, stream); });
}

}  // namespace mlora
