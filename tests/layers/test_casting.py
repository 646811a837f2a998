"""Hooks that cast a layer around its calls: weights rest in one dtype and multiply in another."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import assert_close
from torch import nn

import mlora
from mlora import errors

WIDTH = 8


def net() -> Any:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    return nn.Sequential(block, nn.LayerNorm(WIDTH)).eval()


def by_hooks(module: nn.Module, rest: torch.dtype, compute: torch.dtype) -> None:
    module.register_forward_pre_hook(lambda layer, _: (layer.to(compute), None)[1])
    module.register_forward_hook(lambda layer, *_: (layer.to(rest), None)[1])


def by_forward(module: nn.Module, rest: torch.dtype, compute: torch.dtype) -> None:
    """As diffusers' hooks do: they put a `forward` on the instance."""
    forward = module.forward

    def cast(*args: Any, **kwargs: Any) -> Any:
        module.to(compute)
        try:
            return forward(*args, **kwargs)
        finally:
            module.to(rest)

    module.forward = cast


def casting(how: Any, around: str, rest: torch.dtype) -> tuple[Any, Any]:
    """A model whose linears rest in `rest`, and one of the same values without hooks."""
    model, plain = net(), net()
    for name in ("0.0", "0.2"):
        plain.get_submodule(name).to(rest).to(torch.float32)
        model.get_submodule(name).to(rest)
    for name in ("0.0", "0.2") if around == "layer" else ("0",):
        how(model.get_submodule(name), rest, torch.float32)
    return model, plain


def adapter(dora: bool = False) -> mlora.Adapter:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "0.0.lora_A.weight": torch.randn(2, WIDTH, generator=generator),
        "0.0.lora_B.weight": torch.randn(WIDTH, 2, generator=generator),
    }
    if dora:
        tensors["0.0.lora_magnitude_vector"] = torch.rand(WIDTH, generator=generator) + 0.5
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["0.0"], "use_dora": dora}
    return mlora.Adapter(config, tensors)


CASTS = [
    (by_hooks, "layer", torch.float8_e4m3fn),
    (by_forward, "layer", torch.float8_e4m3fn),
    (by_hooks, "block", torch.float8_e4m3fn),
    (by_hooks, "layer", torch.bfloat16),
    (by_forward, "layer", torch.bfloat16),
]


@pytest.mark.parametrize(("how", "around", "rest"), CASTS, ids=lambda value: getattr(value, "__name__", str(value)))
@pytest.mark.parametrize("dora", (False, True), ids=("lora", "dora"))
@torch.no_grad()
def test_rows_of_layers_that_hooks_cast(how: Any, around: str, rest: torch.dtype, dora: bool) -> None:
    model, plain = casting(how, around, rest)
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(2))
    bare = plain(x)
    assert torch.equal(model(x), bare)
    runtime = mlora.patch(model, dtype=torch.float32)
    assert torch.equal(model(x), bare)
    runtime.add_adapter("a", adapter(dora))
    got = model(x, adapter_names=["a", None, "a"])
    want = copy.deepcopy(plain)
    other = mlora.patch(want)
    other.add_adapter("a", adapter(dora))
    assert_close(got, want(x, adapter_names=["a", None, "a"]))
    assert (got[0] - bare[0]).abs().max() > 1e-2 and torch.equal(got[1], bare[1])
    assert model.get_submodule("0.0").weight.dtype is rest
    mlora.unpatch(model)
    assert torch.equal(model(x), bare)


def test_a_move_outside_of_a_call_is_still_refused() -> None:
    model = net()
    mlora.patch(model)
    for name in ("0.0", "0"):
        with pytest.raises(errors.ModelMovedError):
            model.get_submodule(name).to(torch.bfloat16)
