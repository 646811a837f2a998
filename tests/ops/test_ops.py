"""The operators against an fp64 loop; rows do not see each other; base rows keep the library's bits."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from op_cases import (
    BF16,
    DTYPES,
    FUSED,
    MIX,
    NATIVE,
    ROUTINGS,
    A,
    B,
    Case,
    check,
    in_chains,
    needs_native,
    sentinel,
    turned,
)  # fmt: skip
from torch import Tensor

import mlora
from mlora import layout
from mlora.ops import dispatch, reference
from mlora.ops.library import HAS_CUDA, HAS_TRITON


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    "ranks, width_in, width_out",
    [
        ((1, 3, 2), 1, 1),
        ((16, 3, 20), 20, 855),
        ((16, 1, 0), 2049, 20),
        ((16, 8, 4), 576, 576),
        ((256, 20, 3), 855, 2049),
    ],
    ids=["1x1", "20x855", "2049x20", "576x576", "855x2049"],
)
def test_apply_matches_fp64(ranks, width_in, width_out, dtype, routing):
    case = Case(ranks, width_in, width_out, dtype, gains=True, shifts=True)
    recipes, length = ROUTINGS[routing]
    rows = len(recipes) * length
    x, _ = sentinel(rows, width_in, dtype)
    y, y_buffer = sentinel(rows, width_out, dtype)
    x.copy_(case.randn(rows, width_in))
    y.copy_(case.randn(rows, width_out))
    before, base = y_buffer.clone(), case.randn(rows, width_out)
    plan = case.plan(recipes)
    for b in (None, base):
        y_buffer.copy_(before)
        ref = reference.apply(y, b, x, case.arena, case.table, plan)
        oracle = case.oracle(y, b, x, recipes)
        assert dispatch.apply_(y, b, x, case.arena, case.table, plan) is None
        after = y.clone()
        if rows:
            check(after, oracle, ref)
        routed = torch.tensor([bool(r) for r in recipes]).repeat_interleave(length)
        old = before[1:-1, 3 : 3 + width_out]
        assert torch.equal(after[~routed], old[~routed])
        y.copy_(old)
        assert torch.equal(y_buffer.view(torch.uint8), before.view(torch.uint8)), "wrote outside of the view"


@pytest.mark.parametrize("dtype", FUSED)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    "ranks, width_in, width_out",
    [((1, 3, 2), 2, 1), ((16, 3, 20), 20, 855), ((16, 1, 0), 2050, 20), ((16, 8, 4), 576, 576)],
    ids=["2x1", "20x855", "2050x20", "576x576"],
)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_linear_matches_fp64(ranks, width_in, width_out, bias, routing, dtype):
    case = Case(ranks, width_in, width_out, dtype, gains=True, shifts=True)
    recipes, length = ROUTINGS[routing]
    rows = len(recipes) * length
    x, _ = sentinel(rows, width_in, dtype)
    x.copy_(case.randn(rows, width_in))
    weight = (case.randn(width_out, width_in).float() / width_in**0.5).to(dtype)
    b = case.randn(width_out) if bias else None
    plan = case.plan(recipes)
    kblock = 192 if dtype is torch.float32 else 512
    got = dispatch.linear(x, weight, b, case.arena, case.table, plan, kblock)
    if dtype is torch.float32:  # the error depends on how long the chains are, and libraries' are of all lengths
        ref = reference.apply(in_chains(x, weight, b, kblock), None, x, case.arena, case.table, plan)
    else:
        ref = reference.linear(x, weight, b, case.arena, case.table, plan, kblock)
    assert got.shape == ref.shape and got.is_contiguous()
    if rows:
        dense = F.linear(x.double(), weight.double(), None if b is None else b.double())
        check(got, case.oracle(dense, None, x, recipes), ref)


@pytest.mark.parametrize("dtype", FUSED)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width_in, width_out", [(576, 576), (576, 192), (1536, 576), (1024, 33), (200, 64)])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_linear_base_rows_have_the_library_bits(width_in, width_out, bias, threads, dtype, in_threads, monkeypatch):
    monkeypatch.setattr(dispatch, "_FASTER", math.inf)  # whichever is faster
    dispatch._probe.cache_clear()
    in_threads(threads)
    case = Case((16,), width_in, width_out, dtype)
    matched = 0
    for tokens in (1, 2, 3, 4, 5, 16, 17, 40, 64, 65, 200):
        kblock = dispatch.probe_kblock(width_in, width_out, bias, tokens, dtype)
        if kblock == 0:
            continue
        matched += 1
        x, weight = case.randn(tokens, width_in), case.randn(width_out, width_in)
        half = width_in // 2  # leave rounding noise only, as the probe does, but with other numbers
        x[:, half:], weight[:, half:] = (-x[:, :half]).roll(2, 1), weight[:, :half].roll(2, 1)
        b = case.randn(width_out) * (1e-5 if dtype is torch.bfloat16 else 1e-7) if bias else None
        expected = F.linear(x, weight, b)
        none = torch.zeros(layout.PLAN_HEADER, dtype=torch.int32)
        assert torch.equal(dispatch.linear(x, weight, b, case.arena, case.table, none, kblock), expected)
        plan = case.plan([[]] + [A] * (tokens - 1))
        mixed = dispatch.linear(x, weight, b, case.arena, case.table, plan, kblock)
        assert torch.equal(mixed[0], expected[0])
    dispatch._probe.cache_clear()
    if not matched:
        pytest.skip("this machine's library sums in another order")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_linear_by_the_library_is_its_product_and_then_apply(bias, dtype):
    case = Case((16, 3, 20), 64, 96, dtype, gains=True, shifts=True)
    weight, b = case.randn(96, 64), case.randn(96) if bias else None
    padded = case.randn(5, 7, 70)
    for x in (padded[..., 3:67], padded[..., 3:67].transpose(0, 1).contiguous().transpose(0, 1), padded[:, 0, :64]):
        plan = case.plan([A, [], B, MIX, A])
        want = F.linear(x, weight, b)
        base = want.clone()
        dispatch.apply_(want, None, x, case.arena, case.table, plan)
        got = dispatch.linear(x, weight, b, case.arena, case.table, plan, dispatch.LIBRARY)
        assert torch.equal(got, want) and torch.equal(got[1], base[1]) and not torch.equal(got[0], base[0])
    none = x.new_empty(0, 64)
    got = dispatch.linear(none, weight, b, case.arena, case.table, case.plan([A]), dispatch.LIBRARY)
    assert got.shape == (0, 96)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("tokens", [0, 1, 5, 16, 65, 100])
def test_a_probed_linear_asks_which_block(tokens, dtype, in_threads, monkeypatch):
    """Once a shape and range of tokens; and whatever is said, base rows are the library's."""
    monkeypatch.setattr(dispatch, "_FASTER", math.inf)  # the clock does not decide
    dispatch._probe.cache_clear()
    in_threads(2)
    width = 192 + 2 * tokens + 2 * DTYPES.index(dtype)  # that no other test has asked about
    case = Case((16, 3, 20), width, 96, dtype)
    x, weight = case.randn(tokens, width), case.randn(96, width)
    kblock = dispatch.probe_kblock(width, 96, False, tokens, dtype)
    for plan in (case.plan([[]] + [A] * 4 if tokens % 5 == 0 else [A]), case.plan([[]])):
        args = (x, weight, None, case.arena, case.table, plan)
        assert torch.equal(dispatch.linear(*args, dispatch.PROBED), dispatch.linear(*args, kblock))
    assert torch.equal(dispatch.linear(*args, dispatch.PROBED), F.linear(x, weight))
    odd = weight.t().contiguous().t()  # no rows that the kernel could read
    assert torch.equal(dispatch.linear(x, odd, *args[2:], dispatch.PROBED), F.linear(x, odd))
    dispatch._probe.cache_clear()


