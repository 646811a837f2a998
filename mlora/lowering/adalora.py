"""AdaLoRA: dW = s B diag(E) A, s = alpha / (init_r + 1e-5)   (Zhang et al., arXiv:2303.10512).

PEFT divides by the rank that training began with, whatever is left after pruning, and takes
alpha = init_r where `lora_alpha` is not positive. Rank rows whose E is 0 are dropped.
"""

from __future__ import annotations

from .. import errors
from . import lora
from .delta import Delta
from .module import Format, Lowering, Module

FORMAT = Format(
    parts={"lora_A": "lora_A", "lora_B": "lora_B", "lora_E": "lora_E"},
    honoured={"lora_alpha", "init_r", "rank_pattern"},
    neutral=lora.FORMAT.neutral
    | {
        "r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
        "init_lora_weights", "alpha_pattern", "use_rslora",
    },
    notes=lora.FORMAT.notes,
)  # fmt: skip


def delta(module: Module) -> Delta:
    """The delta of one module."""
    base, initial = module.base, module.integer("init_r", 12)
    e = module.parts.get("lora_E")
    rank = 0 if e is None or e.dim() == 0 else e.shape[0]
    wanted = _kept(module, initial)
    module.expect("lora_E has rank", rank, wanted)
    if rank == 0:
        return Delta()
    a, b = module.part("lora_A", rank, base.in_features), module.part("lora_B", base.out_features, rank)
    values = module.part("lora_E", rank, 1)[:, 0]
    alpha = module.number("lora_alpha", 8)
    scale = (alpha if alpha > 0 else float(initial)) / (initial + 1e-5)
    live = values != 0
    return Delta(a[live] * values[live, None], b.t()[live], scale) if live.any() else Delta()


def _kept(module: Module, initial: int) -> int:
    """How many rank rows training left to the module: its mask in `rank_pattern`, whose keys end in `lora_E`."""
    masks = module.config.get("rank_pattern") or {}
    if not isinstance(masks, dict):
        raise errors.AdapterError(f"adapter from {module.source}: rank_pattern must be an object")
    mask = next((m for key, m in masks.items() if key.partition(".lora_E")[0] == module.file), None)
    if mask is None:
        return initial
    if not isinstance(mask, list) or len(mask) != initial:
        raise errors.AdapterError(f"{module.where}: rank_pattern is not a list of {initial} booleans")
    return sum(map(bool, mask))


ADALORA = Lowering(FORMAT, delta)
