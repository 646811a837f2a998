"""`lora_dropout` in one mixed batch: gradients are PEFT's under the mask that the row's place makes, and so the rest of
the batch, checkpoints, micro-batches and interruptions change nothing."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build, inputs_for, peft_alone, row_of
from gradients import LINEARS, error, folder_of, gradients_of, loss_of, of_peft, out_of, trained
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mlora import errors
from mlora.ops import dropout

P, SEED = 0.3, 12345


class Masked(nn.Module):
    """In the place of PEFT's nn.Dropout: the mask of one row."""

    def __init__(self, path: str, step: int, row: int) -> None:
        super().__init__()
        key = hashlib.blake2b(path.encode(), digest_size=8, key=SEED.to_bytes(8, "little")).digest()
        odds = np.array([[*np.frombuffer(key, dtype="<u4"), round(P * 2**32)]], dtype=np.uint32).view(np.int32)
        self.places, self.odds = torch.tensor([[0, step, row, 0]], dtype=torch.int32), torch.from_numpy(odds)

    def forward(self, x: Tensor) -> Tensor:
        mask = dropout.drop(torch.ones_like(x.detach()), self.places, self.odds)
        assert x.numel() < 50 or 0 < int((mask == 0).sum()) < mask.numel()
        return x * mask


def theirs(base: Any, folder: Path, batch: dict[str, Tensor], row: int, step: int, number: int) -> Any:
    """PEFT's model after the backward pass of one row, which is the adapter's row `number` of its step, and its
    outputs."""
    model = peft_alone(base, folder).train()  # where PEFT's DoRA asks for its dropout
    for path, module in model.named_modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["oracle-0"] = Masked(path.removeprefix("base_model.model."), step, number)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("oracle-0" in key)
    out = out_of(model, row_of(batch, row))
    loss_of(out, row).backward()
    return model, out.detach()


def begun(base: Any, folders: dict[str, Path], step: int = 0, **options: Any) -> Any:
    """In training mode; every adapter with dropout at the same seed."""
    model = trained(base, folders, **options).train()
    for name in folders:
        if name not in options.get("frozen", ()):
            model.mlora.set_rng_state(name, {"seed": SEED, "step": step, "rows": 0})
    return model


@pytest.fixture
def case(tmp_path: Path) -> Any:
    def make(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, dict[str, Path]]:
        """`options`: of "a", which has dropout, and "c", which has none; "b" is a LoRA with dropout."""
        base = build(kind, dtype)
        folders = {
            name: folder_of(tmp_path, base, kind, name, seed, **own)
            for seed, (name, own) in enumerate(
                {"a": {"lora_dropout": P, **options}, "b": {"lora_dropout": P}, "c": options}.items()
            )
        }
        return base, folders

    return make


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", ["mlp", "qwen2"])
def test_gradients_are_those_of_peft_under_the_mask(kind: str, options: dict[str, Any], case: Any) -> None:
    """fp64; one adapter has rows of two micro-batches, beside the base, an adapter without dropout, and a frozen one
    whose config has some."""
    base, folders = case(kind, **options)
    folders["z"] = folders["b"]
    model = begun(base, folders, step=7, frozen=("z",))
    first, second = (inputs_for(kind, 5, dtype=torch.float64, seed=seed) for seed in (1, 2))
    outs = []
    for batch, entries in ((first, ["b", None, "a", "c", "a"]), (second, ["a", "z", None, "c", "b"])):
        out = out_of(model, batch, adapter_names=entries)
        loss_of(out).backward()
        outs.append(out.detach())
    places = {"a": [(first, 2, 0), (first, 4, 1), (second, 0, 2)], "b": [(first, 0, 0), (second, 4, 1)]}
    for name, rows in places.items():
        want: dict[str, Tensor] = {}
        for batch, row, number in rows:
            peft, out = theirs(base, folders[name], batch, row, 7, number)
            mine = outs[batch is second][row]
            assert (mine - out[0]).norm() < 1e-10 * out.norm()
            want = {key: want.get(key, 0) + value for key, value in of_peft(peft).items()}
        assert error(gradients_of(model.mlora, name), want) < 1e-10
        assert model.mlora.get_rng_state(name) == {"seed": SEED, "step": 7, "rows": len(rows)}
    plain = trained(base, {"c": folders["c"]})
    for batch in (first, second):
        loss_of(out_of(plain, row_of(batch, 3), adapter_names=["c"]), 3).backward()
    assert error(gradients_of(model.mlora, "c"), gradients_of(plain.mlora, "c")) < 1e-10
    frozen = trained(base, {"z": folders["z"]}, frozen=("z",)).eval()
    want = out_of(frozen, row_of(second, 1), adapter_names=["z"])
    assert (outs[1][1] - want[0]).norm() < 1e-10 * want.norm()


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_the_gradient_of_the_input_is_masked_too(options: dict[str, Any], case: Any) -> None:
    base, folders = case("mlp", **options)
    model = begun(base, folders)
    batch = inputs_for("mlp", 3, dtype=torch.float64)
    x = batch["x"].requires_grad_()
    loss_of(out_of(model, {"x": x}, adapter_names=["a", "b", None])).backward()
    for row, name in enumerate("ab"):
        own = {"x": x.detach().clone().requires_grad_()}
        theirs(base, folders[name], own, row, 0, 0)
        assert (x.grad[row] - own["x"].grad[row]).norm() < 1e-10 * x.grad[row].norm()


