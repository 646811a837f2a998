// How an operator sees a tensor: rows of its last dimension at one distance.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace mlora {

// Whether the leading dimensions are evenly spaced rows of contiguous elements; then *stride is their distance.
inline bool as_rows(const torch::stable::Tensor& t, int64_t* stride) {
  const int64_t dims = t.dim();
  const auto sizes = t.sizes(), strides = t.strides();
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
  if (as_rows(t, stride)) return t;
  *stride = t.size(t.dim() - 1);
  return torch::stable::contiguous(t);
}

inline int64_t width_of(const char* name, const torch::stable::Tensor& t) {
  STD_TORCH_CHECK(t.dim() >= 1 && t.size(t.dim() - 1) > 0, "mlora: ", name, " must have a last dimension");
  return t.size(t.dim() - 1);
}

}  // namespace mlora
