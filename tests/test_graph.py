"""What a patched model does on a GPU, traced with fake CUDA tensors: its launches, and that it never waits."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import build, inputs_for
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import mlora
from mlora.layers import Head, LoraLayer, find, group_heads
from mlora.layers.head import answer
from mlora.ops import dispatch, layout
from mlora.store import BOTH, GAIN, INPUT, LORA, TURN

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

# Operators that read a device's memory from the host, or whose shapes depend on it.
WAITS = {
    "aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::_unique2",
    "aten::masked_select", "aten::unique_dim", "aten::repeat_interleave.Tensor",
}  # fmt: skip


class Trace(TorchDispatchMode):
    """Names of the operators that ran, and of those that the host waits for or that copy from its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name()
        self.calls.append(name)
        devices = {a.device.type for a in [*args, out] if isinstance(a, torch.Tensor)}
        if name in WAITS or devices > {"cuda"} or (name.startswith("aten::lift") and "cpu" in devices):
            self.waits.append(name)
        return out

    def count(self, name: str) -> int:
        return sum(call.split(".")[0] == f"mlora::{name}" for call in self.calls)


def traced_layer(touches: int, tokens: int) -> Trace:
    """One forward of one linear on fake CUDA tensors whose plan has `touches` for it."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = torch.nn.Sequential(torch.nn.Linear(64, 96, device="cuda", dtype=torch.bfloat16))
        runtime = mlora.patch(model, memory=1 << 16)
        layer = model[0]
        assert isinstance(layer, LoraLayer) and layer.weight.device.type == "cuda"
        x = torch.empty(tokens, 64, device="cuda", dtype=torch.bfloat16)
        words = torch.zeros(64, dtype=torch.int32, device="cuda")
        runtime._shared.local.plan = mlora.routing.Plan(words, bytes([touches]), (), 1, (1,))
        assert mode is not None
        with torch.no_grad(), Trace() as trace:
            out = layer(x)
        runtime._shared.local.plan = None
        assert out.device.type == "cuda" and out.shape == (tokens, 96)
    return trace


@pytest.mark.parametrize("tokens", [1, 2048])
@pytest.mark.parametrize(
    ("touches", "calls"),
    [
        (0, {"apply_": 0, "scale_input": 0}),
        (LORA, {"apply_": 1, "scale_input": 0}),
        (LORA | GAIN, {"apply_": 1, "scale_input": 0}),
        (LORA | INPUT, {"apply_": 1, "scale_input": 1}),
        (GAIN | INPUT, {"apply_": 1, "scale_input": 1}),
        (GAIN | INPUT | BOTH, {"apply_": 1, "scale_input": 1}),
        (INPUT, {"apply_": 0, "scale_input": 1, "turn_output": 0}),
        (TURN, {"apply_": 0, "scale_input": 0, "turn_output": 1}),
        (LORA | TURN, {"apply_": 1, "scale_input": 0, "turn_output": 1}),
        (TURN | INPUT | BOTH, {"apply_": 0, "scale_input": 1, "turn_output": 1}),
    ],
    ids=["base", "lora", "gain", "input", "either", "both", "input_alone", "turn", "lora_and_turn", "both_turns"],
)
def test_a_layer_makes_one_call_and_never_waits(touches: int, calls: dict[str, int], tokens: int) -> None:
    trace = traced_layer(touches, tokens)
    assert trace.waits == []
    assert {name: trace.count(name) + trace.count("triton_" + name) for name in calls} == calls
    large = dispatch.backend("cuda", torch.bfloat16) == "cuda" and tokens > dispatch.CUDA_MAX_TOKENS
    assert trace.count("triton_apply_") == (calls["apply_"] if large else 0), "many tokens go to the tensor cores"
    free = ("mlora::", "prim::", "aten::view", "aten::t", "aten::detach")  # views and queries launch nothing
    others = [call for call in trace.calls if not call.startswith(free)]
    products = 2 if touches & BOTH else 1  # of u * x and of x, only where a row takes both gains
    assert others == ["aten::addmm"] * products, "beside the operators above only the base product"


@pytest.mark.skipif(dispatch.backend("cuda", torch.bfloat16) != "cuda", reason="built without the CUDA operators")
@pytest.mark.parametrize("clusters", [True, False])
def test_without_clusters_triton_serves_every_size(monkeypatch: pytest.MonkeyPatch, clusters: bool) -> None:
    monkeypatch.setattr(dispatch, "_clusters", lambda index: clusters)
    assert traced_layer(LORA, 1).count("triton_apply_") == (not clusters)


@pytest.mark.parametrize("run", [lambda x: x.cpu(), lambda x: torch.tensor([1], device=x.device)])
def test_the_trace_sees_waits(run: Any) -> None:
    with FakeTensorMode():
        x = torch.ones(3, device="cuda")
        with Trace() as trace:
            run(x)
    assert trace.waits


def test_an_embedding_makes_one_call_and_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "is_dense", lambda tensor: tensor is not None)  # fake tensors do not look it
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = torch.nn.Sequential(torch.nn.Embedding(50, 96, device="cuda", dtype=torch.bfloat16))
        model.get_input_embeddings = lambda: model[0]
        runtime = mlora.patch(model, memory=1 << 16)
        ids = torch.zeros(2, 7, dtype=torch.int64, device="cuda")
        words = torch.zeros(64, dtype=torch.int32, device="cuda")
        runtime._shared.local.plan = mlora.routing.Plan(words, bytes([LORA]), (), 1, (1,))
        with torch.no_grad(), Trace() as trace:
            model(ids)
        runtime._shared.local.plan = None
    assert trace.waits == [] and trace.count("embed_") == 1


def test_heads_of_another_size_never_wait() -> None:
    with FakeTensorMode():
        arena = torch.empty(1 << 12, device="cuda")
        x, weight = torch.empty(6, 5, 16, device="cuda"), torch.empty(10, 16, device="cuda")
        own = [Head(0, 320, 20), None, Head(0, 320, 20), Head(400, -1, 7), None, None]
        heads = group_heads(own, x.device)
        with Trace() as trace:
            out = answer(x, heads, arena, lambda x: x @ weight.T, 10)
    assert out.shape == (6, 5, 20) and trace.waits == []


def test_launches_of_an_operator_depend_on_shapes_only() -> None:
    """Two launches for `apply_`, one for `linear` and `scale_input`; grids that never ask the plan."""
    from mlora.kernels import launch
    from mlora.kernels.config import Device

    device = Device(132, 90)
    with FakeTensorMode():
        arena = torch.empty(1024, dtype=torch.bfloat16, device="cuda")
        table = torch.empty(64, layout.TABLE_WIDTH, dtype=torch.int64, device="cuda")
        plan = torch.empty(512, dtype=torch.int32, device="cuda")
        weight = torch.empty(14336, 4096, dtype=torch.bfloat16, device="cuda")
        for tokens in (1, 16, 64, 2048, 8192):
            x = torch.empty(tokens, 4096, dtype=torch.bfloat16, device="cuda")
            y = torch.empty(tokens, 14336, dtype=torch.bfloat16, device="cuda")
            arrived = torch.empty(tokens, dtype=torch.int32, device="cuda")
            with Trace() as trace:
                apply_ = launch.apply_launches(y, None, x, arena, table, plan, arrived, device)
                linear = launch.linear_launches(y, x, weight, None, arena, table, plan, device)
                scale = launch.turn_launches(x, x, None, arena, table, plan, device)
            assert [len(launches) for launches in (apply_, linear, scale)] == [2, 1, 1]
            assert set(trace.calls) <= {"aten::empty.memory_format", "aten::new_empty"} and not trace.waits
            assert all(item.grid <= 4 * device.processors for item in [*apply_, *linear, *scale])


def test_warmup_runs_every_shape_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlora.kernels import launch

    model = build("llama")
    runtime = mlora.patch(model, memory=1 << 16)
    ran: list[str] = []
    monkeypatch.setattr(launch, "_run", lambda launches, where: ran.extend(item.name for item in launches))
    calls = launch.warmup(model)
    shapes = {
        (m.in_features, m.out_features)
        for m in model.modules()
        if hasattr(m, "_mlora") and isinstance(m, torch.nn.Linear)
    }
    assert calls == 4 * len(shapes) and ran.count("shrink") == ran.count("expand") == 2 * len(shapes)
    assert runtime is model.mlora and inputs_for("llama", 1)


def test_no_two_launches_share_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches of one stream do; each captured launch has its own, until those that were cleared before are used up."""
    from mlora.kernels import arrivals

    now = SimpleNamespace(cuda_stream=1, synchronize=lambda: None, capturing=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: now)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now.capturing)
    monkeypatch.setattr(arrivals, "POOL", 200)
    monkeypatch.setattr(arrivals, "_streams", {})
    monkeypatch.setattr(arrivals, "_pools", {})
    device = torch.device("cuda", 0)
    with FakeTensorMode():
        first = arrivals.counters(device, 16)
        assert arrivals.counters(device, 1024) is first
        more = arrivals.counters(device, 5000)
        assert more.numel() == 5000 and arrivals.counters(device, 16) is more
        now.cuda_stream = 2
        assert arrivals.counters(device, 16) is not more
        now.capturing = True
        taken = [arrivals.counters(device, 90) for _ in range(3)]
        assert [t.storage_offset() for t in taken] == [0, 96, 0] and all(t.numel() == 90 for t in taken)
        assert taken[0]._typed_storage()._cdata == taken[1]._typed_storage()._cdata
        assert taken[2]._typed_storage()._cdata != taken[0]._typed_storage()._cdata, "cleared in the graph"
