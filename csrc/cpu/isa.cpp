// Which instruction set's kernels run.

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <string>

#include "ops.h"

namespace mlora {
namespace {

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

int64_t isa_number() { return isa(); }

}  // namespace
}  // namespace mlora

STABLE_TORCH_LIBRARY_IMPL(mlora, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&mlora::isa_number)); }
