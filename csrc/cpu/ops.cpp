// The CPU operators: validation, the split of the work over threads, and the choice of an instruction set.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdlib>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "../strides.h"
#include "work.h"
#if MLORA_X86
#include <xmmintrin.h>
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

// Subnormal operands make FMA code 30 times slower; dot-product instructions flush them anyway.
class FlushSubnormals {
 public:
#if MLORA_X86
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
  unsigned saved_;
#endif
};

// Threads for work of this cost, in elements read or so.
int64_t threads_for(int64_t cost) {
  constexpr int64_t kSmall = 1 << 17;  // not worth waking a thread for
  return cost < kSmall ? 1 : torch::stable::get_num_threads();
}

// Calls f(task, tasks) for every task, one a thread.
template <class F>
void split(int64_t cost, const F& f) {
  const int64_t tasks = threads_for(cost);
  if (tasks == 1) {
    const FlushSubnormals flush;
    f(int64_t{0}, int64_t{1});
    return;
  }
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    for (int64_t task = begin; task < end; ++task) f(task, tasks);
  });
}

// As two calls of `split`, first(task, tasks) for every task before second(task, tasks) for any, but waking the
// threads once. A task of the first phase is run by whoever claims it, so that a thread that comes late holds nobody
// up, and so that nobody ever waits for a task that nobody is running.
template <class First, class Second>
void split_in_two(int64_t cost, const First& first, const Second& second) {
  constexpr int64_t kMost = 256;
  const int64_t tasks = threads_for(cost);
  if (tasks == 1 || tasks > kMost) {
    split(tasks == 1 ? 0 : cost, first);
    split(tasks == 1 ? 0 : cost, second);
    return;
  }
  std::atomic<bool> claimed[kMost] = {};
  std::atomic<int64_t> done{0};
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    for (int64_t i = 0; i < tasks; ++i) {
      const int64_t task = (begin + i) % tasks;
      if (claimed[task].exchange(true, std::memory_order_relaxed)) continue;
      first(task, tasks);
      done.fetch_add(1, std::memory_order_release);
    }
    for (int spins = 0; done.load(std::memory_order_acquire) != tasks; ++spins) {
#if MLORA_X86
      _mm_pause();
#endif
      if (spins > 4096) std::this_thread::yield();
    }
    for (int64_t task = begin; task < end; ++task) second(task, tasks);
  });
}

// Walks jobs laid end to end along the cost axis, and hands out each one's share of one task's range of that axis.
class Share {
 public:
  Share(int64_t cost, int64_t task, int64_t tasks) : from_(task * cost / tasks), to_((task + 1) * cost / tasks) {}

  // A job of `units` units that cost `each`: sets [begin, end) to the units whose first cost lies in the range.
  bool take(int64_t units, int64_t each, int64_t* begin, int64_t* end) {
    *begin = clamp((from_ - position_ + each - 1) / each, from_ <= position_, units);
    *end = clamp((to_ - position_ + each - 1) / each, to_ <= position_, units);
    position_ += units * each;
    return *begin < *end;
  }

 private:
  static int64_t clamp(int64_t unit, bool before, int64_t units) { return before ? 0 : unit < units ? unit : units; }

  int64_t from_, to_, position_ = 0;
};

constexpr int64_t kRankUnit = 4;     // rank rows that a shrink tile takes
constexpr int64_t kColumnUnit = 64;  // columns, at least a cache line of each rank row
constexpr int64_t kStaysNear = 1 << 19;  // bytes that a core's second-level cache keeps beside what else it reads

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

// One task's part of the work on the segments.
struct Jobs {
  std::vector<Job> first, second;

