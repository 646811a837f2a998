"""The Triton kernels: in the interpreter against the fp64 loop, and compiled for architectures that are not here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import build, inputs_for
from op_cases import FORMS, MIX, PARTS, A, B, Case, check, sentinel, turned
from torch import Tensor

from mlora import layout
from mlora.ops import reference

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED and importlib.util.find_spec("triton") is not None:
    import interpreter

    from mlora.kernels import config, launch, operators

    interpreter.install()
interpreted = pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET was not set before triton was imported")

C, BIG = [(2, 2.0)], [(3, 1.0)]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `shrink` does not write, `expand` must not read."""
    if INTERPRETED:
        make = launch._workspace
        monkeypatch.setattr(launch, "_workspace", lambda x: (make(x)[0].fill_(torch.nan), make(x)[1]))


def aligned(case: Case) -> Case:
    """The same adapters with every part at a multiple of 64 bytes, as the store lays them out."""
    step = 64 // case.arena.itemsize
    chunks: list[Tensor] = []
    at = 0
    for slot, adapter in enumerate(case.adapters):
        for name, column in PARTS.items():
            if name in adapter:
                part = adapter[name].to(case.arena.dtype).flatten()
                size = -(-part.numel() // step) * step
                chunks.append(F.pad(part, (0, size - part.numel()), value=torch.nan))
                case.table[slot, column] = at
                at += size
    case.arena = torch.cat(chunks)
    return case


def run_apply(case: Case, recipes: list, length: int, base: bool = False, plan: Tensor | None = None) -> None:
    """Strided x and y with sentinels; against the oracle; rows without a route and the surroundings keep their bits."""
    rows = len(recipes) * length
    x, _ = sentinel(rows, case.width_in, case.dtype)
    y, y_buffer = sentinel(rows, case.width_out, case.dtype)
    x.copy_(case.randn(rows, case.width_in))
    y.copy_(case.randn(rows, case.width_out))
    before, b = y_buffer.clone(), case.randn(rows, case.width_out) if base else None
    plan = case.plan(recipes) if plan is None else plan
    old = y.clone()
    ref = reference.apply(y, b, x, case.arena, case.table, plan)
    operators.apply_(y, b, x, case.arena, case.table, plan)
    check(y, case.oracle(old, b, x, recipes), ref)
    routed = torch.tensor([bool(r) for r in recipes]).repeat_interleave(length)
    assert torch.equal(y[~routed], old[~routed])
    y.copy_(old)
    assert torch.equal(y_buffer.view(torch.uint8), before.view(torch.uint8)), "wrote outside of the view"


RANKS = (16, 3, 8, 130)
ROUTINGS = {
    "one": ([A], 1),
    "decode": ([A, [], B, MIX, A, BIG, C], 1),
    "all-base": ([[], []], 3),
    "prefill": ([MIX, [], B, A, C, BIG], 23),
    "uniform": ([MIX], 130),
}


@interpreted
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("dtype", "wide"), FORMS)
@pytest.mark.parametrize(
    ("ranks", "width_in", "width_out"),
    [((1, 3, 0, 2), 1, 3), ((17, 3, 8, 65), 7, 100), (RANKS, 100, 64)],
    ids=["1x3", "7x100", "100x64"],
)
def test_apply_matches_fp64(
    ranks: Any, width_in: int, width_out: int, dtype: torch.dtype, wide: bool, routing: str
) -> None:
    recipes, length = ROUTINGS[routing]
    case = aligned(Case(ranks, width_in, width_out, dtype, gains=True, shifts=True, wide=wide))
    run_apply(case, recipes, length, base=width_in == 7)


