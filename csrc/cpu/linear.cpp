// The operators linear and linear_keep: the base product by the block that gives the library's bits, or by the library.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <map>
#include <optional>
#include <vector>

#include "../strides.h"
#include "jobs.h"
#include "ops.h"
#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // of torch 2.12; before, errors have no text of their own
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace mlora {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls an operator by name; its first result.
template <class Result, class... Args>
Result call(const char* name, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Result>(stack[0]);
}

// What `linear` may be given for a kblock beside a number of inputs; as in ops/dispatch.py.
constexpr int64_t kLibrary = 0;  // the library computes the product, and rounds it before the delta is added
constexpr int64_t kProbed = -1;  // what probe_kblock says
constexpr int64_t kFastest = -3;  // what probe_fastest says

// What probe_kblock or probe_fastest, which are Python, say; they are asked once a thread, shape and range of tokens.
int64_t probed_kblock(const Tensor& weight, bool bias, int64_t tokens, bool fastest) {
  constexpr int64_t kOwn = 64;  // up to which each number of tokens may have a block of its own
  int64_t alike = tokens;
  if (tokens > kOwn) {
    for (alike = kOwn; alike < tokens;) alike *= 2;
  }
  const ScalarType dtype = weight.scalar_type();
  thread_local std::map<std::array<int64_t, 7>, int64_t> answers;
  const std::array<int64_t, 7> question = {weight.size(0), weight.size(1), bias, alike, static_cast<int64_t>(dtype),
                                           static_cast<int64_t>(torch::stable::get_num_threads()), fastest};
  const auto known = answers.find(question);
  if (known != answers.end()) return known->second;
  const char* name = fastest ? "mlora::probe_fastest" : "mlora::probe_kblock";
  return answers[question] = call<int64_t>(name, weight.size(1), weight.size(0), bias, tokens, dtype);
}

// Whether the library multiplies x as one matrix of tokens, in rows, and adds a bias before it rounds. To inputs in
// pieces it may do it batch by batch, in columns, or the bias afterwards. As in layers/state.py.
bool in_rows(const Tensor& x, bool bias) {
  if (x.is_contiguous()) return true;
  return x.stride(x.dim() - 1) == 1 && (x.dim() == 2 || (!bias && x.dim() == 3 && x.size(1) == 1));
}

struct Block {  // what linear needs of one thread
  Scratch xt, panel, sums, delta;
};
thread_local Block thread_block;

// Gives segments of few tokens a delta, which is made before the base's product: read column by column with that, B's
// rows are a cache line here and there. Returns whether there is one, and no rank rows but theirs.
bool place_deltas(const Problem& p, Work& work, bool* any) {
  const int64_t stride = ceil_div(p.out, kLinearColumns) * kLinearColumns;
  const auto few = [](const Segment& s) { return s.ranks && s.count <= kFewTokens; };
  int64_t count = 0;
  bool all = true;
  for (const Segment& s : work.segments) {
    if (few(s)) count += s.count;
    all = all && (few(s) || !s.ranks);
  }
  float* delta = count ? thread_block.delta.get<float>(count * stride) : nullptr;
  for (Segment& s : work.segments) {
    if (!few(s)) continue;
    s.delta = delta;
    s.delta_stride = stride;
    delta += s.count * stride;
  }
  *any = count;
  return count && all;
}

}  // namespace