  // Columns of every segment, which need all of its rank rows: `second` waits for every task's `first`.
  void cut(const Problem& p, const Work& work, int64_t shrink, int64_t expand, int64_t task, int64_t tasks) {
    first.clear();
    second.clear();
    Share rank_rows(shrink, task, tasks), columns(expand, task, tasks);
    for (const Segment& s : work.segments) {
      float* v = s.v;
      int64_t begin, end;
      for (int32_t e = 0; e < s.term_count; ++e) {
        const Term& term = s.terms[e];
        if (rank_rows.take(ceil_div(term.rank, kRankUnit), rank_unit_cost(p, s), &begin, &end)) {
          const int64_t last = end * kRankUnit < term.rank ? end * kRankUnit : term.rank;
          first.push_back({&s, &term, v, begin * kRankUnit, last});
        }
        v += term.rank;
      }
      if (expand && s.has_output && columns.take(ceil_div(p.out, kColumnUnit), column_unit_cost(s), &begin, &end)) {
        second.push_back({&s, nullptr, nullptr, begin * kColumnUnit,
                          end * kColumnUnit < p.out ? end * kColumnUnit : p.out});
      }
    }
  }

  // Whole segments, so that nobody waits and an adapter's A and B, which adjoin, are read in one go. Returns false,
  // if they do not divide evenly into the tasks.
  bool take_whole(const Problem& p, const Work& work, int64_t total, int64_t task, int64_t tasks) {
    first.clear();
    second.clear();
    int64_t position = 0, mine = 0;
    for (const Segment& s : work.segments) {
      const int64_t cost = shrink_cost(p, s) + expand_cost(p, s), middle = position + cost / 2;
      position += cost;
      if (cost == 0 || middle * tasks / total != task) continue;
      mine += cost;
      float* v = s.v;
      for (int32_t e = 0; e < s.term_count; ++e) {
        const Term& term = s.terms[e];
        if (term.rank) first.push_back({&s, &term, v, 0, term.rank});
        v += term.rank;
      }
      first.push_back({&s, nullptr, nullptr, 0, p.out});
    }
    return mine * tasks <= total + total / 8;
  }
};

// What the calling thread keeps between calls: a plan resolved, and the jobs of each task.
thread_local Work thread_work;
thread_local std::vector<Jobs> thread_jobs;

std::vector<Jobs>& jobs_of(int64_t tasks) {
  if (static_cast<int64_t>(thread_jobs.size()) < tasks) thread_jobs.resize(tasks);
  return thread_jobs;
}

void apply_(Tensor y, std::optional<Tensor> base, Tensor x, Tensor arena, Tensor table, Tensor plan) {
  Problem p = {};
  p.in = width_of("x", x);
  p.out = width_of("y", y);
  p.tokens = x.numel() / p.in;
  const Type type = type_of("x", x, arena);
  STD_TORCH_CHECK(y.scalar_type() == arena.scalar_type(), "mlora: y and arena must have one dtype");
  STD_TORCH_CHECK(y.numel() == p.tokens * p.out, "mlora: x has ", p.tokens, " tokens, y has ", y.numel() / p.out);
  Work& work = thread_work;
  work.build(arena, table, plan, p.tokens, p.in, p.out, false);
  if (p.tokens == 0 || work.segments.empty()) return;

  x = rows_of(x, &p.x_stride);
  p.x = x.const_data_ptr();
  if (base) {
    STD_TORCH_CHECK(base->scalar_type() == arena.scalar_type(), "mlora: base and arena must have one dtype");
    STD_TORCH_CHECK(base->dim() >= 1 && base->size(base->dim() - 1) == p.out && base->numel() == y.numel(),
                    "mlora: base must have y's shape");
    base = rows_of(*base, &p.base_stride);
    p.base = base->const_data_ptr();
  }
  Tensor rows = rows_of(y, &p.y_stride);
  p.y = rows.mutable_data_ptr();
  const Kernels& k = kernels();
  int64_t shrink = 0, expand = 0, b_bytes = 0, most_b_bytes = 0;
  for (const Segment& s : work.segments) {
    shrink += shrink_cost(p, s);
    expand += expand_cost(p, s);
    const int64_t bytes = s.ranks * p.out * arena.element_size();
    b_bytes += bytes;
    most_b_bytes = bytes > most_b_bytes ? bytes : most_b_bytes;
  }
  const int64_t total = shrink + expand, tasks = threads_for(total);
  std::vector<Jobs>& jobs = jobs_of(tasks);
  const auto run = [&](const std::vector<Job>& list, bool fetch_b) {
    k.run[type](p, list.data(), static_cast<int64_t>(list.size()), fetch_b);
  };
  bool whole = true;
  for (int64_t task = 0; task < tasks && whole; ++task) whole = jobs[task].take_whole(p, work, total, task, tasks);
  if (whole) {
    split(total, [&](int64_t task, int64_t) { run(jobs[task].first, most_b_bytes <= kStaysNear); });
  } else {
    for (int64_t task = 0; task < tasks; ++task) jobs[task].cut(p, work, shrink, expand, task, tasks);
    split_in_two(
        total, [&](int64_t task, int64_t) { run(jobs[task].first, b_bytes <= tasks * kStaysNear); },
        [&](int64_t task, int64_t) { run(jobs[task].second, false); });
  }
  if (rows.get() != y.get()) torch::stable::copy_(y, rows);
}