def test_without_training_mode_or_gradients_nothing_is_dropped(case: Any) -> None:
    base, folders = case("qwen2", torch.float32)
    model = begun(base, folders)
    batch = inputs_for("qwen2", 2)
    with torch.no_grad():
        want = out_of(model, batch, adapter_names=["a", "b"])
    model.eval()
    assert torch.equal(out_of(model, batch, adapter_names=["a", "b"]), want)
    model.train()
    assert model.mlora.get_rng_state("a")["rows"] == 0, "rows that dropped nothing were counted"
    model.mlora.set_requires_grad(["a", "b"], False)
    assert torch.equal(out_of(model, batch, adapter_names=["a", "b"]), want), "not trained any more"
    model.mlora.set_requires_grad(["a", "b"], True)
    dropped = out_of(model, batch, adapter_names=["a", "b"])
    assert not torch.equal(dropped, want)
    assert not torch.equal(out_of(model, batch, adapter_names=["a", "b"]), dropped), "the next rows have other masks"


def gradients(model: Any, batch: dict[str, Tensor], entries: list[Any], name: str, **options: Any) -> dict[str, Tensor]:
    loss_of(out_of(model, batch, adapter_names=entries, **options)).backward()
    return gradients_of(model.mlora, name)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_row_does_not_see_its_batch(case: Any) -> None:
    """The mask of a row is the one that it has alone, whatever the names of its adapter and the others hold."""
    base, folders = case("mlp", torch.float32)
    x = inputs_for("mlp", 4)["x"]
    x[1:3] = torch.nan
    alone, beside = begun(base, folders), begun(base, {"other": folders["a"], **folders})
    want = gradients(alone, {"x": x[[0, 3]]}, ["a", "a"], "a")
    loss = out_of(beside, {"x": x}, adapter_names=["other", "b", "c", "other"])
    out = loss_of(loss[[0]]) + loss_of(loss[[3]], 1)
    out.backward()
    got = gradients_of(beside.mlora, "other")
    assert error(got, want) < 1e-5


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved tensors", "reentrant"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_checkpoints_make_the_same_mask(use_reentrant: bool, options: dict[str, Any], case: Any) -> None:
    base, folders = case("qwen2", torch.float32, **options)
    batch = inputs_for("qwen2", 3)
    entries = ["a", "b", "a"]
    want = gradients(begun(base, folders), batch, entries, "a")
    model = begun(base, folders)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert same(gradients(model, batch, entries, "a"), want)
    assert model.mlora.get_rng_state("a")["rows"] == 2
    plain = begun(base, folders)
    plain.mlora.set_rng_state("a", {"seed": SEED, "step": 0, "rows": 1})
    assert not same(gradients(plain, batch, entries, "a"), want), "the test sees no masks"


def test_a_checkpoint_after_the_adapters_have_moved(case: Any) -> None:
    """What is computed again has the mask of the forward pass, wherever the adapters lie by then."""
    base, folders = case("mlp", torch.float32)
    x = inputs_for("mlp", 2)["x"].requires_grad_()

    def run(moved: bool) -> dict[str, Tensor]:
        model = begun(base, folders)
        block = model.up
        own = block.forward
        block.forward = lambda t: checkpoint(own, t, use_reentrant=False)
        out = loss_of(out_of(model, {"x": x}, adapter_names=["a", "b"]))
        if moved:
            model.mlora._store.placements += 1
        out.backward()
        return gradients_of(model.mlora, "a")

    assert same(run(False), run(True))


def parameters(model: Any, name: str) -> dict[str, Tensor]:
    return dict(model.mlora.named_parameters(name))


