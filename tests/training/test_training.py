"""Gradients of adapters in one mixed batch, against PEFT alone; what they do not depend on; what is refused."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HIDDEN, build, identity, inputs_for, logits, peft_alone, row_of
from gradients import (
    LINEARS,
    ROOM,
    error,
    folder_of,
    gradients_of,
    in_a_thread,
    loss_of,
    of_peft,
    out_of,
    theirs,
    trained,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import mlora
from mlora import errors

OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"0": 2, "fc1": 2, "c_fc": 2}, "alpha_pattern": {"0": 3, "fc1": 9, "c_fc": 9}},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["mlp", "gpt2", "opt"])
def test_gradients_are_those_of_peft_alone(kind, options, tmp_path):
    """fp64. Rows of two adapters, of the base, and of a mix with a frozen one; one adapter has two rows."""
    base = build(kind, torch.float64)
    folders = {
        name: folder_of(tmp_path, base, kind, name, seed, **OPTIONS[options] if name != "z" else {})
        for seed, name in enumerate(("a", "b", "z"))
    }
    model = trained(base, folders, frozen=("z",))
    batch = inputs_for(kind, 5, dtype=torch.float64)
    weight = 1.0 if options == "dora" else 0.5  # PEFT has no other for DoRA
    entries = ["b", None, "a", {"a": weight, "z": -1.5}, "z"]
    loss_of(out_of(model, batch, adapter_names=entries)).backward()
    alone = of_peft(theirs(base, batch, 2, [folders["a"]], [1.0]))
    mixed = of_peft(theirs(base, batch, 3, [folders["a"], folders["z"]], [weight, -1.5]))
    want = {key: alone[key] + mixed[key] for key in alone}
    assert error(gradients_of(model.mlora, "a"), want) < 1e-10
    assert error(gradients_of(model.mlora, "b"), of_peft(theirs(base, batch, 0, [folders["b"]], [1.0]))) < 1e-10
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["mlp", "qwen2", "gpt2"])
def test_errors_are_not_larger_than_those_of_peft(kind, dtype, tmp_path):
    """Against fp64, in the geometric mean over adapters and batches: one batch's may be any."""
    base = build(kind, dtype)
    folders = {name: folder_of(tmp_path, base, kind, name, i) for i, name in enumerate("abc")}
    model, rows = trained(base, folders), {"a": 0, "b": 1, "c": 3}
    assert {parameter.dtype for _, parameter in model.mlora.named_parameters("a")} == {torch.float32}

    def alone(name: str, model_dtype: torch.dtype, adapter_dtype: torch.dtype) -> Any:
        wrapped = peft_alone(copy.deepcopy(base).to(model_dtype), folders[name])
        for key, parameter in wrapped.named_parameters():
            parameter.requires_grad_("oracle-0" in key)
            if parameter.requires_grad:
                parameter.data = parameter.data.to(adapter_dtype)
        return wrapped

    kinds = {"exact": (torch.float64,) * 2, "default": (dtype, torch.float32), "narrow": (dtype, dtype)}
    peft = {(name, key): alone(name, *dtypes) for name in rows for key, dtypes in kinds.items()}
    ratios: dict[str, list[float]] = {"default": [], "narrow": []}
    for seed in range(8):
        batch = inputs_for(kind, 4, dtype=dtype, length=11, seed=seed)
        backward(model, batch, ["a", "b", None, "c"], plainly, "abc")
        for name, row in rows.items():
            found = {}
            for key in kinds:
                peft[name, key].zero_grad(set_to_none=True)
                wide = {k: v.to(kinds[key][0]) if v.is_floating_point() else v for k, v in row_of(batch, row).items()}
                loss_of(out_of(peft[name, key], wide), row).backward()
                found[key] = of_peft(peft[name, key])
            mine = error(gradients_of(model.mlora, name), found["exact"])
            for key, own in ratios.items():
                own.append(math.log(mine / error(found[key], found["exact"])))
    means = {key: math.exp(sum(own) / len(own)) for key, own in ratios.items()}
    assert means["default"] <= (2.0 if dtype is torch.float32 else 1.5), means
    assert means["narrow"] <= (2.0 if dtype is torch.float32 else 1.0), means


