"""mlora's own type, DELTA: the algebra itself, for merged adapters that no PEFT type can hold.

Per module `delta_A` (rank, in) and `delta_B` (rank, out), or `delta_matrix` (out, in) in their place, `delta_gain`
(out,), `delta_in_gain` (in,), `delta_shift` (out,), and the `values` of turns, `delta_turn` (size, out) and
`delta_in_turn` (size, in), with `delta_turn_stride` and `delta_in_turn_stride` (); each where there is one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from .. import errors
from ..adapters.adapter import Adapter
from .delta import BaseLinear, Delta, Matrix
from .module import Format, Lowering, Module
from .turn import Turn

MATRIX = "delta_matrix"
PARTS = {"a": "delta_A", "b": "delta_B", "gain": "delta_gain", "in_gain": "delta_in_gain", "shift": "delta_shift"}
TURNS = {"turn": "delta_turn", "in_turn": "delta_in_turn"}

FORMAT = Format(
    parts={
        key: key for key in (MATRIX, *PARTS.values(), *TURNS.values(), *(f"{key}_stride" for key in TURNS.values()))
    },
    integers={f"{key}_stride" for key in TURNS.values()},
    convs={1, 2, 3},
    grouped=True,
)


def delta(module: Module) -> Delta:
    """The delta of one module."""
    base = module.base
    widths = {"gain": base.out_features, "in_gain": base.in_features, "shift": base.out_features}
    parts: dict[str, Any] = {
        part: module.part(PARTS[part], width) for part, width in widths.items() if PARTS[part] in module.parts
    }
    if "delta_A" in module.parts or "delta_B" in module.parts:
        parts["a"] = module.part("delta_A", None, base.in_features)
        parts["b"] = module.part("delta_B", parts["a"].shape[0], base.out_features)
    if MATRIX in module.parts:
        if "a" in parts:
            raise errors.AdapterError(f"{module.where}: it has {MATRIX} and factors, delta_A and delta_B, beside it")
        module.check(MATRIX, base.out_features, base.in_features)
        parts["matrix"] = Matrix.of(module.parts[MATRIX])
    for part, key in TURNS.items():
        if key in module.parts:
            parts[part] = _turn(module, key, base.out_features if part == "turn" else base.in_features)
    if parts.get("in_turn") is not None and math.prod(base.kernel) > 1:
        raise errors.AdapterError(f"{module.where}: inputs of a convolution are turned where its kernel is 1x1 only")
    if not parts:
        raise errors.AdapterError(f"{module.where}: it has no weights")
    return Delta(**parts)


def _turn(module: Module, key: str, width: int) -> Turn:
    values = module.part(key, None, width)
    stride = int(module.part(f"{key}_stride"))
    if stride < 1 or width % (len(values) * stride):
        raise errors.AdapterError(
            f"{module.where}: {key} has blocks of {len(values)} elements, {stride} apart, which do not divide {width}"
        )
    return Turn(values, stride)


NATIVE = Lowering(FORMAT, delta)


def to_adapter(deltas: Mapping[str, Delta], source: str, bases: Mapping[str, BaseLinear]) -> Adapter:
    """The adapter that lowers to `deltas` (dotted path -> delta) on `bases`: a LoRA, which PEFT reads too, or a DELTA
    where one of them has gains, turns or no rank rows, is a whole matrix, or is of a convolution for which PEFT's LoRA
    has no such form."""
    deltas = {name: d for name, d in deltas.items() if not d.is_empty}
    plain = all(
        d.a is not None
        and not d.changes_outputs
        and not d.changes_inputs
        and ((conv := bases[name].conv) is None or not (conv.dilated or conv.groups > 1))
        for name, d in deltas.items()
    )
    if not plain:
        tensors = {
            f"{name}.{key}": tensor * d.scale if part == "b" else tensor
            for name, d in deltas.items()
            for part, key in PARTS.items()
            if (tensor := getattr(d, part)) is not None
        }
        for name, d in deltas.items():
            if d.matrix is not None:
                tensors[f"{name}.{MATRIX}"] = d.matrix.read() if d.scale == 1 else d.matrix.read() * d.scale
            for part, key in TURNS.items():
                if (turn := getattr(d, part)) is not None:
                    tensors[f"{name}.{key}"] = turn.values
                    tensors[f"{name}.{key}_stride"] = torch.tensor(turn.stride)
        return Adapter({"peft_type": "DELTA", "target_modules": sorted(deltas)}, tensors, source)
    tensors = {}
    with_bias = any(d.shift is not None for d in deltas.values())
    for name, d in deltas.items():
        assert d.a is not None and d.b is not None
        base = bases[name]
        if base.embed_scale is not None:
            tensors[f"{name}.lora_embedding_A"] = d.a
            tensors[f"{name}.lora_embedding_B"] = (d.b * (d.scale / base.embed_scale)).t().contiguous()
            continue
        kernel = base.kernel
        tensors[f"{name}.lora_A.weight"] = d.a.reshape(d.rank, base.channels, *kernel)
        b = (d.b * d.scale).t().contiguous()
        tensors[f"{name}.lora_B.weight"] = b.reshape(*b.shape, *[1] * len(kernel))
        if with_bias:
            tensors[f"{name}.lora_B.bias"] = torch.zeros(d.b.shape[1]) if d.shift is None else d.shift
    largest = max((d.rank for d in deltas.values()), default=1)
    ranks = {name: d.rank for name, d in deltas.items() if d.rank != largest}
    config = {
        "peft_type": "LORA",
        "target_modules": sorted(deltas),
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,  # a scaling of 1 everywhere
        "lora_bias": with_bias,
    }
    return Adapter(config, tensors, source)
