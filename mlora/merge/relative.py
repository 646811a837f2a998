"""The delta that does, on weights with something folded in, what another does on the base's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import errors
from ..lowering.delta import Delta
from ..lowering.turn import Turn
from .sums import weighted_sum


def relative(recipe: Sequence[tuple[Delta, float]], folded: Sequence[tuple[Delta, float]], where: str) -> Delta:
    """What to add to a module that has `folded` in its weight, so that it does what `recipe` would do alone.

    Let f, G' and U' be the folded sum's low-rank part with its shift, and what it does to outputs and inputs by gains
    and turns; G and U what the recipe does to them. The module gives y'(x) = G' base(U' x) + f(x), so that
        G base(x) = G G'^-1 (y'(x) - f(x))   and   base(U x) = y'(U'^-1 U x) - f(U'^-1 U x).

    Raises:
        MergeError: what is folded in has no inverse, or changes of outputs meet those of inputs, or turns of blocks of
            different sizes each other.
    """
    if any(d.replaces for d, _ in (*recipe, *folded)):
        raise errors.MergeError(
            f"module {where}: weights of another size are no sum with what is folded in; unmerge_adapter first"
        )
    if any(d.invocation for d, _ in recipe):
        raise errors.MergeError(
            f"module {where}: an aLoRA (alora_invocation_tokens) is served beside something folded in only where none "
            f"of the adapters has gains, as DoRA and IA3 do; unmerge_adapter first"
        )
    want, have = weighted_sum(recipe, where), weighted_sum(folded, where)
    if not folded:
        return want
    if any(d.changes_outputs for d in (want, have)) and any(d.changes_inputs for d in (want, have)):
        raise errors.MergeError(f"module {where}: gains and input gains, of which one is folded in, do not combine")
    minus = Delta(have.a, have.b, -1.0, have.matrix, shift=None if have.shift is None else -have.shift)
    made: dict[str, Any] = {}
    for gain, turn in (("gain", "turn"), ("in_gain", "in_turn")):
        ours, theirs = ((getattr(d, gain), getattr(d, turn)) for d in (want, have))
        if all(part is None for part in (*ours, *theirs)):
            continue
        if ours[1] is None and theirs[1] is None:
            ratio: Tensor | Turn = _ratio(ours[0], theirs[0], where)
        else:
            ratio = _turn_ratio(ours, theirs, gain, where)
        if isinstance(ratio, Turn):
            made[turn] = Turn(ratio.values.float(), ratio.stride)
        else:
            made[gain] = (ratio - 1).float()
        minus = _scaled_outputs(minus, ratio) if gain == "gain" else _scaled_inputs(minus, ratio)
    rest = replace(want, gain=None, in_gain=None, turn=None, in_turn=None)
    trained = any(d.trained for d, _ in (*recipe, *folded))
    return replace(weighted_sum([(rest, 1.0), (minus, 1.0)], where), trained=trained, **made)


def _ratio(ours: Tensor | None, theirs: Tensor | None, where: str) -> Tensor:
    """Of a gain to that which is folded in, as 1 + what `Delta` has of either."""
    below = torch.ones(1, dtype=torch.float64) if theirs is None else 1 + theirs.double()
    if (below == 0).any():
        raise errors.MergeError(f"module {where}: a gain of 0 is folded in, which nothing undoes")
    return (1 if ours is None else 1 + ours.double()) / below


def _turn_ratio(ours: Any, theirs: Any, gain: str, where: str) -> Turn:
    """The same of turns, each with the gain beside it: T T'^-1 of outputs, T'^-1 T of inputs."""
    shapes = {turn.shape for _, turn in (ours, theirs) if turn is not None}
    if len(shapes) > 1:
        raise errors.MergeError(
            f"module {where}: turns of blocks of different sizes, of which one is folded in, do not combine"
        )
    ((size, stride),) = shapes
    eye = torch.eye(size, dtype=torch.float64)

    def blocks(scale: Tensor | None, turn: Turn | None) -> Tensor:
        found = eye if turn is None else eye + turn.blocks().double()
        return found if scale is None else found + _in_blocks(scale.double(), size, stride).diag_embed()

    mine, folded = blocks(*ours), blocks(*theirs)
    inverse, info = torch.linalg.inv_ex(folded)
    if info.any():
        raise errors.MergeError(f"module {where}: a turn is folded in that has no inverse: nothing undoes it")
    ratio = mine @ inverse if gain == "gain" else inverse @ mine
    return Turn.of_blocks(ratio - eye, stride)


def _in_blocks(vector: Tensor, size: int, stride: int) -> Tensor:
    """(blocks, size) of (width,)."""
    return vector.reshape(-1, size, stride).transpose(1, 2).reshape(-1, size)


def _scaled(tensor: Tensor, by: Tensor | Turn, transposed: bool = False) -> Tensor:
    """by x along the last dimension; `transposed`: by^T x, where that is no gain."""
    wide = tensor.double()
    return ((wide + by.times(wide, transposed)) if isinstance(by, Turn) else wide * by).float()


def _scaled_outputs(delta: Delta, by: Tensor | Turn) -> Delta:
    """by (B^T A x + c), or by (D x + c)."""
    b, shift = (None if part is None else _scaled(part, by) for part in (delta.b, delta.shift))
    matrix = None if delta.matrix is None else delta.matrix.map(lambda dense: _scaled(dense.t(), by).t())
    return replace(delta, b=b, shift=shift, matrix=matrix)


def _scaled_inputs(delta: Delta, by: Tensor | Turn) -> Delta:
    """B^T A by x, or D by x."""
    a = None if delta.a is None else _scaled(delta.a, by, transposed=True)
    matrix = None if delta.matrix is None else delta.matrix.map(lambda dense: _scaled(dense, by, transposed=True))
    return replace(delta, a=a, matrix=matrix)