SHAPES = {
    "one": lambda x: x[0, 0],
    "rows": lambda x: x[:, 0].contiguous(),
    "rows of a batch": lambda x: x[:, 0],
    "batch": lambda x: x,
    "last tokens": lambda x: x[:, -1:],
    "first tokens": lambda x: x[:, :2],
    "tokens first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "features first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "one row for all": lambda x: x[:1].expand_as(x),
    "images": lambda x: x.unflatten(1, (3, 2)),
    "cut images": lambda x: x.unflatten(1, (3, 2))[:, :2],
}


@needs_native
@pytest.mark.parametrize("dtype", FUSED)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("width_in, width_out", [(320, 96), (1536, 320)])
@pytest.mark.parametrize("noise", [False, True], ids=["values", "noise"])
def test_base_rows_have_the_library_bits_in_any_shape(noise, width_in, width_out, shape, bias, dtype):
    """It adds a bias before it rounds or after, and sums in one order or another, by how its input lies."""
    torch.manual_seed(0)
    bare = torch.nn.Linear(width_in, width_out, bias=bias).to(dtype)
    x, half = torch.randn(4, 6, width_in).to(dtype), width_in // 2
    if noise:  # of rounding, which is left when the second half of features cancels the first
        with torch.no_grad():
            x[..., half:], bare.weight[:, half:] = (-x[..., :half]).roll(2, -1), bare.weight[:, :half].roll(2, 1)
            if bias:
                bare.bias *= 2.0**-12 if dtype is torch.bfloat16 else 2.0**-20
    model = torch.nn.Sequential(copy.deepcopy(bare))
    runtime = mlora.patch(model, memory=1 << 16)
    tensors = {"0.lora_A.weight": torch.randn(2, width_in), "0.lora_B.weight": torch.randn(width_out, 2)}
    runtime.add_adapter("a", mlora.Adapter({"peft_type": "LORA", "r": 2, "lora_alpha": 1}, tensors))
    x = shape(x)
    with torch.no_grad():
        want = bare(x)
        assert torch.equal(model(x), want)
        if x.dim() > 1:
            assert torch.equal(model(x, adapter_names=[None, "a", None, "a"])[::2], want[::2])
        case = Case((), width_in, width_out, dtype)
        none = torch.zeros(layout.PLAN_HEADER, dtype=torch.int32)
        args = (x, bare.weight, bare.bias, case.arena, case.table, none)
        assert torch.equal(dispatch.linear(*args, dispatch.PROBED), want)