def steps(model: Any, optimizer: Any, batches: list[dict[str, Tensor]], entries: list[Any]) -> None:
    """An optimizer's step for every two micro-batches."""
    for number, batch in enumerate(batches):
        loss_of(out_of(model, batch, adapter_names=entries)).backward()
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()


def test_an_interrupted_run_goes_on_as_if_it_was_not(case: Any) -> None:
    """Stopped between two steps, and saved; the rest in another model: the same bits."""
    base, folders = case("mlp", torch.float32)
    entries, batches = ["a", "b", "a"], [inputs_for("mlp", 3, seed=seed) for seed in range(8)]

    def optimizer_of(model: Any) -> Any:
        return torch.optim.AdamW(parameters(model, "a").values(), lr=1e-2, fused=True)

    whole = begun(base, folders)
    steps(whole, optimizer_of(whole), batches, entries)
    assert whole.mlora.get_rng_state("a") == {"seed": SEED, "step": 4, "rows": 0}
    assert whole.mlora.get_rng_state("b") == {"seed": SEED, "step": 0, "rows": 8}, "no step was made of it"

    first = begun(base, folders)
    optimizer = optimizer_of(first)
    steps(first, optimizer, batches[:4], entries)
    saved = {
        "parameters": {key: value.detach().clone() for key, value in parameters(first, "a").items()},
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "rng": {name: first.mlora.get_rng_state(name) for name in "ab"},
    }
    second = trained(base, folders).train()
    with torch.no_grad():
        for key, parameter in parameters(second, "a").items():
            parameter.copy_(saved["parameters"][key])
    optimizer = optimizer_of(second)
    optimizer.load_state_dict(saved["optimizer"])
    for name, state in saved["rng"].items():
        second.mlora.set_rng_state(name, state)
    steps(second, optimizer, batches[4:], entries)
    mine, want = parameters(second, "a"), parameters(whole, "a")
    assert all(torch.equal(mine[key], want[key]) for key in want)


def test_micro_batches_are_one_batch(case: Any) -> None:
    base, folders = case("mlp", torch.float64)
    batch = inputs_for("mlp", 4, dtype=torch.float64)
    whole, parts = begun(base, folders), begun(base, folders)
    want = gradients(whole, batch, ["a", "b", "a", "a"], "a")
    for rows in ([0, 1], [2, 3]):
        out = out_of(parts, {"x": batch["x"][rows]}, adapter_names=[["a", "b", "a", "a"][row] for row in rows])
        loss_of(out, rows[0]).backward()
    assert error(gradients_of(parts.mlora, "a"), want) < 1e-12


def test_seeds(case: Any) -> None:
    from peft import LoraConfig

    base, _ = case("mlp", torch.float32)
    model = trained(base, {}).train()
    config = LoraConfig(target_modules=LINEARS["mlp"], lora_dropout=P, r=4)
    torch.manual_seed(77)
    for name, seed in (("a", 5), ("b", 5), ("c", 6), ("d", None)):
        model.mlora.add_adapter(name, config, seed=seed)
    states = [model.mlora.get_rng_state(name)["seed"] for name in "abcd"]
    assert states == [5, 5, 6, 77]
    x = inputs_for("mlp", 1)["x"].repeat(3, *(1,) * (inputs_for("mlp", 1)["x"].dim() - 1))
    for name in "abc":
        for key, parameter in parameters(model, name).items():
            parameter.data.fill_(0.1 if "lora_B" in key else 0.2)
        model.mlora.refresh_adapter(name)
    out = out_of(model, {"x": x}, adapter_names=["a", "b", "c"])
    assert torch.allclose(out[0], out[1], rtol=1e-5) and not torch.allclose(out[0], out[2], rtol=1e-3)


def test_what_is_refused(case: Any) -> None:
    base, folders = case("mlp", torch.float32)
    model = begun(base, folders)
    x = inputs_for("mlp", 2)["x"]
    mixed = [{"a": 0.5, "c": 0.5}, "c"]
    with pytest.raises(errors.UnsupportedAdapterError, match=r"'a' is trained with lora_dropout=0\.3"):
        model(x, adapter_names=mixed)
    model.eval()
    model(x, adapter_names=mixed)
    model.train()
    with model.mlora.use_adapters("a"), pytest.raises(errors.AttributionError, match="outside of a call"):
        model.up(torch.randn(2, 3, model.up.in_features))
    model.mlora.load_adapter(folders["a"], "frozen")
    with pytest.raises(errors.AdapterError, match="has no parameters"):
        model.mlora.get_rng_state("frozen")
