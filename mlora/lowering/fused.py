"""LoRA of modules that newer versions of transformers hold otherwise: one linear an expert -> a stack of their weights,
gate and up -> one matrix, one matrix of queries, keys and values -> three.

transformers converts weights by operations on tensors (`WeightConverter`). Those that only move rows of a matrix move
those of B alike: conv(s B A) = s conv(B) A. Of several sources the rank rows lie side by side, and each has its own:

    conv(s_1 B_1 A_1, s_2 B_2 A_2) = conv([s_1 B_1, 0], [0, s_2 B_2]) [A_1; A_2]
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import errors
from .delta import BaseLinear, Delta
from .module import Lowering, Module
from .names import Names
from .targets import some


class Converted(NamedTuple):
    """A module of the model's: its `parts` and the `config` that these follow, and the file's `modules` that they were
    made of."""

    parts: dict[str, Tensor]
    config: Mapping[str, Any]
    modules: tuple[str, ...]


def convert(
    modules: Mapping[str, Module], names: Names, bases: Mapping[str, BaseLinear], lowering: Lowering
) -> dict[str, Converted]:
    """What the model has in the place of modules that the file names and the model holds otherwise, by path.

    Args:
        modules: the file's name of such a module -> the module.

    Raises:
        UnsupportedAdapterError: they are no plain LoRA, or are moved otherwise than row by row.
        AdapterError: they do not fit.
    """
    places: dict[str, dict[str, list[str]]] = {}
    for name in modules:
        if (place := names.converted(name)) is not None:
            places.setdefault(place[0], {}).setdefault(place[1], []).append(name)
    made: dict[str, Converted] = {}
    for key, patterns in places.items():
        if (target := key if key in bases else key.removesuffix(".weight")) not in bases:
            continue
        own = [name for named in patterns.values() for name in named]
        source = modules[own[0]].source
        where = f"adapter from {source}: it has weights for {some(own)}, which this model holds as {target}"
        deltas = {name: _delta(modules[name], lowering, where) for name in own}
        experts = bases[target].experts
        slots = {p: _experts(named, experts, names, where) if experts else named for p, named in patterns.items()}
        scale = next(iter(deltas.values())).scale or 1.0
        a, b = _side_by_side(slots, deltas, scale, bases[target], where)
        rank = a.shape[1]
        config = {**modules[own[0]].config, "r": rank, "lora_alpha": scale * rank}
        config.update(use_rslora=False, rank_pattern={}, alpha_pattern={})
        for path, moved in _moved(key, b, bases[target], names, where).items():
            if path not in bases or moved.shape[-2:] != (bases[path].out_features, rank):
                raise errors.AdapterError(f"{where}; converted they have shape {tuple(moved.shape)} at {path}")
            parts = {
                "lora_A": a.flatten(0, 1),
                "lora_B": moved.reshape(-1, *moved.shape[-2:]).permute(1, 2, 0).flatten(1),
            }
            made[path] = Converted(parts, config, tuple(own))
    return made


def _delta(module: Module, lowering: Lowering, where: str) -> Delta:
    """The module's delta, by itself; it must be rank rows and nothing else."""
    kind = module.config.get("peft_type")
    delta = lowering.delta(module) if module.parts.keys() == {"lora_A", "lora_B"} and kind == "LORA" else None
    if not isinstance(delta, Delta) or delta.invocation:
        seen = f"{kind} with {', '.join(sorted(module.parts))}" + (" of an aLoRA" if delta is not None else "")
        raise errors.UnsupportedAdapterError(f"{where}; plain LoRA is served there, and it is {seen}")
    return delta


def _experts(named: list[str], experts: int, names: Names, where: str) -> list[str]:
    """What files call the modules of all experts, in their order; `named` are those that this one has."""
    place = names.converted(named[0])
    for number in re.finditer(r"(?<=\.)\d+(?=\.)", named[0]):
        every = [named[0][: number.start()] + str(n) + named[0][number.end() :] for n in range(experts)]
        if set(named) <= set(every) and all(names.converted(name) == place for name in (every[0], every[-1])):
            return every
    raise errors.AdapterError(
        f"{where}; this model has {experts} experts, 0 to {experts - 1}, and they end with {named[-1]}"
    )


def _side_by_side(
    slots: Mapping[str, list[str]], deltas: Mapping[str, Delta], scale: float, base: BaseLinear, where: str
) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """A of each expert, (experts, rank, in), with the rank rows of all patterns; and B by pattern and expert, (out,
    rank), zero in the rank rows of the others. An expert without weights has zeros."""
    ranks = {p: max(deltas[name].rank for name in named if name in deltas) for p, named in slots.items()}
    a = torch.zeros(max(1, base.experts), sum(ranks.values()), base.in_features)
    b: dict[str, list[Tensor]] = {}
    start = 0
    for pattern, named in slots.items():
        width = next(d.b.shape[1] for name in named if (d := deltas.get(name)) and d.b is not None)
        b[pattern] = [torch.zeros(width, a.shape[1]) for _ in named]
        for expert, name in enumerate(named):
            if (delta := deltas.get(name)) is None:
                continue
            assert delta.a is not None and delta.b is not None
            if (delta.a.shape[1], delta.b.shape[1]) != (base.in_features, width):
                raise errors.AdapterError(
                    f"{where}; {name} has {delta.a.shape[1]} inputs and {delta.b.shape[1]} outputs, which must be "
                    f"{base.in_features} and {width}"
                )
            rows = slice(start, start + delta.rank)
            a[expert, rows] = delta.a.float()
            b[pattern][expert][:, rows] = delta.b.float().t() * (delta.scale / scale)
        start += ranks[pattern]
    return a, b


def _moved(key: str, b: dict[str, list[Tensor]], base: BaseLinear, names: Names, where: str) -> dict[str, Tensor]:
    """B where transformers' conversion puts it: path -> (out, rank), or (experts, out, rank)."""
    patterns = names.converter(next(iter(b))).source_patterns
    if lacking := [pattern for pattern in patterns if pattern not in b]:  # not adapted; what is left of the width
        rest = (base.out_features - sum(own[0].shape[0] for own in b.values())) // len(lacking)
        one = next(iter(b.values()))
        b.update({pattern: [torch.zeros(max(rest, 0), one[0].shape[1]) for _ in one] for pattern in lacking})
    try:
        moved = _run(key, {pattern: b[pattern] for pattern in patterns}, names)
        first = _run(key, {pattern: [tensor[:, :1] for tensor in b[pattern]] for pattern in patterns}, names)
    except (ValueError, RuntimeError, AttributeError) as error:  # what its operations raise at sizes that do not fit
        raise errors.AdapterError(f"{where}; transformers cannot convert them: {error}") from error
    if any(not torch.equal(tensor[..., :1], first[path]) for path, tensor in moved.items()):
        raise errors.UnsupportedAdapterError(f"{where}; that is not by moving rows alone, for which LoRA has no form")
    return moved


def _run(key: str, tensors: Mapping[str, list[Tensor]], names: Names) -> dict[str, Tensor]:
    """What transformers' conversion makes: path -> tensor."""
    converter = names.converter(next(iter(tensors)))
    for pattern, own in tensors.items():
        for tensor in own:
            converter.add_tensor(key, key, pattern, tensor)
    made = converter.convert(key, model=names.model, config=names.model.config)
    return {
        path.removesuffix(".weight"): tensor[0] if isinstance(tensor, list) else tensor for path, tensor in made.items()
    }
