// The CPU operators: validation, the split of the work over threads, and the choice of an instruction set.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "../strides.h"
#include "ops.h"
#include "split.h"
#include "work.h"
#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // of torch 2.12; before, errors have no text of their own
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace mlora {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Isa best_isa() {
#if MLORA_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return kScalar;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq")) {
    return kAvx2;
  }
  return __builtin_cpu_supports("avx512bf16") ? kAvx512Bf16 : kAvx512;
#else
  return kScalar;
#endif
}

// The best the machine has, or the lower one that MLORA_CPU_ISA asks for.
Isa choose_isa() {
  const Isa best = best_isa();
  const char* wanted = std::getenv("MLORA_CPU_ISA");
  if (!wanted || !*wanted) return best;
  const char* names[] = {"scalar", "avx2", "avx512", "avx512_bf16"};
  for (int i = 0; i < 4; ++i) {
    if (std::string(names[i]) == wanted) return i < best ? static_cast<Isa>(i) : best;
  }
  STD_TORCH_CHECK(false, "MLORA_CPU_ISA is '", wanted, "', must be one of scalar, avx2, avx512, avx512_bf16");
}

Isa isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

}  // namespace

const Kernels& kernels() {
#if MLORA_X86
  switch (isa()) {
    case kAvx512Bf16:
      return kernels_avx512_bf16;
    case kAvx512:
      return kernels_avx512;
    case kAvx2:
      return kernels_avx2;
    default:
      break;
  }
#endif
  return kernels_scalar;
}

namespace {

constexpr int64_t kRankUnit = 4;     // rank rows that a shrink tile takes
constexpr int64_t kColumnUnit = 64;  // columns, at least a cache line of each rank row
constexpr int64_t kStaysNear = 1 << 19;  // bytes that a core's second-level cache keeps beside what else it reads

// In elements read or so; reading a rank row costs about as much as using it for four tokens.
int64_t rank_unit_cost(const Problem& p, const Segment& s) { return (s.count + 4) * p.in; }
int64_t column_unit_cost(const Segment& s) { return (s.count + 4) * (s.ranks + 2) * kColumnUnit / 4; }

int64_t shrink_cost(const Problem& p, const Segment& s) {
  int64_t units = 0;
  for (int32_t e = 0; e < s.term_count; ++e) units += ceil_div(s.terms[e].rank, kRankUnit);
  return units * rank_unit_cost(p, s);
}

int64_t expand_cost(const Problem& p, const Segment& s) {
  return s.has_output ? ceil_div(p.out, kColumnUnit) * column_unit_cost(s) : 0;
}

// A segment of one module's work.
struct Piece {
  const Problem* problem;
  const Segment* segment;
  int64_t shrink, expand;  // costs
};

Piece piece_of(const Problem& p, const Segment& s) { return {&p, &s, shrink_cost(p, s), expand_cost(p, s)}; }

// One task's part of the work on the pieces.
struct Jobs {
  std::vector<Job> first, second;

  // Columns of every segment, which need all of its rank rows: `second` waits for every task's `first`. Without
  // `expand`, only what is before.
  void cut(const std::vector<Piece>& pieces, int64_t shrink, int64_t expand, int64_t task, int64_t tasks,
           bool fetch_b) {
    first.clear();
    second.clear();
    Share rank_rows(shrink, task, tasks), columns(expand, task, tasks);
    for (const Piece& piece : pieces) {
      const Problem& p = *piece.problem;
      const Segment& s = *piece.segment;
      float* v = s.v;
      int64_t begin, end;
      for (int32_t e = 0; e < s.term_count; ++e) {
        const Term& term = s.terms[e];
        if (rank_rows.take(ceil_div(term.rank, kRankUnit), rank_unit_cost(p, s), &begin, &end)) {
          const int64_t last = end * kRankUnit < term.rank ? end * kRankUnit : term.rank;
          first.push_back({&p, &s, &term, v, begin * kRankUnit, last, fetch_b});
        }
        v += term.rank;
      }
      if (expand && piece.expand &&
          columns.take(ceil_div(p.out, kColumnUnit), column_unit_cost(s), &begin, &end)) {
        add_columns(second, p, s, begin * kColumnUnit, end * kColumnUnit < p.out ? end * kColumnUnit : p.out);
      }
    }
  }

