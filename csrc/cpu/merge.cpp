// The operator merge_.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "../strides.h"
#include "ops.h"
#include "split.h"

namespace mlora {
namespace {

using torch::stable::Tensor;

thread_local Scratch thread_factors;

constexpr int64_t kBeyondCaches = 1 << 22;  // bytes

void merge_(Tensor weight, std::optional<Tensor> source, Tensor arena, Tensor table, Tensor plan) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "mlora: weight must be contiguous, (out, in)");
  const Types types = types_of("weight", weight, arena);
  const Tensor from = source ? *source : weight;
  STD_TORCH_CHECK(from.scalar_type() == weight.scalar_type() && from.dim() == 2 && from.size(0) == weight.size(0) &&
                      from.size(1) == weight.size(1) && from.is_contiguous(),
                  "mlora: source must be as weight is");
  MergeProblem p = {from.const_data_ptr(), weight.mutable_data_ptr(), weight.size(1), weight.size(0), false};
  Work& work = thread_work();
  work.build(routing_of(arena, table, plan), 1, p.in, p.out, true);
  STD_TORCH_CHECK(work.segments.size() == 1, "mlora: merge_ takes a plan of one row");
  const Segment& s = work.segments[0];
  STD_TORCH_CHECK(!s.turns && !s.in_turns, "mlora: turns are folded by reference_merge_");
  const Kernels& k = kernels();
  const int64_t row_bytes = p.in * static_cast<int64_t>(weight.element_size());
  p.stream = p.source != p.weight && p.out * row_bytes > kBeyondCaches && row_bytes % 64 == 0 &&
             reinterpret_cast<uintptr_t>(p.weight) % 64 == 0;
  const int64_t blocks = ceil_div(p.out, kMergeRows);
  split(p.out * p.in * (s.both_ranks + 1), [&](int64_t task, int64_t tasks) {
    float* scratch = thread_factors.get<float>(merge_scratch(p.in, s.both_ranks));
    const int64_t begin = task * blocks / tasks * kMergeRows, end = (task + 1) * blocks / tasks * kMergeRows;
    k.merge[types](p, s, begin, end < p.out ? end : p.out, scratch);
  });
}

}  // namespace
}  // namespace mlora

STABLE_TORCH_LIBRARY_IMPL(mlora, CPU, m) { m.impl("merge_", TORCH_BOX(&mlora::merge_)); }
