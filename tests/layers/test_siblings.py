"""Layers that read one input are served in one call: q, k and v; gate and up. On every backend that has such a call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import inputs_for, logits, make_adapter, served
from torch.utils._python_dispatch import TorchDispatchMode

import mlora
from mlora.ops import dispatch

pytestmark = pytest.mark.skipif(
    dispatch.backend("cpu", torch.float32) not in dispatch.GROUPING, reason="this backend serves modules one by one"
)


class Launches(TorchDispatchMode):
    """Names of the operators of ours that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mlora":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_siblings_share_a_launch(llama: Any, tmp_path: Path) -> None:
    """q, k and v; gate and up: four launches a decoder layer, and the same bits as one by one."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    make_adapter(tmp_path / "a", llama, 1, r=3, target_modules=targets)
    make_adapter(tmp_path / "b", llama, 2, r=2, target_modules=["k_proj", "up_proj"])
    model = served(llama, {n: tmp_path / n for n in "ab"}, fused=False)
    batch, names = inputs_for("llama", 4), ["a", None, "b", "a"]
    groups, model.mlora._shared.groups = model.mlora._shared.groups, None
    alone = logits(model, batch, adapter_names=names)
    model.mlora._shared.groups = groups
    logits(model, batch, adapter_names=names)  # learns who reads what
    with Launches() as launches:
        together = logits(model, batch, adapter_names=names)
    assert torch.equal(together, alone)
    layers = len(model.model.layers)
    assert launches.names.count("mlora::apply_group_") == launches.names.count("mlora::apply_") == 2 * layers
    with Launches() as launches:  # an adapter that leaves most of them alone
        few = logits(model, batch, adapter_names="b")
    assert launches.names.count("mlora::apply_") == 2 * layers and "mlora::apply_group_" not in launches.names
    model.mlora._shared.groups = None
    assert torch.equal(few, logits(model, batch, adapter_names="b"))


def test_an_input_that_was_written_to_is_another_input() -> None:
    """The second reader of a tensor gets what the tensor holds then, and a reader that stays away is forgotten."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({name: torch.nn.Linear(24, 24) for name in "ab"})
    tensors = {
        f"{n}.lora_{part}.weight": torch.randn(shape) for n in "ab" for part, shape in (("A", (2, 24)), ("B", (24, 2)))
    }
    runtime = mlora.patch(model, memory=1 << 16, fused=False)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["a", "b"]}
    runtime.add_adapter("x", mlora.Adapter(config, tensors))
    with torch.no_grad(), runtime.use_adapters("x"):
        x = torch.randn(3, 24)
        first = model["a"](x), model["b"](x)
        again = torch.randn(3, 24)
        assert runtime._shared.groups
        y = again.clone()
        model["a"](y)
        y.mul_(2)
        assert torch.equal(model["b"](y), model["b"](y.clone()))
        model["a"](x), model["b"](x)  # learned again
        assert any(runtime._shared.groups.values())
        model["a"](x.clone())
        model["a"](again)  # nobody asked for b
        assert not any(runtime._shared.groups.values())
        assert torch.equal(model["b"](x), first[1]) and torch.equal(model["a"](x), first[0])
