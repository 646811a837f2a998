// The operator row_norms.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "../strides.h"
#include "ops.h"
#include "split.h"

namespace mlora {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kNormUnit = 4 * kNormRows;  // rows that a thread takes at least

Tensor row_norms(Tensor weight, Tensor b, Tensor a, double scale) {
  STD_TORCH_CHECK(weight.dim() == 2 && b.dim() == 2 && a.dim() == 2 && b.size(0) == weight.size(0) &&
                      a.size(1) == weight.size(1) && b.size(1) == a.size(0),
                  "mlora: weight must be (out, in), b (out, rank) and a (rank, in)");
  STD_TORCH_CHECK(a.scalar_type() == ScalarType::Float && b.scalar_type() == ScalarType::Float,
                  "mlora: a and b must be float32");
  const Type type = rows_type(types_of("weight", weight, weight));
  RowNorms p = {};
  p.in = weight.size(1);
  p.rank = a.size(0);
  const int64_t out = weight.size(0);
  Tensor norms = torch::stable::new_empty(a, {out});
  if (out == 0) return norms;
  STD_TORCH_CHECK(p.in > 0, "mlora: weight must have columns");
  weight = rows_of(weight, &p.stride);
  a = torch::stable::contiguous(a);
  p.weight = weight.const_data_ptr();
  p.a = static_cast<const float*>(a.const_data_ptr());
  p.b = static_cast<const float*>(b.const_data_ptr());
  p.b_row = b.stride(0);
  p.b_rank = b.stride(1);
  p.scale = static_cast<float>(scale);
  p.to = static_cast<float*>(norms.mutable_data_ptr());
  const int64_t units = ceil_div(out, kNormUnit);
  split(out * p.in * (p.rank + 1), [&](int64_t task, int64_t tasks) {
    std::vector<float> factors(static_cast<size_t>(kNormRows * p.rank));
    const int64_t from = task * units / tasks * kNormUnit, to = (task + 1) * units / tasks * kNormUnit;
    kernels().row_norms[type](p, from, to < out ? to : out, factors.data());
  });
  return norms;
}

}  // namespace
}  // namespace mlora

STABLE_TORCH_LIBRARY_IMPL(mlora, CPU, m) { m.impl("row_norms", TORCH_BOX(&mlora::row_norms)); }
