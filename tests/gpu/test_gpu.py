"""What only a GPU can show: the kernels on the device, their capture in a graph, and that their time is no nonsense.

python -m pytest tests/gpu, or `make gpu`
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from conftest import VOCAB, assert_close, build, inputs_for, logits, make_adapter, resized, served
from op_cases import DTYPES, MIX, A, B, Case, check

import mlora
from mlora.ops import dispatch, reference

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)
if dispatch.backend("cuda", torch.float32) != "cuda":
    pytest.skip("built without the CUDA operators", allow_module_level=True)

RECIPES = [A, [], B, MIX, A, A, A, A, A, A, A, MIX]


def on_device(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    return case.arena.cuda(), case.table.cuda()


@pytest.mark.parametrize("length", [1, 9, 170])
@pytest.mark.parametrize("align", [1, 32], ids=["unaligned", "aligned"])
@pytest.mark.parametrize(
    "ranks, width_in, width_out",
    [
        ((1, 3, 0), 1, 1),
        ((16, 3, 20), 20, 855),
        ((16, 1, 0), 2049, 20),
        ((65, 8, 130), 4096, 4096),
        ((300, 3, 8), 855, 14336),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_apply(dtype, ranks, width_in, width_out, align, length):
    case = Case(ranks, width_in, width_out, dtype, gains=True, shifts=True, align=align)
    x, y = case.randn(len(RECIPES) * length, width_in), case.randn(len(RECIPES) * length, width_out)
    base, plan = case.randn(len(RECIPES) * length, width_out), case.plan(RECIPES)
    arena, table = on_device(case)
    for b in (None, base):
        got = y.cuda()
        dispatch.apply_(got, None if b is None else b.cuda(), x.cuda(), arena, table, plan.cuda())
        ref = reference.apply(y, b, x, case.arena, case.table, plan)
        check(got.cpu(), case.oracle(y, b, x, RECIPES), ref)
        row = y[3 * length : 3 * length + 1].cuda()
        alone = None if b is None else b[3 * length : 3 * length + 1].cuda()
        dispatch.apply_(row, alone, x[3 * length : 3 * length + 1].cuda(), arena, table, case.plan([MIX]).cuda())
        assert torch.equal(row, got[3 * length : 3 * length + 1]), "a row depends on its batch"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_group_scale_input_and_merge(dtype):
    case = Case((16, 3, 20), 576, 855, dtype, gains=True, shifts=True, in_gains=True)
    x, y, plan = case.randn(len(RECIPES), 576), case.randn(len(RECIPES), 855), case.plan(RECIPES)
    arena, table = on_device(case)
    expected, ys = y.cuda(), [y.cuda() for _ in range(3)]
    dispatch.apply_(expected, None, x.cuda(), arena, table, plan.cuda())
    dispatch.apply_group_(ys, x.cuda(), arena, [table] * 3, plan.cuda())
    assert all(torch.equal(got, expected) for got in ys)

    scaled = dispatch.scale_input(x.cuda(), arena, table, plan.cuda()).cpu()
    want = reference.scale_input(x, case.arena, case.table, plan)
    assert (scaled.float() - want.float()).abs().max() <= torch.finfo(dtype).eps * want.float().abs().max()

    weight, ref = case.randn(855, 576), case.randn(855, 576)
    ref.copy_(weight)
    got = weight.cuda()
    one = case.plan([[(0, 0.7), (2, 0.3), (1, 1.5)]], spare=0)
    dispatch.merge_(got, None, arena, table, one.cuda())
    reference.merge_(ref, None, case.arena, case.table, one)
    wide = weight.double()
    reference.merge_(wide, None, case.arena.double(), case.table, one)
    check(got.cpu(), wide, ref)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("align", [1, 32], ids=["unaligned", "aligned"])
@pytest.mark.parametrize(
    "turns", [((32, 1), (4, 1), (2, 4)), ((2, 32), (2, 2), (3, 1)), ((4, 2), (2, 1), None)], ids=str
)
def test_turns(dtype, align, turns):
    case = Case((1, 3, 2), 1152, 1152, dtype, in_gains=True, align=align, turns=turns)
    x, y, plan = case.randn(len(RECIPES), 1152), case.randn(len(RECIPES), 1152), case.plan(RECIPES)
    arena, table = on_device(case)
    there, here = (arena, table, plan.cuda()), (case.arena, case.table, plan)
    wide = (case.arena.double(), case.table, plan)
    got = dispatch.scale_input(x.cuda(), *there).cpu()
    check(got, reference.scale_input(x.double(), *wide), reference.scale_input(x, *here))
    got = dispatch.turn_output(y.cuda(), x.cuda(), *there).cpu()
    check(got, reference.turn_output(y.double(), x.double(), *wide), reference.turn_output(y, x, *here))


def test_a_captured_graph_follows_the_plan():
    """One capture; plans, slots and weights change by copies into the same tensors."""
    case = Case((16, 3, 20), 576, 855, torch.bfloat16, gains=True, shifts=True)
    arena, table = on_device(case)
    x, start, y = case.randn(12, 576).cuda(), case.randn(12, 855).cuda(), torch.empty(12, 855).bfloat16().cuda()
    plan = torch.zeros(128, dtype=torch.int32, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        dispatch.apply_(y, None, x, arena, table, plan)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y.copy_(start)
        dispatch.apply_(y, None, x, arena, table, plan)
    for recipes in (RECIPES, [[]] * 12, [A] * 12, [B, A, MIX] * 4):
        words = case.plan(recipes)
        plan[: words.numel()].copy_(words)
        graph.replay()
        expected = start.clone()
        dispatch.apply_(expected, None, x, arena, table, words.cuda())
        assert torch.equal(y, expected)


def test_patched_model(llama, folders):
    model = copy.deepcopy(llama).cuda()
    batch = {name: tensor.cuda() for name, tensor in inputs_for("llama", 4).items()}
    runtime = mlora.patch(model, memory=1 << 20, max_adapters=8)
    for name, folder in folders.items():
        runtime.load_adapter(folder, name)
    entries = ["r3", None, "dora1", {"rs16": 0.5, "bias8": -1.0}]
    got = logits(model, batch, adapter_names=entries)
    native, dispatch._apply_ = dispatch._apply_, dispatch._reference_apply_
    try:
        want = logits(model, batch, adapter_names=entries)
    finally:
        dispatch._apply_ = native
    assert_close(got, want, 1e-4)


def test_no_layer_waits(tmp_path):
    """Torch raises where it would: experts, a router, and an embedding of another size beside them."""
    base = build("qwen2moe")
    base.set_experts_implementation("batched_mm")  # the others ask how many tokens each expert gets
    parameters = ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]
    experts = make_adapter(tmp_path / "experts", base, 1, r=2, target_modules=["q_proj"], target_parameters=parameters)
    saved = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    wide = make_adapter(tmp_path / "wide", resized(base, VOCAB + 3), 2, r=2, **saved)
    folders, entries = {"experts": experts, "wide": wide}, ["experts", None, "wide", {"experts": 0.5}]
    ids = torch.randint(2, VOCAB, (4, 5), generator=torch.Generator().manual_seed(1))
    ids[2, 1] = VOCAB + 2
    want = logits(served(base, folders), {"input_ids": ids}, adapter_names=entries)
    model, batch = served(base.cuda(), folders), {"input_ids": ids.cuda(), "use_cache": False}
    logits(model, batch, adapter_names=entries)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = logits(model, batch, adapter_names=entries)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got.isinf().cpu(), want.isinf())
    assert_close(got.cpu().nan_to_num(neginf=0), want.nan_to_num(neginf=0), 1e-4)
    batch["input_ids"][1, 3] = VOCAB
    with pytest.raises(mlora.errors.TokenError, match="row 1"):
        logits(model, batch, adapter_names=entries)


def test_time_is_sane():
    """16 rows of 8 adapters on 4096 -> 4096 at rank 16: 2.4 MB. A tenth of the slowest supported card's bandwidth."""
    case = Case((16,) * 8, 4096, 4096, torch.bfloat16, align=32)
    arena, table = on_device(case)
    plan = case.plan([[(i // 2, 1.0)] for i in range(16)]).cuda()
    x, y = case.randn(16, 4096).cuda(), case.randn(16, 4096).cuda()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    for _ in range(20):
        dispatch.apply_(y, None, x, arena, table, plan)
    events[0].record()
    for _ in range(100):
        dispatch.apply_(y, None, x, arena, table, plan)
    events[1].record()
    torch.cuda.synchronize()
    microseconds = events[0].elapsed_time(events[1]) * 10
    assert microseconds < 100, f"{microseconds:.1f} us a call"
