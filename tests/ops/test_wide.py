"""An arena of fp32 beside x and y in 16 bits: the bits of the same adapters beside fp32, rounded once.

What x and y are widened to is exact, so the fp32 kernels on them say what each bit must be; and the fp64 loop says how
near that is, which is as near as one rounding allows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_cases import (
    BF16,
    EPS,
    MIX,
    NATIVE,
    ROUTINGS,
    A,
    B,
    Case,
    check_rank_gradients,
    needs_native,
    offsets_of,
    sentinel,
    width_of_v,
)
from test_identities import WIDTHS, whole
from torch import Tensor

from mlora.ops import direct, dispatch, reference, training

DTYPES = [torch.float16, torch.bfloat16]
ROWS = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
SHAPES = [
    ((1, 3, 2), 1, 1),
    ((16, 3, 20), 20, 855),
    ((16, 1, 0), 2049, 20),
    ((9, 8, 4), 576, 576),
    ((256, 20, 3), 855, 130),
]
IDS = ["1x1", "20x855", "2049x20", "576x576", "855x130"]
needs_bf16 = pytest.mark.skipif(not BF16, reason="needs AVX512_BF16")


def check(got: Tensor, exact: Tensor) -> None:
    """One rounding of the exact result, and a few of fp32 before it."""
    smallest = {torch.float16: 2.0**-25, torch.bfloat16: 0.0}[got.dtype]
    within = EPS[got.dtype] * exact.abs() + smallest + 2.0**-18 * exact.abs().max()
    assert ((got.double() - exact).abs() <= within).all()


@ROWS
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("ranks, width_in, width_out", SHAPES, ids=IDS)
def test_apply_matches_fp64(ranks, width_in, width_out, dtype, routing):
    case = Case(ranks, width_in, width_out, dtype, gains=True, shifts=True, wide=True)
    recipes, length = ROUTINGS[routing]
    rows = len(recipes) * length
    x, (y, buffer) = sentinel(rows, width_in, dtype)[0], sentinel(rows, width_out, dtype)
    x.copy_(case.randn(rows, width_in))
    y.copy_(case.randn(rows, width_out))
    before, tensors = buffer.clone(), (case.arena, case.table, case.plan(recipes))
    old = y.clone()
    for base in (None, case.randn(rows, width_out)):
        wide = y.float()
        assert dispatch.apply_(y, base, x, *tensors) is None
        dispatch.apply_(wide, None if base is None else base.float(), x.float(), *tensors)
        if NATIVE:
            assert torch.equal(y, wide.to(dtype))
        if rows:
            check(y, case.oracle(old, base, x, recipes))
        y.copy_(old)
        assert torch.equal(buffer.view(torch.uint8), before.view(torch.uint8)), "wrote outside of the view"


@ROWS
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("factor", "width_in", "width_out"), WIDTHS)
def test_identities_match_fp64(factor, width_in, width_out, dtype, routing):
    case = whole(factor, width_in, width_out, dtype, wide=True)
    recipes, length = ROUTINGS[routing]
    rows = len(recipes) * length
    x, y = case.randn(rows, width_in), case.randn(rows, width_out)
    wide, old, tensors = y.float(), y.clone(), (case.arena, case.table, case.plan(recipes))
    dispatch.apply_(y, None, x, *tensors)
    dispatch.apply_(wide, None, x.float(), *tensors)
    if NATIVE:
        assert torch.equal(y, wide.to(dtype))
    if rows:
        check(y, case.oracle(old, None, x, recipes))


@needs_native
@ROWS
@pytest.mark.parametrize("width_in, width_out", [(576, 576), (855, 2049)])
def test_a_row_does_not_see_its_batch(dtype, width_in, width_out, in_threads):
    case = Case((16, 3, 20, 256), width_in, width_out, dtype, gains=True, shifts=True, wide=True)
    recipes, length = [A, MIX, [], B, [(3, 1.0)], A, A, MIX], 37
    x, y = case.randn(len(recipes) * length, width_in), case.randn(len(recipes) * length, width_out)

    def run(select: Tensor, chosen: list) -> Tensor:
        out = y[select].clone()
        dispatch.apply_(out, None, x[select], case.arena, case.table, case.plan(chosen))
        return out

    everything = torch.arange(len(x))
    in_threads(1)
    batch = run(everything, recipes)
    in_threads(2)
    assert torch.equal(batch, run(everything, recipes))
    assert torch.equal(batch[5::length], run(everything[5::length], recipes)), "decode"
    for row, recipe in enumerate(recipes):
        assert torch.equal(batch[row * length + 5], run(everything[row * length + 5 : row * length + 6], [recipe])[0])


@needs_bf16
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    "ranks, width_in, width_out", [((1, 3, 2), 2, 1), ((16, 3, 20), 20, 855), ((16, 1, 0), 2050, 20)]
)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_linear_matches_fp64(ranks, width_in, width_out, bias, routing):
    """Base rows are those of an arena in 16 bits; others are the unrounded base plus the delta, rounded once."""
    case = Case(ranks, width_in, width_out, torch.bfloat16, gains=True, shifts=True, wide=True)
    recipes, length = ROUTINGS[routing]
    rows = len(recipes) * length
    x, weight = sentinel(rows, width_in, case.dtype)[0], case.randn(width_out, width_in)
    x.copy_(case.randn(rows, width_in))
    b = case.randn(width_out) if bias else None
    tensors = (case.arena, case.table)
    got = dispatch.linear(x, weight, b, *tensors, case.plan(recipes), 512)
    none = dispatch.linear(x, weight, b, *tensors, case.plan([[]]), 512)
    narrow = Case(ranks, width_in, width_out, torch.bfloat16)
    assert torch.equal(none, dispatch.linear(x, weight, b, narrow.arena, narrow.table, narrow.plan([[]]), 512))
    routed = torch.tensor([bool(r) for r in recipes]).repeat_interleave(length)
    assert torch.equal(got[~routed], none[~routed])
    if rows:
        dense = F.linear(x.double(), weight.double(), None if b is None else b.double())
        exact = case.oracle(dense, None, x, recipes)
        # The base's own products are summed in fp32, in chains of the whole input.
        within = EPS[torch.bfloat16] * exact.abs() + 2.0**-15 * exact.abs().max()
        assert ((got.double() - exact).abs() <= within).all()


@needs_bf16
def test_linear_adds_the_delta_of_apply(in_threads):
    """With a base of zero both round the same sum; and linear's rows do not see each other."""
    case = Case((16, 3, 20), 576, 855, torch.bfloat16, shifts=True, wide=True)
    recipes = [A, MIX, [], B] * 8
    x, weight, plan = case.randn(32, 576), torch.zeros(855, 576, dtype=torch.bfloat16), case.plan(recipes)
    out = torch.zeros(32, 855, dtype=torch.bfloat16)
    dispatch.apply_(out, None, x, case.arena, case.table, plan)
    assert torch.equal(out, dispatch.linear(x, weight, None, case.arena, case.table, plan, 512))
    weight = case.randn(855, 576)
    whole = dispatch.linear(x, weight, None, case.arena, case.table, plan, 512)
    for threads, rows in ((1, slice(0, 32)), (2, slice(3, 5)), (2, slice(7, 24)), (2, slice(4, 12)), (1, slice(9, 10))):
        in_threads(threads)
        part = dispatch.linear(x[rows], weight, None, case.arena, case.table, case.plan(recipes[rows]), 512)
        assert torch.equal(whole[rows] if rows.stop - rows.start > 1 else part, part)


