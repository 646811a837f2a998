"""A patched model compiles once: what its adapters do afterwards changes contents, never graphs."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_close, build, inputs_for, logits, make_adapter, refused
from torch import Tensor, nn

import mlora
from mlora import errors
from mlora.ops.dispatch import cuda_tokens
from mlora.patching import PLAN_WORDS

MIXED = ["r3", None, "dora1", {"rs16": 0.5, "bias8": -1.0}]
SHUFFLED = [{"dora1": 2.0}, "rs16", "rs16", None]


class Counting:
    """A backend that counts the graphs it was asked to compile."""

    def __init__(self, name: str) -> None:
        self.compile = torch._dynamo.lookup_backend(name)
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs += 1
        return self.compile(graph, inputs)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
def test_adapters_come_and_go_without_a_new_graph(
    llama: Any, folders: dict[str, Path], tmp_path: Path, backend: str
) -> None:
    model, batch = copy.deepcopy(llama), inputs_for("llama", 4)
    late = make_adapter(tmp_path / "late", llama, 77, r=5, target_modules=["up_proj", "k_proj", "lm_head"])
    runtime = mlora.patch(model, memory=1 << 20, max_adapters=8)
    counting = Counting(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counting)
    assert_close(logits(compiled, batch), logits(model, batch), 1e-6)  # compiled before any adapter is there

    def check(entries: Any) -> Tensor:
        with runtime.use_adapters(entries):
            got = logits(compiled, batch)
        assert_close(got, logits(model, batch, adapter_names=entries), 1e-6)
        return got

    for name, folder in folders.items():
        runtime.load_adapter(folder, name)
        check(name)
    first = check(MIXED)
    assert not torch.equal(first, check(SHUFFLED))
    assert torch.equal(first, check(MIXED))
    runtime.delete_adapter("r3")
    check(SHUFFLED)
    runtime.load_adapter(late, "late")
    check(["late", "dora1", None, {"late": -1.0, "bias8": 0.5}])
    check(None)
    runtime.set_adapter("late")
    assert_close(logits(compiled, batch), logits(model, batch, adapter_names="late"), 1e-6)
    runtime.set_adapter(None)
    assert_close(logits(compiled, batch), logits(llama, batch), 1e-6)
    assert counting.graphs == 1


@pytest.mark.parametrize(("kind", "backend"), (("gpt2", "aot_eager"), ("mlp", "aot_eager"), ("mlp", "inductor")))
def test_other_modules_compile_too(kind: str, backend: str, tmp_path: Path) -> None:
    base, batch = build(kind), inputs_for(kind, 3)
    names = {"gpt2": ["c_attn", "c_fc"], "mlp": ["up", "head"]}[kind]
    options = {"fan_in_fan_out": True} if kind == "gpt2" else {}
    folder = make_adapter(tmp_path / "a", base, 1, r=4, use_dora=True, target_modules=names, **options)
    runtime = mlora.patch(base, memory=1 << 18)
    runtime.load_adapter(folder, "a")
    counting = Counting(backend)
    compiled = torch.compile(base, fullgraph=True, backend=counting)
    for entries in (None, "a", ["a", None, {"a": 0.5}]):
        with runtime.use_adapters(entries):
            # inductor sums in an order of its own
            assert_close(logits(compiled, batch), logits(base, batch), 5e-6 if backend == "inductor" else 1e-6)
    assert counting.graphs == 1


def test_a_bf16_model_compiles(folders: dict[str, Path]) -> None:
    model, batch = build("llama", torch.bfloat16), inputs_for("llama", 4, length=3)
    runtime = mlora.patch(model, memory=1 << 20, max_adapters=8)
    for name, folder in folders.items():
        runtime.load_adapter(folder, name)
    counting = Counting("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counting)
    for entries in (MIXED, SHUFFLED, None):
        with runtime.use_adapters(entries):
            assert_close(logits(compiled, batch).float(), logits(model, batch).float(), 2**-6)
    assert counting.graphs == 1


@pytest.mark.parametrize("fused", [True, False])
def test_linears_have_the_bits_of_eager_code(fused: bool) -> None:
    """For every number of tokens, though one graph serves them all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(576, 320), nn.Linear(320, 576, bias=False)).to(torch.bfloat16).eval()
    bare = copy.deepcopy(model)
    tensors = {
        f"{n}.lora_{part}.weight": torch.randn(shape, dtype=torch.bfloat16)
        for n, (out, width) in (("0", (320, 576)), ("1", (576, 320)))
        for part, shape in (("A", (3, width)), ("B", (out, 3)))
    }
    runtime = mlora.patch(model, memory=1 << 18, fused=fused)
    runtime.add_adapter("a", mlora.Adapter({"peft_type": "LORA", "r": 3, "target_modules": ["0", "1"]}, tensors))
    counting = Counting("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counting, dynamic=True)
    with torch.no_grad():
        for rows in (2, 5, 16, 60):
            x = torch.randn(rows, 3, 576, dtype=torch.bfloat16)
            for entries in (None, "a", [None, "a"] + [{"a": 0.5}] * (rows - 2)):
                with runtime.use_adapters(entries):
                    got = compiled(x)
                    assert torch.equal(got, model(x))
            assert torch.equal(got[0], bare(x)[0]) and not torch.equal(got[1], bare(x)[1])
    assert counting.graphs == 1


def test_a_compiled_forward_inside_the_patched_model(patched: Any, llama: Any) -> None:
    batch = inputs_for("llama", 4)
    want = logits(patched, batch, adapter_names=MIXED)
    tokens = patched.generate(**batch, adapter_names=MIXED, max_new_tokens=3)
    counting = Counting("eager")
    patched.forward = torch.compile(patched.forward, fullgraph=True, backend=counting)
    assert_close(logits(patched, batch, adapter_names=MIXED), want, 1e-6)
    assert_close(
        logits(patched, batch, adapter_names=SHUFFLED[::-1])[1:3],
        logits(patched, batch, adapter_names="rs16")[1:3],
    )
    assert counting.graphs == 1
    with torch._dynamo.config.patch(error_on_recompile=False):  # the cache and the lengths change, not the adapters
        assert torch.equal(patched.generate(**batch, adapter_names=MIXED, max_new_tokens=3), tokens)


def test_names_inside_a_compiled_call_are_a_clear_error(patched: Any) -> None:
    batch = inputs_for("llama", 4)
    compiled = torch.compile(patched, fullgraph=True, backend="eager")
    with refused(patched, Exception, "adapter_names", "use_adapters"):
        compiled(**batch, adapter_names=MIXED)
    with patched.mlora.use_adapters(MIXED):
        assert_close(logits(compiled, batch), logits(patched, batch), 1e-6)


def test_the_wrong_number_of_rows_in_a_compiled_call(patched: Any) -> None:
    batch = inputs_for("llama", 4)
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager")
    logits(compiled, batch)
    two = patched.mlora.use_adapters(["r3", None])
    with two, refused(patched, errors.MloraError, "2 entries", "4 rows"):
        logits(compiled, batch)


class Experts(nn.Module):
    """A module list of that name gets tokens that were gathered from any rows."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[0](x.flatten(0, 1).flip(0)).view_as(x)


def test_gathered_tokens_in_a_compiled_call() -> None:
    model = Experts().eval()
    tensors = {"experts.0.lora_A.weight": torch.randn(1, 8), "experts.0.lora_B.weight": torch.randn(8, 1)}
    runtime = mlora.patch(model, memory=1 << 16)
    runtime.add_adapter("a", mlora.Adapter({"peft_type": "LORA", "r": 1}, tensors))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 4, 8)
    with torch.no_grad():
        with runtime.use_adapters("a"):
            assert_close(compiled(x), model(x), 1e-6)
        with runtime.use_adapters(["a", None, "a"]), refused(model, errors.AttributionError, "3 entries"):
            compiled(x)


def test_a_routing_larger_than_the_buffer_is_an_error() -> None:
    """Never a batch of base rows."""
    model, rows = nn.Sequential(nn.Linear(4, 4)), PLAN_WORDS
    runtime = mlora.patch(model)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["0"]}
    runtime.add_adapter(
        "a", mlora.Adapter(config, {"0.lora_A.weight": torch.ones(1, 4), "0.lora_B.weight": torch.ones(4, 1)})
    )
    x, entries = torch.randn(rows, 4), ["a", None] * (rows // 2)
    with torch.no_grad(), runtime.use_adapters(entries):
        bare = nn.functional.linear(x, model[0].weight, model[0].bias)
        assert_close(model(x)[::2], (bare + x.sum(1, keepdim=True))[::2])
        with pytest.raises(RuntimeError, match=f"{PLAN_WORDS}"):
            torch.compile(model, fullgraph=True, backend="eager")(x)


def test_the_mark_of_a_constant_is_torchs() -> None:
    def function() -> None:
        pass

    assert vars(torch.compiler.assume_constant_result(function)) == vars(cuda_tokens)


def test_tasks_in_turn_run_compiled_code_under_their_own(patched: Any) -> None:
    batch = inputs_for("llama", 2)
    want = {name: logits(patched, batch, adapter_names=name) for name in ("r3", "rs16", "__base__")}
    counting = Counting("aot_eager")
    compiled = torch.compile(patched, fullgraph=True, backend=counting)

    async def task(name: str) -> None:
        with patched.mlora.use_adapters(name):
            for _ in range(2):
                assert_close(logits(compiled, batch), want[name], 1e-6)
                await asyncio.sleep(0)
        assert_close(logits(compiled, batch), want["__base__"], 1e-6)

    def stream(name: str) -> Iterator[None]:
        with patched.mlora.use_adapters(name):
            while True:
                assert_close(logits(compiled, batch), want[name], 1e-6)
                logits(patched, batch, adapter_names="bias8")
                yield

    async def main() -> None:
        await asyncio.gather(task("r3"), task("rs16"))

    asyncio.run(main())
    one, two = stream("r3"), stream("rs16")
    for generator in (one, two, one, two):
        next(generator)
    with pytest.raises(errors.RoutingError, match="generator"):
        logits(compiled, batch)
    one.close(), two.close()
    assert_close(logits(compiled, batch), want["__base__"], 1e-6)
    assert counting.graphs == 1
