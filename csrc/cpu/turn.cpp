// The operators scale_input and turn_output.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../strides.h"
#include "ops.h"
#include "split.h"

namespace mlora {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What scale_input and turn_output share: columns of every segment, by cost. `turns` of a segment is how many elements
// each column takes beside its own.
template <class F>
void split_columns(const Problem& p, const Work& work, int64_t Segment::*turns, const F& f) {
  const int64_t units = ceil_div(p.in, kColumnUnit);
  const auto each = [&](const Segment& s) { return s.count * kColumnUnit * (s.*turns + 1); };
  int64_t cost = 0;
  for (const Segment& s : work.segments) cost += units * each(s);
  split(cost, [&](int64_t task, int64_t tasks) {
    Share share(cost, task, tasks);
    for (const Segment& s : work.segments) {
      int64_t begin, end;
      if (!share.take(units, each(s), &begin, &end)) continue;
      f(s, begin * kColumnUnit, end * kColumnUnit < p.in ? end * kColumnUnit : p.in);
    }
  });
}

Tensor scale_input(Tensor x, Tensor arena, Tensor table, Tensor plan) {
  Problem p = {};
  p.in = p.out = p.y_stride = width_of("x", x);
  p.tokens = x.numel() / p.in;
  const Types types = types_of("x", x, arena);
  Work& work = thread_work();
  work.build(routing_of(arena, table, plan), p.tokens, p.in, 0, true);
  x = rows_of(x, &p.x_stride);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  p.x = x.const_data_ptr();
  p.y = y.mutable_data_ptr();
  split_columns(p, work, &Segment::in_turns, [&](const Segment& s, int64_t begin, int64_t end) {
    kernels().scale_input[types](p, s, begin, end);
  });
  return y;
}

Tensor turn_output(Tensor y, std::optional<Tensor> base, Tensor arena, Tensor table, Tensor plan) {
  Problem p = {};
  p.in = p.out = p.y_stride = width_of("y", y);
  p.tokens = y.numel() / p.in;
  const Types types = types_of("y", y, arena);
  Tensor x = y;
  if (base) {
    STD_TORCH_CHECK(base->scalar_type() == y.scalar_type(), "mlora: base and y must have one dtype");
    STD_TORCH_CHECK(base->dim() >= 1 && base->size(base->dim() - 1) == p.in && base->numel() == y.numel(),
                    "mlora: base must have y's shape");
    x = *base;
  }
  Work& work = thread_work();
  work.build(routing_of(arena, table, plan), p.tokens, 0, p.out, true);
  y = rows_of(y, &p.base_stride);
  x = rows_of(x, &p.x_stride);
  Tensor out = torch::stable::new_empty(y, y.sizes());
  p.x = x.const_data_ptr();
  p.base = y.const_data_ptr();
  p.y = out.mutable_data_ptr();
  split_columns(p, work, &Segment::turns, [&](const Segment& s, int64_t begin, int64_t end) {
    kernels().turn_output[types](p, s, begin, end);
  });
  return out;
}

}  // namespace
}  // namespace mlora

STABLE_TORCH_LIBRARY_IMPL(mlora, CPU, m) {
  m.impl("scale_input", TORCH_BOX(&mlora::scale_input));
  m.impl("turn_output", TORCH_BOX(&mlora::turn_output));
}
