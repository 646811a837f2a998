// The operators rank_gradients_ and column_sums.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <vector>

#include "../strides.h"
#include "ops.h"
#include "split.h"

namespace mlora {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGradientUnit = 32;  // columns of a gradient that a thread takes at least

void rank_gradients_(Tensor to, Tensor v, Tensor rows, Tensor offsets, Tensor arena, Tensor table, Tensor plan) {
  const int64_t width = width_of("rows", rows), tokens = rows.numel() / width;
  const Type type = rows_type(types_of("rows", rows, arena));
  STD_TORCH_CHECK(to.dim() == 1 && to.is_contiguous() && to.scalar_type() == ScalarType::Float,
                  "mlora: to must be a contiguous 1-D float32 tensor");
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.is_contiguous() && offsets.scalar_type() == ScalarType::Long &&
                      offsets.numel() == table.size(0),
                  "mlora: offsets must be a contiguous int64 tensor of an element for each of the table's slots");
  Problem p = {};
  keep(&p, v);
  Work& work = thread_work();
  work.build(routing_of(arena, table, plan), tokens, 0, 0, false, p.keep, p.kept);
  rows = rows_of(rows, &p.x_stride);

  thread_local std::vector<Gradient> all;
  thread_local std::vector<GradientPart> parts;
  thread_local std::vector<std::array<int64_t, 3>> found;  // slot, segment, the term's first rank row in it
  all.clear();
  parts.clear();
  found.clear();
  for (size_t i = 0; i < work.segments.size(); ++i) {
    const Segment& s = work.segments[i];
    int64_t first = 0;
    for (const Term* term = s.terms; term != s.terms + s.term_count; first += term->rank, ++term) {
      if (term->rank) found.push_back({term->slot, static_cast<int64_t>(i), first});
    }
  }
  std::sort(found.begin(), found.end());
  parts.reserve(found.size());  // or what points there would move
  const int64_t* at = static_cast<const int64_t*>(offsets.const_data_ptr());
  const int64_t* ranks = static_cast<const int64_t*>(table.const_data_ptr()) + kRank;
  int64_t cost = 0, last = -1;
  for (const auto& [slot, index, first] : found) {
    if (at[slot] < 0) continue;
    const Segment& s = work.segments[index];
    const int64_t rank = ranks[slot * kTableWidth];
    STD_TORCH_CHECK(at[slot] <= to.numel() && rank <= (to.numel() - at[slot]) / width, "mlora: the gradient of slot ",
                    slot, ", ", rank, " rank rows of ", width, " from ", at[slot], ", is outside of ", to.numel());
    parts.push_back({&s, s.v + first});
    if (slot != last) {
      all.push_back({&parts.back(), 0, rows.const_data_ptr(), p.x_stride, width, rank,
                     static_cast<float*>(to.mutable_data_ptr()) + at[slot]});
    }
    last = slot;
    ++all.back().count;
  }
  const int64_t units = ceil_div(width, kGradientUnit);
  const auto each = [](const Gradient& g) {
    int64_t count = 0;
    for (const GradientPart* part = g.parts; part != g.parts + g.count; ++part) count += part->segment->count + 1;
    return count * g.rank * kGradientUnit / 4 + 1;
  };
  for (const Gradient& g : all) cost += units * each(g);
  const std::vector<Gradient>& shared = all;  // a thread's own would be another
  split(cost, [&](int64_t task, int64_t tasks) {
    Share share(cost, task, tasks);
    for (const Gradient& g : shared) {
      int64_t begin, end;
      if (!share.take(units, each(g), &begin, &end)) continue;
      kernels().gradients[type](g, begin * kGradientUnit, end * kGradientUnit < width ? end * kGradientUnit : width);
    }
  });
}

Tensor column_sums(Tensor left, std::optional<Tensor> right, std::optional<Tensor> tokens) {
  ColumnSums p = {};
  const int64_t width = width_of("left", left), rows = left.numel() / width;
  const Type type = rows_type(types_of("left", left, left));
  p.count = rows;
  if (right) {
    STD_TORCH_CHECK(right->scalar_type() == left.scalar_type() && width_of("right", *right) == width &&
                        right->numel() == left.numel(),
                    "mlora: right must be rows as left's");
    right = rows_of(*right, &p.right_stride);
    p.right = right->const_data_ptr();
  }
  if (tokens) {
    STD_TORCH_CHECK(tokens->dim() == 1 && tokens->scalar_type() == ScalarType::Long && tokens->is_contiguous(),
                    "mlora: tokens must be a contiguous 1-D int64 tensor");
    p.count = tokens->numel();
    p.tokens = static_cast<const int64_t*>(tokens->const_data_ptr());
    for (int64_t t = 0; t < p.count; ++t) {
      STD_TORCH_CHECK(p.tokens[t] >= 0 && p.tokens[t] < rows, "mlora: token ", p.tokens[t], " of ", rows);
    }
  }
  left = rows_of(left, &p.left_stride);
  p.left = left.const_data_ptr();
  Tensor to = torch::stable::new_empty(left, {width}, ScalarType::Float);
  if (p.count == 0) return torch::stable::zero_(to);
  p.to = static_cast<float*>(to.mutable_data_ptr());
  const int64_t units = ceil_div(width, kColumnUnit);
  split(2 * p.count * width, [&](int64_t task, int64_t tasks) {
    const int64_t from = task * units / tasks * kColumnUnit, end = (task + 1) * units / tasks * kColumnUnit;
    kernels().column_sums[type](p, from, end < width ? end : width);
  });
  return to;
}

}  // namespace
}  // namespace mlora

STABLE_TORCH_LIBRARY_IMPL(mlora, CPU, m) {
  m.impl("rank_gradients_", TORCH_BOX(&mlora::rank_gradients_));
  m.impl("column_sums", TORCH_BOX(&mlora::column_sums));
}
