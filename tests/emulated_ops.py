"""The CUDA operators on the CPU. Run by test_cuda.py and sanitize.py, with MLORA_BACKEND=emulation."""

from __future__ import annotations

import copy
import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_close, inputs_for, logits
from op_cases import FORMS, MIX, A, B, Case, check, sentinel, side_by_side
from torch import Tensor

import mlora
from mlora.ops import dispatch, reference

assert dispatch.backend("cpu", torch.float32) == "emulation"

COUNTED = "asan" not in os.environ.get("LD_PRELOAD", "")  # AddressSanitizer's build leaves counts out

ROUTINGS = {
    "one": ([A], 1),
    "decode": ([A, [], B, MIX, A], 1),
    "many": ([A] * 19 + [B, MIX], 1),
    "prefill": ([MIX, [], A], 11),
    "long": ([B, []], 35),
}
SHAPES = {
    "1x3": ((1, 3, 0), 1, 3),
    "3x1": ((3, 1, 8), 3, 1),
    "7x64": ((8, 0, 65), 7, 64),
    "64x7": ((64, 3, 1), 64, 7),
    "576x1000": ((65, 16, 8), 576, 1000),
    "1000x576": ((130, 3, 130), 1000, 576),
}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_shape(multiprocessors: int | str, cluster: int) -> None:
        monkeypatch.setenv("MLORA_EMULATION_MULTIPROCESSORS", str(multiprocessors))
        monkeypatch.setenv("MLORA_EMULATION_CLUSTER", str(cluster))

    return set_shape


# The whole product in bfloat16, half of it in the others.
APPLIED = [
    pytest.param(*form.values, routing, align, id=f"{form.id}-{routing}-{'unaligned' if align == 1 else 'aligned'}")
    for form in FORMS
    for routing in ROUTINGS
    for align in (1, 32)
    if form.id == "bfloat16" or (align == 1) == (routing in ("decode", "prefill"))
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "wide", "routing", "align"), APPLIED)
def test_apply(dtype, wide, routing, align, shape):
    recipes, length = ROUTINGS[routing]
    case = Case(*SHAPES[shape], dtype, gains=True, shifts=True, align=align, wide=wide)
    rows = len(recipes) * length
    y, buffer = sentinel(rows, case.width_out, dtype)
    x = case.randn(rows, case.width_in)
    if align == 1:
        x = sentinel(rows, case.width_in, dtype)[0].copy_(x)
    else:
        y = torch.empty(rows, case.width_out, dtype=dtype)
    start = case.randn(rows, case.width_out)
    plan = case.plan(recipes)
    base = case.randn(rows, case.width_out) if routing in ("many", "prefill") else None
    y.copy_(start)
    ref = reference.apply(y, base, x, case.arena, case.table, plan)
    oracle = case.oracle(y, base, x, recipes)
    torch.ops.mlora.apply_(y, base, x, case.arena, case.table, plan)
    check(y, oracle, ref)
    base_rows = torch.tensor([not r for r in recipes]).repeat_interleave(length)
    assert torch.equal(y[base_rows], start[base_rows])
    y.fill_(0)
    inside = buffer[1:-1, 3 : 3 + case.width_out]
    inside.fill_(torch.nan)
    assert buffer.isnan().all(), "wrote outside of the view"


@pytest.mark.parametrize("multiprocessors, cluster", [(1, 1), (5, 1), (2, 2), (9, 4), (40, 4), (16, 16)])
def test_any_device(device, multiprocessors, cluster):
    """More clusters than tiles, fewer, clusters larger than the work, slices of several steps, batches of several
    rounds."""
    device(multiprocessors, cluster)
    case = Case((16, 3, 20, 65), 600, 900, torch.bfloat16, gains=True, shifts=True, align=32)
    for recipes, length in (([A], 1), ([A, [], B, MIX, A, [(3, 1.0)]], 1), ([A, B, MIX], 30)):
        x, y = case.randn(len(recipes) * length, 600), case.randn(len(recipes) * length, 900)
        plan = case.plan(recipes)
        ref, oracle = reference.apply(y, None, x, case.arena, case.table, plan), case.oracle(y, None, x, recipes)
        torch.ops.mlora.apply_(y, None, x, case.arena, case.table, plan)
        check(y, oracle, ref)


