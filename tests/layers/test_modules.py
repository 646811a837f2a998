"""Modules that are wrapped, shared or fed tokens out of order, and inputs of odd shapes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    HIDDEN,
    Mlp,
    assert_close,
    build,
    identity,
    inputs_for,
    logits,
    make_adapter,
    peft_alone,
    refused,
    row_of,
)
from torch import Tensor, nn

import mlora
from mlora import errors

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


@pytest.mark.parametrize("tensor", ("weight", "bias"))
@pytest.mark.parametrize("fused", (True, False))
def test_a_tensor_that_is_parametrized_after_the_patch(tensor: str, fused: bool) -> None:
    model = nn.Sequential(nn.Linear(16, 16)).eval()
    tensors = {"0.lora_A.weight": torch.ones(1, 16), "0.lora_B.weight": torch.ones(16, 1)}
    runtime = mlora.patch(model, memory=1 << 16, fused=fused)
    runtime.add_adapter("a", mlora.Adapter({"peft_type": "LORA", "r": 1, "target_modules": ["0"]}, tensors))
    x = torch.randn(3, 16)
    plain = {name: value.detach().clone() for name, value in model[0].named_parameters()}
    nn.utils.parametrize.register_parametrization(model[0], tensor, nn.Softplus())
    plain[tensor] = nn.functional.softplus(plain[tensor])
    with torch.no_grad():
        want = nn.functional.linear(x, **plain)
        assert_close(model(x), want, 1e-6)
        with runtime.use_adapters("a"):
            assert_close(model(x), want + 8 * x.sum(-1, keepdim=True), 1e-6)  # lora_alpha / r is 8


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
    runtime.load_adapter(folders["dora1"], "dora1")  # whose magnitudes are divided by norms of what is offloaded
    assert_close(logits(model, batch, adapter_names="dora1"), logits(peft_alone(llama, folders["dora1"]), batch))


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


# Shapes at the edge


def test_an_empty_batch_and_a_single_token(patched: Any, folders: dict[str, Path]) -> None:
    plain = Mlp().eval()
    mlora.patch(plain, memory=1 << 16)
    with torch.no_grad():
        assert plain(torch.empty(0, 3, HIDDEN), adapter_names=[]).shape == (0, 3, 9)
        assert plain(torch.randn(HIDDEN), adapter_names=None).shape == (9,)
    one = {"input_ids": torch.tensor([[5]])}
    assert logits(patched, one, adapter_names=["r3"]).shape == (1, 1, 67)


@pytest.mark.parametrize(("entries", "twice"), [(["in", "out"], False), ([{"in": 1, "out": 1}, "in"], True)])
def test_the_base_runs_twice_only_where_a_row_takes_both_gains(model: Any, entries: list[Any], twice: bool) -> None:
    name, calls = "model.layers.0.mlp.down_proj", 0
    module = model.get_submodule(name)

    def forward(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return nn.Linear.forward(module, x)

    module.forward = forward
    runtime = mlora.patch(model)
    gains = {}
    for kind, width, feedforward in (("in", module.in_features, ["down_proj"]), ("out", module.out_features, [])):
        config = {"peft_type": "IA3", "target_modules": ["down_proj"], "feedforward_modules": feedforward}
        shape = (1, width) if feedforward else (width, 1)
        tensors = {f"model.layers.{i}.mlp.down_proj.ia3_l": 1 + torch.rand(shape) for i in range(2)}
        gains[kind] = tensors[f"{name}.ia3_l"].view(-1)
        runtime.add_adapter(kind, mlora.Adapter(config, tensors))
    x = torch.randn(2, 3, module.in_features)
    with runtime.use_adapters(entries), torch.no_grad():
        calls = 0
        got = module(x)
        assert calls == 1 + twice
        for row, entry in enumerate(entries):
            want = (x[row] * gains["in"] if "in" in entry else x[row]) @ module.weight.t()
            if "out" in entry:
                want = want + (gains["out"] - 1) * (x[row] @ module.weight.t())
            assert_close(got[row], want)


class Chosen(nn.Module):
    """Gives a layer those tokens that are of its kind, of which there may be none."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.sounds = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.up(x)
        return x.masked_scatter(mask[..., None], self.sounds(x[mask]))


@torch.no_grad()
def test_no_tokens_are_any_rows(tmp_path: Path) -> None:
    base, x = Chosen().eval(), torch.randn(3, 5, HIDDEN)
    model = copy.deepcopy(base)
    folder = make_adapter(tmp_path / "a", base, 1, target_modules=["up", "sounds"])
    mlora.patch(model).load_adapter(folder, "a")
    none = torch.zeros(3, 5, dtype=torch.bool)
    want, bare = peft_alone(base, folder)(x, none), base(x, none)
    assert_close(model(x, none, adapter_names=["a", None, "a"]), torch.stack([want[0], bare[1], want[2]]))
    for tokens in ([1, 3], [1, 3, 4]):  # as many as rows, and all of one
        some = none.clone()
        some[0, tokens] = True
        with refused(model, errors.AttributionError, "sounds", f"({len(tokens)}, 32)", "3 rows"):
            model(x, some, adapter_names=["a", None, "a"])
        assert_close(model(x, some, adapter_names="a"), peft_alone(base, folder)(x, some))
    every = ~none
    want, bare = peft_alone(base, folder)(x, every), base(x, every)
    assert_close(model(x, every, adapter_names=["a", None, "a"]), torch.stack([want[0], bare[1], want[2]]))


# Subclasses of linears


class Choosing(nn.Linear):
    """A router that gives what it chooses, as Llama 4's."""

    def forward(self, x: Tensor) -> Any:
        scores = super().forward(x)
        return scores.softmax(-1), scores


class Grouped(nn.Linear):
    """One of several linears for each of as many groups of inputs, as DeepSeek V4's."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.view(3, -1, self.in_features)
        return torch.einsum("...gi,goi->...go", x.unflatten(-2, (-1, 3)), weight).flatten(-3, -2)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5


class Subclasses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.choosing, self.grouped, self.scaled = Choosing(HIDDEN, 4), Grouped(HIDDEN, 6), Scaled(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = self.scaled(x)
        return self.choosing(x)[0].sum(-1, keepdim=True) + self.grouped(x).sum(-1, keepdim=True) + x


@torch.no_grad()
def test_subclasses_of_linears(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = Subclasses().eval(), torch.randn(2, 3, HIDDEN)
    folders = {
        name: make_adapter(tmp_path / name, base, 1, target_modules=[name])
        for name in ("choosing", "grouped", "scaled")
    }
    model = copy.deepcopy(base)
    runtime = mlora.patch(model)
    with refused(model, errors.AdapterError, "choosing", "subclasses with a forward of their own"):
        runtime.load_adapter(folders["choosing"])
    for name in ("grouped", "scaled"):
        runtime.load_adapter(folders[name])
    for names in ("grouped", ["grouped", None]):
        with refused(
            model, errors.UnsupportedAdapterError, "grouped (Grouped) gives shape (2, 3, 2)", "no linear's output"
        ):
            model(x, adapter_names=names)
    got = model(x, adapter_names=["scaled", None])
    assert_close(got, torch.stack([peft_alone(base, folders["scaled"])(x)[0], base(x)[1]]))
