"""Modules of transformers whose weights their owners compute with and never call them for: adapters of such are refused
when they are loaded. What is not listed here, `reads.py` refuses when it happens."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from .dense import is_dense

# Classes of owners -> the names of what they read. Fused kernels take the convolutions of state-space models and of
# linear attention; `torch.nn.functional.multi_head_attention_forward` takes WavLM's projections.
_READ = {
    r"(Mamba|FalconMamba|Jamba)(Mamba)?Mixer": ("conv1d", "dt_proj"),
    r"(Mamba2|Zamba2?Mamba|Bamba|FalconH1|NemotronHMamba2)Mixer|GraniteMoeHybridMambaLayer": ("conv1d",),
    r".*GatedDeltaNet|(BailingHybrid|KimiLinear)DeltaAttention|.*LinearAttention|Inkling.*ShortConvolution": (
        "conv1d",
    ),
    r"Lfm\d(Moe)?ShortConv": ("conv",),
    r"WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    r"(ConditionalDetr|Detr|MaskFormerDetr)MHAttentionMap": ("k_proj",),
    r"DabDetrMHAttentionMap": ("k_linear",),
    r"TDNNLayer": ("kernel",),
    r"MobileBertLMPredictionHead": ("decoder", "dense"),
    r"LayoutLMv2Encoder": ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
}


def owners_of(model: nn.Module, paths: Mapping[str, nn.Module]) -> Mapping[str, str]:
    """Those of `paths` that are only read -> the class of their owner. It calls quantized ones."""
    found = {}
    for path, module in paths.items():
        parent, _, name = path.rpartition(".")
        if not is_dense(module._parameters.get("weight")):
            continue
        owner = type(model.get_submodule(parent)).__name__
        if any(name in names and re.fullmatch(pattern, owner) for pattern, names in _READ.items()):
            found[path] = owner
    return found
