"""TinyLoRA: dW = B (sum_i v_i P_i) A   (arXiv:2602.04118).

A and B are the leading singular vectors of W, times the roots of the singular values, and the P_i fixed random r x r
matrices; v is trained, and shared by groups of modules that follow one another in the model. Files hold A, B and v,
and the P_i unless `save_projection=False`: PEFT then draws them from torch's CPU generator, by a seed and the module's
place among the targets. So does this.

An embedding has A, (r, out), and B, (vocab, r), the other way round, and its delta is not scaled by the embedding's
own scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import errors
from .delta import Delta, compact
from .module import Format, Lowering, Module

FORMAT = Format(
    parts={part: part for part in ("tinylora_A", "tinylora_B", "tinylora_P")},
    honoured={"r", "u", "weight_tying", "projection_seed", "save_projection"},
    neutral={"tinylora_dropout", "init_v_bound", "init_weights"},
    families={"base_model.tinylora_v.": "tinylora_v."},
)


def delta(module: Module) -> Delta:
    """The delta of one module."""
    base, embeds = module.base, module.base.embed_scale is not None
    rank = min(module.integer("r", 2), base.in_features, base.out_features)
    outer, inner = (base.in_features, base.out_features) if embeds else (base.out_features, base.in_features)
    a, b = module.part("tinylora_A", rank, inner).double(), module.part("tinylora_B", outer, rank).double()
    names = [target.name for target in module.targets]
    place = names.index(base.name) if base.name in names else names.index(next(n for n in base.aliases if n in names))
    v = _vector(module, place, len(names))
    middle = torch.einsum("i,ijk->jk", v, _projection(module, place, len(v), rank).double())
    if embeds:
        return compact(b.t().float(), (middle @ a).float())
    return compact((middle @ a).float(), b.t().float())


def _vector(module: Module, place: int, count: int) -> Tensor:
    """v of the group of the module at `place` of `count`."""
    tying = module.number("weight_tying", 0.0)
    groups = max(1, round(count * (1.0 - tying)))
    group = min(place // max(1, count // groups), groups - 1)
    if (held := sum(name.startswith("tinylora_v.") for name in module.shared)) > groups:
        raise errors.AdapterError(
            f"adapter from {module.source}: it has {held} trained vectors, and its config makes {groups} groups of the "
            f"{count} modules that it targets in this model"
        )
    return module.whole(f"tinylora_v.{group}", module.integer("u", 64)).double()


def _projection(module: Module, place: int, count: int, rank: int) -> Tensor:
    if module.config.get("save_projection", True):
        return module.part("tinylora_P", count, rank, rank)
    generator = torch.Generator().manual_seed(module.integer("projection_seed", 42, least=0) + place)
    return torch.normal(mean=0.0, std=1.0 / rank**0.5, size=(count, rank, rank), generator=generator)


TINYLORA = Lowering(FORMAT, delta, ordered=True, starts=lambda config: config.get("init_weights", True) is True)
