// The operator drop.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../strides.h"
#include "ops.h"
#include "split.h"

namespace mlora {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const int32_t* words_of(const char* name, const Tensor& t, int64_t width) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(1) == width && t.scalar_type() == ScalarType::Int && t.is_contiguous(),
                  "mlora: ", name, " must be a contiguous int32 tensor of shape (n, ", width, ")");
  return static_cast<const int32_t*>(t.const_data_ptr());
}

Tensor drop(Tensor x, Tensor places, Tensor odds) {
  Drop d = {};
  d.width = width_of("x", x);
  const int64_t tokens = x.numel() / d.width, rows = places.size(0), adapters = odds.size(0);
  const Type type = rows_type(types_of("x", x, x));
  d.places = words_of("places", places, kPlaceWidth);
  d.odds = words_of("odds", odds, kOddsWidth);
  STD_TORCH_CHECK(rows > 0 ? tokens % rows == 0 : tokens == 0, "mlora: ", tokens, " tokens do not divide into ", rows,
                  " places");
  for (int64_t row = 0; row < rows; ++row) {
    const int32_t who = d.places[row * kPlaceWidth + kWho];
    STD_TORCH_CHECK(who < adapters, "mlora: places name adapter ", who, " of ", adapters);
  }
  x = rows_of(x, &d.x_stride);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  if (tokens == 0) return y;
  d.length = tokens / rows;
  d.x = x.const_data_ptr();
  d.y = y.mutable_data_ptr();
  split(2 * tokens * d.width, [&](int64_t task, int64_t tasks) {
    kernels().drop[type](d, task * tokens / tasks, (task + 1) * tokens / tasks);
  });
  return y;
}

}  // namespace
}  // namespace mlora

STABLE_TORCH_LIBRARY_IMPL(mlora, CPU, m) { m.impl("drop", TORCH_BOX(&mlora::drop)); }
