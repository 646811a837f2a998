"""EVA's start: A from the principal directions of a module's inputs, and ranks divided by how much they explain.

`peft.get_eva_state_dict` computes the directions from data, on a patched model as on any other. What is done with them
here is what PEFT's `initialize_lora_eva_weights` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import errors
from ..adapters.keys import PEFT_PREFIX
from ..lowering import BaseLinear
from ..lowering.targets import pattern_value, some

_HOW = (
    "compute it with peft.get_eva_state_dict(model, dataloader, config) and give it to add_adapter(..., "
    "eva_state_dict=), or make the adapter with PEFT and load it with is_trainable=True"
)


def eva_start(
    fields: Mapping[str, Any], names: Sequence[str], bases: Mapping[str, BaseLinear], given: Mapping[str, Tensor] | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config as EVA leaves it, and each module's A, (rank, in); modules that got no rank are in neither.

    Args:
        names: the modules that the config targets.
        given: module -> its directions, (rank, in), as PEFT computes them; the rank is the module's new one.

    Raises:
        AdapterError: `given` is missing, or was made for other modules.
    """
    if given is None:
        raise errors.AdapterError(f"config: init_lora_weights='eva' starts from data; {_HOW}")
    found = {str(name).removeprefix(PEFT_PREFIX): tensor for name, tensor in given.items()}
    if missing := [name for name in names if name not in found]:
        raise errors.AdapterError(f"eva_state_dict has nothing for {some(missing)}, which the config targets; {_HOW}")
    if strange := [name for name in found if name not in names]:
        raise errors.AdapterError(f"eva_state_dict has {some(strange)}, which the config does not target; {_HOW}")
    options = fields.get("eva_config") or {}
    adjusts = (options if isinstance(options, Mapping) else vars(options)).get("adjust_scaling_factors", True)
    starts: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name in sorted(names, key=len, reverse=True):  # a shorter one's pattern may match a longer name
        base, directions = bases[name], found[name]
        if directions.dim() != 2 or directions.shape[1] != base.in_features:
            raise errors.AdapterError(
                f"eva_state_dict has shape {tuple(directions.shape)} for {name}, which takes {base.in_features} "
                f"features; it must be (rank, {base.in_features})"
            )
        planned, rank = pattern_value(fields.get("rank_pattern"), name, fields.get("r", 8)), len(directions)
        if not rank:
            continue
        ranks[name] = rank
        alphas[name] = pattern_value(fields.get("alpha_pattern"), name, fields.get("lora_alpha", 8))
        if rank != planned:
            alphas[name] *= rank / planned if adjusts else 1
            directions = directions.to(base.dtype)  # PEFT makes such a layer anew, in the base's dtype
        starts[name] = directions.detach().to("cpu", torch.promote_types(base.dtype, torch.float32))
    changed = dict(fields) | {"rank_pattern": ranks, "alpha_pattern": alphas}
    if len(starts) < len(names):
        changed["target_modules"] = list(starts)
    return changed, starts