@interpreted
def test_b_reaches_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank rows so far from the first that their distance in elements is no int32; and the same bits as without."""
    import triton
    import triton.language as tl

    from mlora.kernels import expand

    width, far = 1 << 20, 1 << 12  # 4 Gi elements
    data = torch.arange(15 * width + 32, dtype=torch.float32)

    @triton.jit
    def read(out, b, r, width, read_b: tl.constexpr):
        cols = tl.arange(0, 32)
        first = b - r.to(tl.int64) * width
        tile = read_b(first, r, r + 16, cols, cols < 32, width, 16, 1, True)
        tl.store(out + cols[:, None] * 16 + tl.arange(0, 16)[None, :], tile)

    out = torch.zeros(32, 16)
    read[(1,)](out, data, far, width, expand.read_b)
    assert torch.equal(out, data.as_strided((32, 16), (1, width)))

    case = aligned(Case((16, 65), 100, 70, torch.bfloat16))
    x, plan = case.randn(4, 100), case.plan([A, [], [(1, 1.0)], A])
    near, beyond = (case.randn(4, 70) for _ in range(2))
    beyond.copy_(near)
    operators.apply_(near, None, x, case.arena, case.table, plan)
    monkeypatch.setattr(config, "_REACH", 1)
    operators.apply_(beyond, None, x, case.arena, case.table, plan)
    assert torch.equal(near, beyond)


@interpreted
@pytest.mark.parametrize(("recipes", "length"), [([A, [], BIG], 1), ([C, BIG, []], 44)], ids=["decode", "prefill"])
@pytest.mark.parametrize(("dtype", "wide"), [FORMS[0], FORMS[2], FORMS[4]])
def test_aligned_and_wide(recipes: list, length: int, dtype: torch.dtype, wide: bool) -> None:
    """Several leaves and parts of the sum, several tiles, parts where the store puts them."""
    run_apply(aligned(Case((16, 3, 64, 65), 600, 100, dtype, gains=True, shifts=True, wide=wide)), recipes, length)


@interpreted
@pytest.mark.parametrize(("length", "processors"), [(1, 24), (1, 100), (40, 24)], ids=["pairs", "leaves", "parts"])
def test_whoever_arrives_last(monkeypatch: pytest.MonkeyPatch, length: int, processors: int) -> None:
    """The programs of `shrink` in any order: the same bits, and the counters are zeros again."""
    monkeypatch.setattr(launch, "INTERPRETED", config.Device(processors, 90))
    case = aligned(Case((16, 3, 20, 65), 700, 50, torch.bfloat16))
    plan, x = case.plan([A, MIX, [], BIG]), case.randn(4 * length, 700)
    results, order, place = [], [], interpreter.InterpreterBuilder.set_grid_idx
    monkeypatch.setattr(
        interpreter.InterpreterBuilder, "set_grid_idx", lambda self, i, j, k: place(self, order[i], j, k)
    )
    for seed in range(4):
        y, arrived = torch.zeros(4 * length, 50, dtype=torch.bfloat16), torch.zeros(4 * length, dtype=torch.int32)
        tensors = (case.arena, case.table, plan, arrived)
        for item in launch.apply_launches(y, None, x, *tensors, launch.INTERPRETED):
            generator = torch.Generator().manual_seed(seed)
            order[:] = torch.randperm(item.grid, generator=generator).tolist() if seed else range(item.grid)
            item.run()
        assert not arrived.any()
        results.append(y)
    assert all(torch.equal(results[0], y) for y in results[1:])


@interpreted
@pytest.mark.parametrize("length", [1, 70])
def test_ranks_beyond_the_workspace(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    monkeypatch.setattr(config, "MAX_CAPACITY", 32)
    case = aligned(Case((16, 3, 20, 70), 150, 40, torch.float16, shifts=True))
    run_apply(case, [BIG, MIX, [(3, 0.5), (2, 1.0)]], length)


@interpreted
def test_more_routes_than_are_read_at_once() -> None:
    case = aligned(Case([1 + i % 5 for i in range(70)], 20, 33, torch.float32, shifts=True))
    run_apply(case, [[(i, 1.0)] for i in range(70)] + [[]], 2)


@interpreted
def test_plans_that_route_nothing_or_have_room_left() -> None:
    case = aligned(Case((3, 2, 4), 20, 33, torch.float32, gains=True, in_gains=True))
    x, y = case.randn(6, 20), case.randn(6, 33)
    before = y.clone()
    for plan in (torch.zeros(8, dtype=torch.int32), torch.zeros(1 << 10, dtype=torch.int32), case.plan([[], []])):
        operators.apply_(y, None, x, case.arena, case.table, plan)
        assert torch.equal(y, before)
        assert torch.equal(operators.scale_input(x, case.arena, case.table, plan), x)
    run_apply(case, [A, [], B], 2, plan=case.plan([A, [], B], spare=5000))


def delta(case: Case, x: Tensor, y: Tensor, select: Tensor, chosen: list) -> Tensor:
    out = y[select].clone()
    operators.apply_(out, None, x[select], case.arena, case.table, case.plan(chosen))
    return out


@interpreted
@pytest.mark.parametrize(("dtype", "wide"), [FORMS[0], FORMS[2], FORMS[4]])
def test_a_row_does_not_see_its_batch(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, wide: bool) -> None:
    """Alone, beside others, in the decode and the prefill form, on any number of processors: the same bits, where a
    dot is a chain over k."""
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", interpreter.chain_dot)
    case = aligned(Case((16, 3, 20, 65), 700, 50, dtype, gains=True, shifts=True, wide=wide))  # three parts
    recipes, length = [A, MIX, [], B, BIG, A], 27
    rows = len(recipes) * length
    assert rows > config.DECODE_TOKENS
    everything = torch.arange(rows)
    x, y = case.randn(rows, 700), case.randn(rows, 50)
    batch = delta(case, x, y, everything, recipes)
    for processors in (1, 7):
        monkeypatch.setattr(launch, "INTERPRETED", config.Device(processors, 90))
        assert torch.equal(batch, delta(case, x, y, everything, recipes)), "processors"
    decode = delta(case, x, y, everything[5::length], recipes)
    assert torch.equal(batch[5::length], decode), "decode"
    for row in (0, 1, 4):
        one = everything[row * length + 5 : row * length + 6]
        assert torch.equal(decode[row : row + 1], delta(case, x, y, one, [recipes[row]])), "alone"


@interpreted
def test_however_decode_divides_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs or leaves of the sum, tiles of 32 tokens or 16, as there are more programs: the bits of the prefill form,
    also where `expand` computes A x itself, where a dot is a chain over k."""
    import count

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", interpreter.chain_dot)
    case = aligned(Case((1, 1, 1, 65), 700, 50, torch.float32))
    x, y = case.randn(150, 700), case.randn(150, 50)
    expected = delta(case, x, y, torch.arange(150), [BIG])[:27]
    routes = reference.routes(case.plan([BIG]), case.table, 27)
    for processors, divided in ((4, (32, 2)), (40, (32, 1)), (70, (16, 1))):
        assert count._divide(routes, 700, config.DECODE, processors) == divided
        monkeypatch.setattr(launch, "INTERPRETED", config.Device(processors, 90))
        assert torch.equal(delta(case, x, y, torch.arange(27), [BIG]), expected), divided
    monkeypatch.setattr(config, "MAX_CAPACITY", 32)
    monkeypatch.setattr(config, "MIN_CAPACITY", 32)
    assert torch.equal(delta(case, x, y, torch.arange(27), [BIG]), expected), "beyond the workspace"


