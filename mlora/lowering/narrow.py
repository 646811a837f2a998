"""Plain LoRAs of a split model, read as slices: a process reads and lowers only what it has.

Nothing in the delta of a plain LoRA takes a whole factor, so it is lowered for a model as narrow as this process's part
is. All other types are lowered whole and cut then (`own.py`).
"""

from __future__ import annotations

from dataclasses import replace

from ..adapters.adapter import Adapter
from ..adapters.on_disk import OnDisk
from .cut import Cut
from .delta import BaseLinear
from .names import Names

# Suffix of a key -> the axis of the module that a dimension of the tensor is, and which.
_FACTORS = {
    ".lora_A.weight": ("inputs", 1),
    ".lora_B.weight": ("outputs", 0),
    ".lora_B.bias": ("outputs", 0),
    ".lora_embedding_A": ("", 0),
    ".lora_embedding_B": ("", 0),
}

# What makes a LoRA more than B A: what these take is whole.
_MORE = (
    "use_dora", "kasa_config", "use_bdlora", "target_parameters", "trainable_token_indices", "modules_to_save",
    "ensure_weight_tying",
)  # fmt: skip


def narrow(adapter: Adapter, names: Names) -> tuple[Adapter, dict[str, BaseLinear]] | None:
    """The adapter with slices in place of its tensors, and the modules as wide as this process has them; None where it
    has to be lowered whole: it is no plain LoRA, lies in memory, or does not plainly fit."""
    bases = names.bases
    tensors = adapter.tensors
    if not isinstance(tensors, OnDisk) or adapter.peft_type != "LORA":
        return None
    if any(adapter.config.get(option) for option in _MORE):
        return None
    slices: dict[str, tuple[int, Cut]] = {}
    for key in tensors:
        suffix = next((suffix for suffix in _FACTORS if key.endswith(suffix)), None)
        base = bases.get(names.find(key.removesuffix(suffix))) if suffix else None
        if suffix is None or base is None:
            return None
        axis, dim = _FACTORS[suffix]
        if base.cut is None:
            continue
        if not base.linear or not axis or base.cut.why or base.owner:
            return None
        shape = tensors.shape(key)
        width = base.in_features if axis == "inputs" else base.out_features
        if len(shape) <= dim or shape[dim] != width:
            return None
        if base.cut.axis == axis:
            slices[key] = dim, base.cut
        elif base.cut.across:
            if len(shape) < 2:  # a bias, which is added to all outputs
                return None
            slices[key] = dim, base.cut.other
    spans = {key: (dim, cut.spans) for key, (dim, cut) in slices.items()}
    return adapter.holding(tensors.narrowed(spans)), {path: _narrowed(base) for path, base in bases.items()}


def _narrowed(base: BaseLinear) -> BaseLinear:
    if base.cut is None or not base.linear or base.cut.why:
        return base
    other = base.cut.other
    widths = {base.cut.axis: base.cut.width, **({other.axis: other.width} if other.spans else {})}
    return replace(
        base,
        in_features=widths.get("inputs", base.in_features),
        out_features=widths.get("outputs", base.out_features),
    )