@pytest.mark.parametrize(
    "gpcs, programs",
    [
        ("16,16,16,16,16,16,18,18", 128),
        ("12,16,16,16,18,18,18,18", 112),  # seven clusters of 16
        ("14,14,16,16,18,18,18,18", 112),  # six of 16 are less than three quarters; 14 of 8
        ("18,18,18,18,20,18,18,20", 128),
        ("6,6,6,6", 24),  # clusters of 2
        ("7", 6),
        ("1,1", 2),
    ],
)
def test_as_many_clusters_as_run_at_once(device, gpcs, programs):
    device(gpcs, 16)
    case = Case((16, 3, 20), 1024, 136, torch.bfloat16, align=32)
    x, y, plan = case.randn(40, 1024), case.randn(40, 136), case.plan([A, MIX] * 20)
    oracle, ref = case.oracle(y, None, x, [A, MIX] * 20), reference.apply(y, None, x, case.arena, case.table, plan)
    counts()
    torch.ops.mlora.apply_(y, None, x, case.arena, case.table, plan)
    assert not COUNTED or counts()["programs"] == programs
    check(y, oracle, ref)


def test_a_row_does_not_see_its_batch():
    case = Case((16, 3, 20, 270), 200, 136, torch.float32, gains=True, shifts=True)
    recipes, length = [A, MIX, [], B, [(3, 1.0)], A, A, MIX], 13
    x, y = case.randn(len(recipes) * length, 200), case.randn(len(recipes) * length, 136)

    def run(tokens: Tensor, chosen: list) -> Tensor:
        out = y[tokens].clone()
        torch.ops.mlora.apply_(out, None, x[tokens], case.arena, case.table, case.plan(chosen))
        return out

    everything = torch.arange(len(recipes) * length)
    batch = run(everything, recipes)
    assert torch.equal(batch, run(everything, recipes))
    for row, recipe in enumerate(recipes):
        for t in (0, 7, 12):
            token = everything[row * length + t : row * length + t + 1]
            assert torch.equal(batch[token], run(token, [recipe]))
    assert torch.equal(batch[5::length], run(everything[5::length], recipes))


@pytest.mark.parametrize(("dtype", "wide"), [FORMS[0], FORMS[2], FORMS[4]])
@pytest.mark.parametrize("widths", [(300,), (64, 300), (192, 1, 65, 128)], ids=str)
@pytest.mark.parametrize("multiprocessors", [3, 24])
def test_group_has_the_bits_of_its_modules(device, dtype, wide, widths, multiprocessors):
    device(multiprocessors, 3 if multiprocessors == 3 else 4)
    cases = [
        Case((16, 3, 90), 200, out, dtype, gains=i == 1, shifts=True, seed=i, wide=wide) for i, out in enumerate(widths)
    ]
    arena = side_by_side(cases)
    for recipes in ([A], [A, [], B, MIX, A] * 4):
        x, plan = cases[0].randn(len(recipes), 200), cases[0].plan(recipes)
        ys = [case.randn(len(recipes), case.width_out) for case in cases]
        expected = [y.clone() for y in ys]
        for y, case in zip(expected, cases, strict=True):
            torch.ops.mlora.apply_(y, None, x, arena, case.table, plan)
        dispatch.apply_group_(ys, x, arena, [case.table for case in cases], plan)
        assert all(torch.equal(y, want) for y, want in zip(ys, expected, strict=True))