@interpreted
@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("dtype", "wide"), [FORMS[0], FORMS[2], FORMS[4]])
def test_linear_matches_fp64(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, wide: bool, bias: bool, length: int
) -> None:
    case = aligned(Case((16, 3, 20, 65), 100, 70, dtype, gains=True, shifts=True, wide=wide))
    recipes = [A, [], MIX, BIG]
    x, weight = case.randn(4 * length, 100), (case.randn(70, 100).float() / 10).to(dtype)
    b = case.randn(70) if bias else None
    for recipe in (recipes, [[]] * 4):
        plan = case.plan(recipe)
        got = operators.linear(x, weight, b, case.arena, case.table, plan, 1)
        dense = F.linear(x.double(), weight.double(), None if b is None else b.double())
        ref = reference.linear(x, weight, b, case.arena, case.table, plan, 0)
        check(got, case.oracle(dense, None, x, recipe), ref)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", interpreter.chain_dot)
    got = operators.linear(x, weight, b, case.arena, case.table, plan, 1)
    blank = torch.zeros(8, dtype=torch.int32)
    assert torch.equal(got, operators.linear(x, weight, b, case.arena, case.table, blank, 1)), "base rows"
    mixed = operators.linear(x, weight, b, case.arena, case.table, case.plan(recipes), 1)
    assert torch.equal(mixed[length : 2 * length], got[length : 2 * length]), "base rows beside others"


