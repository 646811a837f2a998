"""UniLoRA: dW = B A, whose entries are those of one vector theta, scaled   (arXiv:2506.00799).

    A = theta[i_A] * s_A, B = theta[i_B] * s_B

Each entry of theta is used about as often as any other, n times, and scaled by 1 / sqrt(n). Files hold the places i and
the scales s, or with `save_indices=False` theta alone: PEFT then deals the places out anew, A and B of one module after
another in the model's order, by NumPy's generator. So does this.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .. import errors
from .delta import Delta, compact
from .module import Format, Lowering, Module

_PARTS = ("unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B")

FORMAT = Format(
    parts={part: part for part in _PARTS},
    honoured={"r", "theta_d_length", "proj_seed", "save_indices"},
    neutral={"unilora_dropout", "init_theta_d_bound", "init_weights"},
    shared={"base_model.unilora_theta_d": "unilora_theta_d"},
    integers={"unilora_indices_A", "unilora_indices_B"},
)


def delta(module: Module) -> Delta:
    """The delta of one module."""
    base, rank, length = module.base, module.integer("r", 4), module.integer("theta_d_length", 256)
    theta = module.whole("unilora_theta_d", length)
    if module.config.get("save_indices"):
        a = _entries(module, theta, "A", (rank, base.in_features))
        b = _entries(module, theta, "B", (base.out_features, rank))
    else:
        a, b = _dealt(module, theta, rank)
    return compact(a, b.t())


def _entries(module: Module, theta: Tensor, side: str, shape: tuple[int, int]) -> Tensor:
    places = module.part(f"unilora_indices_{side}", *shape).long()
    if places.min() < 0 or places.max() >= len(theta):
        raise errors.AdapterError(f"{module.where}: unilora_indices_{side} lie outside of theta's {len(theta)} entries")
    return theta[places] * module.part(f"unilora_scales_{side}", *shape)


def _dealt(module: Module, theta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    base, sizes = module.base, [rank * (target.in_features + target.out_features) for target in module.targets]
    if strange := [target.name for target in module.targets if not target.linear]:
        raise errors.UnsupportedAdapterError(
            f"adapter from {module.source}: its target_modules name {strange[0]}; PEFT has UniLoRA for linears only"
        )
    own = [target.name for target in module.targets].index(base.name)
    places, scales = _places(sum(sizes), len(theta), module.integer("proj_seed", 42, least=0))
    start, split = sum(sizes[:own]), rank * base.in_features
    mine = places[start : start + sizes[own]]
    entries = theta[mine] * scales[mine]
    return entries[:split].view(rank, base.in_features), entries[split:].view(base.out_features, rank)


@lru_cache(maxsize=1)
def _places(count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """The place in theta of each of `count` entries, and the scale of each place (PEFT's `generate_index`)."""
    generator = np.random.default_rng(seed)
    places = np.repeat(np.arange(length), count // length)
    if rest := count % length:
        places = np.concatenate([places, generator.choice(length, size=rest, replace=False)])
    generator.shuffle(places)
    found = torch.from_numpy(places)
    counts = torch.bincount(found, minlength=length)
    return found, counts.clamp(min=1).float().rsqrt()


UNILORA = Lowering(FORMAT, delta, ordered=True, everywhere="unilora_theta_d", starts=lambda config: False)
