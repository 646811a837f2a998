"""On which device a module is called, and where its weights are between calls.

A model may lie on several devices, and accelerate's hooks may bring weights to the device of their call and take them
away again: `AlignDevicesHook`, from host memory or a disk, leaving tensors on "meta" meanwhile, and `CpuOffload`, which
moves a whole part of the model. They are known by what they have, so that accelerate need not be installed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .dense import tensors_of

BRINGS = ("pre_forward", "post_forward")
"""What hooks call the methods that bring weights and take them away."""


def devices_of(model: nn.Module) -> dict[int, torch.device]:
    """By the id of each module of `model`: the device on which it is called.

    That is where a hook of its own brings its inputs; else where a hook of a module around it brings the weights of all
    that is inside; else where its own tensors are. A module without tensors or hooks is taken to be where most of the
    model's are.
    """
    found: dict[int, torch.device] = {}
    most = _most(model)

    def walk(module: nn.Module, around: torch.device | None) -> None:
        if id(module) in found:  # it is shared; the first path counts, as it does in the store
            return
        own = None
        for hook in _hooks(module):
            if (device := _device(hook)) is not None:
                own = device
                around = device if brings_all(hook) else around
        held = next((tensor.device for tensor in tensors_of(module) if not tensor.is_meta), most)
        found[id(module)] = own or around or held
        for child in module.children():
            walk(child, around)

    walk(model, None)
    return found


def offloaded(model: nn.Module, module: nn.Module) -> dict[str, Tensor]:
    """What accelerate keeps for a module of `model` whose own tensors are on "meta" between calls, by the parameter's
    name, in host memory; empty for one that keeps its own. What is on a disk is read anew each time."""
    wanted = [name for name, tensor in module.named_parameters(recurse=False) if tensor.is_meta]
    if not wanted:
        return {}
    names = next((name for name, other in model.named_modules() if other is module), "").split(".")
    for depth in range(len(names), -1, -1):
        inside = "".join(f"{name}." for name in names[depth:])
        for hook in _hooks(model.get_submodule(".".join(names[:depth]))):
            kept = getattr(hook, "weights_map", None)
            if isinstance(kept, Mapping) and (not inside or brings_all(hook)):
                return {name: kept[inside + name] for name in wanted if inside + name in kept}
    return {}


def _hooks(module: nn.Module) -> Iterator[Any]:
    """Accelerate's, those inside of a `SequentialHook` one by one."""
    hook = module.__dict__.get("_hf_hook")
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))


def _device(hook: Any) -> torch.device | None:
    """Where a hook brings a module's inputs."""
    device = getattr(hook, "execution_device", None)
    if device is None or torch.device(device).type == "meta":
        return None
    return torch.empty(0, device=device).device  # with its index


def moves(model: nn.Module) -> bool:
    """Whether a hook moves modules to the device of their call, and somebody moves them away again."""
    return any(_moves(hook) for module in model.modules() for hook in _hooks(module))


def _moves(hook: Any) -> bool:
    """Whether it is a `CpuOffload`."""
    return _device(hook) is not None and not hasattr(hook, "weights_map")


def brings_all(hook: Any) -> bool:
    """Whether it is a hook that brings what is inside of its module, too."""
    return bool(getattr(hook, "place_submodules", _moves(hook)))


def _most(model: nn.Module) -> torch.device:
    devices = Counter(p.device for p in model.parameters() if not p.is_meta)
    return devices.most_common(1)[0][0] if devices else torch.device("cpu")