@interpreted
@pytest.mark.parametrize(("dtype", "wide"), FORMS)
@pytest.mark.parametrize("width", [1, 300])
def test_scale_input(dtype: torch.dtype, wide: bool, width: int) -> None:
    case = aligned(Case((1, 0, 3), width, 4, dtype, in_gains=True, wide=wide))
    recipes = [A, [], MIX, B]
    x, _ = sentinel(12, width, dtype)
    x.copy_(case.randn(12, width))
    plan = case.plan(recipes)
    got = operators.scale_input(x, case.arena, case.table, plan)
    oracle = x.double().clone()
    for t in range(12):
        for slot, weight in recipes[t // 3]:
            if "in_gain" in case.adapters[slot]:
                oracle[t] += float(np.float32(weight)) * case.adapters[slot]["in_gain"] * x[t].double()
    check(got, oracle, reference.scale_input(x, case.arena, case.table, plan))
    assert torch.equal(got[3:6], x[3:6]) and torch.equal(got[9:], x[9:])


@interpreted
@pytest.mark.parametrize(("dtype", "wide"), FORMS)
@pytest.mark.parametrize(
    ("width", "shapes"),
    [(5, ((1, 5), None, (5, 1))), (96, ((4, 1), (2, 16), (96, 1))), (300, ((2, 150), None, (3, 4)))],
)
def test_turns(dtype: torch.dtype, wide: bool, width: int, shapes: Any) -> None:
    case = aligned(Case((1, 0, 3), width, width, dtype, in_gains=True, turns=shapes, wide=wide))
    recipes = [A, [], MIX, B]
    x, y = sentinel(12, width, dtype)[0], sentinel(12, width, dtype)[0]
    x.copy_(case.randn(12, width))
    y.copy_(case.randn(12, width))
    tensors = (case.arena, case.table, case.plan(recipes))
    inputs, outputs = x.double().clone(), y.double().clone()
    for t in range(12):
        for slot, weight in recipes[t // 3]:
            adapter, weight = case.adapters[slot], float(np.float32(weight))
            if "in_gain" in adapter:
                inputs[t] += weight * adapter["in_gain"] * x[t].double()
            if "turn" in adapter:
                inputs[t] += weight * turned(adapter["in_turn"], adapter["shape"][1], x[t])
                outputs[t] += weight * turned(adapter["turn"], adapter["shape"][1], x[t])
    got = operators.scale_input(x, *tensors)
    check(got, inputs, reference.scale_input(x, *tensors))
    assert torch.equal(got[3:6], x[3:6])
    got = operators.turn_output(y, x, *tensors)
    check(got, outputs, reference.turn_output(y, x, *tensors))
    assert torch.equal(got[3:6], y[3:6])
    assert torch.equal(operators.turn_output(x, None, *tensors), operators.turn_output(x, x, *tensors))


@interpreted
@pytest.mark.parametrize(("dtype", "wide"), FORMS)
@pytest.mark.parametrize("width", [1, 150])
def test_embed_matches_fp64(dtype: torch.dtype, wide: bool, width: int) -> None:
    """Looked up by token, in mixes too, with an identity B, and rank rows that are 0 for the tokens at hand."""
    vocab, length = 11, 9
    case = aligned(Case((16, 3, width, 20), vocab, width, dtype, gains=True, wide=wide))
    case.adapters[2]["b"] = torch.eye(width, dtype=torch.float64)
    case.arena[int(case.table[2, layout.B]) :][: width * width] = torch.nan  # not read
    case.table[2, layout.WHOLE] = 1
    recipes = [A, [], MIX, BIG, C]
    ids = torch.arange(len(recipes) * length).remainder(vocab - 1).view(len(recipes), length)
    rows = case.arena[int(case.table[0, layout.A]) :][: 16 * vocab].view(16, vocab)
    rows[5:, : vocab - 1] = 0  # of other tokens
    case.adapters[0]["a"][5:, : vocab - 1] = 0
    y, buffer = sentinel(ids.numel(), width, dtype)
    y.copy_(case.randn(ids.numel(), width))
    old, outside, plan = y.clone(), buffer.clone(), case.plan(recipes)
    hot = F.one_hot(ids.flatten(), vocab).to(dtype)
    reference_y = reference.embed(old, ids, case.arena, case.table, plan, vocab)
    operators.embed_(y, ids, case.arena, case.table, plan, vocab)
    check(y, case.oracle(old, None, hot, recipes), reference_y)
    assert torch.equal(y[length : 2 * length], old[length : 2 * length])
    one = old[-1:].clone()
    operators.embed_(one, ids[-1:, -1:], case.arena, case.table, case.plan([C]), vocab)
    assert torch.equal(one, y[-1:]), "a token does not see the others"
    y.copy_(old)
    assert torch.equal(buffer.view(torch.uint8), outside.view(torch.uint8)), "wrote outside of the view"


@interpreted
@pytest.mark.parametrize(("dtype", "wide"), FORMS)
@pytest.mark.parametrize(("width_in", "width_out"), [(3, 1), (70, 100)])
def test_merge_matches_fp64(dtype: torch.dtype, wide: bool, width_in: int, width_out: int) -> None:
    case = aligned(Case((16, 3, 40), width_in, width_out, dtype, gains=True, in_gains=True, wide=wide))
    weight, buffer = sentinel(width_out, width_in, dtype)
    weight.copy_(case.randn(width_out, width_in))
    before, outside = weight.clone(), buffer.clone()
    oracle, wide = before.double().clone(), before.float()
    for slot, w in MIX:
        adapter = {k: v for k, v in case.adapters[slot].items() if k != "scale"}
        scale, w = case.adapters[slot]["scale"], float(np.float32(w))
        oracle += w * scale * adapter["b"].T @ adapter["a"]
        wide = wide + (adapter["b"].float().T @ adapter["a"].float()) * (w * scale)
        for name, shape in (("gain", (-1, 1)), ("in_gain", (1, -1))):
            if name in adapter:
                oracle += w * adapter[name].view(shape) * before.double()
                wide = wide + w * adapter[name].view(shape).float() * before.float()
    operators.merge_(weight, None, case.arena, case.table, case.plan([MIX]))
    check(weight, oracle, wide.to(dtype))
    elsewhere = torch.full_like(before, torch.nan)
    operators.merge_(elsewhere, before, case.arena, case.table, case.plan([MIX]))
    assert torch.equal(elsewhere, weight)
    weight.copy_(before)
    assert torch.equal(buffer.view(torch.uint8), outside.view(torch.uint8)), "wrote outside of the view"
    operators.merge_(weight, None, case.arena, case.table, torch.zeros(8, dtype=torch.int32))
    assert torch.equal(weight, before)


@interpreted
@pytest.mark.parametrize("shape", ["transposed", "sliced"])
def test_any_strides(shape: str) -> None:
    case = aligned(Case((3, 4, 5), 20, 33, torch.float32, gains=True))
    x, y = case.randn(4, 6, 20), case.randn(4, 6, 33)
    if shape == "transposed":
        x, y = x.transpose(1, 2).contiguous().transpose(1, 2), y.transpose(0, 1).contiguous().transpose(0, 1)
    else:
        x, y = case.randn(4, 9, 20)[:, 2:8], case.randn(4, 9, 40)[:, 1:7, 4:37]
    plan = case.plan([A, [], B, MIX])
    expected = reference.apply(y, None, x, case.arena, case.table, plan)
    operators.apply_(y, None, x, case.arena, case.table, plan)
    torch.testing.assert_close(y, expected)


@interpreted
def test_opcheck() -> None:
    case = aligned(Case((3, 2, 4), 20, 33, torch.float32, gains=True, in_gains=True))
    x, y, tensors = case.randn(4, 20), case.randn(4, 33), (case.arena, case.table, case.plan([A, [], B, MIX]))
    ops = torch.ops.mlora
    checks = ("test_schema", "test_faketensor")  # the others run the operator many times more, and need no kernel
    for op, args in (
        (ops.triton_apply_, (y, y.clone(), x, *tensors)),
        (ops.triton_scale_input, (x, *tensors)),
        (ops.triton_embed_, (y, torch.arange(4), *tensors, 20)),
        (ops.triton_linear, (x, case.randn(33, 20), case.randn(33), *tensors, 1)),
    ):
        torch.library.opcheck(op.default, args, test_utils=checks)


@interpreted
def test_wrong_tensors_are_refused() -> None:
    case = aligned(Case((3, 2, 4), 20, 33, torch.float32))
    x, y, plan = case.randn(4, 20), case.randn(4, 33), case.plan([A])
    for args, message in (
        ((y, None, x.half(), case.arena, case.table, plan), "x and y must have one dtype"),
        ((y, None, x, case.arena.half(), case.table, plan), "or the arena float32 beside 16 bits"),
        ((y, y[:2], x, case.arena, case.table, plan), "base must have y's shape"),
        ((y[:3], None, x, case.arena, case.table, plan), "4 tokens, y has 3"),
        ((y, None, x, case.arena, case.table[:, :5], plan), "table must be"),
        ((y, None, x, case.arena, case.table, plan[:5]), "header"),
    ):
        with pytest.raises(RuntimeError, match=message):
            operators.apply_(*args)


GENERATE = """
import sys, torch
sys.path.insert(0, {tests!r})
from conftest import build, inputs_for
import mlora
from mlora.ops import dispatch
if dispatch.backend("cpu", torch.float32) == "triton":
    import interpreter
    interpreter.install()
model, batch = build("llama"), inputs_for("llama", 4)
runtime = mlora.patch(model, memory=1 << 20, max_adapters=8)
for folder in sys.argv[2:]:
    runtime.load_adapter(folder, folder.rsplit("/", 1)[1])
names = ["r3", None, "dora1", {{"rs16": 0.5, "bias8": -1.0}}]
with torch.no_grad():
    options = dict(max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)
    out = model.generate(**batch, adapter_names=names, **options)
torch.save((dispatch.backend("cpu", torch.float32), torch.stack(out.logits), out.sequences), sys.argv[1])
"""


def test_a_model_generates(folders: dict[str, Path], tmp_path: Path) -> None:
    """The same tokens as with the reference, every LoRA product of the model through the Triton kernels."""
    results = {}
    for name in ("triton", "reference"):
        env = {**os.environ, "MLORA_BACKEND": name, "TRITON_INTERPRET": "1"}
        code = GENERATE.format(tests=str(Path(__file__).parents[1]))
        command = [sys.executable, "-c", code, str(tmp_path / name), *map(str, folders.values())]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        results[name] = torch.load(tmp_path / name)
    (ran, logits, tokens), (oracle, expected, wanted) = results["triton"], results["reference"]
    assert (ran, oracle) == ("triton", "reference")
    assert torch.equal(tokens, wanted)
    torch.testing.assert_close(logits, expected)
    with torch.no_grad():
        bare = build("llama")(**inputs_for("llama", 4)).logits[:, -1]
    torch.testing.assert_close(logits[0, 1], bare[1])
    assert (logits[0, 0] - bare[0]).abs().max() > 0.1


COMPILE = """
import json, re, sys, torch
from mlora.kernels import aot, launch
from mlora.kernels.config import Device
from mlora import layout
capability = int(sys.argv[1])
device = Device(132, capability)
table, plan = torch.empty(64, layout.TABLE_WIDTH, dtype=torch.int64), torch.empty(1024, dtype=torch.int32)
found = []
forms = [(torch.bfloat16, 2048), (torch.float32, 2048)] + [(torch.bfloat16, 16)] * (capability == 90)
for dtype, tokens in forms:
    arena, weight = torch.empty(1024, dtype=dtype), torch.empty(4096, 4096, dtype=dtype)
    x, y = torch.empty(tokens, 4096, dtype=dtype), torch.empty(tokens, 4096, dtype=dtype)
    arrived = torch.empty(tokens, dtype=torch.int32)
    launches = launch.apply_launches(y, None, x, arena, table, plan, arrived, device)
    launches += launch.linear_launches(y, x, weight, None, arena, table, plan, device)
    kept, offsets = torch.empty(16 * tokens), torch.empty(64, dtype=torch.int64)
    launches += launch.apply_launches(y, None, x, arena, table, plan, arrived, device, kept)[:1]
    if tokens == 2048:
        launches += launch.gradient_launches(kept, kept, x, offsets, table, plan, device)
    if tokens == 2048 and dtype == torch.bfloat16:
        launches += launch.turn_launches(y, x, None, arena, table, plan, device)
        launches += launch.turn_launches(y, x, y, arena, table, plan, device)
        launches += launch.merge_launches(weight, weight, arena, table, plan)
    for item in launches:
        code = aot.compile_launch(item, capability)
        count = lambda pattern, text: len(re.findall(pattern, text))
        found.append(dict(
            name=code.name + ", keeping" * (item.args[-1] is kept), dtype=str(dtype)[6:], tokens=tokens,
            spills=code.spills, registers=code.registers, shared=code.shared,
            sync=count(r"\\bmma\\.sync", code.ptx), group=count(r"\\b(?:wgmma\\.mma_async|tcgen05\\.mma)", code.ptx),
            narrow=sum(1 for line in code.sass.splitlines() if re.search(r"\\bLDG\\S*\\.[US]16\\b", line)),
            vector=count(r"\\b(?:LDG|LDGSTS)\\S*\\.128\\b", code.sass), stores=count(r"\\bSTG\\S*\\.128\\b", code.sass),
            floats=count(r"\\b(?:ATOM|ATOMG|RED|REDG)\\S*\\.[BF](?:16|32|64)\\S*", code.sass)))
print(json.dumps(found))
"""
TUNED_FOR = "3.8"  # a version of Triton
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_compiles_for_architectures_that_are_not_here(capability: int) -> None:
    """Machine code by ptxas: no atomics on floats, tensor cores, and one kind of tensor-core instruction in both forms
    of `shrink` and `expand`, on which it rests that both give the same bits. By the Triton that the kernels were tuned
    for, also no spills, few registers, and 128-bit loads and stores: another one's compiler may spend more."""
    import triton

    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability)], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)
    assert len(kernels) == (17 if capability == 90 else 13)  # both forms on one architecture
    for kernel in kernels:
        assert kernel["floats"] == 0, kernel
        assert kernel["shared"] <= SHARED_LIMIT[capability], kernel
        if kernel["name"] != "turn" and kernel["dtype"] != "float32":
            assert kernel["sync"] + kernel["group"] > 0, kernel
        if kernel["name"] in ("shrink", "shrink, keeping", "expand", "rank_gradients"):
            assert kernel["group"] == 0, kernel
    if not triton.__version__.startswith(f"{TUNED_FOR}."):
        return
    for kernel in kernels:
        assert kernel["spills"] == 0, kernel
        small = kernel["name"] == "linear" and kernel["dtype"] == "float32" and capability == 120
        most = 128 if kernel["name"] == "shrink, keeping" else 96 if small else 80
        assert kernel["registers"] <= most, kernel  # 20 of 48 warps; 24 of 64 or 48
        assert kernel["vector"] > 0, kernel
        if kernel["name"] not in (
            "shrink",
            "shrink, keeping",
            "rank_gradients",
        ):  # the latter's sums lie rank rows first in its threads
            assert kernel["stores"] > 0, kernel
        if kernel["name"] == "expand":
            assert kernel["narrow"] <= 1, kernel  # A, 16 by 16 for 256 threads, of recipes beyond the workspace
        if kernel["name"] == "linear":
            assert kernel["narrow"] <= 2, kernel  # gains and shifts


