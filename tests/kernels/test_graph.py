"""What a patched model does on a GPU, traced with fake CUDA tensors: its launches, and that it never waits."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import VOCAB, build, inputs_for, make_adapter, resized
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import mlora
from mlora import layout
from mlora.arena.bits import BOTH, GAIN, INPUT, LORA, TURN
from mlora.arena.store import Store
from mlora.layers import Head, LoraLayer, find, group_heads
from mlora.layers.head import answer
from mlora.ops import dispatch
from mlora.plan import activation
from mlora.plan.plan import Plan

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

# Operators that read a device's memory from the host, or whose shapes depend on it.
WAITS = {
    "aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::_unique2",
    "aten::masked_select", "aten::unique_dim", "aten::repeat_interleave.Tensor",
}  # fmt: skip


class Trace(TorchDispatchMode):
    """Names of the operators that ran, and of those that the host waits for. Checks read what they are given.

    A copy between host and device is one, unless it is `non_blocking` and the host's memory is pinned: torch sees to
    that where it makes the copy on the host; `pinned` are tensors that lie so. Of those, `copies` has the places among
    the calls.
    """

    def __init__(self, pinned: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.waits: list[str] = []
        self.copies: list[int] = []
        self.pinned = pinned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name()
        self.calls.append(name)
        tensors = [a for a in [*args, out] if isinstance(a, Tensor)]
        crosses = {t.device.type for t in tensors} > {"cuda"}
        is_pinned = crosses and (tensors[-1].device.type == "cpu" or any(tensors[0] is one for one in self.pinned))
        if is_pinned and (kwargs or {}).get("non_blocking"):
            self.copies.append(len(self.calls) - 1)
        elif crosses or name in WAITS or (name.startswith("mlora::check_") and tensors[0].device.type == "cuda"):
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
        runtime._shared.local.plan = Plan((words,), torch.zeros(8), bytes([touches]), (), 1, (1,))
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


@pytest.mark.parametrize(
    "run",
    [
        lambda x: x.cpu(),
        lambda x: torch.tensor([1], device=x.device),
        lambda x: torch.tensor([1]).to(x.device, non_blocking=True),  # of memory that is not pinned
        lambda x: x + torch.tensor(1),
    ],
)
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
        runtime._shared.local.plan = Plan((words,), torch.zeros(8), bytes([LORA]), (), 1, (1,))
        with torch.no_grad(), Trace() as trace:
            model(ids)
        runtime._shared.local.plan = None
    assert trace.waits == [] and trace.count("embed_") == 1


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What was pinned, on a machine without a GPU; nothing is being captured."""
    tensors: list[Tensor] = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensors.append(tensor) or tensor)
    return tensors


def test_heads_of_another_size_never_wait(pinned: list[Tensor]) -> None:
    with FakeTensorMode():
        arena = torch.empty(1 << 12, device="cuda")
        x, weight = torch.empty(6, 5, 16, device="cuda"), torch.empty(10, 16, device="cuda")
        own = [Head(0, 320, 20), None, Head(0, 320, 20), Head(400, -1, 7), None, None]
        heads = group_heads(own, 10, x.device)
        with Trace() as trace:
            out = answer(x, heads, arena, lambda x: x @ weight.T, 10)
    assert out.shape == (6, 5, 20) and trace.waits == []


class FakeModel:
    """A patched mixture of experts on a fake GPU, with real adapters: LoRA of experts and router, one with more tokens,
    an aLoRA. Its base never waits. `trace` is of the call that runs."""

    def __init__(self, root: Path, patched: pytest.MonkeyPatch, pinned: list[Tensor]) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.pinned = pinned
        self.trace = Trace()
        base = build("qwen2moe")
        names = ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]
        options: dict[str, dict[str, Any]] = {
            "experts": {"target_modules": ["q_proj"], "target_parameters": names},
            "wide": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
            "alora": {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "alora_invocation_tokens": [5]},
        }
        folders = {
            name: make_adapter(root / name, resized(base, VOCAB + 3) if name == "wide" else base, 1, r=2, **config)
            for name, config in options.items()
        }
        for name, module in list(sys.modules.items()):
            if name.startswith("mlora.layers") and hasattr(module, "is_dense"):  # fake tensors do not look it
                patched.setattr(module, "is_dense", lambda tensor: tensor is not None)
        pack, register, find_all = Store.pack, Store.register, activation.occurrences

        def on_host(store: Store, *args: Any) -> Any:
            capacity = store.spaces[0].capacity
            return pack(Store([torch.device("cpu")], store.dtype, [capacity], store.homes, store.slots), *args)

        def faked(store: Store, *args: Any) -> None:
            with self.mode:
                register(store, *args)

        def occurrences(ids: Tensor, *args: Any) -> Any:  # has to read them
            self.wait("ids")
            return find_all(self.ids, *args)

        patched.setattr(Store, "pack", on_host)
        patched.setattr(Store, "register", faked)
        patched.setattr(activation, "occurrences", occurrences)
        event = SimpleNamespace(synchronize=lambda: self.wait("event"))
        stream = Mock(record_event=lambda: event, synchronize=lambda: self.wait("stream"))
        patched.setattr(torch.cuda, "current_stream", lambda device: stream)
        patched.setattr("mlora.layers.embedding.check_tokens", lambda ids, **of: self.trace.calls.append("checked"))
        bases = mlora.patch(copy.deepcopy(base)).bases  # some are read when adapters are loaded
        self.model = base
        self.model.set_experts_implementation("batched_mm")
        with self.mode:
            for module in self.model.modules():
                for name, tensor in module._parameters.items():
                    if tensor is not None:
                        module._parameters[name] = nn.Parameter(torch.empty_like(tensor, device="cuda"))
                for name, tensor in module._buffers.items():
                    if tensor is not None:
                        module._buffers[name] = torch.empty_like(tensor, device="cuda")
            runtime = mlora.patch(self.model, memory=1 << 20)
        runtime.bases.update(bases)
        for name, folder in folders.items():
            runtime.load_adapter(folder, name)

    def wait(self, what: str) -> None:
        self.trace.calls.append(what)
        self.trace.waits.append(what)

    def __call__(self, entries: Any, ids: Tensor, **options: Any) -> Trace:
        """A call of the model on `ids`, whose contents are known to the search for invocations alone."""
        self.ids = ids
        with self.mode:
            asked = torch.empty(ids.shape, dtype=ids.dtype, device="cuda")
        with self.mode, torch.no_grad(), Trace(self.pinned) as self.trace:
            wide = VOCAB + 3 if "wide" in (entries or ()) else VOCAB
            out = self.model(asked, adapter_names=entries, use_cache=bool(options), **options)
        assert out.logits.shape == (*ids.shape, wide) and out.logits.device.type == "cuda"
        return self.trace


