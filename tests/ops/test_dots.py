"""Base products in the order in which torch itself multiplies 16 bits: to its bits, and rows do not see each other."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from op_cases import ROUTINGS, A, B, Case, check, needs_avx2, sentinel
from torch import Tensor

from mlora import layout
from mlora.ops import dispatch, reference

pytestmark = needs_avx2
NONE = torch.zeros(layout.PLAN_HEADER, dtype=torch.int32)
DTYPES = [torch.float16, torch.bfloat16]


def in_torchs_order(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Its dot products, from its source, a multiply-add at a time; products of 16 bits are exact in fp64."""
    lanes = 16 if torch.ops.mlora.isa() >= 2 else 8
    rows = x.double()[:, None], weight.double()[None]

    def chains(first: int, count: int, size: int) -> Tensor:
        """`count` chains of vectors, which take the inputs from `first` on in turn: (tokens, out, chains, lanes)."""
        xs, ws = (t[..., first : first + size].unflatten(-1, (-1, count, lanes)) for t in rows)
        total = torch.zeros(len(x), len(weight), count, lanes)
        for step in range(xs.shape[-3]):
            total = (xs[..., step, :, :] * ws[..., step, :, :] + total).float().double()
        return total.float()

    def halved(t: Tensor) -> Tensor:
        """Sums over the last dimension, of which halves are added until one is left."""
        while t.shape[-1] > 1:
            a, b = t.chunk(2, -1)
            t = a + b
        return t[..., 0]

    width = x.shape[1]
    whole = width // (8 * lanes) * 8 * lanes
    total = halved(halved(chains(0, 8, whole).transpose(-1, -2))) if whole else torch.zeros(len(x), len(weight))
    total = total + halved(chains(whole, 1, width - whole))[..., 0] if whole < width else total
    return (total if bias is None else total + bias.float()).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("width_in, width_out", [(32, 1), (96, 33), (576, 40), (4160, 7)])
@pytest.mark.parametrize("noise", [False, True], ids=["values", "noise"])
def test_it_adds_as_torch_does(noise, width_in, width_out, bias, dtype):
    case = Case((16,), width_in, width_out, dtype)
    weight, b = case.randn(width_out, width_in), case.randn(width_out) if bias else None
    half = width_in // 2
    if noise:
        weight[:, half:] = weight[:, :half].roll(2, 1)
        b = None if b is None else b * 2.0**-15
    for tokens in (1, 2, 3, 4, 6, 7, 8, 13, 20):
        x = case.randn(tokens, width_in)
        if noise:
            x[:, half:] = (-x[:, :half]).roll(2, 1)
        got = dispatch.linear(x, weight, b, case.arena, case.table, NONE, dispatch.DOTS)
        want = in_torchs_order(x, weight, b)
        assert torch.equal(got, want)
        if noise and width_in > 4000:  # or this tells of no order
            assert not torch.equal(got, in_torchs_order(x.flip(1), weight.flip(1), b))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    "ranks, width_in, width_out",
    [((1, 3, 2), 32, 1), ((16, 3, 20), 96, 855), ((16, 1, 0), 2080, 20), ((16, 8, 4), 576, 576)],
    ids=["32x1", "96x855", "2080x20", "576x576"],
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
    got = dispatch.linear(x, weight, b, case.arena, case.table, plan, dispatch.DOTS)
    ref = reference.linear(x, weight, b, case.arena, case.table, plan, dispatch.DOTS)
    assert got.shape == ref.shape and got.is_contiguous()
    if rows:
        dense = F.linear(x.double(), weight.double(), None if b is None else b.double())
        check(got, case.oracle(dense, None, x, recipes), ref)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("tokens", [*range(1, 10), 16, 17, 40, 100])
def test_a_row_does_not_see_its_batch(tokens, dtype, in_threads):
    """What others hold, what they are given, how many there are, and how many threads: its bits stay."""
    case = Case((16, 3, 20), 2080, 200, dtype)
    x, weight = case.randn(tokens, 2080), case.randn(200, 2080)
    tables = (case.arena, case.table)
    in_threads(2)
    want = dispatch.linear(x, weight, None, *tables, NONE, dispatch.DOTS)
    for row in {0, tokens // 2, tokens - 1}:
        assert torch.equal(dispatch.linear(x[row : row + 1], weight, None, *tables, NONE, dispatch.DOTS)[0], want[row])
        others = case.randn(tokens, 2080)
        others[row] = x[row]
        recipes = [A if t % 3 else B for t in range(tokens)]
        recipes[row] = []
        for threads, plan in itertools.product((1, 2), (NONE, case.plan(recipes))):
            in_threads(threads)
            got = dispatch.linear(others, weight, None, *tables, plan, dispatch.DOTS)
            assert torch.equal(got[row], want[row])
            assert tokens == 1 or not torch.equal(got, want)


def test_what_it_does_not_take():
    for dtype, width, message in ((torch.float32, 64, "takes 16 bits"), (torch.bfloat16, 40, "a multiple of 32")):
        case = Case((16,), width, 96, dtype)
        with pytest.raises(RuntimeError, match=message):
            dispatch.linear(
                case.randn(5, width), case.randn(96, width), None, case.arena, case.table, NONE, dispatch.DOTS
            )
        assert dispatch.probe_kblock(width, 96, False, 5, dtype) != dispatch.DOTS


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_it_is_found_where_no_library_multiplies(bias, dtype):
    """Which is seen on AVX2. What is found has the library's bits in any case."""
    avx2 = torch.ops.mlora.isa() == 1 and torch.backends.cpu.get_cpu_capability() == "AVX2"
    dispatch._probe.cache_clear()
    for tokens in (1, 2, 9, 64):
        kblock = dispatch.probe_kblock(576, 200, bias, tokens, dtype)
        assert kblock == dispatch.DOTS or not avx2
        case = Case((), 576, 200, dtype)
        x, weight, b = case.randn(tokens, 576), case.randn(200, 576), case.randn(200) if bias else None
        assert torch.equal(dispatch.linear(x, weight, b, case.arena, case.table, NONE, kblock), F.linear(x, weight, b))