def test_the_table_and_plan_columns_are_those_of_the_layout() -> None:
    """The kernels copy the numbers when they are imported."""
    from mlora.kernels import work

    for name in ("A", "B", "RANK", "SCALE", "GAIN", "IN_GAIN", "SHIFT", "TURN", "IN_TURN", "TABLE_WIDTH"):
        assert getattr(work, name).value == getattr(layout, name)


@interpreted
@pytest.mark.parametrize("capacity", [256, 64], ids=["fits", "beyond"])
@pytest.mark.parametrize(
    ("recipes", "length", "processors"),
    [([A, [], MIX, BIG], 1, 4), ([BIG], 40, 30), ([BIG], 40, 48), ([MIX, BIG, [], C], 40, 4)],
    ids=["decode", "leaves", "half tiles", "prefill"],
)
def test_counts_are_what_the_interpreter_sees(
    monkeypatch: pytest.MonkeyPatch, recipes: list, length: int, processors: int, capacity: int
) -> None:
    """Bytes loaded and stored of each tensor, and programs without work."""
    import count

    monkeypatch.setattr(config, "MAX_CAPACITY", capacity)
    builder = interpreter.InterpreterBuilder
    case = aligned(Case((16, 3, 40, 65), 300, 100, torch.float16))
    rows = len(recipes) * length
    x, y = case.randn(rows, 300), case.randn(rows, 100)
    plan = case.plan(recipes)
    arrived, device = torch.zeros(rows, dtype=torch.int32), config.Device(processors, 90)
    launches = launch.apply_launches(y, None, x, case.arena, case.table, plan, arrived, device)
    v = launches[0].args[0]
    spans = {name: (t.data_ptr(), t.data_ptr() + t.nbytes) for name, t in (("x", x), ("y", y), ("v", v))}
    start, size = case.arena.data_ptr(), case.arena.itemsize
    parts = [
        (name, start + int(case.table[slot, column]) * size, case.adapters[slot][name].numel() * size)
        for slot in range(4)
        for name, column in (("a", layout.A), ("b", layout.B))
    ]
    seen: dict[tuple[str, str], int] = {}
    worked: set[int] = set()

    def record(kind: str, program: int, pointers: Any, mask: Any, itemsize: int) -> None:
        where = np.broadcast_to(pointers.data, np.broadcast(pointers.data, mask.data).shape)[mask.data.astype(bool)]
        for name, (low, high) in spans.items():
            hit = int(((where >= low) & (where < high)).sum())
            seen[kind, name] = seen.get((kind, name), 0) + hit * itemsize
            if hit:
                worked.add(program)
        for name, low, nbytes in parts:
            seen[kind, name] = (
                seen.get((kind, name), 0) + int(((where >= low) & (where < low + nbytes)).sum()) * itemsize
            )

    load, store = builder.create_masked_load, builder.create_masked_store

    def spy_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        out = load(self, pointers, mask, *rest)
        record("load", self.grid_idx[0], pointers, mask, out.data.itemsize)
        return out

    def spy_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        record("store", self.grid_idx[0], pointers, mask, value.data.itemsize)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", spy_load)
    monkeypatch.setattr(builder, "create_masked_store", spy_store)
    counts = count.count_apply(plan, case.table, rows, 300, 100, 2, device)
    for item, expected in zip(launches, counts, strict=True):
        seen.clear()
        worked.clear()
        item.run()
        assert (item.name, item.grid, item.grid - len(worked)) == (expected.name, expected.grid, expected.idle)
        assert {n: b for (kind, n), b in seen.items() if kind == "load" and b} == expected.loads
        assert {n: b for (kind, n), b in seen.items() if kind == "store" and b} == expected.stores


@interpreted
@pytest.mark.parametrize("tokens", [16, 64, 2048])
@pytest.mark.parametrize("ranks", [(8,), (16,), (64,), (8, 16, 32, 64, 128)], ids=["r8", "r16", "r64", "mixed"])
def test_programs_have_work(ranks: tuple[int, ...], tokens: int) -> None:
    """Every program, of at least as many as the device has multiprocessors, one adapter or many, whatever the number of
    slots."""
    import count

    from mlora.plan.plan import plan_words

    table = torch.zeros(64, layout.TABLE_WIDTH, dtype=torch.int64)
    table[:, layout.RANK] = torch.tensor([ranks[i % len(ranks)] for i in range(64)])
    table[:, layout.GAIN] = table[:, layout.SHIFT] = -1
    for adapters in (1, 8, min(tokens, 64)):
        recipes = [((row % adapters, 1.0),) for row in range(adapters if tokens == 2048 else tokens)]
        plan = torch.from_numpy(plan_words(recipes))
        for item in count.count_apply(plan, table, tokens, 4096, 4096, 2, config.Device(132, 90)):
            assert item.grid >= 132 and item.idle == 0, (adapters, item)
