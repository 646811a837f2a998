"""The parts of a delta, put together again, do what the whole does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mlora import errors
from mlora.lowering import BaseLinear, Cut, Delta, Turn, own_parts
from mlora.lowering.delta import Matrix

IN, OUT = 24, 36
DRAW = torch.Generator().manual_seed(0)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=DRAW, dtype=torch.float64)


W, BIAS = _random(OUT, IN), _random(OUT)

DELTAS = {
    "factors": Delta(_random(3, IN), _random(3, OUT), 0.7),
    "matrix": Delta(matrix=Matrix.of(_random(OUT, IN)), scale=1.3),
    "gain and shift": Delta(_random(3, IN), _random(3, OUT), 0.7, gain=_random(OUT), shift=_random(OUT)),
    "input gain": Delta(_random(2, IN), _random(2, OUT), in_gain=_random(IN)),
    "turn": Delta(turn=Turn(_random(2, OUT)), shift=_random(OUT)),
    "turn apart": Delta(turn=Turn(_random(2, OUT), 3)),
    "input turn": Delta(in_turn=Turn(_random(4, IN)), in_gain=_random(IN)),
    "all of it": Delta(
        _random(2, IN), _random(2, OUT), 2.0, gain=_random(OUT), in_gain=_random(IN), turn=Turn(_random(2, OUT)),
        in_turn=Turn(_random(2, IN)), shift=_random(OUT),
    ),
}  # fmt: skip


def _base(cut: Cut | None) -> BaseLinear:
    return BaseLinear("m", IN, OUT, lambda: W, lambda: BIAS, cut=cut)


def _applied(delta: Delta, x: Tensor, w: Tensor, bias: Any) -> Tensor:
    """G base(U x) + scale B^T A x + c."""
    u = x if delta.in_gain is None else x * (1 + delta.in_gain)
    u = u if delta.in_turn is None else u + delta.in_turn.times(x)
    y = u @ w.t() + bias
    out = y if delta.gain is None else y * (1 + delta.gain)
    out = out if delta.turn is None else out + delta.turn.times(y)
    if delta.matrix is not None:
        out = out + delta.scale * x @ delta.matrix.read().t()
    if delta.a is not None and delta.b is not None:
        out = out + delta.scale * (x @ delta.a.t()) @ delta.b
    return out if delta.shift is None else out + delta.shift


OUTPUTS = {"halves": [((0, 18),), ((18, 36),)], "two in one": [((0, 6), (12, 24)), ((6, 12), (24, 36))]}
INPUTS = {"thirds": [((0, 8),), ((8, 16),), ((16, 24),)], "uneven": [((0, 16),), ((16, 24),)]}


@pytest.mark.parametrize("name", DELTAS)
@pytest.mark.parametrize("parts", OUTPUTS.values(), ids=OUTPUTS)
def test_outputs(name: str, parts: Any) -> None:
    x, delta = _random(5, IN), DELTAS[name]
    want = _applied(delta, x, W, BIAS)
    for rank, spans in enumerate(parts):
        cut = Cut("outputs", spans, rank, len(parts))
        own = own_parts({"m": delta}, {"m": _base(cut)})["m"]
        torch.testing.assert_close(_applied(own, x, cut.of(W, 0), cut.of(BIAS, 0)), cut.of(want, 1))


@pytest.mark.parametrize("name", DELTAS)
@pytest.mark.parametrize("parts", INPUTS.values(), ids=INPUTS)
def test_inputs(name: str, parts: Any) -> None:
    """The bias is added when the partial sums have been added up."""
    x, delta, total = _random(5, IN), DELTAS[name], BIAS
    for rank, spans in enumerate(parts):
        cut = Cut("inputs", spans, rank, len(parts))
        own = own_parts({"m": delta}, {"m": _base(cut)})["m"]
        total = total + _applied(own, cut.of(x, 1), cut.of(W, 1), 0)
    torch.testing.assert_close(total, _applied(delta, x, W, BIAS))


def test_experts() -> None:
    """Of five, with two rank rows each."""
    delta = Delta(_random(10, IN), _random(10, OUT), 0.5)
    base = replace(_base(None), experts=5)
    parts = [
        own_parts({"m": delta}, {"m": replace(base, cut=Cut("experts", spans, rank, 2))})["m"]
        for rank, spans in enumerate((((0, 3),), ((3, 5),)))
    ]
    assert [part.rank for part in parts] == [6, 4]
    for name in ("a", "b"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(delta, name))
    with pytest.raises(errors.UnsupportedAdapterError, match="LoRA of them"):
        own_parts({"m": Delta(matrix=Matrix.of(W))}, {"m": replace(base, cut=Cut("experts", ((0, 3),), 0, 2))})


@pytest.mark.parametrize(
    ("delta", "axis", "said"),
    [
        (Delta(turn=Turn(_random(4, OUT), 9)), "outputs", "blocks of 36"),
        (Delta(in_turn=Turn(_random(8, IN))), "inputs", "at 12 of its inputs"),
        (Delta(_random(40, IN), replaces=True), "outputs", "weights of another size"),
    ],
)
def test_what_cannot_be_cut(delta: Delta, axis: str, said: str) -> None:
    width = OUT if axis == "outputs" else IN
    cut = Cut(axis, ((0, width // 2),), 0, 2)
    with pytest.raises(errors.UnsupportedAdapterError, match=said):
        own_parts({"m": delta}, {"m": _base(cut)})
    odd = replace(_base(cut), cut=Cut("", why="it is split oddly"))
    with pytest.raises(errors.UnsupportedAdapterError, match="split oddly"):
        own_parts({"m": delta}, {"m": odd})
