// What ops.cpp and the kernels exchange: plain structs and launchers, no torch, so that nvcc's part builds fast.
#pragma once

#include <cstdint>

#ifdef MLORA_EMULATION
#include "emulation.h"
#else
#include <cuda_runtime.h>
#endif

#include "../common.h"

namespace mlora {

constexpr int kSiblings = 4;  // modules of a group

struct Sibling {
  void* y;              // [tokens, out]
  const void* base;     // [tokens, out]; null: y as it was
  const int64_t* table; // [slots, kTableWidth]
  int64_t out, y_stride, base_stride;
};

// Strides are in elements, between tokens.
struct ApplyArgs {
  const void* x;  // [tokens, in]
  const void* arena;
  const int32_t* plan;
  int64_t plan_size, tokens, in, x_stride;
  int64_t slice;  // features that a block of a cluster takes; set by launch_apply
  int32_t siblings;
  Sibling sibling[kSiblings];
};

// scale_input and turn_output.
struct TurnArgs {
  const void* x;     // [tokens, width]: what is scaled or turned
  const void* base;  // [tokens, width]: what turned outputs are added to
  void* y;           // [tokens, width], contiguous
  const void* arena;
  const int64_t* table;
  const int32_t* plan;
  int64_t plan_size, tokens, width, x_stride, base_stride;
};

struct MergeArgs {
  const void* source;  // [out, in], contiguous; may be the weight
  void* weight;        // [out, in], contiguous
  const void* arena;
  const int64_t* table;
  const int32_t* slots;   // [terms]
  const float* weights;   // [terms]
  int64_t in, out;
  int32_t terms;
};

// What the shape of a launch follows from.
constexpr int kClusterSizes = 5;  // 1, 2, 4, 8 and 16 blocks
struct DeviceShape {
  int multiprocessors;
  int clusters[kClusterSizes];  // how many clusters of 2^i blocks of `apply` run at once; 0 where there are none
};

cudaError_t device_shape(int device, DeviceShape* shape);
cudaError_t launch_apply(Types types, const ApplyArgs& args, const DeviceShape& shape, cudaStream_t stream);
cudaError_t launch_scale_input(Types types, const TurnArgs& args, const DeviceShape& shape, cudaStream_t stream);
cudaError_t launch_turn_output(Types types, const TurnArgs& args, const DeviceShape& shape, cudaStream_t stream);
cudaError_t launch_merge(Types types, const MergeArgs& args, cudaStream_t stream);

}  // namespace mlora