@pytest.mark.parametrize("dtype", FUSED)
@pytest.mark.parametrize("tokens", [2, 9, 20, 50])
def test_kblock_is_where_the_chain_is_cut(tokens, dtype):
    """1 + 2^30 - 2^30 is 0 in one chain, and 1 if the last two are summed apart."""
    x = torch.zeros(tokens, 64, dtype=dtype)
    x[:, 0], x[:, 32], x[:, 34] = 1, 2.0**30, -(2.0**30)
    weight = torch.ones(40, 64, dtype=dtype)
    case = Case((), 64, 40, dtype)
    none = torch.zeros(layout.PLAN_HEADER, dtype=torch.int32)
    for kblock, expected in ((64, 0.0), (32, 1.0)):
        y = dispatch.linear(x, weight, None, case.arena, case.table, none, kblock)
        assert torch.equal(y, torch.full((tokens, 40), expected, dtype=dtype))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("width_in, width_out", [(576, 576), (855, 2049)])
def test_a_row_does_not_see_its_batch(dtype, width_in, width_out, in_threads):
    """Alone, in a batch, in decode and prefill shapes, under any number of threads: the same bits."""
    case = Case((16, 3, 20, 256), width_in, width_out, dtype, gains=True, shifts=True)
    recipes = [A, MIX, [], B, [(3, 1.0)], A, A, MIX]
    length = 37
    x, y = case.randn(len(recipes) * length, width_in), case.randn(len(recipes) * length, width_out)

    def run(select: Tensor, chosen: list) -> Tensor:
        out = y[select].clone()
        dispatch.apply_(out, None, x[select], case.arena, case.table, case.plan(chosen))
        return out

    everything = torch.arange(len(recipes) * length)
    in_threads(1)
    batch = run(everything, recipes)
    in_threads(2)
    assert torch.equal(batch, run(everything, recipes))
    for row, recipe in enumerate(recipes):
        for t in (0, 1, 36):
            token = everything[row * length + t : row * length + t + 1]
            assert torch.equal(batch[token], run(token, [recipe])), "alone"
        prefill = everything[row * length : (row + 1) * length]
        assert torch.equal(batch[prefill], run(prefill, [recipe])), "prefill"
    decode = everything[5::length]
    assert torch.equal(batch[decode], run(decode, recipes)), "decode"