@pytest.mark.parametrize("kind", ["mlp", "qwen2"])
def test_rows_of_other_types_beside(kind, tmp_path):
    """Frozen adapters with gains, of outputs and inputs: their rows' gradients of the input, and what is trained."""
    from peft import IA3Config, get_peft_model

    base = build(kind)
    targets, feedforward = (["0", "up"], ["0"]) if kind == "mlp" else (["k_proj", "down_proj"], ["down_proj"])
    dora = folder_of(tmp_path, base, kind, "dora", 1, use_dora=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(
            copy.deepcopy(base), IA3Config(target_modules=targets, feedforward_modules=feedforward)
        )
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = 0.5 + torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1))
    wrapped.save_pretrained(tmp_path / "ia3")
    folders = {"a": folder_of(tmp_path, base, kind, "a", 0), "dora": dora, "ia3": tmp_path / "ia3"}
    model = trained(base, folders, frozen=("dora", "ia3"))
    batch = inputs_for(kind, 4)
    name = "x" if kind == "mlp" else "inputs_embeds"
    if kind != "mlp":
        batch = {"inputs_embeds": torch.randn(4, 6, HIDDEN, generator=torch.Generator().manual_seed(3))}
    batch[name] = batch[name].requires_grad_()
    entries = ["dora", "a", "ia3", {"ia3": 1.0, "a": 0.5}]
    loss_of(out_of(model, batch, adapter_names=entries)).backward()
    for row, own in ((0, "dora"), (2, "ia3"), (1, "a")):
        alone = {key: value.detach()[row : row + 1].clone() for key, value in batch.items()}
        alone[name].requires_grad_()
        loss_of(out_of(peft_alone(base, folders[own]), alone), row).backward()
        want = alone[name].grad[0]
        assert (batch[name].grad[row] - want).norm() <= 1e-5 * want.norm()
    mine = gradients_of(model.mlora, "a")
    model.mlora.set_requires_grad("a")
    for _, parameter in model.mlora.named_parameters("a"):
        parameter.grad = None
    wanted: dict[str, Tensor] = {}
    for row, entry in ((1, "a"), (3, entries[3])):  # alone in their batches
        alone = {key: value.detach()[row : row + 1] for key, value in batch.items()}
        loss_of(out_of(model, alone, adapter_names=[entry]), row).backward()
        wanted = gradients_of(model.mlora, "a")
    assert error(mine, wanted) < 1e-5


