// The kernels of one ISA, gathered.
#pragma once

#include "apply.h"
#include "linear.h"

namespace mlora {

#define MLORA_TABLE_(isa) kernels_##isa
#define MLORA_TABLE(isa) MLORA_TABLE_(isa)

const Kernels MLORA_TABLE(MLORA_ISA) = {
    {MLORA_ISA::shrink<float>, MLORA_ISA::shrink<fp16>, MLORA_ISA::shrink<bf16>},
    {MLORA_ISA::expand<float>, MLORA_ISA::expand<fp16>, MLORA_ISA::expand<bf16>},
    {MLORA_ISA::scale_input<float>, MLORA_ISA::scale_input<fp16>, MLORA_ISA::scale_input<bf16>},
#if MLORA_HAVE_BF16
    MLORA_ISA::pack,
    MLORA_ISA::linear,
#else
    nullptr,
    nullptr,
#endif
};

}  // namespace mlora