@ROWS
@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize(
    "width, turns",
    [
        (24, ((4, 1), None, (2, 3))), (5, ((1, 5), None, (5, 1))), (855, ((15, 1), (3, 5), (171, 5))),
        (576, ((32, 1), (64, 1), (2, 288))),
    ],
)  # fmt: skip
def test_scale_input_and_turn_output(width, turns, dtype, length):
    case = Case((1, 0, 3), width, width, dtype, in_gains=True, turns=turns, wide=True)
    tokens, tensors = 4 * length, (case.arena, case.table, case.plan([A, [], MIX, B]))
    x, y = sentinel(tokens, width, dtype)[0], sentinel(tokens, width, dtype)[0]
    x.copy_(case.randn(tokens, width))
    y.copy_(case.randn(tokens, width))
    scaled, turned = dispatch.scale_input(x, *tensors), dispatch.turn_output(y, x, *tensors)
    assert torch.equal(scaled[length : 2 * length], x[length : 2 * length])
    assert torch.equal(turned[length : 2 * length], y[length : 2 * length])
    if NATIVE:
        assert torch.equal(scaled, dispatch.scale_input(x.float(), *tensors).to(dtype))
        assert torch.equal(turned, dispatch.turn_output(y.float(), x.float(), *tensors).to(dtype))
    wide = (case.arena.double(), *tensors[1:])
    check(scaled, reference.scale_input(x.double(), *wide))
    check(turned, reference.turn_output(y.double(), x.double(), *wide))