def rounds(base: Any, folders: dict[str, Path], x: Tensor, entries: list[Any], name: str, steps: int = 4) -> Any:
    """Its losses, gradients and weights over some steps of AdamW of all adapters."""
    model = trained(base, folders)
    optimizers = [torch.optim.AdamW([p for _, p in model.mlora.named_parameters(n)], lr=1e-2) for n in folders]
    seen = []
    mine = [row for row, entry in enumerate(entries) if entry == name]
    for _ in range(steps):
        out = model(inputs_embeds=x, adapter_names=entries).logits
        total = mlora.losses(out, torch.arange(x.shape[1]).repeat(len(x), 1), entries)
        sum(total.values()).backward()
        seen += [total[name].detach(), out.detach()[mine]]
        seen += [p.grad.clone() for _, p in model.mlora.named_parameters(name)]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return seen + [p.detach() for _, p in model.mlora.named_parameters(name)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_runs_do_not_see_each_other(dtype, tmp_path):
    """To the bit, whatever the other rows hold, NaN included, and wherever in the batch the own ones lie first."""
    base = build("qwen2", dtype)
    folders = {name: folder_of(tmp_path, base, "qwen2", name, i) for i, name in enumerate("abc")}
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(5, 9, HIDDEN, generator=draw).to(dtype)
    entries = ["b", "a", None, "a", "c"]
    want = rounds(base, folders, x, entries, "a")
    other = torch.randn(5, 9, HIDDEN, generator=draw).to(dtype)
    other[0], other[2] = torch.nan, torch.inf
    other[[1, 3]] = x[[1, 3]]
    again = rounds(base, folders, other, [{"b": 0.5, "c": 1.0}, "a", "b", "a", None], "a")
    assert len(want) == len(again)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(want, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_loss_curves_are_those_of_peft_alone(dtype):
    """50 steps of three adapters of different ranks and options, from PEFT's seed, in one batch."""
    from peft import LoraConfig, get_peft_model

    base = build("mlp", dtype)
    draw = torch.Generator().manual_seed(5)
    x = {name: torch.randn(2, 12, HIDDEN, generator=draw).to(dtype) for name in "abc"}
    labels = {name: torch.randint(9, (2, 12), generator=draw) for name in "abc"}
    options = {"a": {"r": 4}, "b": {"r": 3, "use_rslora": True}, "c": {"r": 8, "use_dora": True}}
    configs = {name: LoraConfig(target_modules=LINEARS["mlp"], **own) for name, own in options.items()}
    curves: dict[str, list[list[float]]] = {name: [] for name in x}

    model = copy.deepcopy(base)
    runtime = mlora.patch(model, memory=ROOM)
    for seed, name in enumerate(x):
        runtime.add_adapter(name, configs[name], seed=seed)
        curves[name].append([])
    optimizers = [torch.optim.AdamW([p for _, p in runtime.named_parameters(name)], lr=1e-3) for name in x]
    entries, targets = [name for name in x for _ in range(2)], torch.cat(list(labels.values()))
    for _ in range(50):
        found = mlora.losses(model(torch.cat(list(x.values())), adapter_names=entries), targets, entries)
        sum(found.values()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for name, loss in found.items():
            curves[name][0].append(loss.item())
    for seed, name in enumerate(x):
        torch.manual_seed(seed)
        wrapped = get_peft_model(copy.deepcopy(base), configs[name])
        optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-3)
        curves[name].append([])
        for _ in range(50):
            loss = mlora.losses(wrapped(x[name]), labels[name], None)[None]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curves[name][1].append(loss.item())
        mine, theirs = torch.tensor(curves[name])
        assert mine[-1] < 0.9 * mine[0]
        if dtype is torch.float32:
            assert ((mine - theirs).abs() / theirs).max() < 1e-4
        assert abs(float(mine.mean() / theirs.mean()) - 1) < 0.005


def backward(
    model: Any, batch: dict[str, Tensor], entries: list[Any], how: Callable[[Tensor], None], names: str = "ab"
) -> list[Tensor]:
    for name in names:
        for _, parameter in model.mlora.named_parameters(name):
            parameter.grad = None
    how(loss_of(out_of(model, batch, adapter_names=entries)))
    return [p.grad for name in names for _, p in model.mlora.named_parameters(name)]


def plainly(loss: Tensor) -> None:
    loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("length", [9, 70])
def test_checkpointing_and_threads_change_no_bit(dtype, length, tmp_path):
    base = build("qwen2", dtype)
    folders = {name: folder_of(tmp_path, base, "qwen2", name, i) for i, name in enumerate("ab")}
    model = trained(base, folders)
    draw = torch.Generator().manual_seed(0)
    batch = {"inputs_embeds": torch.randn(4, length, HIDDEN, generator=draw).to(dtype).requires_grad_()}
    entries = ["a", None, {"a": 0.5, "b": 2.0}, "b"]
    want = backward(model, batch, entries, plainly)
    assert all(gradient is not None and gradient.any() for gradient in want)
    assert all(map(torch.equal, backward(model, batch, entries, in_a_thread), want))
    model.train()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert all(map(torch.equal, backward(model, batch, entries, plainly), want)), reentrant
        assert all(map(torch.equal, backward(model, batch, entries, in_a_thread), want)), reentrant


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "foreach": lambda p: torch.optim.SGD(p, lr=1e-3, foreach=True, momentum=0.9),
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "by hand", "data"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_step_is_served_at_once(dtype, optimizer, options, tmp_path):
    """The logits are those of the saved adapter, to the bit."""
    base = build("mlp", dtype)
    folders = {"a": folder_of(tmp_path, base, "mlp", "a", 0, **OPTIONS[options])}
    model, batch = trained(base, folders), inputs_for("mlp", 3, dtype=dtype)
    runtime = model.mlora
    with runtime.use_adapters(["a", None, "a"]):  # which pins it
        before = logits(model, batch)
        loss_of(out_of(model, batch)).backward()
        parameters = [parameter for _, parameter in runtime.named_parameters("a")]
        if optimizer in OPTIMIZERS:
            OPTIMIZERS[optimizer](parameters).step()
        elif optimizer == "by hand":
            with torch.no_grad():
                for parameter in parameters:
                    parameter -= 1e-3 * parameter.grad
        else:
            for parameter in parameters:
                parameter.data -= 1e-3 * parameter.grad
            runtime.refresh_adapter("a")
        after = logits(model, batch)
    assert not torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])
    runtime.save_adapter("a", tmp_path / "saved")
    runtime.load_adapter(tmp_path / "saved", "again")
    assert torch.equal(logits(model, batch, adapter_names=["again", None, "again"]), after)


