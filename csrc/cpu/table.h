// The kernels of one ISA, gathered.
#pragma once

#include "apply.h"
#include "attend.h"
#include "dropout.h"
#include "gradients.h"
#include "linear.h"
#include "merge.h"
#include "turn.h"

namespace mlora {

#define MLORA_TABLE_(isa) kernels_##isa
#define MLORA_TABLE(isa) MLORA_TABLE_(isa)

const Kernels MLORA_TABLE(MLORA_ISA) = {
    {MLORA_ISA::run<float>, MLORA_ISA::run<fp16>, MLORA_ISA::run<bf16>},
    {MLORA_ISA::scale_input<float>, MLORA_ISA::scale_input<fp16>, MLORA_ISA::scale_input<bf16>},
    {MLORA_ISA::turn_output<float>, MLORA_ISA::turn_output<fp16>, MLORA_ISA::turn_output<bf16>},
    {MLORA_ISA::merge<float>, MLORA_ISA::merge<fp16>, MLORA_ISA::merge<bf16>},
#if MLORA_HAVE_BF16
    {MLORA_ISA::pack<float>, nullptr, MLORA_ISA::pack<bf16>},
    {MLORA_ISA::linear<float>, nullptr, MLORA_ISA::linear<bf16>},
#elif MLORA_HAVE_AVX512
    {MLORA_ISA::pack<float>, nullptr, nullptr},
    {MLORA_ISA::linear<float>, nullptr, nullptr},
#else
    {},
    {},
#endif
    {MLORA_ISA::attend<float>, MLORA_ISA::attend<fp16>, MLORA_ISA::attend<bf16>},
    {MLORA_ISA::merge_rows<float>, MLORA_ISA::merge_rows<fp16>, MLORA_ISA::merge_rows<bf16>},
    MLORA_ISA::kTileRows,
    {MLORA_ISA::gradients<float>, MLORA_ISA::gradients<fp16>, MLORA_ISA::gradients<bf16>},
    {MLORA_ISA::drop<float>, MLORA_ISA::drop<fp16>, MLORA_ISA::drop<bf16>},
};

}  // namespace mlora
