"""A patched model stays itself, refuses what it cannot do exactly, and unpatching leaves no trace."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    HIDDEN,
    build,
    identity,
    inputs_for,
    logits,
    refused,
    state_hash,
)
from torch import Tensor, nn

import mlora
from mlora import errors

MIXED = ["r3", None, "dora1", {"rs16": 0.5, "bias8": -1.0}]


# The model stays itself


@pytest.mark.parametrize("kind", ("llama", "gpt2", "t5", "mlp"))
def test_a_patched_model_looks_like_itself(kind: str) -> None:
    model = build(kind)
    keys, bits = list(model.state_dict()), state_hash(model)
    names = {name: (type(m).__name__, type(m), repr(m)) for name, m in model.named_modules()}
    parameters = [(name, id(p)) for name, p in model.named_parameters()]
    signature = inspect.signature(model.forward)
    mlora.patch(model, memory=1 << 16)
    assert list(model.state_dict()) == keys and state_hash(model) == bits
    assert [(name, id(p)) for name, p in model.named_parameters()] == parameters
    assert inspect.signature(model.forward) == signature
    for name, module in model.named_modules():
        assert type(module).__name__ == names[name][0] and isinstance(module, names[name][1])
        assert type(module).__module__ == names[name][1].__module__ and repr(module) == names[name][2]


@pytest.mark.parametrize("kind", ("llama", "gpt2", "t5", "mlp"))
def test_unpatch_gives_back_the_identical_modules(kind: str) -> None:
    model = build(kind)
    before, bits = identity(model), state_hash(model)
    batch = inputs_for(kind, 3)
    want = logits(model, batch)
    mlora.patch(model, memory=1 << 16)
    assert identity(model) != before
    logits(model, batch)
    assert mlora.unpatch(model) is model
    assert identity(model) == before and state_hash(model) == bits
    assert torch.equal(logits(model, batch), want)
    mlora.patch(model, memory=1 << 16)  # and again
    mlora.unpatch(model)
    assert identity(model) == before


def test_unpatch_frees_the_arena(model: Any, folders: dict[str, Path], batch: dict[str, Tensor]) -> None:
    runtime = mlora.patch(model, memory=1 << 20)
    runtime.load_adapter(folders["r3"], "r3")
    logits(model, batch, adapter_names="r3")
    arena = weakref.ref(runtime._store.spaces[0].arena)
    mlora.unpatch(model)
    del runtime
    gc.collect()
    assert arena() is None


def test_save_pretrained_writes_the_same_model(patched: Any, llama: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    patched.mlora.set_adapter("rs16")
    patched.save_pretrained(tmp_path / "patched")
    llama.save_pretrained(tmp_path / "bare")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "patched" / name).read_bytes() == (tmp_path / "bare" / name).read_bytes(), name
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "patched")
    assert type(again) is type(llama) and state_hash(again) == state_hash(llama)


def test_state_dict_goes_both_ways(patched: Any, llama: Any, batch: dict[str, Tensor]) -> None:
    other = build("llama", seed=9)
    other.load_state_dict(patched.state_dict())
    assert torch.equal(logits(other, batch), logits(llama, batch))
    patched.load_state_dict(build("llama", seed=9).state_dict())
    assert torch.equal(logits(patched, batch), logits(build("llama", seed=9), batch))


def test_hooks_fire_and_see_the_adapter(model: Any, folders: dict[str, Path], batch: dict[str, Tensor]) -> None:
    seen: list[str] = []
    linear = model.model.layers[0].self_attn.q_proj
    linear.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    linear.register_forward_hook(lambda m, args, out: seen.append("post"))
    runtime = mlora.patch(model, memory=1 << 20)
    runtime.load_adapter(folders["r3"], "r3")
    outputs: list[Tensor] = []
    linear.register_forward_hook(lambda m, args, out: outputs.append(out.clone()))
    for entry in (None, "r3"):
        logits(model, batch, adapter_names=entry)
    assert seen == ["pre", "post"] * 2
    assert not torch.equal(outputs[0], outputs[1]), "a hook sees what the layer returns"
    linear.register_forward_hook(lambda m, args, out: torch.zeros_like(out))
    assert not torch.equal(logits(model, batch, adapter_names="r3"), logits(model, batch, adapter_names=None))
    mlora.unpatch(model)
    logits(model, batch)
    assert seen == ["pre", "post"] * 5


def test_keyword_calls_of_a_linear_work(patched: Any, llama: Any) -> None:
    x = torch.randn(2, HIDDEN)
    with torch.no_grad():
        assert torch.equal(patched.lm_head(input=x), llama.lm_head(input=x))


def test_runtime_is_reachable_from_the_model(model: Any) -> None:
    runtime = mlora.patch(model, memory=1 << 16)
    assert model.mlora is runtime and isinstance(runtime, mlora.Runtime)


# Patching what cannot be patched


def test_patching_twice(patched: Any, batch: dict[str, Tensor]) -> None:
    with refused(patched, errors.PatchError, "patched already", "model.mlora"):
        mlora.patch(patched)
    with refused(patched, errors.PatchError, "part of this model"):
        mlora.patch(nn.Sequential(patched))
    with refused(patched, errors.PatchError, "patched already"):
        mlora.patch(patched.model)


def test_unpatching_what_is_not_patched(model: Any) -> None:
    before = identity(model)
    with pytest.raises(errors.PatchError, match="LlamaForCausalLM is not patched"):
        mlora.unpatch(model)
    mlora.patch(model, memory=1 << 16)
    with pytest.raises(errors.PatchError, match="not patched"):
        mlora.unpatch(model.model)
    mlora.unpatch(model)
    with pytest.raises(errors.PatchError, match="not patched"):
        mlora.unpatch(model)
    assert identity(model) == before


@pytest.mark.parametrize(
    ("make", "wanted"),
    (
        (lambda: nn.Sequential(nn.ReLU()), "no linear"),
        (lambda: "a path", "str"),
        (lambda: None, "NoneType"),
        (lambda: nn.MultiheadAttention(8, 2), "no linear"),
    ),
    ids=("no-linear", "text", "none", "attention-only"),
)
def test_things_that_cannot_be_patched(make: Any, wanted: str) -> None:
    with pytest.raises(errors.PatchError, match=wanted):
        mlora.patch(make())


@pytest.mark.parametrize(
    ("options", "wanted"),
    (
        ({"memory": 0}, "memory=0, wanted a whole number of bytes, at least 1"),
        ({"memory": -5}, "memory=-5, wanted"),
        ({"memory": 2e9}, "memory=2000000000.0, wanted a whole number"),
        ({"memory": "2 lots"}, "memory='2 lots', wanted"),
        ({"host_memory": "0GB"}, "host_memory='0GB', wanted"),
        ({"max_adapters": 0}, "max_adapters=0, wanted a whole number of at least 1"),
        ({"max_adapters": None}, "max_adapters=None, wanted"),
        ({"max_merges": -1}, "max_merges=-1, wanted a whole number of at least 0"),
        ({"dtype": torch.int8}, "dtype=torch.int8, wanted one of torch.bfloat16, torch.float16"),
        ({"dtype": torch.float8_e4m3fn}, "dtype=torch.float8_e4m3fn, wanted"),
        ({"dtype": "float32"}, "dtype='float32', wanted"),
    ),
    ids=str,
)
def test_impossible_options(model: Any, options: dict[str, Any], wanted: str) -> None:
    before = identity(model)
    with pytest.raises(errors.PatchError, match=wanted):
        mlora.patch(model, **options)
    assert identity(model) == before


def test_a_patched_model_is_neither_copied_nor_pickled(patched: Any, batch: dict[str, Tensor]) -> None:
    for part in (patched, patched.model, patched.lm_head):
        with refused(patched, errors.PatchError, "copied", "unpatch"):
            copy.deepcopy(part)
        with refused(patched, errors.PatchError, "pickled", "state_dict"):
            pickle.dumps(part)
    with refused(patched, errors.PatchError):
        copy.deepcopy(patched.mlora)
    logits(patched, batch, adapter_names="r3")


class Encoder(nn.Module):
    """Linears whose owners read their weights without calling them, beside one that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Linear(HIDDEN, HIDDEN)
        self.attention = nn.MultiheadAttention(HIDDEN, 4, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(HIDDEN, 4, 48, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        return self.layer(self.attention(x, x, x)[0])


@pytest.mark.parametrize("target", ("attention.out_proj", "layer.linear1", "layer.self_attn.out_proj"))
def test_linears_that_are_not_called_are_refused_not_ignored(target: str, tmp_path: Path) -> None:
    model = Encoder().eval()
    width = model.get_submodule(target).out_features
    adapter = mlora.Adapter(
        {"peft_type": "LORA", "r": 2, "target_modules": [target]},
        {f"{target}.lora_A.weight": torch.randn(2, HIDDEN), f"{target}.lora_B.weight": torch.randn(width, 2)},
    )
    mlora.patch(model, memory=1 << 16)
    with refused(model, errors.AdapterError, target, "no linear"):
        model.mlora.add_adapter("x", adapter)
    with torch.no_grad():  # and the fast paths that read the weights still run
        assert model(torch.randn(2, 5, HIDDEN)).shape == (2, 5, HIDDEN)


# Moving


MOVES: tuple[tuple[str, Any, str], ...] = (
    ("to-bf16", lambda m: m.to(torch.bfloat16), "torch.bfloat16"),
    ("half", lambda m: m.half(), "torch.float16"),
    ("double", lambda m: m.double(), "torch.float64"),
    ("bfloat16", lambda m: m.bfloat16(), "torch.bfloat16"),
    ("type", lambda m: m.type(torch.float16), "torch.float16"),
    ("to-meta", lambda m: m.to("meta"), "meta"),
    ("to-empty-meta", lambda m: m.to_empty(device="meta"), "meta"),
    ("linear", lambda m: m.model.layers[1].mlp.down_proj.to(torch.bfloat16), "torch.bfloat16"),
    ("layer", lambda m: m.model.layers[0].half(), "torch.float16"),
    ("inner-model", lambda m: m.model.half(), "torch.float16"),
    ("layers", lambda m: m.model.layers.to(torch.float64), "torch.float64"),
)


@pytest.mark.parametrize(("move", "wanted"), [m[1:] for m in MOVES], ids=[m[0] for m in MOVES])
def test_moving_a_patched_model(patched: Any, batch: dict[str, Tensor], move: Any, wanted: str) -> None:
    want = logits(patched, batch, adapter_names=MIXED)
    with refused(patched, errors.ModelMovedError, "torch.float32", wanted, "unpatch"):
        move(patched)
    assert torch.equal(logits(patched, batch, adapter_names=MIXED), want)


def test_calls_that_move_nothing_are_fine(patched: Any, batch: dict[str, Tensor]) -> None:
    patched.to("cpu").float().to(torch.float32).eval().requires_grad_(False).train().eval()
    patched.zero_grad()
    logits(patched, batch, adapter_names=MIXED)


def test_unpatch_move_patch(patched: Any, folders: dict[str, Path], batch: dict[str, Tensor]) -> None:
    mlora.unpatch(patched)
    patched.to(torch.bfloat16)
    runtime = mlora.patch(patched, memory=1 << 20)
    runtime.load_adapter(folders["r3"], "r3")
    assert logits(patched, batch, adapter_names="r3").dtype == torch.bfloat16


@pytest.mark.parametrize("entry", ("rs16", MIXED), ids=("one", "mixed"))
def test_autocast_is_an_error_not_a_wrong_result(patched: Any, batch: dict[str, Tensor], entry: Any) -> None:
    with refused(patched, errors.ModelMovedError, "autocast"), torch.autocast("cpu", torch.bfloat16):
        patched(**batch, adapter_names=entry)


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float16)),
    ids=("fp32-bf16", "bf16-bf16", "bf16-fp16"),
)
def test_autocast_without_an_adapter_is_the_bare_model(dtype: torch.dtype, autocast: torch.dtype) -> None:
    model, few = build("llama", dtype), inputs_for("llama", 4, length=3)
    bare = copy.deepcopy(model)
    mlora.patch(model, memory=1 << 16)
    with torch.autocast("cpu", autocast):
        assert torch.equal(logits(model, few), logits(bare, few))


def test_weights_moved_behind_our_back_are_noticed(patched: Any, batch: dict[str, Tensor]) -> None:
    for parameter in patched.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    with pytest.raises(errors.ModelMovedError, match="bfloat16"):
        logits(patched, batch, adapter_names="rs16")
