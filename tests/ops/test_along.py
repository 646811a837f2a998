"""Base products in an order of mlora's own: as exact as the library's, and rows do not see each other."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_cases import DTYPES, ROUTINGS, A, B, Case, check, in_chains, needs_native, sentinel

from mlora import layout
from mlora.ops import direct, dispatch, fastest, reference

pytestmark = needs_native
NONE = torch.zeros(layout.PLAN_HEADER, dtype=torch.int32)


@pytest.fixture(autouse=True)
def asked_anew():
    fastest._answers.cache_clear()
    yield
    fastest._answers.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    "ranks, width_in, width_out",
    [((1, 3, 2), 1, 1), ((16, 3, 20), 20, 855), ((16, 1, 0), 2049, 20), ((16, 8, 4), 576, 576), ((4, 1, 2), 5120, 33)],
    ids=["1x1", "20x855", "2049x20", "576x576", "5120x33"],
)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_it_matches_fp64(ranks, width_in, width_out, bias, routing, dtype):
    case = Case(ranks, width_in, width_out, dtype, gains=True, shifts=True)
    recipes, length = ROUTINGS[routing]
    rows = len(recipes) * length
    x, _ = sentinel(rows, width_in, dtype)
    x.copy_(case.randn(rows, width_in))
    weight = (case.randn(width_out, width_in).float() / width_in**0.5).to(dtype)
    b = case.randn(width_out) if bias else None
    plan = case.plan(recipes)
    got = dispatch.linear(x, weight, b, case.arena, case.table, plan, dispatch.ALONG)
    if dtype is torch.float32:
        ref = reference.apply(in_chains(x, weight, b, 192), None, x, case.arena, case.table, plan)
    else:
        ref = reference.linear(x, weight, b, case.arena, case.table, plan, dispatch.ALONG)
    assert got.shape == ref.shape and got.is_contiguous()
    if rows:
        dense = F.linear(x.double(), weight.double(), None if b is None else b.double())
        check(got, case.oracle(dense, None, x, recipes), ref)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("tokens", [*range(1, 10), 16, 17, 40, 100])
def test_a_row_does_not_see_its_batch(tokens, dtype, in_threads):
    """What others hold, what they are given, and how many threads there are: its bits stay."""
    case = Case((16, 3, 20), 2050, 200, dtype)
    x, weight = case.randn(tokens, 2050), case.randn(200, 2050)
    tables = (case.arena, case.table)
    in_threads(2)
    want = dispatch.linear(x, weight, None, *tables, NONE, dispatch.ALONG)
    for row in {0, tokens // 2, tokens - 1}:
        others = case.randn(tokens, 2050)
        others[row] = x[row]
        recipes = [A if t % 3 else B for t in range(tokens)]
        recipes[row] = []
        for threads, plan in itertools.product((1, 2), (NONE, case.plan(recipes))):
            in_threads(threads)
            got = dispatch.linear(others, weight, None, *tables, plan, dispatch.ALONG)
            assert torch.equal(got[row], want[row])
            assert tokens == 1 or not torch.equal(got, want)


@pytest.mark.parametrize("tokens", [1, 3, 8, 11])
def test_it_adds_along_the_input(tokens):
    """Not in the library's order, which is what the choice is about: the two differ where rounding noise is all."""
    case = Case((16,), 1024, 64, torch.bfloat16)
    x, weight = case.randn(tokens, 1024), case.randn(64, 1024)
    x[:, 512:], weight[:, 512:] = (-x[:, :512]).roll(2, 1), weight[:, :512].roll(2, 1)
    own = dispatch.linear(x, weight, None, case.arena, case.table, NONE, dispatch.ALONG)
    assert not torch.equal(own, F.linear(x, weight))


def test_fp16_has_no_blocks():
    case = Case((16,), 64, 96, torch.float16)
    x, weight, plan = case.randn(5, 64), case.randn(96, 64), case.plan([A] * 5)
    with pytest.raises(RuntimeError, match="float32 or bfloat16"):
        dispatch.linear(x, weight, None, case.arena, case.table, plan, 64)


