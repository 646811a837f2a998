// How an operator sees a tensor: rows of its last dimension at one distance, of a type that kernels have.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "common.h"

namespace mlora {

// Whether the leading ones of `dims` dimensions are evenly spaced rows of contiguous elements; then *stride is their
// distance.
template <class Sizes>
bool evenly_spaced(const Sizes& sizes, const Sizes& strides, int64_t dims, int64_t* stride) {
  if (sizes[dims - 1] > 1 && strides[dims - 1] != 1) return false;
  int64_t rows = 1, distance = sizes[dims - 1];
  for (int64_t d = dims - 2; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (rows == 1) {
      distance = strides[d];
    } else if (strides[d] != rows * distance) {
      return false;
    }
    rows *= sizes[d];
  }
  *stride = distance;
  return true;
}

inline torch::stable::Tensor rows_of(const torch::stable::Tensor& t, int64_t* stride) {
  if (evenly_spaced(t.sizes(), t.strides(), t.dim(), stride)) return t;
  *stride = t.size(t.dim() - 1);
  return torch::stable::contiguous(t);
}

inline int64_t width_of(const char* name, const torch::stable::Tensor& t) {
  STD_TORCH_CHECK(t.dim() >= 1 && t.size(t.dim() - 1) > 0, "mlora: ", name, " must have a last dimension");
  return t.size(t.dim() - 1);
}

// Of rows `t` and the arena beside them.
inline Types types_of(const char* name, const torch::stable::Tensor& t, const torch::stable::Tensor& arena) {
  using torch::headeronly::ScalarType;
  const ScalarType rows = t.scalar_type(), dtype = arena.scalar_type();
  const bool floats = dtype == ScalarType::Float, halves = dtype == ScalarType::Half;
  STD_TORCH_CHECK(floats || halves || dtype == ScalarType::BFloat16,
                  "mlora: arena must be float32, float16 or bfloat16");
  if (rows == dtype) return floats ? kFloats : halves ? kHalves : kBFloats;
  STD_TORCH_CHECK(floats && (rows == ScalarType::Half || rows == ScalarType::BFloat16), "mlora: ", name,
                  " and arena must have one dtype, or arena float32 beside float16 or bfloat16");
  return rows == ScalarType::Half ? kHalvesByFloats : kBFloatsByFloats;
}

}  // namespace mlora
