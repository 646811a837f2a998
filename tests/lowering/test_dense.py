"""Deltas of full rank, served as the whole matrices that they are."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn

import mlora
from mlora import errors, lowering
from mlora.lowering import dense

WIDE, TALL = (6, 10), (12, 6)  # (out, in) of the two linears


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(*WIDE[::-1]), nn.Linear(*TALL[::-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def c3a(seed: int, scale: float = 1.0) -> tuple[mlora.Adapter, dict[str, Tensor]]:
    """A C3A of blocks of 2, and its deltas, entry by entry."""
    generator = torch.Generator().manual_seed(seed)
    tensors, deltas = {}, {}
    for name, (out, width) in (("first", WIDE), ("second", TALL)):
        kernel = torch.randn(out // 2, width // 2, 2, generator=generator) * scale
        delta = torch.zeros(out, width, dtype=torch.float64)
        for o in range(out):
            for i in range(width):
                delta[o, i] = kernel[o // 2, i // 2, (i - o) % 2].double() / width
        tensors[f"{name}.c3a_kernel"], deltas[name] = kernel, delta
    config = {"peft_type": "C3A", "block_size": 2, "target_modules": ["first", "second"]}
    return mlora.Adapter(config, tensors), deltas


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def changed(net: nn.Module, *terms: tuple[dict[str, Tensor], float]) -> nn.Module:
    """A copy with the weighted deltas added to its weights."""
    result = copy.deepcopy(net).double()
    with torch.no_grad():
        for deltas, weight in terms:
            for name, delta in deltas.items():
                result.get_submodule(name).weight += weight * delta
    return result


def ask(net: Any, x: Tensor, entries: Any) -> Tensor:
    with torch.no_grad(), net.mlora.use_adapters(entries):
        return net(x)


def near(got: Tensor, net: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(got.double(), net(x.double()), rtol=2e-6, atol=2e-6)


def test_rows_alone_and_in_sums(net: Net) -> None:
    (one, first), (two, second) = c3a(1), c3a(2)
    bare, x = copy.deepcopy(net), torch.randn(4, 10)
    runtime = mlora.patch(net, memory=1 << 20)
    info = runtime.add_adapter("one", one, dense=True)
    runtime.add_adapter("two", two, dense=True)
    assert not info.errors and set(info.dense) == {"first", "second"} and sum(info.dense.values()) <= info.bytes
    got = ask(net, x, ["one", None, {"one": 0.5, "two": -1.5}, "two"])
    for row, terms in enumerate((((first, 1.0),), (), ((first, 0.5), (second, -1.5)), ((second, 1.0),))):
        near(got[row : row + 1], changed(bare, *terms), x[row : row + 1])


def test_the_refusal_tells_the_bytes_of_a_copy(net: Net) -> None:
    runtime = mlora.patch(net, memory=1 << 20)
    with pytest.raises(errors.UnsupportedAdapterError, match=r"dense=True.*240 bytes here and 528 for its 2 modules"):
        runtime.add_adapter("one", c3a(1)[0])
    with pytest.raises(errors.AdapterError, match="approximate is 2 and dense is true"):
        runtime.add_adapter("one", c3a(1)[0], dense=True, approximate=2)
    assert not runtime.adapters


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_gradients_of_inputs(net: Net, dtype: torch.dtype) -> None:
    (one, first), (two, second) = c3a(1), c3a(2)
    bare, x = copy.deepcopy(net), torch.randn(3, 10, dtype=dtype)
    runtime = mlora.patch(net.to(dtype), memory=1 << 20)
    runtime.add_adapter("one", one, dense=True)
    runtime.add_adapter("two", two, dense=True)
    x.requires_grad_()
    with runtime.use_adapters(["one", None, {"one": 0.5, "two": -1.5}]):
        net(x).square().sum().backward()
    for row, terms in enumerate((((first, 1.0),), (), ((first, 0.5), (second, -1.5)))):
        own = x[row : row + 1].detach().double().requires_grad_()
        changed(bare, *terms)(own).square().sum().backward()
        assert x.grad is not None
        torch.testing.assert_close(x.grad[row : row + 1].double(), own.grad, rtol=5e-6, atol=5e-6)


def test_a_matrix_takes_the_bytes_of_the_weight(net: Net) -> None:
    """Where the kernels take the identity beside it as read."""
    runtime = mlora.patch(net, memory=1 << 20)
    info = runtime.add_adapter("one", c3a(1)[0], dense=True)
    assert info.dense == {name: net.get_submodule(name).weight.nbytes for name in ("first", "second")}


@pytest.mark.parametrize("keep", ("copy", "corrections"))
def test_folding_is_exact_and_goes_back_to_the_bit(net: Net, keep: str) -> None:
    (one, first), (two, second) = c3a(1), c3a(2)
    bare, x = copy.deepcopy(net), torch.randn(3, 10)
    runtime = mlora.patch(net, memory=1 << 20)
    for name, adapter in (("one", one), ("two", two)):
        runtime.add_adapter(name, adapter, dense=True)
    runtime.merge_adapter({"one": 0.5, "two": 2.0}, keep=keep)
    for name in ("first", "second"):
        want = bare.get_submodule(name).weight.double() + 0.5 * first[name] + 2 * second[name]
        torch.testing.assert_close(net.get_submodule(name).weight.double(), want, rtol=2e-7, atol=2e-7)
    near(ask(net, x, ["two", None, "one"])[:1], changed(bare, (second, 1.0)), x[:1])  # undoes what is folded in
    runtime.unmerge_adapter()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), bare.parameters(), strict=True))


def test_beside_a_folded_gain(net: Net) -> None:
    """A row beside IA3 that is folded in needs a bridge, of which the matrix is a part."""
    one, first = c3a(1)
    bare, x = copy.deepcopy(net), torch.randn(2, 10)
    config = {"peft_type": "IA3", "target_modules": ["first"], "feedforward_modules": []}
    gain = mlora.Adapter(config, {"first.ia3_l": torch.rand(6, 1) + 0.5})
    runtime = mlora.patch(net, memory=1 << 20)
    runtime.add_adapter("one", one, dense=True)
    runtime.add_adapter("gain", gain)
    runtime.merge_adapter("gain")
    got = ask(net, x, ["one", None])
    near(got[:1], changed(bare, (first, 1.0)), x[:1])
    near(got[1:], changed(bare), x[1:])
    runtime.merge_adapter("one")
    near(ask(net, x, [None, "one"])[:1], changed(bare), x[:1])


@pytest.mark.parametrize("kind", ("linear", "ties", "svd"))
def test_merges_saved_and_loaded_again(tmp_path: Path, net: Net, kind: str) -> None:
    (one, first), (two, second) = c3a(1), c3a(2)
    bare, x = copy.deepcopy(net), torch.randn(2, 10)
    runtime = mlora.patch(net, memory=1 << 20)
    for name, adapter in (("one", one), ("two", two)):
        runtime.add_adapter(name, adapter, dense=True)
    options: dict[str, Any] = {"density": 1.0} if kind == "ties" else {}
    info = runtime.add_weighted_adapter(["one", "two"], [0.5, 2.0], "both", kind, **options)
    assert info.peft_type == "DELTA" and set(info.dense) == {"first", "second"} and not info.errors
    got = ask(net, x, "both")
    if kind != "ties":  # which leaves out where signs differ
        near(got, changed(bare, (first, 0.5), (second, 2.0)), x)
    runtime.save_adapter("both", tmp_path / "both")
    again = runtime.load_adapter(tmp_path / "both", "again")
    assert again.dense == info.dense and torch.equal(ask(net, x, "again"), got)
    runtime.save_adapter("one", tmp_path / "one")
    runtime.load_adapter(tmp_path / "one", "same", dense=True)
    assert torch.equal(ask(net, x, "same"), ask(net, x, "one"))


def test_loading_makes_one_matrix_at_a_time(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is there while another is made, so that a large adapter takes its blob and one module."""
    made: list[ref[Tensor]] = []
    weight = dense._c3a

    def watched(module: Any) -> Any:
        found = weight(module)

        def read() -> Tensor:
            assert not any(other() is not None for other in made)
            matrix = found.weight()
            made.append(ref(matrix))
            return matrix

        return dense.Dense(read, found.why)

    monkeypatch.setitem(lowering.LOWERINGS, "C3A", replace(dense.C3A, delta=watched))
    runtime = mlora.patch(net, memory=1 << 20)
    runtime.add_adapter("one", c3a(1)[0], dense=True)
    assert len(made) >= 2