def test_no_call_past_the_dispatcher_asks():
    case = Case((16,), 64, 96, torch.bfloat16)
    x, weight, y = case.randn(5, 64), case.randn(96, 64), case.randn(5, 96)
    layer = direct.layer_of(case.arena, case.table, 64, 96, torch.bfloat16)
    with pytest.raises(RuntimeError, match="kblock must be positive"):
        direct.linear(layer, NONE.numpy().tobytes(), y, x, weight, None, dispatch.FASTEST)
    assert direct.linear(layer, NONE.numpy().tobytes(), y, x, weight, None, dispatch.ALONG)
    assert torch.equal(y, dispatch.linear(x, weight, None, case.arena, case.table, NONE, dispatch.ALONG))


def timed(monkeypatch: pytest.MonkeyPatch, least: int, lead: float = 2.0) -> list[int]:
    """Has the candidate `least` take 1 / lead of the others' time; what was timed, in order."""
    seen: list[int] = []

    def linear(*args: Any) -> None:
        seen.append(args[-1])

    def seconds(call: Any) -> float:
        seen.append(dispatch.LIBRARY)
        call()
        return 1 / lead if seen[-1] == least else 1.0

    monkeypatch.setattr(dispatch, "linear", linear)
    monkeypatch.setattr(dispatch, "seconds", seconds)
    monkeypatch.setattr(dispatch, "probe_kblock", lambda *_: 512)
    return seen


@pytest.mark.parametrize("least", [dispatch.ALONG, dispatch.LIBRARY, 512])
def test_the_fastest_is_asked_once_a_range_of_tokens(least, monkeypatch):
    seen = timed(monkeypatch, least)
    assert fastest.probe(64, 96, True, 3, torch.bfloat16) == least and seen
    seen.clear()
    assert all(fastest.probe(64, 96, True, tokens, torch.bfloat16) == least for tokens in (1, 4, 33, 64))
    assert not seen
    assert fastest.probe(64, 96, True, 70, torch.bfloat16) == least and seen
    seen.clear()
    assert fastest.probe(64, 96, True, 128, torch.bfloat16) == least and not seen


def test_noise_does_not_decide(monkeypatch):
    timed(monkeypatch, dispatch.LIBRARY, lead=1.04)
    assert fastest.probe(64, 96, False, 3, torch.bfloat16) == dispatch.ALONG


def test_what_is_far_behind_is_timed_once(monkeypatch):
    seen = timed(monkeypatch, dispatch.ALONG, lead=2.1)
    fastest.probe(1024, 1024, False, 100, torch.bfloat16)
    copies = (1 << 31) // (128 << 20)  # of a weight, of so many tokens
    assert {kblock: seen.count(kblock) for kblock in set(seen)} == {
        dispatch.ALONG: 3 * copies,
        dispatch.LIBRARY: 5,
        512: copies,
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_a_linear_that_asks_runs_the_fastest(dtype):
    case = Case((16, 3, 20), 70, 96, dtype)
    x, weight, plan = case.randn(5, 70), case.randn(96, 70), case.plan([A, [], B, A, []])
    kblock = fastest.probe(70, 96, False, 5, dtype)
    args = (x, weight, None, case.arena, case.table, plan)
    assert torch.equal(dispatch.linear(*args, dispatch.FASTEST), dispatch.linear(*args, kblock))
    odd = weight.t().contiguous().t()  # no rows that the kernel could read
    assert torch.equal(dispatch.linear(x, odd, *args[2:5], NONE, dispatch.FASTEST), F.linear(x, odd))


@pytest.mark.parametrize("shape", [(0, 96), (64, 0)])
def test_nothing_is_asked_about_nothing(shape):
    assert fastest.probe(*shape, False, 4, torch.bfloat16) == dispatch.LIBRARY
    assert fastest.probe(64, 96, False, 0, torch.bfloat16) == dispatch.LIBRARY
    assert fastest.probe(64, 96, False, 1 << 20, torch.bfloat16) == dispatch.LIBRARY