Tensor scale_input(Tensor x, Tensor arena, Tensor table, Tensor plan) {
  Problem p = {};
  p.in = p.out = p.y_stride = width_of("x", x);
  p.tokens = x.numel() / p.in;
  const Type type = type_of("x", x, arena);
  Work& work = thread_work;
  work.build(arena, table, plan, p.tokens, p.in, 0, true);
  x = rows_of(x, &p.x_stride);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  p.x = x.const_data_ptr();
  p.y = y.mutable_data_ptr();
  const Kernels& k = kernels();
  const int64_t cost = p.tokens * p.in;
  split(cost, [&](int64_t task, int64_t tasks) {
    Share share(cost, task, tasks);
    for (const Segment& s : work.segments) {
      int64_t begin, end;
      if (!share.take(s.count, p.in, &begin, &end)) continue;
      Segment part = s;
      part.tokens += begin;
      part.count = static_cast<int32_t>(end - begin);
      k.scale_input[type](p, part);
    }
  });
  return y;
}

struct Block {  // what linear needs of one thread
  Scratch xt, sums;
};
thread_local Block thread_block;

Tensor linear(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor arena, Tensor table, Tensor plan,
              int64_t kblock) {
  const Kernels& k = kernels();
  STD_TORCH_CHECK(k.linear, "mlora: linear needs a CPU with AVX512_BF16");
  Problem p = {};
  p.in = width_of("x", x);
  p.tokens = x.numel() / p.in;
  const Type type = type_of("x", x, arena);
  STD_TORCH_CHECK(type == kBFloat16 && weight.scalar_type() == ScalarType::BFloat16,
                  "mlora: linear takes bfloat16 only");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == p.in && weight.is_contiguous(),
                  "mlora: weight must be contiguous, (out, ", p.in, ")");
  STD_TORCH_CHECK(p.in % 2 == 0, "mlora: linear takes an even number of input features, x has ", p.in);
  STD_TORCH_CHECK(kblock > 0 && kblock % 2 == 0, "mlora: kblock must be even and positive, is ", kblock);
  p.out = weight.size(0);
  p.kblock = kblock;
  p.weight = weight.const_data_ptr();
  if (bias) {
    STD_TORCH_CHECK(bias->scalar_type() == ScalarType::BFloat16 && bias->numel() == p.out && bias->is_contiguous(),
                    "mlora: bias must be contiguous bfloat16 of ", p.out, " elements");
    p.bias = bias->const_data_ptr();
  }
  Work& work = thread_work;
  work.build(arena, table, plan, p.tokens, p.in, p.out, true);
  x = rows_of(x, &p.x_stride);
  p.x = x.const_data_ptr();

  const auto sizes = x.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = p.out;
  Tensor y = torch::stable::new_empty(x, torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()));
  p.y = y.mutable_data_ptr();
  p.y_stride = p.out;
  if (p.tokens == 0 || p.out == 0) return y;

  const int64_t units = ceil_div(p.out, kLinearColumns), cost = units * kLinearColumns * p.in;
  int64_t shrink = 0, b_bytes = 0;
  for (const Segment& s : work.segments) {
    shrink += shrink_cost(p, s);
    b_bytes += 2 * s.ranks * p.out;
  }
  const auto columns = [&](int64_t task, int64_t tasks) {
    int64_t begin, end;
    if (!Share(cost, task, tasks).take(units, kLinearColumns * p.in, &begin, &end)) return;
    const int64_t tiles = ceil_div(p.tokens, kLinearTokens);
    uint32_t* xt = thread_block.xt.get<uint32_t>(tiles * kLinearTokens * p.in / 2);
    float* sums = thread_block.sums.get<float>(tiles * kLinearTokens * kLinearColumns);
    k.pack(p, xt);
    k.linear(p, xt, work.segments.data(), static_cast<int64_t>(work.segments.size()), sums, begin * kLinearColumns,
             end * kLinearColumns < p.out ? end * kLinearColumns : p.out);
  };
  if (shrink == 0) {
    split(cost, columns);
    return y;
  }
  const int64_t tasks = threads_for(shrink + cost);
  const bool fetch_b = b_bytes <= tasks * kStaysNear;
  std::vector<Jobs>& jobs = jobs_of(tasks);
  for (int64_t task = 0; task < tasks; ++task) jobs[task].cut(p, work, shrink, 0, task, tasks);
  split_in_two(
      shrink + cost,
      [&](int64_t task, int64_t) {
        const std::vector<Job>& list = jobs[task].first;
        k.run[type](p, list.data(), static_cast<int64_t>(list.size()), fetch_b);
      },
      columns);
  return y;
}

