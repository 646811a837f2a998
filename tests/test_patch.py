"""A patched model stays itself, refuses what it cannot do exactly, and unpatching leaves no trace."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    HIDDEN,
    Mlp,
    assert_close,
    build,
    inputs_for,
    logits,
    make_adapter,
    peft_alone,
    refused,
    row_of,
    state_hash,
)
from torch import Tensor, nn

import mlora
from mlora import errors

MIXED = ["r3", None, "dora1", {"rs16": 0.5, "bias8": -1.0}]


@pytest.fixture
def model(llama: Any) -> Any:
    return copy.deepcopy(llama)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return inputs_for("llama", 4)


# The model stays itself


def identity(model: nn.Module) -> list[Any]:
    return [(name, id(m), type(m), set(m.__dict__)) for name, m in model.named_modules(remove_duplicate=False)]


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
    arena = weakref.ref(runtime._store.arena)
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


@pytest.mark.parametrize("options", ({"memory": 0}, {"memory": -5}, {"max_adapters": 0}), ids=str)
def test_impossible_options(model: Any, options: dict[str, int]) -> None:
    before = identity(model)
    with pytest.raises(errors.PatchError, match="positive") as caught:
        mlora.patch(model, **options)
    assert str(next(iter(options.values()))) in str(caught.value)
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


# Accelerate's hooks, shared modules, and modules that gather tokens


class Spy:
    """A hook of accelerate's that counts what passes through it."""

    def __new__(cls) -> Any:
        from accelerate.hooks import ModelHook

        class Counting(ModelHook):
            calls = 0

            def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
                self.calls += 1
                return args, kwargs

        return Counting()