def test_going_on_from_a_saved_one_is_going_on(tmp_path):
    base = build("mlp")
    folders = {"a": folder_of(tmp_path, base, "mlp", "a", 0)}
    batch = inputs_for("mlp", 3)

    def steps(model: Any, count: int, state: Any = None) -> Any:
        optimizer = torch.optim.AdamW([p for _, p in model.mlora.named_parameters("a")], lr=0.05)
        if state is not None:
            optimizer.load_state_dict(state)
        for _ in range(count):
            optimizer.zero_grad()
            loss_of(out_of(model, batch, adapter_names="a")).backward()
            optimizer.step()
        return optimizer.state_dict()

    whole, half = trained(base, folders), trained(base, folders)
    steps(whole, 6)
    state = copy.deepcopy(steps(half, 3))
    half.mlora.save_adapter("a", tmp_path / "half")
    rest = trained(base, {"a": tmp_path / "half"})
    steps(rest, 3, state)
    pairs = zip(whole.mlora.named_parameters("a"), rest.mlora.named_parameters("a"), strict=True)
    assert all(key == other and torch.equal(p, q) for (key, p), (other, q) in pairs)


def test_a_backward_pass_finds_its_adapters_wherever_they_are(tmp_path):
    """They may have been evicted and lie elsewhere; changed or gone, they are not to be found."""
    base = build("mlp")
    folders = {name: folder_of(tmp_path, base, "mlp", name, i) for i, name in enumerate("abc")}
    batch = inputs_for("mlp", 2)

    def step(loss: Tensor) -> list[Tensor]:
        loss.backward()
        gradients = [p.grad for _, p in runtime.named_parameters("a")]
        for _, parameter in runtime.named_parameters("a"):
            parameter.grad = None
        return gradients

    model = trained(base, folders, max_adapters=1)
    runtime = model.mlora

    def loss() -> Tensor:
        return loss_of(out_of(model, batch, adapter_names=["a", None]))

    want = step(loss())
    kept = loss()
    logits(model, batch, adapter_names="b")
    logits(model, batch, adapter_names="c")
    assert all(map(torch.equal, step(kept), want))
    kept = loss()
    with torch.no_grad():
        next(runtime.named_parameters("a"))[1].add_(1)
    with pytest.raises(errors.RoutingError, match="'a' has been trained on since"):
        kept.backward()
    with torch.no_grad():
        next(runtime.named_parameters("a"))[1].sub_(1)
    kept = loss()
    runtime.delete_adapter("a")
    with pytest.raises(errors.RoutingError, match="'a' was deleted since"):
        kept.backward()