  // Whole pieces, so that nobody waits and an adapter's A and B, which adjoin, are read in one go. Returns false,
  // if they do not divide evenly into the tasks.
  bool take_whole(const std::vector<Piece>& pieces, int64_t total, int64_t task, int64_t tasks) {
    first.clear();
    second.clear();
    int64_t position = 0, mine = 0;
    for (const Piece& piece : pieces) {
      const int64_t cost = piece.shrink + piece.expand, middle = position + cost / 2;
      position += cost;
      if (cost == 0 || middle * tasks / total != task) continue;
      mine += cost;
      const Problem& p = *piece.problem;
      const Segment& s = *piece.segment;
      const bool fetch_b = s.count > kFewTokens && s.ranks * p.out * p.itemsize <= kStaysNear;
      float* v = s.v;
      for (int32_t e = 0; e < s.term_count; ++e) {
        const Term& term = s.terms[e];
        if (term.rank) first.push_back({&p, &s, &term, v, 0, term.rank, fetch_b});
        v += term.rank;
      }
      add_columns(first, p, s, 0, p.out);
    }
    return mine * tasks <= total + total / 8;
  }

 private:
  static void add_columns(std::vector<Job>& jobs, const Problem& p, const Segment& s, int64_t from, int64_t to) {
    const int64_t most = s.count <= kFewTokens ? kFewColumns : to;
    for (; from < to; from += most) {
      jobs.push_back({&p, &s, nullptr, nullptr, from, to - from < most ? to : from + most, false});
    }
  }
};

// What the calling thread keeps between calls: a plan resolved for a module, and the jobs of each task.
thread_local Work thread_work;
thread_local std::vector<Piece> thread_pieces;
thread_local std::vector<Jobs> thread_jobs;

std::vector<Jobs>& jobs_of(int64_t tasks) {
  if (static_cast<int64_t>(thread_jobs.size()) < tasks) thread_jobs.resize(tasks);
  return thread_jobs;
}

// The work's shrink and expand.
void apply_all(const Problem& p, const Work& work, Type type) {
  std::vector<Piece>& pieces = thread_pieces;
  pieces.clear();
  int64_t shrink = 0, expand = 0, b_bytes = 0;
  for (const Segment& s : work.segments) {
    pieces.push_back(piece_of(p, s));
    shrink += pieces.back().shrink;
    expand += pieces.back().expand;
    b_bytes += s.ranks * p.out * p.itemsize;
  }
  const int64_t total = shrink + expand, tasks = threads_for(total);
  if (total == 0) return;
  std::vector<Jobs>& jobs = jobs_of(tasks);
  const Kernels& k = kernels();
  const auto run = [&](const std::vector<Job>& list) { k.run[type](list.data(), static_cast<int64_t>(list.size())); };
  bool whole = true;
  for (int64_t task = 0; task < tasks && whole; ++task) whole = jobs[task].take_whole(pieces, total, task, tasks);
  if (whole) {
    split(total, [&](int64_t task, int64_t) { run(jobs[task].first); });
    return;
  }
  const bool fetch_b = b_bytes <= tasks * kStaysNear;
  for (int64_t task = 0; task < tasks; ++task) jobs[task].cut(pieces, shrink, expand, task, tasks, fetch_b);
  split_in_two(
      total, [&](int64_t task, int64_t) { run(jobs[task].first); },
      [&](int64_t task, int64_t) { run(jobs[task].second); });
}

}  // namespace

void apply_rows(const Routing& routing, const Problem& p, Type type) {
  Work& work = thread_work;
  work.build(routing, p.tokens, p.in, p.out, false);
  if (p.tokens > 0 && !work.segments.empty()) apply_all(p, work, type);
}