@pytest.mark.parametrize("when", ("before", "after"))
def test_accelerate_hooks(
    llama: Any, folders: dict[str, Path], batch: dict[str, Tensor], when: str, model: Any
) -> None:
    from accelerate.hooks import add_hook_to_module

    spies = {name: Spy() for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp", "")}

    def add() -> None:
        for name, spy in spies.items():
            add_hook_to_module(model.get_submodule(name), spy)

    def load() -> None:
        runtime = mlora.patch(model, memory=1 << 20)
        for name in ("r3", "rs16"):
            runtime.load_adapter(folders[name], name)

    for step in (add, load) if when == "before" else (load, add):
        step()
    want = torch.cat([logits(peft_alone(llama, folders["rs16"]), row_of(batch, i)) for i in range(4)])
    assert_close(logits(model, batch, adapter_names="rs16"), want)
    assert torch.equal(logits(model, batch), logits(llama, batch))
    assert [spy.calls for spy in spies.values()] == [2, 2, 2]
    mlora.unpatch(model)
    assert torch.equal(logits(model, batch), logits(llama, batch)), "the hooks outlive the patch"
    assert [spy.calls for spy in spies.values()] == [3, 3, 3]


def test_removing_an_accelerate_hook_keeps_the_adapter(
    model: Any, folders: dict[str, Path], batch: dict[str, Tensor]
) -> None:
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    linear = model.model.layers[0].self_attn.q_proj
    add_hook_to_module(linear, Spy())
    mlora.patch(model, memory=1 << 20).load_adapter(folders["r3"], "r3")
    want = logits(model, batch, adapter_names="r3")
    remove_hook_from_module(linear)
    assert torch.equal(logits(model, batch, adapter_names="r3"), want)


def test_replacing_an_accelerate_hook_keeps_the_adapter(
    model: Any, folders: dict[str, Path], batch: dict[str, Tensor]
) -> None:
    from accelerate.hooks import add_hook_to_module

    linear, first, second = model.model.layers[0].self_attn.q_proj, Spy(), Spy()
    add_hook_to_module(linear, first)
    mlora.patch(model, memory=1 << 20).load_adapter(folders["r3"], "r3")
    want = logits(model, batch, adapter_names="r3")
    add_hook_to_module(linear, second)  # wraps the forward that the first one wrapped
    assert torch.equal(logits(model, batch, adapter_names="r3"), want)
    assert (first.calls, second.calls) == (1, 1)


def test_a_forward_that_somebody_put_on_a_linear_is_the_base(
    model: Any, folders: dict[str, Path], batch: dict[str, Tensor]
) -> None:
    linear = model.model.layers[0].self_attn.q_proj
    linear.forward = lambda x: nn.functional.linear(x, linear.weight) * 2
    mine, bare = linear.forward, logits(model, batch)
    mlora.patch(model, memory=1 << 20).load_adapter(folders["r3"], "r3")
    assert torch.equal(logits(model, batch), bare)
    assert not torch.equal(logits(model, batch, adapter_names="r3"), bare)
    mlora.unpatch(model)
    assert linear.__dict__["forward"] is mine and torch.equal(logits(model, batch), bare)


@pytest.mark.parametrize("when", ("before", "after"))
def test_cpu_offload(llama: Any, model: Any, folders: dict[str, Path], batch: dict[str, Tensor], when: str) -> None:
    from accelerate import cpu_offload

    if when == "before":
        cpu_offload(model, execution_device=torch.device("cpu"))
    runtime = mlora.patch(model, memory=1 << 20)
    if when == "after":
        cpu_offload(model, execution_device=torch.device("cpu"))
    runtime.load_adapter(folders["rs16"], "rs16")
    assert_close(logits(model, batch, adapter_names="rs16"), logits(peft_alone(llama, folders["rs16"]), batch))
    assert torch.equal(logits(model, batch), logits(llama, batch))
    with refused_on_meta(model, errors.UnsupportedAdapterError, "offloaded"):
        runtime.load_adapter(folders["dora1"], "dora1")


class refused_on_meta:
    """`refused` for models whose weights cannot be hashed."""

    def __init__(self, model: Any, error: type[BaseException], wanted: str) -> None:
        self.runtime, self.error, self.wanted = model.mlora, error, wanted

    def __enter__(self) -> None:
        self.before = self.runtime.adapters, self.runtime._store.used

    def __exit__(self, kind: Any, error: Any, _: Any) -> bool:
        assert isinstance(error, self.error) and self.wanted in str(error)
        assert (self.runtime.adapters, self.runtime._store.used) == self.before
        return True


def test_a_tied_weight_is_adapted_at_one_end_only(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(build("llama").config)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    folder = make_adapter(tmp_path / "a", model, 1, r=4, target_modules=["q_proj"])
    head = mlora.Adapter(
        {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["lm_head"]},
        {"lm_head.lora_A.weight": torch.randn(2, HIDDEN), "lm_head.lora_B.weight": torch.randn(67, 2)},
    )
    batch = inputs_for("llama", 3)
    bare = copy.deepcopy(model)
    runtime = mlora.patch(model, memory=1 << 18)
    runtime.load_adapter(folder, "a")
    runtime.add_adapter("head", head)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_close(logits(model, batch, adapter_names="a"), logits(peft_alone(bare, folder), batch))
    with torch.no_grad():
        hidden = bare.model(**batch).last_hidden_state
        a, b = head.tensors["lm_head.lora_A.weight"], head.tensors["lm_head.lora_B.weight"]
        want = (bare.lm_head(hidden) + hidden @ a.t() @ b.t()) * batch["attention_mask"][..., None]
    assert_close(logits(model, batch, adapter_names="head"), want)


class Shared(nn.Module):
    """One linear under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(HIDDEN, HIDDEN)
        self.second = nn.Linear(HIDDEN, HIDDEN)
        self.third = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)).tanh())


def shared_adapter(*names: str) -> mlora.Adapter:
    generator = torch.Generator().manual_seed(len(names))
    tensors = {}
    for name in names:
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, HIDDEN, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(HIDDEN, 2, generator=generator)
    return mlora.Adapter({"peft_type": "LORA", "r": 2, "lora_alpha": 2}, tensors)


def test_a_shared_module_is_one_layer(tmp_path: Path) -> None:
    model = Shared().eval()
    bare = copy.deepcopy(model)
    before = identity(model)
    runtime = mlora.patch(model, memory=1 << 16)
    assert model.first is model.third
    x = torch.randn(3, 4, HIDDEN)
    for name in ("first", "third"):
        adapter = shared_adapter(name)
        runtime.add_adapter(name, adapter)
        a, b = (adapter.tensors[f"{name}.lora_{part}.weight"] for part in "AB")

        def layer(v: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
            return bare.first(v) + v @ a.t() @ b.t()

        with torch.no_grad():
            assert_close(model(x, adapter_names=name), layer(bare.second(layer(x)).tanh()))
    with refused(model, errors.AdapterError, "shared", "first", "third"):
        runtime.add_adapter("both", shared_adapter("first", "third"))
    mlora.unpatch(model)
    assert identity(model) == before


class Experts(nn.Module):
    """A mixture of experts written with linears: tokens of all rows are gathered per expert."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Linear(HIDDEN, HIDDEN)
        self.gate = nn.Linear(HIDDEN, 3)
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        flat = self.front(x).reshape(-1, HIDDEN)
        choice = self.gate(flat).argmax(-1)  # the gate reads (rows * length, hidden), in order
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            mine = choice == index
            out[mine] = expert(flat[mine])
        return out.view_as(x)


def test_gathered_tokens_are_an_error_never_a_guess(tmp_path: Path) -> None:
    torch.manual_seed(0)
    bare = Experts().eval()
    config = {"r": 2, "lora_alpha": 2, "strength": 3.0}
    inside = make_adapter(tmp_path / "in", bare, 1, target_modules=r"experts\.\d", **config)
    outside = make_adapter(tmp_path / "out", bare, 2, target_modules=["front", "gate"], **config)
    model = copy.deepcopy(bare)
    runtime = mlora.patch(model, memory=1 << 16)
    runtime.load_adapter(inside, "in")
    runtime.load_adapter(outside, "out")
    x = torch.randn(4, 5, HIDDEN)
    for rows in (["in", None, "out", "in"], ["in", "in", "in", {"in": 2.0}]):
        with refused(model, errors.AttributionError, "experts.", "4 rows", "expert"):
            model(x, adapter_names=rows)
    with torch.no_grad():
        alone = peft_alone(bare, inside)
        assert_close(model(x, adapter_names="in"), alone(x))
        assert_close(model(x[:1], adapter_names=["in"]), alone(x[:1]))
        want = torch.cat([(peft_alone(bare, outside) if i % 2 else bare)(x[i : i + 1]) for i in range(4)])
        assert_close(model(x, adapter_names=[None, "out"] * 2), want)


class Odd(nn.Module):
    """Gives its linear an input of a shape that `shape` chooses."""

    def __init__(self, shape: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.shape(x))


@pytest.mark.parametrize(
    ("shape", "fits"),
    (
        (lambda x: x, True),
        (lambda x: x[:, 0], True),
        (lambda x: x.flatten(0, 1), True),
        (lambda x: x[:, None], True),
        (lambda x: x.transpose(0, 1), False),
        (lambda x: x.flatten(0, 1)[:-1], False),
        (lambda x: x[:2], False),
        (lambda x: x.mean((0, 1)), False),
        (lambda x: x.flatten(0, 1).repeat(2, 1), False),
    ),
    ids=(
        "as-is",
        "first-token",
        "flat",
        "four-dims",
        "length-first",
        "some",
        "half-the-rows",
        "pooled",
        "doubled",
    ),
)
def test_inputs_that_cannot_be_attributed_to_rows(shape: Any, fits: bool) -> None:
    model = Odd(shape).eval()
    adapter = mlora.Adapter(
        {"peft_type": "LORA", "r": 1, "lora_alpha": 1},
        {"linear.lora_A.weight": torch.randn(1, HIDDEN), "linear.lora_B.weight": torch.randn(HIDDEN, 1)},
    )
    mlora.patch(model, memory=1 << 16).add_adapter("a", adapter)
    x = torch.randn(4, 6, HIDDEN)
    entries = ["a", None, "a", {"a": 2.0}]
    if not fits:
        with refused(model, errors.AttributionError, "linear", "4 rows"), torch.no_grad():
            model(x, adapter_names=entries)
        return
    with torch.no_grad():
        a, b = adapter.tensors["linear.lora_A.weight"], adapter.tensors["linear.lora_B.weight"]
        weights = torch.tensor([1.0, 0.0, 1.0, 2.0])[:, None, None].expand(4, 6, HIDDEN)
        given = shape(x)
        want = model(x, adapter_names=None) + shape(weights) * (given @ a.t() @ b.t())
        assert_close(model(x, adapter_names=entries), want)


# Entries, names, and what stays after an error


@pytest.mark.parametrize(
    ("entries", "error", "wanted"),
    (
        ("nobody", errors.UnknownAdapterError, ("'nobody'", "'r3'", "'rs16'")),
        (["r3", "nobody", None, None], errors.UnknownAdapterError, ("'nobody'", "'r3'")),
        ({"r3": 1, "nobody": 1}, errors.UnknownAdapterError, ("'nobody'", "'r3'")),
        (["r3"] * 3, errors.EntryError, ("3 entries", "4 rows")),
        (["r3"] * 5, errors.EntryError, ("5 entries", "4 rows")),
        (["r3"], errors.EntryError, ("1 entries", "4 rows")),
        ([], errors.EntryError, ("0 entries", "4 rows")),
        ({"r3": float("nan")}, errors.EntryError, ("'r3'", "nan", "finite")),
        (["r3", {"rs16": float("inf")}, None, None], errors.EntryError, ("'rs16'", "inf", "finite")),
        (5, errors.EntryError, ("5", "int")),
        ([5, None, None, None], errors.EntryError, ("5", "int")),
    ),
    ids=(
        "name", "name-in-row", "name-in-mix", "few", "many", "one-in-a-list", "empty", "nan", "inf", "int",
        "int-in-row",
    ),
)  # fmt: skip
@pytest.mark.parametrize("how", ("call", "generate", "context"))
def test_bad_entries(
    patched: Any,
    batch: dict[str, Tensor],
    entries: Any,
    error: type[Exception],
    wanted: tuple[str, ...],
    how: str,
) -> None:
    with refused(patched, error, *wanted):
        if how == "call":
            patched(**batch, adapter_names=entries)
        elif how == "generate":
            patched.generate(**batch, adapter_names=entries, max_new_tokens=2)
        else:
            with patched.mlora.use_adapters(entries):
                patched(**batch)


@pytest.mark.parametrize("entry", (["r3"], 3, "nobody", {"r3": float("nan")}), ids=("list", "int", "name", "nan"))
def test_bad_defaults(patched: Any, entry: Any) -> None:
    patched.mlora.set_adapter("rs16")
    with refused(patched, errors.MloraError):
        patched.mlora.set_adapter(entry)


@pytest.mark.parametrize("name", ("r3", "", "__base__", None, 5), ids=("taken", "empty", "base", "none", "int"))
def test_names_that_cannot_be_given(patched: Any, folders: dict[str, Path], name: Any) -> None:
    adapter = mlora.Adapter.from_pretrained(folders["rs16"])
    error = errors.DuplicateAdapterError if name == "r3" else errors.EntryError
    with refused(patched, error, repr(name), *([str(folders["r3"])] if name == "r3" else [])):
        patched.mlora.add_adapter(name, adapter)
    if name is not None:
        with refused(patched, error, repr(name)):
            patched.mlora.load_adapter(folders["rs16"], name)


def test_deleting(patched: Any, folders: dict[str, Path], batch: dict[str, Tensor]) -> None:
    runtime = patched.mlora
    want = logits(patched, batch, adapter_names="rs16")
    with refused(patched, errors.UnknownAdapterError, "'nobody'", "'r3'"):
        runtime.delete_adapter("nobody")
    runtime.delete_adapter("r3")
    assert "r3" not in runtime.adapters
    with refused(patched, errors.UnknownAdapterError, "'r3'", "'rs16'"):
        patched(**batch, adapter_names="r3")
    runtime.load_adapter(folders["rs16"], "r3")  # the name is free again, for other weights
    assert torch.equal(logits(patched, batch, adapter_names="r3"), want)


def test_deleting_what_is_in_use(patched: Any, batch: dict[str, Tensor]) -> None:
    runtime = patched.mlora
    with runtime.use_adapters(["r3", None, {"rs16": 1.0}, None]):
        for name in ("r3", "rs16"):
            with refused(patched, errors.AdapterInUseError, f"'{name}'", "use_adapters"):
                runtime.delete_adapter(name)
        want = logits(patched, batch)
        runtime.delete_adapter("dora1")  # nobody uses it
        assert torch.equal(logits(patched, batch), want)
    runtime.set_adapter("r3")
    with refused(patched, errors.AdapterInUseError, "'r3'", "set_adapter(None)"):
        runtime.delete_adapter("r3")
    runtime.set_adapter(None)
    runtime.delete_adapter("r3")
    runtime.delete_adapter("rs16")


def test_unpatching_while_routed(patched: Any) -> None:
    with patched.mlora.use_adapters("r3"), refused(patched, errors.PatchError, "use_adapters"):
        mlora.unpatch(patched)
    patched.mlora.set_adapter("r3")
    mlora.unpatch(patched)


@pytest.mark.parametrize("how", ("call", "generate", "context", "submodule"))
def test_an_exception_in_mid_forward_leaves_no_routing(
    patched: Any, llama: Any, batch: dict[str, Tensor], how: str
) -> None:
    want = logits(patched, batch, adapter_names=MIXED)

    class Boom(Exception):
        pass

    def fail(*_: Any) -> None:
        raise Boom

    hook = patched.model.layers[1].register_forward_pre_hook(fail)
    before_pins = [patched.mlora._store[n].pins for n in patched.mlora.adapters]
    with refused(patched, Boom):
        if how == "call":
            patched(**batch, adapter_names=MIXED)
        elif how == "generate":
            patched.generate(**batch, adapter_names=MIXED, max_new_tokens=3)
        else:
            with patched.mlora.use_adapters(MIXED):
                (patched if how == "context" else patched.model)(**batch)
    hook.remove()
    assert [patched.mlora._store[n].pins for n in patched.mlora.adapters] == before_pins
    assert torch.equal(logits(patched, batch), logits(llama, batch))
    assert torch.equal(logits(patched, batch, adapter_names=MIXED), want)
    for name in ("r3", "rs16", "dora1", "bias8"):
        patched.mlora.delete_adapter(name)
    mlora.unpatch(patched)


def test_wrong_number_of_rows_inside_use_adapters(patched: Any, batch: dict[str, Tensor]) -> None:
    with patched.mlora.use_adapters(["r3", "rs16"]):
        with refused(patched, errors.EntryError, "2 entries", "4 rows"):
            patched(**batch)
        logits(patched, {key: value[:2] for key, value in batch.items()})
        with refused(patched, errors.MloraError, "4"), torch.no_grad():
            patched.model(**batch)


def test_a_batch_that_needs_more_than_the_arena(model: Any, folders: dict[str, Path], batch: Any) -> None:
    sizes = {}
    probe = mlora.patch(model, memory=1 << 20)
    for name, folder in folders.items():
        sizes[name] = probe.load_adapter(folder, name).bytes
    mlora.unpatch(model)
    room = sizes["rs16"] + 128
    runtime = mlora.patch(model, memory=room)
    for name, folder in folders.items():
        runtime.load_adapter(folder, name)
    needed = sizes["rs16"] + sizes["r3"]
    with refused(model, errors.CapacityError, f"{needed:,} bytes", f"{runtime._store.capacity:,}", "memory="):
        model(**batch, adapter_names=["rs16", "r3", None, None])
    # One after another they all fit, whatever was there before.
    fresh = copy.deepcopy(build("llama"))
    whole = mlora.patch(fresh, memory=1 << 20)
    for name, folder in folders.items():
        whole.load_adapter(folder, name)
    for name in [*folders, *reversed(folders)]:
        got = logits(model, batch, adapter_names=name)
        assert torch.equal(got, logits(fresh, batch, adapter_names=name))
        assert runtime.adapters[name].location == "device"
    runtime.set_adapter("r3")
    with refused(model, errors.CapacityError, f"{needed:,} bytes", "active already"):
        runtime.set_adapter("rs16")  # the old default stays until the new one is there
    runtime.set_adapter(None)
    runtime.set_adapter("rs16")


def test_an_adapter_larger_than_the_arena(model: Any, folders: dict[str, Path]) -> None:
    runtime = mlora.patch(model, memory=4096)
    with refused(model, errors.CapacityError, "'rs16'", "4,096", "memory="):
        runtime.load_adapter(folders["rs16"], "rs16")


# Threads


def test_two_threads_get_their_own_rows(patched: Any, llama: Any) -> None:
    batch = inputs_for("llama", 2)
    jobs = {"one": ["r3", None], "two": ["rs16", "bias8"], "three": None}

    def run(entries: Any) -> list[Tensor]:
        options = {"max_new_tokens": 5, "adapter_names": entries}
        return [patched.generate(**batch, **options), logits(patched, batch, adapter_names=entries)]

    want = {name: run(entries) for name, entries in jobs.items()}
    assert not torch.equal(want["one"][1], want["two"][1])
    failures: list[str] = []
    barrier = threading.Barrier(len(jobs))

    def work(name: str) -> None:
        barrier.wait()
        for _ in range(6):
            got = run(jobs[name])
            if not all(torch.equal(g, w) for g, w in zip(got, want[name], strict=True)):
                failures.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert patched.mlora._active == 0


def test_threads_load_and_delete_while_others_run(patched: Any, folders: dict[str, Path]) -> None:
    batch = inputs_for("llama", 2)
    want = logits(patched, batch, adapter_names=["r3", "rs16"])
    stop = threading.Event()
    problems: list[str] = []

    def churn() -> None:
        try:
            adapters = [mlora.Adapter.from_pretrained(folders[name]) for name in ("bias8", "dora1")]
            while not stop.is_set():
                for index, adapter in enumerate(adapters):
                    patched.mlora.add_adapter(f"x{index}", adapter)
                for index in range(2):
                    patched.mlora.delete_adapter(f"x{index}")
        except Exception as error:
            problems.append(repr(error))

    thread = threading.Thread(target=churn)
    thread.start()
    for _ in range(15):
        if not torch.equal(logits(patched, batch, adapter_names=["r3", "rs16"]), want):
            problems.append("other rows")
    stop.set()
    thread.join()
    assert not problems


def test_a_default_set_by_one_thread_serves_another(patched: Any) -> None:
    batch = inputs_for("llama", 2)
    want = logits(patched, batch, adapter_names="r3")
    patched.mlora.set_adapter("r3")
    out: list[Tensor] = []
    with patched.mlora.use_adapters("rs16"):  # this thread's own routing is not the other thread's
        thread = threading.Thread(target=lambda: out.append(logits(patched, batch)))
        thread.start()
        thread.join()
    assert torch.equal(out[0], want)


# Gradients


def test_gradients_of_the_inputs_equal_pefts(patched: Any, llama: Any, folders: dict[str, Path]) -> None:
    mask = torch.ones(2, 5, dtype=torch.long)
    embeds = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(1))
    direction = torch.randn(2, 5, 67, generator=torch.Generator().manual_seed(2))

    def gradient(model: Any, rows: slice, **options: Any) -> Tensor:
        x = embeds[rows].clone().requires_grad_()
        (model(inputs_embeds=x, attention_mask=mask[rows], **options).logits * direction[rows]).sum().backward()
        return x.grad

    for first, second in (("r3", "dora1"), ("rs16", "bias8")):
        want = [gradient(peft_alone(llama, folders[n]), slice(i, i + 1)) for i, n in enumerate((first, second))]
        got = gradient(patched, slice(None), adapter_names=[first, second])
        assert_close(got, torch.cat(want), 2e-5)
    assert torch.equal(gradient(patched, slice(None)), gradient(llama, slice(None)))


def test_results_with_and_without_gradients_agree(patched: Any, batch: dict[str, Tensor]) -> None:
    patched.zero_grad()
    with_graph = patched(**batch, adapter_names=MIXED).logits * batch["attention_mask"][..., None]
    assert with_graph.requires_grad
    assert_close(with_graph.detach(), logits(patched, batch, adapter_names=MIXED), 2e-6)
    with torch.inference_mode():
        inside = patched(**batch, adapter_names=MIXED).logits * batch["attention_mask"][..., None]
    assert torch.equal(inside, logits(patched, batch, adapter_names=MIXED))


# Shapes at the edge


def test_an_empty_batch_and_a_single_token(patched: Any, folders: dict[str, Path]) -> None:
    plain = Mlp().eval()
    mlora.patch(plain, memory=1 << 16)
    with torch.no_grad():
        assert plain(torch.empty(0, 3, HIDDEN), adapter_names=[]).shape == (0, 3, 9)
        assert plain(torch.randn(HIDDEN), adapter_names=None).shape == (9,)
    one = {"input_ids": torch.tensor([[5]])}
    assert logits(patched, one, adapter_names=["r3"]).shape == (1, 1, 67)
