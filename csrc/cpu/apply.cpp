// The operators apply_, apply_keep_, shrink_ and expand_.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "../strides.h"
#include "jobs.h"
#include "ops.h"

namespace mlora {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Work& thread_work() {
  thread_local Work work;
  return work;
}

Planned& thread_planned() {
  thread_local Planned planned;
  return planned;
}

namespace {

// The work's shrink and expand.
void apply_all(const Problem& p, const Work& work, Types types) {
  std::vector<Piece>& pieces = thread_planned().pieces;
  pieces.clear();
  int64_t shrink = 0, expand = 0, b_bytes = 0;
  for (const Segment& s : work.segments) {
    pieces.push_back(piece_of(p, s));
    shrink += pieces.back().shrink;
    expand += pieces.back().expand;
    b_bytes += s.b_ranks * p.out * p.itemsize;
  }
  const int64_t total = shrink + expand, tasks = threads_for(total);
  if (total == 0) return;
  std::vector<Jobs>& jobs = thread_planned().jobs_of(tasks);
  const Kernels& k = kernels();
  const auto run = [&](const std::vector<Job>& list) { k.run[types](list.data(), static_cast<int64_t>(list.size())); };
  bool whole = true;
  for (int64_t task = 0; task < tasks && whole; ++task) whole = jobs[task].take_whole(pieces, total, task, tasks);
  if (whole) {
    split(total, [&](int64_t task, int64_t) { run(jobs[task].first); });
    return;
  }
  const bool fetch_b = expand && b_bytes <= tasks * kStaysNear;
  for (int64_t task = 0; task < tasks; ++task) jobs[task].cut(pieces, shrink, expand, task, tasks, fetch_b);
  split_in_two(
      total, [&](int64_t task, int64_t) { run(jobs[task].first); },
      [&](int64_t task, int64_t) { run(jobs[task].second); });
}

}  // namespace

void apply_rows(const Routing& routing, const Problem& p, Types types) {
  Work& work = thread_work();
  work.build(routing, p.tokens, p.in, p.out, false);
  if (p.tokens > 0 && !work.segments.empty()) apply_all(p, work, types);
}

// Where an operator leaves what shrink makes, or finds it.
void keep(Problem* p, const Tensor& v) {
  STD_TORCH_CHECK(v.dim() == 1 && v.is_contiguous() && v.scalar_type() == ScalarType::Float,
                  "mlora: v must be a contiguous 1-D float32 tensor");
  p->keep = static_cast<float*>(v.mutable_data_ptr());
  p->kept = v.numel();
}

void apply_tensors(Problem p, Tensor y, std::optional<Tensor> base, Tensor x, const Tensor& arena, const Tensor& table,
                   const Tensor& plan) {
  p.in = width_of("x", x);
  p.out = width_of("y", y);
  p.tokens = x.numel() / p.in;
  p.itemsize = static_cast<int64_t>(arena.element_size());
  const Types types = types_of("x", x, arena);
  STD_TORCH_CHECK(y.scalar_type() == x.scalar_type(), "mlora: y and x must have one dtype");
  STD_TORCH_CHECK(y.numel() == p.tokens * p.out, "mlora: x has ", p.tokens, " tokens, y has ", y.numel() / p.out);
  Work& work = thread_work();
  work.build(routing_of(arena, table, plan), p.tokens, p.in, p.out, false, p.keep, p.kept);
  if (p.tokens == 0 || work.segments.empty()) return;
  if (base) {
    STD_TORCH_CHECK(base->scalar_type() == x.scalar_type(), "mlora: base and x must have one dtype");
    STD_TORCH_CHECK(base->dim() >= 1 && base->size(base->dim() - 1) == p.out && base->numel() == y.numel(),
                    "mlora: base must have y's shape");
    base = rows_of(*base, &p.base_stride);
    p.base = base->const_data_ptr();
  }
  x = rows_of(x, &p.x_stride);
  p.x = x.const_data_ptr();
  const Tensor rows = rows_of(y, &p.y_stride);
  p.y = rows.mutable_data_ptr();
  apply_all(p, work, types);
  if (rows.get() != y.get()) torch::stable::copy_(y, rows);
}

namespace {

void apply_(Tensor y, std::optional<Tensor> base, Tensor x, Tensor arena, Tensor table, Tensor plan) {
  apply_tensors({}, y, base, x, arena, table, plan);
}

void apply_keep_(Tensor y, Tensor v, std::optional<Tensor> base, Tensor x, Tensor arena, Tensor table, Tensor plan) {
  Problem p = {};
  keep(&p, v);
  apply_tensors(p, y, base, x, arena, table, plan);
}

// apply_all without columns: what it leaves for expand is all there is.
void shrink_(Tensor v, Tensor x, Tensor arena, Tensor table, Tensor plan) {
  Problem p = {};
  keep(&p, v);
  p.in = width_of("x", x);
  p.tokens = x.numel() / p.in;
  p.itemsize = static_cast<int64_t>(arena.element_size());
  const Types types = types_of("x", x, arena);
  Work& work = thread_work();
  work.build(routing_of(arena, table, plan), p.tokens, p.in, 0, false, p.keep, p.kept);
  if (p.tokens == 0 || work.segments.empty()) return;
  x = rows_of(x, &p.x_stride);
  p.x = x.const_data_ptr();
  apply_all(p, work, types);
}

// apply_all without inputs: what shrink leaves is there.
void expand_(Tensor y, Tensor v, Tensor arena, Tensor table, Tensor plan) {
  Problem p = {};
  keep(&p, v);
  p.out = width_of("y", y);
  p.tokens = y.numel() / p.out;
  p.itemsize = static_cast<int64_t>(arena.element_size());
  const Types types = types_of("y", y, arena);
  Work& work = thread_work();
  work.build(routing_of(arena, table, plan), p.tokens, 0, p.out, false, p.keep, p.kept);
  if (p.tokens == 0 || work.segments.empty()) return;
  const Tensor rows = rows_of(y, &p.y_stride);
  p.y = rows.mutable_data_ptr();
  apply_all(p, work, types);
  if (rows.get() != y.get()) torch::stable::copy_(y, rows);
}

}  // namespace
}  // namespace mlora

STABLE_TORCH_LIBRARY_IMPL(mlora, CPU, m) {
  m.impl("apply_", TORCH_BOX(&mlora::apply_));
  m.impl("apply_keep_", TORCH_BOX(&mlora::apply_keep_));
  m.impl("shrink_", TORCH_BOX(&mlora::shrink_));
  m.impl("expand_", TORCH_BOX(&mlora::expand_));
}