namespace {

// Where an operator leaves what shrink makes, for the backward pass.
void keep(Problem* p, const Tensor& v) {
  STD_TORCH_CHECK(v.dim() == 1 && v.is_contiguous() && v.scalar_type() == ScalarType::Float,
                  "mlora: v must be a contiguous 1-D float32 tensor");
  p->keep = static_cast<float*>(v.mutable_data_ptr());
  p->kept = v.numel();
}

void apply(Problem p, Tensor y, std::optional<Tensor> base, Tensor x, const Tensor& arena, const Tensor& table,
           const Tensor& plan) {
  p.in = width_of("x", x);
  p.out = width_of("y", y);
  p.tokens = x.numel() / p.in;
  p.itemsize = static_cast<int64_t>(arena.element_size());
  const Type type = type_of("x", x, arena);
  STD_TORCH_CHECK(y.scalar_type() == arena.scalar_type(), "mlora: y and arena must have one dtype");
  STD_TORCH_CHECK(y.numel() == p.tokens * p.out, "mlora: x has ", p.tokens, " tokens, y has ", y.numel() / p.out);
  Work& work = thread_work;
  work.build(routing_of(arena, table, plan), p.tokens, p.in, p.out, false, p.keep, p.kept);
  if (p.tokens == 0 || work.segments.empty()) return;
  if (base) {
    STD_TORCH_CHECK(base->scalar_type() == arena.scalar_type(), "mlora: base and arena must have one dtype");
    STD_TORCH_CHECK(base->dim() >= 1 && base->size(base->dim() - 1) == p.out && base->numel() == y.numel(),
                    "mlora: base must have y's shape");
    base = rows_of(*base, &p.base_stride);
    p.base = base->const_data_ptr();
  }
  x = rows_of(x, &p.x_stride);
  p.x = x.const_data_ptr();
  const Tensor rows = rows_of(y, &p.y_stride);
  p.y = rows.mutable_data_ptr();
  apply_all(p, work, type);
  if (rows.get() != y.get()) torch::stable::copy_(y, rows);
}

void apply_(Tensor y, std::optional<Tensor> base, Tensor x, Tensor arena, Tensor table, Tensor plan) {
  apply({}, y, base, x, arena, table, plan);
}

void apply_keep_(Tensor y, Tensor v, std::optional<Tensor> base, Tensor x, Tensor arena, Tensor table, Tensor plan) {
  Problem p = {};
  keep(&p, v);
  apply(p, y, base, x, arena, table, plan);
}

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
  const Type type = type_of("x", x, arena);
  Work& work = thread_work;
  work.build(routing_of(arena, table, plan), p.tokens, p.in, 0, true);
  x = rows_of(x, &p.x_stride);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  p.x = x.const_data_ptr();
  p.y = y.mutable_data_ptr();
  split_columns(p, work, &Segment::in_turns, [&](const Segment& s, int64_t begin, int64_t end) {
    kernels().scale_input[type](p, s, begin, end);
  });
  return y;
}

Tensor turn_output(Tensor y, std::optional<Tensor> base, Tensor arena, Tensor table, Tensor plan) {
  Problem p = {};
  p.in = p.out = p.y_stride = width_of("y", y);
  p.tokens = y.numel() / p.in;
  const Type type = type_of("y", y, arena);
  Tensor x = y;
  if (base) {
    STD_TORCH_CHECK(base->scalar_type() == arena.scalar_type(), "mlora: base and arena must have one dtype");
    STD_TORCH_CHECK(base->dim() >= 1 && base->size(base->dim() - 1) == p.in && base->numel() == y.numel(),
                    "mlora: base must have y's shape");
    x = *base;
  }
  Work& work = thread_work;
  work.build(routing_of(arena, table, plan), p.tokens, 0, p.out, true);
  y = rows_of(y, &p.base_stride);
  x = rows_of(x, &p.x_stride);
  Tensor out = torch::stable::new_empty(y, y.sizes());
  p.x = x.const_data_ptr();
  p.base = y.const_data_ptr();
  p.y = out.mutable_data_ptr();
  split_columns(p, work, &Segment::turns, [&](const Segment& s, int64_t begin, int64_t end) {
    kernels().turn_output[type](p, s, begin, end);
  });
  return out;
}

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

// What probe_kblock, which is Python, says; it is asked once a thread, shape and range of tokens.
int64_t probed_kblock(const Tensor& weight, bool bias, int64_t tokens) {
  constexpr int64_t kOwn = 64;  // up to which each number of tokens may have a block of its own
  int64_t alike = tokens;
  if (tokens > kOwn) {
    for (alike = kOwn; alike < tokens;) alike *= 2;
  }
  const ScalarType dtype = weight.scalar_type();
  thread_local std::map<std::array<int64_t, 6>, int64_t> answers;
  const std::array<int64_t, 6> question = {weight.size(0), weight.size(1), bias, alike, static_cast<int64_t>(dtype),
                                           static_cast<int64_t>(torch::stable::get_num_threads())};
  const auto known = answers.find(question);
  if (known != answers.end()) return known->second;
  return answers[question] =
             call<int64_t>("mlora::probe_kblock", weight.size(1), weight.size(0), bias, tokens, dtype);
}