void linear_rows(const Routing& routing, const Problem& p, Types types) {
  const Kernels& k = kernels();
  const Type type = rows_type(types);
  const int64_t unit = type == kBFloat16 ? 2 : 1;
  const bool along = p.kblock == kAlong || p.kblock == kDots;  // or in blocks
  if (p.kblock == kDots) {
    STD_TORCH_CHECK(k.dots[type], "mlora: linear in torch's order takes 16 bits, and needs a CPU with AVX2");
    STD_TORCH_CHECK(p.in % kDotStep == 0, "mlora: linear in torch's order takes a multiple of ", kDotStep,
                    " input features, x has ", p.in);
  }
  if (along) {
    STD_TORCH_CHECK(p.in > 0, "mlora: linear takes no empty rows");
  } else {
    STD_TORCH_CHECK(p.kblock > 0 && p.kblock % unit == 0, "mlora: kblock must be positive, and even for bfloat16, is ",
                    p.kblock);
    STD_TORCH_CHECK(type != kHalf, "mlora: linear takes float32 or bfloat16 with a kblock");
    STD_TORCH_CHECK(k.blocks[type],
                    "mlora: linear with a kblock needs a CPU with AVX2, and with AVX512_BF16 for bfloat16");
    STD_TORCH_CHECK(p.in % unit == 0, "mlora: linear takes an even number of bfloat16 input features, x has ", p.in);
  }
  Work& work = thread_work();
  work.build(routing, p.tokens, p.in, p.out, true, p.keep, p.kept);
  if (p.tokens == 0 || p.out == 0) return;
  const int64_t units = ceil_div(p.out, kLinearColumns), tiles = ceil_div(p.tokens, kLinearTokens);
  const int64_t cost = units * kLinearColumns * p.in * tiles;
  bool deltas = false;
  const bool only_deltas = place_deltas(p, work, &deltas);
  int64_t shrink = 0, expand = 0, b_bytes = 0;
  std::vector<Piece>& pieces = thread_planned().pieces;
  pieces.clear();
  for (const Segment& s : work.segments) {
    pieces.push_back(piece_of(p, s));
    if (!s.delta) pieces.back().expand = 0;  // a part of the columns
    shrink += pieces.back().shrink;
    expand += pieces.back().expand;
    b_bytes += s.delta ? 0 : s.b_ranks * p.out * p.itemsize;
  }
  const int64_t steps = ceil_div(p.in, kAlongStep), groups = along ? steps : tiles * ceil_div(p.in / unit, 16);
  const int64_t size = p.kblock == kDots ? int64_t{sizeof(float)} : k.packed[type];
  const int64_t pack_size = along ? p.tokens * steps * kAlongStep * size / int64_t{sizeof(uint32_t)}
                                  : tiles * kLinearTokens * p.in / unit;
  const auto columns = [&](const uint32_t* xt, int64_t task, int64_t tasks) {
    const int64_t begin = task * units / tasks * kLinearColumns, end = (task + 1) * units / tasks * kLinearColumns;
    if (begin == end) return;
    float* sums = thread_block.sums.get<float>((along ? 1 : 2) * tiles * kLinearTokens * kLinearColumns);
    uint32_t* panel = along ? nullptr : thread_block.panel.get<uint32_t>(panel_units(p.tokens) * kLinearColumns);
    k.linear[types](p, xt, work.segments.data(), static_cast<int64_t>(work.segments.size()), panel, sums, begin,
                   end < p.out ? end : p.out);
  };
  const int64_t total = shrink + expand + cost, tasks = threads_for(total);
  if (shrink + expand == 0 && tiles == 1) {  // packing so little twice costs less than waiting for each other
    split(total, [&](int64_t task, int64_t) {
      uint32_t* xt = thread_block.xt.get<uint32_t>(pack_size);
      k.pack[type](p, xt, 0, groups);
      columns(xt, task, tasks);
    });
    return;
  }
  const bool fetch_b = b_bytes <= tasks * kStaysNear;
  std::vector<Jobs>& jobs = thread_planned().jobs_of(tasks);
  bool whole = only_deltas;
  for (int64_t task = 0; task < tasks && whole; ++task) {
    whole = jobs[task].take_whole(pieces, shrink + expand, task, tasks);
  }
  for (int64_t task = 0; task < tasks && !whole; ++task) {
    jobs[task].cut(pieces, shrink, 0, task, tasks, fetch_b);
    const int64_t begin = task * units / tasks * kLinearColumns, end = (task + 1) * units / tasks * kLinearColumns;
    for (const Segment& s : work.segments) {
      if (s.delta) Jobs::add_columns(jobs[task].second, p, s, begin, end < p.out ? end : p.out);
    }
  }
  uint32_t* xt = thread_block.xt.get<uint32_t>(pack_size);
  split_in_two(
      total,
      [&](int64_t task, int64_t) {
        k.pack[type](p, xt, task * groups / tasks, (task + 1) * groups / tasks);
        const std::vector<Job>& list = jobs[task].first;
        k.run[types](list.data(), static_cast<int64_t>(list.size()));
      },
      [&](int64_t task, int64_t) {
        const std::vector<Job>& list = jobs[task].second;
        k.run[types](list.data(), static_cast<int64_t>(list.size()));
        columns(xt, task, tasks);
      });
}

namespace {

Tensor linear_of(Problem p, Tensor x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& arena,
                 const Tensor& table, const Tensor& plan, int64_t kblock) {
  p.in = width_of("x", x);
  p.tokens = x.numel() / p.in;
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == p.in, "mlora: weight must be (out, ", p.in, ")");
  if (kblock == kProbed || kblock == kFastest) {
    const bool asked = weight.is_contiguous() && in_rows(x, bias.has_value());
    kblock = asked ? probed_kblock(weight, bias.has_value(), p.tokens, kblock == kFastest) : kLibrary;
  }
  if (kblock == kLibrary) {
    const Tensor y = call<Tensor>("aten::linear", x, weight, bias);
    apply_tensors(p, y, std::nullopt, x, arena, table, plan);
    return y;
  }
  const Types types = types_of("x", x, arena);
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "mlora: linear takes x and weight alike with a kblock");
  STD_TORCH_CHECK(weight.is_contiguous(), "mlora: weight must be contiguous");
  p.out = weight.size(0);
  p.kblock = kblock;
  p.weight = weight.const_data_ptr();
  if (bias) {
    STD_TORCH_CHECK(bias->scalar_type() == x.scalar_type() && bias->numel() == p.out && bias->is_contiguous(),
                    "mlora: bias must be contiguous, of x's dtype, with ", p.out, " elements");
    p.bias = bias->const_data_ptr();
  }
  x = rows_of(x, &p.x_stride);
  p.x = x.const_data_ptr();

  const auto sizes = x.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = p.out;
  Tensor y = torch::stable::new_empty(x, torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()));
  p.y = y.mutable_data_ptr();
  p.y_stride = p.out;
  p.itemsize = static_cast<int64_t>(arena.element_size());
  linear_rows(routing_of(arena, table, plan), p, types);
  return y;
}

Tensor linear(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor arena, Tensor table, Tensor plan,
              int64_t kblock) {
  return linear_of({}, x, weight, bias, arena, table, plan, kblock);
}

Tensor linear_keep(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor v, Tensor arena, Tensor table, Tensor plan,
                   int64_t kblock) {
  Problem p = {};
  keep(&p, v);
  return linear_of(p, x, weight, bias, arena, table, plan, kblock);
}

}  // namespace
}  // namespace mlora

STABLE_TORCH_LIBRARY_IMPL(mlora, CPU, m) {
  m.impl("linear", TORCH_BOX(&mlora::linear));
  m.impl("linear_keep", TORCH_BOX(&mlora::linear_keep));
}