@pytest.mark.parametrize("dtype", FUSED)
def test_linear_adds_the_delta_of_apply(dtype, in_threads):
    """With a base of zero both round the same sum; and linear's rows do not see each other."""
    case = Case((16, 3, 20), 576, 855, dtype, shifts=True)
    recipes = [A, MIX, [], B] * 8
    x, weight = case.randn(32, 576), torch.zeros(855, 576, dtype=dtype)
    plan = case.plan(recipes)
    out = torch.zeros(32, 855, dtype=dtype)
    dispatch.apply_(out, None, x, case.arena, case.table, plan)
    assert torch.equal(out, dispatch.linear(x, weight, None, case.arena, case.table, plan, 512))

    weight = case.randn(855, 576)
    whole = dispatch.linear(x, weight, None, case.arena, case.table, plan, 512)
    for threads, rows in ((1, slice(0, 32)), (2, slice(3, 5)), (2, slice(7, 24))):
        in_threads(threads)
        part = dispatch.linear(x[rows], weight, None, case.arena, case.table, case.plan(recipes[rows]), 512)
        assert torch.equal(whole[rows], part)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("width", [1, 20, 576, 855])
def test_scale_input(dtype, width):
    case = Case((1, 0, 3), width, 4, dtype, in_gains=True)
    recipes, length = [A, [], MIX, B], 3
    x, _ = sentinel(12, width, dtype)
    x.copy_(case.randn(12, width))
    plan = case.plan(recipes)
    got = dispatch.scale_input(x, case.arena, case.table, plan)
    oracle = x.double().clone()
    for t in range(12):
        for slot, weight in recipes[t // length]:
            if "in_gain" in case.adapters[slot]:
                oracle[t] += float(np.float32(weight)) * case.adapters[slot]["in_gain"] * x[t].double()
    check(got, oracle, reference.scale_input(x, case.arena, case.table, plan))
    assert torch.equal(got[3:6], x[3:6]) and torch.equal(got[9:], x[9:])


# Blocks of neighbours and of elements apart; shorter than a vector, as long, longer; of one element; of all.
TURNS = {
    "small": (24, ((4, 1), None, (2, 3))),
    "one": (5, ((1, 5), None, (5, 1))),
    "odd": (855, ((15, 1), (2 + 1, 5), (171, 5))),
    "blocks": (576, ((32, 1), (64, 1), (576, 1))),
    "pairs": (576, ((2, 32), (2, 288), (2, 1))),
    "wide": (2048, ((32, 1), (2, 4), (8, 1))),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("of", TURNS)
@pytest.mark.parametrize("length", [1, 7])
def test_scale_input_and_turn_output_with_turns(of, dtype, length, in_threads):
    """Also under any number of threads, and a row does not see its batch."""
    width, shapes = TURNS[of]
    case = Case((1, 0, 3), width, width, dtype, in_gains=True, turns=shapes)
    recipes = [A, [], MIX, B]
    tokens = length * len(recipes)
    x, y = sentinel(tokens, width, dtype)[0], sentinel(tokens, width, dtype)[0]
    x.copy_(case.randn(tokens, width))
    y.copy_(case.randn(tokens, width))
    tensors = (case.arena, case.table, case.plan(recipes))

    def oracle(add: Tensor, name: str) -> Tensor:
        out = add.double().clone()
        for row, recipe in enumerate(recipes):
            t = slice(row * length, (row + 1) * length)
            for slot, weight in recipe:
                weight, adapter = float(np.float32(weight)), case.adapters[slot]
                if name == "in_turn" and "in_gain" in adapter:
                    out[t] += weight * adapter["in_gain"] * x[t].double()
                if name in adapter:
                    out[t] += weight * turned(adapter[name], adapter["shape"][1], x[t])
        return out

    calls = {
        "in_turn": (lambda op, t=slice(None), *rest: op.scale_input(x[t], *(rest or tensors)), x),
        "turn": (lambda op, t=slice(None), *rest: op.turn_output(y[t], x[t], *(rest or tensors)), y),
    }
    for name, (call, added) in calls.items():
        got = []
        for threads in (1, 2):
            in_threads(threads)
            got.append(call(dispatch))
        check(got[0], oracle(added, name), call(reference))
        assert torch.equal(*got)
        assert torch.equal(got[0][length : 2 * length], added[length : 2 * length]), "base rows keep their bits"
        part = slice(2 * length, 3 * length)
        assert torch.equal(call(dispatch, part, case.arena, case.table, case.plan([MIX])), got[0][part])
    assert torch.equal(dispatch.turn_output(x, None, *tensors), dispatch.turn_output(x, x, *tensors))


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "from source"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    "ranks, width_in, width_out, margin",
    [
        ((1, 3, 2), 1, 1, 8), ((16, 3, 20), 20, 855, 8), ((16, 1, 0), 2049, 20, 8), ((256, 20, 3), 576, 131, 8),
        ((5, 1, 2), 1536, 1500, 8), ((5, 1, 2), 1536, 1500, 32),
    ],
    ids=["1x1", "20x855", "2049x20", "576x131", "beyond the caches, unaligned", "beyond the caches"],
)  # fmt: skip
def test_merge_matches_fp64(ranks, width_in, width_out, margin, dtype, in_place, in_threads):
    """Also under any number of threads, and nothing beside the weight is written."""
    case = Case(ranks, width_in, width_out, dtype, gains=True, in_gains=True)
    plan, source = case.plan([MIX], spare=0), case.randn(width_out, width_in)
    guard = torch.full((width_out * width_in + 2 * margin,), torch.nan, dtype=dtype)
    weight = guard[margin:-margin].view(width_out, width_in)

    oracle = source.double()
    for slot, w in MIX:
        adapter, w = case.adapters[slot], float(np.float32(w))
        if "a" in adapter:
            oracle = oracle + w * adapter["scale"] * adapter["b"].T @ adapter["a"]
        if "gain" in adapter:
            oracle = oracle + w * adapter["gain"][:, None] * source.double()
        if "in_gain" in adapter:
            oracle = oracle + w * adapter["in_gain"] * source.double()
    ref = source.clone()
    reference.merge_(ref, None, case.arena, case.table, plan)
    results = []
    for threads in (1, 2):
        in_threads(threads)
        weight.copy_(source if in_place else torch.full_like(source, torch.nan))
        dispatch.merge_(weight, None if in_place else source, case.arena, case.table, plan)
        results.append(weight.clone())
    check(weight, oracle, ref)
    assert torch.equal(*results)
    assert guard[:margin].isnan().all() and guard[-margin:].isnan().all()


@pytest.mark.parametrize("shape", ["transposed", "sliced", "batched"])
def test_apply_takes_any_strides(shape):
    case = Case((3, 4, 5), 20, 33, torch.float32, gains=True)
    recipes = [A, [], B, MIX]
    x, y = case.randn(4, 6, 20), case.randn(4, 6, 33)
    if shape == "transposed":
        x, y = x.transpose(1, 2).contiguous().transpose(1, 2), y.transpose(0, 1).contiguous().transpose(0, 1)
    elif shape == "sliced":
        x, y = case.randn(4, 9, 20)[:, 2:8], case.randn(4, 9, 40)[:, 1:7, 4:37]
    plan = case.plan(recipes)
    expected = reference.apply(y, None, x, case.arena, case.table, plan)
    dispatch.apply_(y, None, x, case.arena, case.table, plan)
    torch.testing.assert_close(y, expected)
    assert torch.equal(y[1], expected[1])


@needs_native
def test_subnormals_are_not_slow_and_leave_the_mode_alone():
    case = Case((16,), 576, 576, torch.float32)
    case.arena.fill_(1e-40)
    x, y, tiny = case.randn(4, 576), case.randn(4, 576), torch.tensor([1e-40])
    dispatch.apply_(y, None, x, case.arena, case.table, case.plan([A]))
    assert y.isfinite().all() and (tiny * 2 != 0).all()


@needs_native
def test_half_keeps_subnormals():
    case = Case((1,), 1, 40, torch.float16)
    case.arena[case.table[0, layout.A]] = 2.0**-10
    b = int(case.table[0, layout.B])
    case.arena[b : b + 40] = 3 * 2.0**-24
    y = torch.zeros(1, 40, dtype=torch.float16)
    x = torch.full((1, 1), 1024.0, dtype=torch.float16)
    dispatch.apply_(y, None, x, case.arena, case.table, case.plan([[(0, 2.0)]]))
    assert torch.equal(y, torch.full((1, 40), 3 * 2.0**-24, dtype=torch.float16))


def small(dtype=torch.float32):
    turns = ((1, 1), None, (1, 1))  # that both widths have
    case = Case((3, 2, 4), 20, 33, dtype, gains=True, shifts=True, in_gains=True, turns=turns)
    return case, case.randn(4, 20), case.randn(4, 33), case.plan([A, [], B, MIX])


@pytest.mark.parametrize("prefix", ["", "reference_"])
def test_opcheck(prefix):
    case, x, y, plan = small()
    ops = torch.ops.mlora
    tensors = (case.arena, case.table, plan)
    torch.library.opcheck(getattr(ops, prefix + "apply_").default, (y, None, x, *tensors))
    torch.library.opcheck(getattr(ops, prefix + "apply_").default, (y, y.clone(), x, *tensors))
    torch.library.opcheck(getattr(ops, prefix + "scale_input").default, (x, *tensors))
    torch.library.opcheck(getattr(ops, prefix + "turn_output").default, (y, None, *tensors))
    torch.library.opcheck(getattr(ops, prefix + "turn_output").default, (y, y.clone(), *tensors))
    case = Case((3, 2, 4), 20, 33, torch.float32, gains=True, in_gains=True)  # kernels fold no turns
    folded = (case.randn(33, 20), case.randn(33, 20), case.arena, case.table, case.plan([MIX], spare=0))
    torch.library.opcheck(getattr(ops, prefix + "merge_").default, folded)
    case, x, y, plan = small(torch.bfloat16)
    for kblock in (dispatch.LIBRARY, dispatch.PROBED, *([512] if prefix or BF16 else [])):
        args = (x, case.randn(33, 20), case.randn(33), case.arena, case.table, plan, kblock)
        torch.library.opcheck(getattr(ops, prefix + "linear").default, args)


def test_compiles_in_one_graph():
    case, x, y, plan = small()

    def step(y, x, plan):
        z = dispatch.scale_input(x, case.arena, case.table, plan) * 2
        y = dispatch.turn_output(y + 1, None, case.arena, case.table, plan)
        dispatch.apply_(y, None, z, case.arena, case.table, plan)
        return y * 3

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(y, x, plan), step(y, x, plan))
    other = case.plan([B, MIX, [], []])
    assert torch.equal(compiled(y, x, other), step(y, x, other))