// Whether the library multiplies x as one matrix of tokens, in rows, and adds a bias before it rounds. To inputs in
// pieces it may do it batch by batch, in columns, or the bias afterwards. As in layers/state.py.
bool in_rows(const Tensor& x, bool bias) {
  if (x.is_contiguous()) return true;
  return x.stride(x.dim() - 1) == 1 && (x.dim() == 2 || (!bias && x.dim() == 3 && x.size(1) == 1));
}

struct Block {  // what linear needs of one thread
  Scratch xt, panel, sums;
};
thread_local Block thread_block;

}  // namespace

void linear_rows(const Routing& routing, const Problem& p, Type type) {
  const Kernels& k = kernels();
  const int64_t unit = type == kBFloat16 ? 2 : 1;
  STD_TORCH_CHECK(type != kHalf, "mlora: linear takes float32 or bfloat16 with a kblock");
  STD_TORCH_CHECK(k.linear[type], "mlora: linear needs a CPU with AVX-512, and AVX512_BF16 for bfloat16");
  STD_TORCH_CHECK(p.in % unit == 0, "mlora: linear takes an even number of bfloat16 input features, x has ", p.in);
  STD_TORCH_CHECK(p.kblock > 0 && p.kblock % unit == 0, "mlora: kblock must be positive, and even for bfloat16, is ",
                  p.kblock);
  Work& work = thread_work;
  work.build(routing, p.tokens, p.in, p.out, true, p.keep, p.kept);
  if (p.tokens == 0 || p.out == 0) return;
  const int64_t units = ceil_div(p.out, kLinearColumns), tiles = ceil_div(p.tokens, kLinearTokens);
  const int64_t cost = units * kLinearColumns * p.in * tiles;
  int64_t shrink = 0, b_bytes = 0;
  std::vector<Piece>& pieces = thread_pieces;
  pieces.clear();
  for (const Segment& s : work.segments) {
    pieces.push_back(piece_of(p, s));
    shrink += pieces.back().shrink;
    b_bytes += s.ranks * p.out * p.itemsize;
  }
  const auto pack_size = tiles * kLinearTokens * p.in / unit;
  const auto columns = [&](const uint32_t* xt, int64_t task, int64_t tasks) {
    const int64_t begin = task * units / tasks * kLinearColumns, end = (task + 1) * units / tasks * kLinearColumns;
    if (begin == end) return;
    const int64_t block = p.kblock < p.in ? p.kblock : p.in;
    float* sums = thread_block.sums.get<float>(tiles * kLinearTokens * kLinearColumns);
    uint32_t* panel = thread_block.panel.get<uint32_t>(ceil_div(block, 16) * 16 * kLinearColumns);
    k.linear[type](p, xt, work.segments.data(), static_cast<int64_t>(work.segments.size()), panel, sums, begin,
                   end < p.out ? end : p.out);
  };
  const int64_t total = shrink + cost, tasks = threads_for(total);
  if (shrink == 0 && tiles == 1) {  // packing so little twice costs less than waiting for each other
    split(total, [&](int64_t task, int64_t) {
      uint32_t* xt = thread_block.xt.get<uint32_t>(pack_size);
      k.pack[type](p, xt, 0, tiles);
      columns(xt, task, tasks);
    });
    return;
  }
  const bool fetch_b = b_bytes <= tasks * kStaysNear;
  std::vector<Jobs>& jobs = jobs_of(tasks);
  for (int64_t task = 0; task < tasks; ++task) jobs[task].cut(pieces, shrink, 0, task, tasks, fetch_b);
  uint32_t* xt = thread_block.xt.get<uint32_t>(pack_size);
  split_in_two(
      total,
      [&](int64_t task, int64_t) {
        k.pack[type](p, xt, task * tiles / tasks, (task + 1) * tiles / tasks);
        const std::vector<Job>& list = jobs[task].first;
        k.run[type](list.data(), static_cast<int64_t>(list.size()));
      },
      [&](int64_t task, int64_t) { columns(xt, task, tasks); });
}

