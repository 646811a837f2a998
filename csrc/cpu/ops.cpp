// The CPU operators: validation, the split of the work over threads, and the choice of an instruction set.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <optional>
#include <string>

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

// Calls f(from, to) for ranges that cover [0, cost), one range a thread; the cost is in elements read or so.
template <class F>
void split(int64_t cost, const F& f) {
  constexpr int64_t kSmall = 1 << 17;  // not worth waking a thread for
  const int64_t threads = cost < kSmall ? 1 : torch::stable::get_num_threads();
  if (threads == 1) {
    const FlushSubnormals flush;
    f(int64_t{0}, cost);
    return;
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    f(begin * cost / threads, end * cost / threads);
  });
}

// Walks jobs laid end to end along the cost axis, and hands out each one's share of a range of that axis.
class Share {
 public:
  Share(int64_t from, int64_t to) : from_(from), to_(to) {}

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

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Reading a rank row costs about as much as using it for four tokens.
int64_t shrink_cost(const Problem& p, const Segment& s) { return (s.count + 4) * p.in; }
int64_t expand_cost(const Segment& s) { return (s.count + 4) * (s.ranks + 2) * kColumnUnit / 4; }

void run_shrink(const Kernels& k, Type type, const Problem& p, const Work& work) {
  int64_t cost = 0;
  for (const Segment& s : work.segments) {
    for (int32_t e = 0; e < s.term_count; ++e) {
      cost += ceil_div(s.terms[e].rank, kRankUnit) * shrink_cost(p, s);
    }
  }
  if (cost == 0) return;
  split(cost, [&](int64_t from, int64_t to) {
    Share share(from, to);
    for (const Segment& s : work.segments) {
      int64_t column = 0;
      for (int32_t e = 0; e < s.term_count; ++e) {
        const Term& term = s.terms[e];
        int64_t begin, end;
        if (share.take(ceil_div(term.rank, kRankUnit), shrink_cost(p, s), &begin, &end)) {
          const int64_t last = end * kRankUnit < term.rank ? end * kRankUnit : term.rank;
          k.shrink[type](p, s, term, s.v + column, begin * kRankUnit, last);
        }
        column += term.rank;
      }
    }
  });
}

void run_expand(const Kernels& k, Type type, const Problem& p, const Work& work) {
  const int64_t units = ceil_div(p.out, kColumnUnit);
  int64_t cost = 0;
  for (const Segment& s : work.segments) cost += s.has_output ? units * expand_cost(s) : 0;
  if (cost == 0) return;
  split(cost, [&](int64_t from, int64_t to) {
    Share share(from, to);
    for (const Segment& s : work.segments) {
      int64_t begin, end;
      if (!s.has_output || !share.take(units, expand_cost(s), &begin, &end)) continue;
      k.expand[type](p, s, begin * kColumnUnit, end * kColumnUnit < p.out ? end * kColumnUnit : p.out);
    }
  });
}

Type type_of(const Tensor& x, const Tensor& arena) {
  const ScalarType dtype = arena.scalar_type();
  STD_TORCH_CHECK(x.scalar_type() == dtype, "mlora: x and arena must have one dtype");
  switch (dtype) {
    case ScalarType::Float:
      return kFloat;
    case ScalarType::Half:
      return kHalf;
    case ScalarType::BFloat16:
      return kBFloat16;
    default:
      STD_TORCH_CHECK(false, "mlora: dtype must be float32, float16 or bfloat16");
  }
}

thread_local Work thread_work;

void apply_(Tensor y, std::optional<Tensor> base, Tensor x, Tensor arena, Tensor table, Tensor plan) {
  Problem p = {};
  p.in = width_of("x", x);
  p.out = width_of("y", y);
  p.tokens = x.numel() / p.in;
  const Type type = type_of(x, arena);
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
  run_shrink(k, type, p, work);
  run_expand(k, type, p, work);
  if (rows.get() != y.get()) torch::stable::copy_(y, rows);
}

Tensor scale_input(Tensor x, Tensor arena, Tensor table, Tensor plan) {
  Problem p = {};
  p.in = p.out = p.y_stride = width_of("x", x);
  p.tokens = x.numel() / p.in;
  const Type type = type_of(x, arena);
  Work& work = thread_work;
  work.build(arena, table, plan, p.tokens, p.in, 0, true);
  x = rows_of(x, &p.x_stride);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  p.x = x.const_data_ptr();
  p.y = y.mutable_data_ptr();
  const Kernels& k = kernels();
  const int64_t each = p.in;
  split(p.tokens * p.in, [&](int64_t from, int64_t to) {
    Share share(from, to);
    for (const Segment& s : work.segments) {
      int64_t begin, end;
      if (!share.take(s.count, each, &begin, &end)) continue;
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
  const Type type = type_of(x, arena);
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

  run_shrink(k, type, p, work);
  const int64_t units = ceil_div(p.out, kLinearColumns);
  split(units * kLinearColumns * p.in, [&](int64_t from, int64_t to) {
    int64_t begin, end;
    if (!Share(from, to).take(units, kLinearColumns * p.in, &begin, &end)) return;
    const int64_t tiles = ceil_div(p.tokens, kLinearTokens);
    uint32_t* xt = thread_block.xt.get<uint32_t>(tiles * kLinearTokens * p.in / 2);
    float* sums = thread_block.sums.get<float>(tiles * kLinearTokens * kLinearColumns);
    k.pack(p, xt);
    k.linear(p, xt, work.segments.data(), static_cast<int64_t>(work.segments.size()), sums, begin * kLinearColumns,
             end * kLinearColumns < p.out ? end * kLinearColumns : p.out);
  });
  return y;
}

int64_t isa_number() { return isa(); }

}  // namespace
}  // namespace mlora

STABLE_TORCH_LIBRARY_IMPL(mlora, CPU, m) {
  m.impl("apply_", TORCH_BOX(&mlora::apply_));
  m.impl("linear", TORCH_BOX(&mlora::linear));
  m.impl("scale_input", TORCH_BOX(&mlora::scale_input));
}

STABLE_TORCH_LIBRARY_IMPL(mlora, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&mlora::isa_number));
}