def test_reference_is_differentiable():
    turns = ((5, 1), None, (1, 5))
    case = Case((3, 2, 4), 5, 5, torch.float64, gains=True, shifts=True, in_gains=True, turns=turns)
    plan = case.plan([A, [], B, MIX])
    x, y, base = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 5), (4, 5), (4, 5)))
    tensors = (case.arena, case.table, plan)
    assert torch.autograd.gradcheck(lambda y, b, x: reference.apply(y, b, x, *tensors), (y, base, x))
    assert torch.autograd.gradcheck(lambda x: reference.scale_input(x, *tensors), (x,))
    assert torch.autograd.gradcheck(lambda y, b: reference.turn_output(y, b, *tensors), (y, base))


def damage_table(column, value):
    def change(case, plan):
        case.table[0, column] = value

    return change


def damage_plan(index, value):
    def change(case, plan):
        plan[index] = value

    return change


# The plan of `small` is R=4, P=3, E=5: row_start 8:12, row_order 12:16, term_start 16:20, slots 20:25.
DAMAGE = {
    "a beyond the arena": (damage_table(layout.A, 10**6), "outside of the arena"),
    "b negative": (damage_table(layout.B, -2), "no A or B|outside of the arena"),
    "gain beyond the arena": (damage_table(layout.GAIN, 10**6), "outside of the arena"),
    "offset that overflows": (damage_table(layout.SHIFT, 2**63 - 1), "outside of the arena"),
    "no a": (damage_table(layout.A, -1), "no A or B"),
    "rank too large": (damage_table(layout.RANK, 2**40), "rank|outside of the arena"),
    "rows do not divide": (damage_plan(0, 3), "do not divide|at most 3|names row"),
    "more terms than entries": (damage_plan(2, 10**6), "needs"),
    "negative routes": (damage_plan(1, -1), "header"),
    "row_start falls": (damage_plan(9, 3), "row_start"),
    "row out of range": (damage_plan(12, 4), "names row 4"),
    "negative row": (damage_plan(12, -1), "names row -1"),
    "term_start too large": (damage_plan(19, 6), "term_start"),
    "slot out of range": (damage_plan(20, 3), "names slot 3"),
    "negative slot": (damage_plan(20, -1), "names slot -1"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_plan_or_table_is_refused(name):
    change, message = DAMAGE[name]
    case, x, y, plan = small()
    before = y.clone()
    change(case, plan)
    with pytest.raises(RuntimeError, match=message):
        dispatch.apply_(y, None, x, case.arena, case.table, plan)
    with pytest.raises(RuntimeError, match=message):
        reference.apply(y, None, x, case.arena, case.table, plan)
    assert torch.equal(y, before)


@pytest.mark.parametrize(
    ("of", "value", "message"),
    [
        ("", 10**6, "outside of the arena"),
        ("_SHAPE", -1, "turns blocks"),
        ("_SHAPE", layout.turn_shape(0, 1), "turns blocks of 0"),
        ("_SHAPE", layout.turn_shape(1, 0), "1 elements, 0 apart"),
        ("_SHAPE", layout.turn_shape(7, 1), "7 elements, 1 apart, of (20|33)"),
        ("_SHAPE", layout.turn_shape(1, 2**31 - 1), "turns blocks of 1"),
    ],
)
def test_a_damaged_turn_is_refused(of, value, message):
    for side, call in {
        "TURN": lambda op, case, x, y, plan: op.turn_output(y, None, case.arena, case.table, plan),
        "IN_TURN": lambda op, case, x, y, plan: op.scale_input(x, case.arena, case.table, plan),
    }.items():
        case, x, y, plan = small()
        case.table[0, getattr(layout, side + of)] = value
        for op in (dispatch, reference):
            with pytest.raises(RuntimeError, match=message):
                call(op, case, x, y, plan)


@needs_native
def test_wrong_tensors_are_refused():
    case, x, y, plan = small()
    apply_ = torch.ops.mlora.apply_
    cases = [
        ((y, None, x.half(), case.arena, case.table, plan), "one dtype"),
        ((y, y[:2], x, case.arena, case.table, plan), "base must have y's shape"),
        ((y[:3], None, x, case.arena, case.table, plan), "4 tokens, y has 3"),
        ((y, None, x, case.arena, case.table[:, :5], plan), "table must be"),
        ((y, None, x, case.arena, case.table.int(), plan), "table must be"),
        ((y, None, x, case.arena, case.table, plan.long()), "plan must be"),
        ((y, None, x, case.arena, case.table, plan[:5]), "header"),
        ((y, None, x, case.arena.view(1, -1), case.table, plan), "arena must be"),
    ]
    for args, message in cases:
        with pytest.raises(RuntimeError, match=message):
            apply_(*args)
    merge_, weight, one = torch.ops.mlora.merge_, case.randn(33, 20), case.plan([MIX], spare=0)
    for args, message in [
        ((weight.t(), None, case.arena, case.table, one), "weight must be contiguous"),
        ((weight.double(), None, case.arena, case.table, one), "one dtype"),
        ((weight, weight[:5], case.arena, case.table, one), "source must be as weight is"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            merge_(*args)
    if NATIVE:  # a GPU's plan cannot be read here
        with pytest.raises(RuntimeError, match="1 tokens do not divide"):
            merge_(weight, None, case.arena, case.table, plan)
        with pytest.raises(RuntimeError, match="turns are folded by"):
            merge_(weight, None, case.arena, case.table, one)
    turn_output = torch.ops.mlora.turn_output
    for args, message in [
        ((y, y[:2], case.arena, case.table, plan), "base must have y's shape"),
        ((y, y.half(), case.arena, case.table, plan), "one dtype"),
        ((y.double(), None, case.arena, case.table, plan), "one dtype"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            turn_output(*args)


def run_python(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_native
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_lower_instruction_sets(isa):
    """The tests above that matter to a kernel, again with a lower instruction set."""
    names = ["scalar", "avx2", "avx512", "avx512_bf16"]
    if names.index(isa) >= torch.ops.mlora.isa() or "MLORA_CPU_ISA" in os.environ:
        pytest.skip("not lower than what the tests above ran with")
    select = "fp64 and (20x855 or 2049x20) and (decode or prefill) or see_its_batch and 855"
    select += " or scale_input and not blocks or subnormals or merge and 20x855 or identities or test_wide and merge"
    select += " or test_dots and (decode and 96x855 or adds_as_torch and 576)"
    others = ("test_along.py", "test_dots.py", "test_identities.py", "test_wide.py")
    files = [__file__, *(str(Path(__file__).with_name(name)) for name in others)]
    code = f"""
import sys, pytest, torch, mlora.ops.dispatch
assert torch.ops.mlora.isa() == {names.index(isa)}
sys.exit(pytest.main(["-qx", "-p", "no:cacheprovider", *{files!r}, "-k", {select!r}]))
"""
    run_python(code, MLORA_CPU_ISA=isa)


def test_backend_override():
    code = """
import torch
from mlora import layout
from mlora.ops import dispatch
assert dispatch.backend("cpu", torch.float32) == "reference"
from torch.utils._python_dispatch import TorchDispatchMode
class Log(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        print(func)
        return func(*args, **(kwargs or {}))
x = torch.randn(2, 3)
none, table = torch.zeros(8, dtype=torch.int32), torch.empty(0, layout.TABLE_WIDTH, dtype=torch.int64)
with Log():
    dispatch.scale_input(x, torch.empty(0), table, none)
"""
    assert "reference_scale_input" in run_python(code, MLORA_BACKEND="reference")
    done = subprocess.run(
        [sys.executable, "-c", "import mlora.ops.dispatch"],
        env={**os.environ, "MLORA_BACKEND": "gpu"},
        capture_output=True,
        text=True,
    )
    assert "MLORA_BACKEND is 'gpu', must be one of cpu, cuda, emulation, reference, triton" in done.stderr


def test_backend_by_device_and_dtype():
    on_gpu = "cuda" if HAS_CUDA else "triton" if HAS_TRITON else "reference"
    assert dispatch.backend("cuda", torch.float16) == on_gpu
    assert dispatch.backend("cuda", torch.float64) == "reference"
    assert dispatch.backend("cpu", torch.float64) == "reference"
    assert dispatch.backend("cpu", torch.bfloat16) == ("cpu" if NATIVE else "reference")


def test_other_dtypes_take_the_reference():
    """Rows of two dtypes, and an arena in fewer bits than they have."""
    case, x, y, plan = small()
    for rows, arena in ((x.bfloat16(), case.arena), (x, case.arena.bfloat16())):
        expected = reference.apply(y, None, rows, arena, case.table, plan)
        got = y.clone()
        dispatch.apply_(got, None, rows, arena, case.table, plan)
        assert torch.equal(got, expected)


@needs_native
def test_runs_inside_another_parallel_region():
    """Several Python threads at once: the scratch is each thread's own."""
    from concurrent.futures import ThreadPoolExecutor

    case = Case((16, 3, 20), 576, 855, torch.bfloat16)
    x, y, plan = case.randn(8, 576), case.randn(8, 855), case.plan([A, B, MIX, []])

    def once(_):
        out = y.clone()
        for _ in range(20):
            out.copy_(y)
            dispatch.apply_(out, None, x, case.arena, case.table, plan)
        return out

    expected = once(0)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(out, expected) for out in pool.map(once, range(8)))