namespace {

Tensor linear_of(Problem p, Tensor x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& arena,
                 const Tensor& table, const Tensor& plan, int64_t kblock) {
  p.in = width_of("x", x);
  p.tokens = x.numel() / p.in;
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == p.in, "mlora: weight must be (out, ", p.in, ")");
  if (kblock == kProbed) {
    const bool asked = weight.is_contiguous() && in_rows(x, bias.has_value());
    kblock = asked ? probed_kblock(weight, bias.has_value(), p.tokens) : kLibrary;
  }
  if (kblock == kLibrary) {
    const Tensor y = call<Tensor>("aten::linear", x, weight, bias);
    apply(p, y, std::nullopt, x, arena, table, plan);
    return y;
  }
  const Type type = type_of("x", x, arena);
  STD_TORCH_CHECK(weight.scalar_type() == arena.scalar_type(),
                  "mlora: linear takes float32 or bfloat16 with a kblock, x, weight and arena alike");
  STD_TORCH_CHECK(weight.is_contiguous(), "mlora: weight must be contiguous");
  p.out = weight.size(0);
  p.kblock = kblock;
  p.weight = weight.const_data_ptr();
  if (bias) {
    STD_TORCH_CHECK(bias->scalar_type() == arena.scalar_type() && bias->numel() == p.out && bias->is_contiguous(),
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
  linear_rows(routing_of(arena, table, plan), p, type);
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

constexpr int64_t kGradientUnit = 32;  // columns of a gradient that a thread takes at least

void rank_gradients_(Tensor to, Tensor v, Tensor rows, Tensor offsets, Tensor arena, Tensor table, Tensor plan) {
  const int64_t width = width_of("rows", rows), tokens = rows.numel() / width;
  const Type type = type_of("rows", rows, arena);
  STD_TORCH_CHECK(to.dim() == 1 && to.is_contiguous() && to.scalar_type() == ScalarType::Float,
                  "mlora: to must be a contiguous 1-D float32 tensor");
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.is_contiguous() && offsets.scalar_type() == ScalarType::Long &&
                      offsets.numel() == table.size(0),
                  "mlora: offsets must be a contiguous int64 tensor of an element for each of the table's slots");
  Problem p = {};
  keep(&p, v);
  Work& work = thread_work;
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

thread_local Scratch thread_factors;

constexpr int64_t kBeyondCaches = 1 << 22;  // bytes

void merge_(Tensor weight, std::optional<Tensor> source, Tensor arena, Tensor table, Tensor plan) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "mlora: weight must be contiguous, (out, in)");
  const Type type = type_of("weight", weight, arena);
  const Tensor from = source ? *source : weight;
  STD_TORCH_CHECK(from.scalar_type() == weight.scalar_type() && from.dim() == 2 && from.size(0) == weight.size(0) &&
                      from.size(1) == weight.size(1) && from.is_contiguous(),
                  "mlora: source must be as weight is");
  MergeProblem p = {from.const_data_ptr(), weight.mutable_data_ptr(), weight.size(1), weight.size(0), false};
  Work& work = thread_work;
  work.build(routing_of(arena, table, plan), 1, p.in, p.out, true);
  STD_TORCH_CHECK(work.segments.size() == 1, "mlora: merge_ takes a plan of one row");
  const Segment& s = work.segments[0];
  STD_TORCH_CHECK(!s.turns && !s.in_turns, "mlora: turns are folded by reference_merge_");
  const Kernels& k = kernels();
  const int64_t row_bytes = p.in * static_cast<int64_t>(weight.element_size());
  p.stream = p.source != p.weight && p.out * row_bytes > kBeyondCaches && row_bytes % 64 == 0 &&
             reinterpret_cast<uintptr_t>(p.weight) % 64 == 0;
  const int64_t blocks = ceil_div(p.out, kMergeRows);
  split(p.out * p.in * (s.ranks + 1), [&](int64_t task, int64_t tasks) {
    float* scratch = thread_factors.get<float>(merge_scratch(p.in, s.ranks));
    const int64_t begin = task * blocks / tasks * kMergeRows, end = (task + 1) * blocks / tasks * kMergeRows;
    k.merge[type](p, s, begin, end < p.out ? end : p.out, scratch);
  });
}

int64_t isa_number() { return isa(); }

}  // namespace
}  // namespace mlora

STABLE_TORCH_LIBRARY_IMPL(mlora, CPU, m) {
  m.impl("apply_", TORCH_BOX(&mlora::apply_));
  m.impl("apply_keep_", TORCH_BOX(&mlora::apply_keep_));
  m.impl("linear", TORCH_BOX(&mlora::linear));
  m.impl("linear_keep", TORCH_BOX(&mlora::linear_keep));
  m.impl("rank_gradients_", TORCH_BOX(&mlora::rank_gradients_));
  m.impl("scale_input", TORCH_BOX(&mlora::scale_input));
  m.impl("turn_output", TORCH_BOX(&mlora::turn_output));
  m.impl("merge_", TORCH_BOX(&mlora::merge_));
}

STABLE_TORCH_LIBRARY_IMPL(mlora, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&mlora::isa_number));
}