@pytest.mark.parametrize(("dtype", "wide"), FORMS)
@pytest.mark.parametrize("width_in, width_out", [(1, 1), (7, 130), (200, 64)])
@pytest.mark.parametrize("recipe", ["mix", "gains"])
def test_merge(dtype, wide, width_in, width_out, recipe):
    case = Case((20, 3, 0, 1), width_in, width_out, dtype, gains=True, in_gains=True, wide=wide)
    weight = case.randn(width_out, width_in)
    recipe = [(0, 0.7), (2, -0.3), (1, 1.5), (3, 1.0)] if recipe == "mix" else [(2, -0.3)]
    plan, oracle, factor = case.plan([recipe], spare=0), weight.double(), 1.0
    for slot, w in recipe:
        adapter, w = case.adapters[slot], float(np.float32(w))
        if "a" in adapter:
            oracle = oracle + w * adapter["scale"] * adapter["b"].T @ adapter["a"]
        gains = adapter.get("gain", torch.zeros(1))[:, None] + adapter.get("in_gain", torch.zeros(1))
        factor = factor + w * gains
    oracle = oracle + (factor - 1) * weight.double()
    ref, got, elsewhere = weight.clone(), weight.clone(), torch.full_like(weight, torch.nan)
    reference.merge_(ref, None, case.arena, case.table, plan)
    dispatch.merge_(got, None, case.arena, case.table, plan)
    dispatch.merge_(elsewhere, weight, case.arena, case.table, plan)
    check(got, oracle, ref)
    assert torch.equal(got, elsewhere)
    dispatch.merge_(elsewhere, weight, case.arena, case.table, torch.zeros(8, dtype=torch.int32))
    assert torch.equal(elsewhere, weight), "no recipe"


def test_merged_weight_does_what_the_rows_do():
    case = Case((5, 3, 2), 24, 40, torch.float32, gains=True, in_gains=True)
    weight, x = case.randn(40, 24), case.randn(6, 24)
    plan = case.plan([MIX] * 6)
    y, base = dispatch.scale_input(x, case.arena, case.table, plan) @ weight.T, x @ weight.T
    dispatch.apply_(y, base, x, case.arena, case.table, plan)
    dispatch.merge_(weight, None, case.arena, case.table, case.plan([MIX], spare=0))
    assert_close(x @ weight.T, y)


def test_what_the_kernel_itself_refuses():
    case = Case((3, 2, 4), 20, 33, torch.float32)
    x, y = case.randn(4, 20), case.randn(4, 33)
    for index, value, message in ((0, 3, "do not divide"), (2, 10**6, "longer than its buffer")):
        plan = case.plan([A, [], B, MIX])
        plan[index] = value
        with pytest.raises(RuntimeError, match=message):
            torch.ops.mlora.apply_(y, None, x, case.arena, case.table, plan)
    with pytest.raises(RuntimeError, match="a group has"):
        torch.ops.mlora.apply_group_([y] * 5, x, case.arena, [case.table] * 5, case.plan([[]]))


def test_tensors_of_other_devices_are_refused():
    """An address of another device would end the process, or its CUDA context. Of several devices the dispatcher takes
    one, here the other, so it is left out."""
    case = Case((3, 2, 4), 20, 20, torch.float32, gains=True)
    x, y, plan, one = case.randn(4, 20), case.randn(4, 20), case.plan([A, [], B, MIX]), case.plan([MIX], spare=0)
    weight, tensors = case.randn(20, 20), (case.arena, case.table)
    calls: dict[str, tuple[Any, ...]] = {
        "apply_": (y, y.clone(), x, *tensors, plan),
        "apply_group_": ([y], x, case.arena, [case.table], plan),
        "scale_input": (x, *tensors, plan),
        "turn_output": (y, x, *tensors, plan),
        "merge_": (weight, weight.clone(), *tensors, one),
    }
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    for name, args in calls.items():
        run = getattr(torch.ops.mlora, name).default
        run.redispatch(cpu, *args)
        for i, arg in enumerate(args):
            other = [arg[0].to("meta")] if isinstance(arg, list) else arg.to("meta")
            with pytest.raises(RuntimeError, match="one device"):
                run.redispatch(cpu, *args[:i], other, *args[i + 1 :])


def counts() -> dict[str, int]:
    names = ("launches", "programs", "idle", "read", "written", "metadata", "narrow")
    values = (ctypes.c_int64 * len(names))()
    ctypes.CDLL(os.environ["MLORA_EMULATION_LIBRARY"]).mlora_counts(values)
    return dict(zip(names, values, strict=True))


def counted(tensors: list[Tensor], words: list[Tensor], run: Any) -> dict[str, int]:
    """What `run` does to tensors of data, and to plans and tables."""
    native = ctypes.CDLL(os.environ["MLORA_EMULATION_LIBRARY"])
    counts()
    for tensor, data in (*((t, 1) for t in tensors), *((t, 0) for t in words)):
        native.mlora_watch(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_int64(tensor.nbytes), data)
    run()
    return counts()