@pytest.fixture
def fake_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pinned: list[Tensor]) -> Iterator[FakeModel]:
    made = FakeModel(tmp_path, monkeypatch, pinned)
    yield made
    mlora.unpatch(made.model)  # or what is checkpointed later would ask its devices


# What the host waits for in a whole call of the model.
CALLS: dict[str, tuple[list[Any], list[str]]] = {
    "none": ([None] * 3, []),
    "experts and router": (["experts", None, {"experts": 0.5}], []),
    "experts, one entry": (["experts"] * 3, []),
    "embedding": (["wide", None, "experts"], ["event"]),
    "alora": (["alora", None, {"alora": 0.5, "experts": 1.0}], ["ids"]),
    "all": (["alora", "wide", "experts"], ["ids", "event"]),
}


@pytest.mark.parametrize("entries", (["alora", None, "alora"], ["alora", None, {"alora": 0.5, "experts": 1.0}]))
@pytest.mark.parametrize("starts", ({"alora": 1}, {"alora": None}), ids=("behind", "none"))
def test_a_step_behind_the_prompt_waits_for_nothing(
    fake_model: FakeModel, entries: list[Any], starts: dict[str, int | None]
) -> None:
    """As `generate` makes them, with a cache."""
    prompt = torch.tensor([[1, 5, 2, 3], [1, 2, 3, 4], [5, 1, 2, 5]])
    cache = DynamicCache()
    with fake_model.mode, fake_model.model.mlora.use_adapters(entries):
        assert fake_model.trace.waits == ["stream"], "others may run what is routed here"
        fake_model(None, prompt, past_key_values=cache)
        local = fake_model.model.mlora._shared.local
        local.prompt = activation.Prompt(local.plan, prompt, [starts, {}, starts])
        trace = fake_model(None, prompt[:, :1], past_key_values=cache)
        local.prompt = None
    assert trace.waits == [] and trace.count("apply_") and len(trace.copies) == (None in starts.values())


def test_compiled_layers_do_not_wait_for_what_they_refuse(
    fake_model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    trace = fake_model(None, torch.zeros(3, 4, dtype=torch.int64))
    assert trace.waits == [] and all(trace.count(f"check_{what}_") for what in ("heads", "experts", "tails"))


@pytest.mark.parametrize("case", CALLS)
def test_no_layer_of_a_model_waits(fake_model: FakeModel, case: str) -> None:
    entries, waits = CALLS[case]
    ids = torch.tensor([[1, 5, 2, 3], [1, 2, 3, 4], [5, 1, 2, 5]])
    trace = fake_model(entries, ids)
    assert trace.waits == waits
    of_layers = ("aten::mm", "aten::bmm", "aten::embedding")
    layers = [at for at, call in enumerate(trace.calls) if call.startswith(of_layers)]
    assert "ids" not in trace.calls or trace.calls.index("ids") < layers[0], "looked for before the layers run"
    assert "event" not in trace.calls or trace.calls.index("event") > layers[-1], "asked for when all layers have run"
    assert trace.calls.count("checked") == waits.count("event")
    assert all(at < layers[0] for at in trace.copies), "what layers read is on the device before they run"


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
            assert all(item.grid <= 4 * device.processors for item in [*apply_, *scale])
            assert linear[0].grid <= 6 * device.processors  # of 4 warps with 80 registers


def test_warmup_runs_every_shape_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlora.kernels import operators
    from mlora.layers.warmup import warmup

    model = build("llama")
    runtime = mlora.patch(model, memory=1 << 16)
    ran: list[str] = []
    monkeypatch.setattr(operators, "_run", lambda launches, where: ran.extend(item.name for item in launches))
    calls = warmup(model)
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
