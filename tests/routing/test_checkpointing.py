"""What a backward pass computes again is under what its forward pass was under, whatever is routed by then."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from conftest import assert_close
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, set_checkpoint_early_stop

import mlora
from mlora import errors

ROWS = ["a", None, "b", {"a": 0.5, "b": -1.0}]
WIDTH = 8


def plainly(blocks: nn.Sequential, x: Tensor) -> Tensor:
    return blocks(x)


def reentrant(blocks: nn.Sequential, x: Tensor) -> Tensor:
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=True)
    return x


def not_reentrant(blocks: nn.Sequential, x: Tensor) -> Tensor:
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False)
    return x


def in_segments(blocks: nn.Sequential, x: Tensor) -> Tensor:
    return checkpoint_sequential(blocks, 2, x, use_reentrant=True)


def nested(blocks: nn.Sequential, x: Tensor) -> Tensor:
    return checkpoint(lambda x: not_reentrant(blocks, x), x, use_reentrant=False)


def nested_reentrant(blocks: nn.Sequential, x: Tensor) -> Tensor:
    return checkpoint(lambda x: reentrant(blocks, x), x, use_reentrant=True)


def offloaded(blocks: nn.Sequential, x: Tensor) -> Tensor:
    with save_on_cpu():
        return not_reentrant(blocks, x)


def to_the_end(blocks: nn.Sequential, x: Tensor) -> Tensor:
    with set_checkpoint_early_stop(False):
        return not_reentrant(blocks, x)


HOWS = (reentrant, not_reentrant, in_segments, nested, nested_reentrant, offloaded, to_the_end)


class Model(nn.Module):
    how: Callable[[nn.Sequential, Tensor], Tensor] = staticmethod(plainly)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.blocks, x)


class World:
    def __init__(self) -> None:
        self.draw = torch.Generator().manual_seed(0)
        self.model = Model()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=self.draw) * 0.5)
        self.weights = [block[0].weight.detach().double() for block in self.model.blocks]
        self.biases = [block[0].bias.detach().double() for block in self.model.blocks]
        self.runtime = mlora.patch(self.model, max_adapters=2)
        self.factors: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for name in "abc":
            self.add(name)
        self.x = torch.randn(4, 3, WIDTH, generator=self.draw)

    def add(self, name: str) -> None:
        self.factors[name], tensors = [], {}
        for index in range(3):
            a, b = (torch.randn(shape, generator=self.draw) * 0.5 for shape in ((2, WIDTH), (WIDTH, 2)))
            tensors[f"blocks.{index}.0.lora_A.weight"], tensors[f"blocks.{index}.0.lora_B.weight"] = a, b
            self.factors[name].append((a.double(), b.double()))
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["0"]}
        self.runtime.add_adapter(name, mlora.Adapter(config, tensors))

    def want(self, entries: list[Any]) -> Tensor:
        """The gradient of a sum of squares, in fp64, of each row by itself."""
        rows = []
        for row, entry in enumerate(entries):
            recipe = {} if entry is None else entry if isinstance(entry, dict) else {entry: 1.0}
            x = out = self.x[row].double().requires_grad_()
            for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
                pairs = [(scale, *self.factors[name][index]) for name, scale in recipe.items()]
                out = torch.tanh(out @ (weight + sum(s * (b @ a) for s, a, b in pairs)).t() + bias)
            out.square().sum().backward()
            rows.append(x.grad)
        return torch.stack(rows)

    def forward(self, how: Any = None, **options: Any) -> tuple[Tensor, Tensor]:
        """A leaf, and the loss of a call on it."""
        if how is not None:
            self.model.how = how
        x = self.x.clone().requires_grad_()
        return x, self.model(x, **options).square().sum()


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    assert made.runtime._shared.local.plan is None and made.runtime._readers.count == 0
    assert all(packed.pins == 0 for packed in made.runtime._store._adapters.values())
    mlora.unpatch(made.model)


@pytest.mark.parametrize("how", (plainly, *HOWS))
def test_gradients_are_those_of_the_forward_pass(world: World, how: Any) -> None:
    x, loss = world.forward(how, adapter_names=ROWS)
    loss.backward()
    assert_close(x.grad, world.want(ROWS), 1e-5)


@pytest.mark.parametrize("how", (plainly, *HOWS))
def test_whatever_is_routed_by_the_backward_pass(world: World, how: Any) -> None:
    """Names, use_adapters, the default and none in the forward pass, and other ones around the backward pass."""
    runtime = world.runtime
    calls = [(*world.forward(how, adapter_names=ROWS), ROWS)]
    with runtime.use_adapters("a"):
        calls.append((*world.forward(), ["a"] * 4))
    calls.append((*world.forward(), [None] * 4))
    runtime.set_adapter("b")
    calls.append((*world.forward(), ["b"] * 4))
    with runtime.use_adapters(["b", "a", None, "b"]):
        calls.append((*world.forward(), ["b", "a", None, "b"]))
    with runtime.use_adapters("a"):
        runtime.set_adapter("a")
        sum(loss for _, loss, _ in calls).backward()
        runtime.set_adapter(None)
    for x, _, entries in calls:
        assert_close(x.grad, world.want(entries), 1e-5)


@pytest.mark.parametrize("how", (plainly, *HOWS))
def test_adapters_that_have_left_the_device_come_back(world: World, how: Any) -> None:
    """To other places, while other adapters lie where they were."""
    x, loss = world.forward(how, adapter_names=["a", None, "b", "a"])
    store = world.runtime._store
    place = store["b"].slot
    other, second = world.forward(adapter_names=["c"] * 4)  # in place of a
    world.forward(adapter_names="a")
    assert store["a"].slot == place and not store["b"].resident
    (loss + second).backward()
    assert_close(x.grad, world.want(["a", None, "b", "a"]), 1e-5)
    assert_close(other.grad, world.want(["c"] * 4), 1e-5)


@pytest.mark.parametrize("how", HOWS)
def test_in_another_thread(world: World, how: Any) -> None:
    x, loss = world.forward(how, adapter_names=ROWS)
    thread = threading.Thread(target=loss.backward)
    with world.runtime.use_adapters("b"):
        thread.start()
        thread.join()
    assert_close(x.grad, world.want(ROWS), 1e-5)


def delete(world: World) -> None:
    world.runtime.delete_adapter("a")


def replace(world: World) -> None:
    world.runtime.delete_adapter("a")
    world.add("a")


def fold(world: World) -> None:
    world.runtime.merge_adapter("c")


@pytest.mark.parametrize("change", (delete, replace, fold))
@pytest.mark.parametrize("how", (reentrant, not_reentrant))
@pytest.mark.parametrize("names", ("outside", "inside"))
def test_what_is_gone_is_refused(world: World, how: Any, names: str, change: Callable[[World], None]) -> None:
    """Also where the checkpointed function makes the call."""
    if names == "outside":
        _, loss = world.forward(how, adapter_names=ROWS)
    else:
        x = world.x.clone().requires_grad_()
        call = lambda x: world.model(x, adapter_names=ROWS)  # noqa: E731
        loss = checkpoint(call, x, use_reentrant=how is reentrant).square().sum()
    change(world)
    error = errors.UnknownAdapterError if (names, change) == ("inside", delete) else errors.RoutingError
    with pytest.raises(error, match="folded" if change is fold else "'a'"):
        loss.backward()
    if change is fold:
        world.runtime.unmerge_adapter()


@pytest.mark.parametrize("use_reentrant", (True, False))
def test_a_checkpointed_call_of_the_model(world: World, use_reentrant: bool) -> None:
    """With names of its own, and under the default of then."""
    for options, entries in (({"adapter_names": ROWS}, ROWS), ({}, ["b"] * 4), ({}, [None] * 4)):
        world.runtime.set_adapter("b" if entries[0] == "b" else None)
        x = world.x.clone().requires_grad_()
        out = checkpoint(lambda x, o=options: world.model(x, **o), x, use_reentrant=use_reentrant)
        world.runtime.set_adapter("a")
        with world.runtime.use_adapters("a"):
            out.square().sum().backward()
        assert_close(x.grad, world.want(entries), 1e-5)
    world.runtime.set_adapter(None)


class Own(torch.autograd.Function):
    """A checkpointing that is not torch's."""

    @staticmethod
    def forward(ctx: Any, function: Any, x: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x)
        return function(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.function(x)
        torch.autograd.backward(out, gradient)
        return None, x.grad


@pytest.mark.parametrize("around", (None, "a", "b"))
def test_another_checkpointing_is_refused(world: World, around: str | None) -> None:
    own = lambda blocks, x: Own.apply(blocks, x)  # noqa: E731
    x, loss = world.forward(own)
    loss.backward()  # without an adapter there is nothing to tell
    assert_close(x.grad, world.want([None] * 4), 1e-5)
    with world.runtime.use_adapters("a"):
        _, loss = world.forward(own)
        world.model.how = plainly
        whole = Own.apply(world.model, world.x.clone().requires_grad_()).square().sum()
    for one, what in ((loss, r"blocks\.0\.0"), (whole, "the model")):
        with ExitStack() as stack:
            if around is not None:
                stack.enter_context(world.runtime.use_adapters(around))
            stack.enter_context(pytest.raises(errors.RoutingError, match=f"{what} runs in a backward pass"))
            one.backward()


def test_a_call_in_a_backward_pass_that_names_its_adapters(world: World) -> None:
    x, loss = world.forward(adapter_names=ROWS)
    seen: list[Tensor] = []

    def hook(gradient: Tensor) -> None:
        with torch.no_grad():
            seen.append(world.model(world.x, adapter_names="b"))
        with torch.enable_grad():
            other, inner = world.forward(adapter_names="b")
        inner.backward()
        seen.append(other.grad)

    x.register_hook(hook)
    loss.backward()
    with torch.no_grad():
        assert torch.equal(seen[0], world.model(world.x, adapter_names="b"))
    assert_close(seen[1], world.want(["b"] * 4), 1e-5)


class Gathering(nn.Module):
    """Its experts get tokens of any rows, which is served where all rows take the same."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])

    def forward(self, x: Tensor, use_reentrant: bool | None) -> Tensor:
        def gathered(x: Tensor) -> Tensor:
            return torch.cat([x[:1, :2], self.experts[0](x.flatten(0, 1)[2:])[None]], 1)

        return gathered(x) if use_reentrant is None else checkpoint(gathered, x, use_reentrant=use_reentrant)


def test_equal_rows_stay_equal() -> None:
    """Also where their plan is made anew."""
    model, draw, gradients = Gathering(), torch.Generator().manual_seed(0), []
    runtime = mlora.patch(model, max_adapters=2)
    for name in "abc":
        tensors = {
            f"experts.0.lora_{side}.weight": torch.randn(shape, generator=draw)
            for side, shape in (("A", (2, WIDTH)), ("B", (WIDTH, 2)))
        }
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["experts.0"]}
        runtime.add_adapter(name, mlora.Adapter(config, tensors))
    for use_reentrant in (None, True, False):
        with torch.no_grad():
            for name in "ab":
                model(torch.zeros(1, 3, WIDTH), None, adapter_names=name)
        x = torch.randn(3, 2, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = model(x, use_reentrant, adapter_names=["b"] * 3)
        with torch.no_grad():
            for name in "aca":
                model(torch.zeros(1, 3, WIDTH), None, adapter_names=name)
        assert not runtime._store["b"].resident
        out.square().sum().backward()
        assert runtime._store["b"].resident is (use_reentrant is not None)
        gradients.append(x.grad)
    for gradient in gradients[1:]:
        assert_close(gradient, gradients[0], 1e-5)