thread_local Scratch thread_coefficients;

void merge_(Tensor weight, std::optional<Tensor> source, Tensor arena, Tensor table, Tensor plan) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "mlora: weight must be contiguous, (out, in)");
  const Type type = type_of("weight", weight, arena);
  const Tensor from = source ? *source : weight;
  STD_TORCH_CHECK(from.scalar_type() == weight.scalar_type() && from.dim() == 2 && from.size(0) == weight.size(0) &&
                      from.size(1) == weight.size(1) && from.is_contiguous(),
                  "mlora: source must be as weight is");
  MergeProblem p = {from.const_data_ptr(), weight.mutable_data_ptr(), weight.size(1), weight.size(0)};
  Work& work = thread_work;
  work.build(arena, table, plan, 1, p.in, p.out, true);
  STD_TORCH_CHECK(work.segments.size() == 1, "mlora: merge_ takes a plan of one row");
  const Segment& s = work.segments[0];
  const Kernels& k = kernels();
  const int64_t panels = ceil_div(p.out, kMergeCoefficients);
  split(p.out * p.in * (s.ranks + 1), [&](int64_t task, int64_t tasks) {
    float* v = thread_coefficients.get<float>((s.ranks + 1) * kMergeCoefficients);
    const int64_t begin = task * panels / tasks * kMergeCoefficients;
    const int64_t end = (task + 1) * panels / tasks * kMergeCoefficients;
    k.merge[type](p, s, begin, end < p.out ? end : p.out, v);
  });
}

int64_t isa_number() { return isa(); }

}  // namespace
}  // namespace mlora

STABLE_TORCH_LIBRARY_IMPL(mlora, CPU, m) {
  m.impl("apply_", TORCH_BOX(&mlora::apply_));
  m.impl("linear", TORCH_BOX(&mlora::linear));
  m.impl("scale_input", TORCH_BOX(&mlora::scale_input));
  m.impl("merge_", TORCH_BOX(&mlora::merge_));
}

STABLE_TORCH_LIBRARY_IMPL(mlora, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&mlora::isa_number));
}