def test_work_and_bytes(device):
    """One launch; every program has work; A, B, x and y are asked for once; all of it 16 bytes at a time."""
    if not COUNTED:
        pytest.skip("nothing is counted")
    device(16, 4)
    case = Case((16,) * 8, 512, 512, torch.bfloat16, align=32)
    x, y, plan = case.randn(16, 512), case.randn(16, 512), case.plan([[(i // 2, 1.0)] for i in range(16)])
    seen = counted(
        [x, y, case.arena],
        [plan, case.table],
        lambda: torch.ops.mlora.apply_(y, None, x, case.arena, case.table, plan),
    )
    assert seen["launches"] == 1 and seen["programs"] == 16 and seen["idle"] == 0 and seen["narrow"] == 0
    assert seen["read"] == (x.nbytes + y.nbytes + 8 * 16 * (512 + 512) * 2) // 32
    assert seen["written"] == y.nbytes // 32


@pytest.mark.parametrize(("dtype", "wide"), FORMS)
@pytest.mark.parametrize(
    "turns",
    [
        ((2, 1), (4, 1), (32, 1)), ((2, 2), (4, 2), (16, 2)), ((2, 4), (1, 3), (24, 4)),
        ((2, 32), (72, 8), (2, 576)), ((1152, 1), (1, 1), (144, 8)),
    ],
    ids=str,
)  # fmt: skip
def test_turns_are_read_whole(device, dtype, wide, turns):
    """Turns, inputs and outputs are asked for 16 bytes at a time where alignment allows, with the bits of other reads.
    Also where a thread has several pieces of a row and a block several tokens."""
    device(1, 1)
    case = Case((1, 3, 2), 1152, 1152, dtype, in_gains=True, align=32, turns=turns, wide=wide)
    recipes = [A, [], MIX, B, [(2, 1.0), (1, -0.5)]] * 2
    x, y, plan = case.randn(10, 1152), case.randn(10, 1152), case.plan(recipes)
    got: list[Tensor] = []

    def run(x: Tensor, y: Tensor) -> None:
        got.append(torch.ops.mlora.scale_input(x, case.arena, case.table, plan))
        got.append(torch.ops.mlora.turn_output(y, x, case.arena, case.table, plan))

    seen = counted([x, y, case.arena], [plan, case.table], lambda: run(x, y))
    assert not COUNTED or seen["read"] > 0 == seen["narrow"]
    run(*(sentinel(10, 1152, dtype)[0].copy_(t) for t in (x, y)))
    assert torch.equal(got[0], got[2]) and torch.equal(got[1], got[3])


def test_merge_reads_whole():
    case = Case((20, 3, 0), 136, 200, torch.bfloat16, gains=True, in_gains=True, align=32)
    weight, plan = case.randn(200, 136), case.plan([MIX], spare=0)
    merge = torch.ops.mlora.merge_
    seen = counted([weight, case.arena], [plan, case.table], lambda: merge(weight, None, case.arena, case.table, plan))
    assert not COUNTED or seen["read"] > 0 == seen["narrow"]


def test_tiny_model_generates(llama: Any, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = copy.deepcopy(llama), inputs_for("llama", 4)
    runtime = mlora.patch(model, memory=1 << 20, max_adapters=8)
    for name, folder in folders.items():
        runtime.load_adapter(folder, name)
    entries = ["r3", None, "dora1", {"rs16": 0.5, "bias8": -1.0}]

    def run() -> tuple[Tensor, Tensor]:
        tokens = model.generate(**batch, adapter_names=entries, max_new_tokens=3, do_sample=False)
        return logits(model, batch, adapter_names=entries), tokens

    calls = []
    native = dispatch._apply_
    monkeypatch.setattr(dispatch, "_apply_", lambda *args: (calls.append(1), native(*args)))
    got, tokens = run()
    assert calls
    monkeypatch.setattr(dispatch, "_apply_", dispatch._reference_apply_)
    want, expected = run()
    assert_close(got, want)
    assert torch.equal(tokens, expected)
    assert not np.array_equal(got.detach(), logits(model, batch).detach())