def test_nothing_is_left_behind(tmp_path):
    base = build("opt")
    next(base.parameters()).requires_grad_(False)
    flags = [parameter.requires_grad for parameter in base.parameters()]
    folders = {"a": folder_of(tmp_path, base, "opt", "a", 0)}
    model = copy.deepcopy(base)
    before, keys = identity(model), list(model.state_dict())
    runtime = mlora.patch(model, memory=ROOM)
    runtime.load_adapter(folders["a"], "a", is_trainable=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    batch = inputs_for("opt", 2)
    loss_of(out_of(model, batch, adapter_names=["a", None])).backward()
    assert list(model.state_dict()) == keys and len(list(model.named_parameters())) == len(flags)
    mlora.unpatch(model)
    assert identity(model) == before
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_a_base_that_is_trained_too(tmp_path):
    base = build("mlp", torch.float64)
    folders = {"a": folder_of(tmp_path, base, "mlp", "a", 0)}
    model, batch = trained(base, folders), inputs_for("mlp", 2, dtype=torch.float64)
    model.up.weight.requires_grad_()
    loss_of(out_of(model, batch, adapter_names=["a", "a"])).backward()
    wrapped = peft_alone(base, folders["a"])
    for key, parameter in wrapped.named_parameters():
        parameter.requires_grad_("oracle-0" in key or key.endswith("up.base_layer.weight"))
    loss_of(out_of(wrapped, batch)).backward()
    want = of_peft(wrapped)
    weight = want.pop(next(key for key in want if "base_layer" in key))
    assert error(gradients_of(model.mlora, "a"), want) < 1e-10
    assert (model.up.weight.grad - weight).norm() < 1e-10 * weight.norm()


def test_frozen_adapters_take_no_gradients(tmp_path):
    base = build("mlp")
    folders = {name: folder_of(tmp_path, base, "mlp", name, i) for i, name in enumerate("ab")}
    model, batch = trained(base, folders), inputs_for("mlp", 2)
    runtime = model.mlora
    runtime.set_requires_grad("a", False)
    loss_of(out_of(model, batch, adapter_names=["a", "b"])).backward()
    assert all(p.grad is None and not p.requires_grad for _, p in runtime.named_parameters("a"))
    assert all(p.grad is not None for _, p in runtime.named_parameters("b"))
    own = sum(p.numel() for _, p in runtime.named_parameters("b"))
    both = own + sum(p.numel() for _, p in runtime.named_parameters("a"))
    total = sum(p.numel() for p in model.parameters()) + both
    assert runtime.get_nb_trainable_parameters() == (own, total)
    runtime.set_requires_grad(["a", "b"], False)
    assert not out_of(model, batch, adapter_names=["a", "b"]).requires_grad
    with pytest.raises(errors.UnknownAdapterError):
        runtime.set_requires_grad("c")
    runtime.load_adapter(folders["a"], "c")
    with pytest.raises(errors.AdapterError, match=r"'c' from .* has no parameters"):
        list(runtime.named_parameters("c"))


def test_merges_of_what_is_trained_are_refused(tmp_path):
    base = build("mlp")
    folders = {name: folder_of(tmp_path, base, "mlp", name, i, r=3) for i, name in enumerate("ab")}
    model, batch = trained(base, folders, frozen=("b",)), inputs_for("mlp", 2)
    runtime = model.mlora
    kept = mlora.Merge(("a", "b"), (0.5, 0.5), "ties", density=0.5)
    for call in (lambda: runtime.merge_adapter("a"), lambda: out_of(model, batch, adapter_names=kept)):
        with pytest.raises(errors.MergeError, match="'a' is being trained"):
            call()
    runtime.add_merge("copy", kept)
    runtime.set_requires_grad("a", False)
    first = logits(model, batch, adapter_names=kept)
    assert torch.equal(first, logits(model, batch, adapter_names="copy"))
    runtime.set_requires_grad("a")
    with torch.no_grad():
        for _, parameter in runtime.named_parameters("a"):
            parameter.mul_(2)
    runtime.set_requires_grad("a", False)
    assert not torch.equal(logits(model, batch, adapter_names=kept), first), "a merge from before the training"
    runtime.merge_adapter("a")
    with pytest.raises(errors.AdapterInUseError, match="folded into the weights"):
        runtime.set_requires_grad("a")
    runtime.unmerge_adapter()


REFUSED = {
    "bias": {"bias": "lora_only"},
}


@pytest.mark.parametrize("option", REFUSED)
def test_what_is_not_trained_is_named(option, tmp_path):
    base = build("mlp")
    folder = folder_of(tmp_path, base, "mlp", "a", 0, **REFUSED[option])
    runtime = mlora.patch(copy.deepcopy(base), memory=ROOM)
    with pytest.raises(errors.UnsupportedAdapterError, match=option):
        runtime.load_adapter(folder, "a", is_trainable=True)
    assert not runtime.adapters
    runtime.load_adapter(folder, "a")  # it is served


def test_other_types_are_not_trained(tmp_path):
    from peft import LoHaConfig, get_peft_model

    base = build("mlp")
    wrapped = get_peft_model(copy.deepcopy(base), LoHaConfig(target_modules=["up"]))
    wrapped.save_pretrained(tmp_path)
    runtime = mlora.patch(copy.deepcopy(base), memory=ROOM)
    with pytest.raises(errors.UnsupportedAdapterError, match="'LOHA' is served and not trained"):
        runtime.load_adapter(tmp_path, "a", is_trainable=True)


def test_compiled_training_is_refused(tmp_path):
    base = build("mlp")
    model = trained(base, {"a": folder_of(tmp_path, base, "mlp", "a", 0)})
    batch = inputs_for("mlp", 2)
    compiled = torch.compile(model, backend="eager")
    with model.mlora.use_adapters(["a", None]):
        want = logits(model, batch)
        with torch.no_grad():
            assert torch.allclose(compiled(**batch), want, atol=1e-6)
        with pytest.raises(errors.UnsupportedAdapterError, match=r"under torch\.compile"):
            compiled(**batch)


def test_a_function_of_its_own_is_checkpointed(tmp_path):
    """Layers outside of a call of the model, in a checkpoint, under use_adapters."""
    base = build("mlp", torch.float64)
    model = trained(base, {"a": folder_of(tmp_path, base, "mlp", "a", 0)})
    x = inputs_for("mlp", 2, dtype=torch.float64)["x"]
    results = []
    for how in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        with model.mlora.use_adapters(["a", None]):
            out = how(model.up, x)
        loss_of(out).backward()
        results.append([p.grad for key, p in model.mlora.named_parameters("a") if ".up." in key])
        for _, parameter in model.mlora.named_parameters("a"):
            parameter.grad = None
    assert all(map(torch.equal, *results)) and all(gradient.any() for gradient in results[0])
