// The kernels of one ISA, gathered.
#pragma once

#include "apply.h"
#include "attend.h"
#include "dropout.h"
#include "gradients.h"
#include "linear.h"
#include "merge.h"
#include "norms.h"
#include "pointwise.h"
#include "turn.h"

namespace mlora {

#define MLORA_TABLE_(isa) kernels_##isa
#define MLORA_TABLE(isa) MLORA_TABLE_(isa)

const Kernels MLORA_TABLE(MLORA_ISA) = {
#define MLORA_TYPES(f) \
  {MLORA_ISA::f<float, float>, MLORA_ISA::f<fp16, fp16>, MLORA_ISA::f<bf16, bf16>, MLORA_ISA::f<fp16, float>, \
   MLORA_ISA::f<bf16, float>}
    MLORA_TYPES(run),
    MLORA_TYPES(scale_input),
    MLORA_TYPES(turn_output),
    MLORA_TYPES(merge),
    MLORA_TYPES(linear),
    {MLORA_ISA::kBlocks<float>, MLORA_ISA::kBlocks<fp16>, MLORA_ISA::kBlocks<bf16>},
    {MLORA_ISA::kDotted<float>, MLORA_ISA::kDotted<fp16>, MLORA_ISA::kDotted<bf16>},
    {MLORA_ISA::pack<float>, MLORA_ISA::pack<fp16>, MLORA_ISA::pack<bf16>},
    {MLORA_ISA::packed<float>(), MLORA_ISA::packed<fp16>(), MLORA_ISA::packed<bf16>()},
#undef MLORA_TYPES
    {MLORA_ISA::attend<float>, MLORA_ISA::attend<fp16>, MLORA_ISA::attend<bf16>},
    {MLORA_ISA::merge_rows<float>, MLORA_ISA::merge_rows<fp16>, MLORA_ISA::merge_rows<bf16>},
    MLORA_ISA::kTileRows,
    {MLORA_ISA::gradients<float>, MLORA_ISA::gradients<fp16>, MLORA_ISA::gradients<bf16>},
    {MLORA_ISA::column_sums<float>, MLORA_ISA::column_sums<fp16>, MLORA_ISA::column_sums<bf16>},
    {MLORA_ISA::row_norms<float>, MLORA_ISA::row_norms<fp16>, MLORA_ISA::row_norms<bf16_in_order>},
    {MLORA_ISA::drop<float>, MLORA_ISA::drop<fp16>, MLORA_ISA::drop<bf16>},
    {MLORA_ISA::rms_norm<float>, MLORA_ISA::rms_norm<fp16>, MLORA_ISA::rms_norm<bf16>},
    {MLORA_ISA::rotate<float>, MLORA_ISA::rotate<fp16>, MLORA_ISA::rotate<bf16>},
    {nullptr, MLORA_ISA::gate<fp16>, MLORA_ISA::gate<bf16>},
};

}  // namespace mlora