@ROWS
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "from source"])
@pytest.mark.parametrize("ranks, width_in, width_out", [*SHAPES[:3], ((5, 1, 2), 1536, 1500)])
def test_merge(ranks, width_in, width_out, dtype, in_place):
    case = Case(ranks, width_in, width_out, dtype, gains=True, in_gains=True, wide=True)
    tensors = (case.arena, case.table, case.plan([MIX], spare=0))
    source = case.randn(width_out, width_in)
    guard = torch.full((source.numel() + 64,), torch.nan, dtype=dtype)
    weight = guard[32:-32].view(width_out, width_in)
    weight.copy_(source if in_place else torch.full_like(source, torch.nan))
    wide, exact = source.float(), source.double()
    dispatch.merge_(weight, None if in_place else source, *tensors)
    dispatch.merge_(wide, None, *tensors)
    reference.merge_(exact, None, case.arena.double(), *tensors[1:])
    if NATIVE:
        assert torch.equal(weight, wide.to(dtype))
    check(weight, exact)
    assert guard[:32].isnan().all() and guard[-32:].isnan().all()


@ROWS
@pytest.mark.parametrize("routing", ROUTINGS)
def test_what_training_asks(dtype, routing):
    """v is that of x in fp32, keeping it changes nothing, and gradients of rank rows match fp64."""
    case = Case((16, 3, 20), 300, 130, dtype, shifts=True, wide=True)
    recipes, length = ROUTINGS[routing]
    rows, tensors = len(recipes) * length, (case.arena, case.table, case.plan(recipes))
    x, y = case.randn(rows, 300), case.randn(rows, 130)
    v, other = (torch.full((width_of_v(case, recipes, length),), torch.nan) for _ in range(2))
    plain, kept = y.clone(), y.clone()
    dispatch.apply_(plain, None, x, *tensors)
    dispatch.apply_keep_(kept, v, None, x, *tensors)
    dispatch.apply_keep_(y.float(), other, None, x.float(), *tensors)
    assert torch.equal(kept, plain)
    if NATIVE:
        assert torch.equal(v, other)
    weight = case.randn(130, 300)
    for kblock in (dispatch.LIBRARY, *([64] if BF16 and dtype is torch.bfloat16 else [])):
        other.fill_(torch.nan)
        got = dispatch.linear_keep(x, weight, None, other, *tensors, kblock)
        assert torch.equal(got, dispatch.linear(x, weight, None, *tensors, kblock)) and torch.equal(v, other)
    offsets, size = offsets_of(case, 130)
    to, ref = torch.full((size,), torch.nan), torch.full((size,), torch.nan)
    dispatch.rank_gradients_(to, v, y, offsets, *tensors)
    training.rank_gradients_(ref, v, y, offsets, *tensors)
    check_rank_gradients(to, ref, v, y, offsets, case, recipes, length)


def calls(dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    case = Case((3, 2, 4), 20, 33, dtype, gains=True, shifts=True, in_gains=True, turns=((1, 1),) * 3, wide=True)
    x, y, tensors = case.randn(4, 20), case.randn(4, 33), (case.arena, case.table, case.plan([A, [], B, MIX]))
    v, weight = torch.zeros(width_of_v(case, [A, [], B, MIX], 1)), case.randn(33, 20)
    folded = Case((3, 2, 4), 20, 33, dtype, gains=True, wide=True)
    offsets, size = offsets_of(case, 33)
    return {
        "apply_": (y, y.clone(), x, *tensors),
        "apply_keep_": (y, v, None, x, *tensors),
        "linear": (x, weight, case.randn(33), *tensors, dispatch.PROBED),
        "linear_keep": (x, weight, None, v, *tensors, dispatch.LIBRARY),
        "rank_gradients_": (torch.zeros(size), v, y, offsets, *tensors),
        "scale_input": (x, *tensors),
        "turn_output": (y, y.clone(), *tensors),
        "embed_": (y, torch.arange(4), *tensors, 20),
        "merge_": (weight, None, folded.arena, folded.table, folded.plan([MIX], spare=0)),
    }


@pytest.mark.parametrize("prefix", ["", "reference_"])
@pytest.mark.parametrize("name", calls(torch.bfloat16))
@ROWS
def test_opcheck(dtype, name, prefix):
    torch.library.opcheck(getattr(torch.ops.mlora, prefix + name).default, calls(dtype)[name])


@needs_native
def test_other_pairs_are_refused():
    """An arena of 16 bits beside fp32 or other 16 bits, fp64, and rows of two dtypes."""
    ops = torch.ops.mlora
    _, arena, *words = calls(torch.bfloat16)["scale_input"]
    for dtype, other in (
        (torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16), (torch.float64, torch.float32),
    ):  # fmt: skip
        x, y, tensors = torch.zeros(4, 20, dtype=dtype), torch.zeros(4, 33, dtype=dtype), (arena.to(other), *words)
        v, weight, offsets = torch.zeros(40), torch.zeros(33, 20, dtype=dtype), torch.full((3,), -1)
        for name, args in (
            ("apply_", (y, None, x, *tensors)),
            ("apply_keep_", (y, v, None, x, *tensors)),
            ("linear", (x, weight, None, *tensors, dispatch.LIBRARY)),
            ("linear", (x, weight, None, *tensors, 64)),
            ("rank_gradients_", (v, v, y, offsets, *tensors)),
            ("scale_input", (x, *tensors)),
            ("turn_output", (y, None, *tensors)),
            ("merge_", (weight, None, *tensors)),
        ):
            with pytest.raises(RuntimeError, match="and arena must have one dtype, or arena float32 beside"):
                getattr(ops, name)(*args)
    x, y, half = torch.zeros(4, 20).bfloat16(), torch.zeros(4, 33).bfloat16(), torch.zeros(4, 33).half()
    with pytest.raises(RuntimeError, match="y and x must have one dtype"):
        ops.apply_(half, None, x, arena, *words)
    with pytest.raises(RuntimeError, match="base and x must have one dtype"):
        ops.apply_(y, half, x, arena, *words)
    with pytest.raises(RuntimeError, match="base and y must have one dtype"):
        ops.turn_output(y, half, arena, *words)
    with pytest.raises(RuntimeError, match="x and weight alike"):
        ops.linear(x, torch.zeros(33, 20), None, arena, *words, 64)


@needs_native
@pytest.mark.skipif(not direct.READY, reason="a torch that C code cannot ask")
@ROWS
def test_past_the_dispatcher(dtype):
    """The operators' bits; x and y of the arena's dtype are not taken."""
    case = Case([5, 16, 0], 40, 72, dtype, gains=True, shifts=True, wide=True)
    plan, x, y = case.plan([A, [], MIX, B]), case.randn(4, 3, 40), case.randn(4, 3, 72)
    layer, raw = direct.layer_of(case.arena, case.table, 40, 72, dtype), plan.numpy().tobytes()
    want = y.clone()
    dispatch.apply_(want, None, x, case.arena, case.table, plan)
    assert direct.apply(layer, raw, y, x) and torch.equal(y, want)
    assert not direct.apply(layer, raw, y.float(), x.float())
    if BF16 and dtype is torch.bfloat16:
        weight = case.randn(72, 40)
        assert direct.linear(layer, raw, y, x, weight, None, 16)
        assert torch.equal(y, dispatch.linear(x, weight, None, case.arena, case.table, plan, 16))
        assert not direct.linear(layer, raw, y, x, weight.float(), None, 16)
    assert direct.layer_of(case.arena.bfloat16(), case.table, 40, 72, torch.float32) is None


def test_fp32_adapters_are_nearer():
    """What it is for: the error of one rounding of the output, where adapters in 16 bits add their own."""
    case = Case((16,), 576, 576, torch.bfloat16, wide=True)
    x, y = case.randn(16, 576), torch.zeros(16, 576, dtype=torch.bfloat16)
    exact, plan = case.oracle(y, None, x, [A] * 16), case.plan([A] * 16)
    errors = []
    for arena in (case.arena, case.arena.bfloat16()):
        got = y.clone()
        dispatch.apply_(got, None, x, arena, case.table, plan)
        errors.append(float((got.double() - exact).norm()))
    rounded = float((exact.bfloat16().double() - exact).norm())
    assert errors[0] <= 1.01 * rounded and errors[1] > 1.5 * rounded
