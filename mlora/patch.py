"""`patch` and `unpatch`: turn a model into a multi-adapter runtime, in place, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import nn

from . import errors
from .adapter import Adapter
from .call import Call
from .layers import (
    LayerState,
    LoraLayer,
    ParametersState,
    Shared,
    compute_dtype,
    find_layers,
    find_stacks,
    guard_moves,
    is_norm_like,
    mixin_of,
    model_dtype,
    refuse_copy,
    refuse_move,
    restore_class,
    swap_class,
    swap_forward,
)
from .ops.checks import check_rows
from .runtime import Runtime
from .store import Store
from .takeover import has_peft, take_over

PLAN_WORDS = 1 << 16  # the plan buffer of compiled code: room for batches of some ten thousand rows


class PatchedModel(nn.Module):
    """Mixed in before the root model's class: `adapter_names=` on calls and on `generate`."""

    mlora: Runtime

    def __call__(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            if adapter_names is not None:
                raise errors.EntryError(
                    "adapter_names= cannot be given inside torch.compile, where every new list of names would be a "
                    "new graph; route with `with runtime.use_adapters(names):` around the compiled call"
                )
            if shape := Call(args, kwargs).shape:
                check_rows(self.mlora._shared.plan, shape[0])
            return super().__call__(*args, **kwargs)
        with self.mlora._forward(adapter_names, Call(args, kwargs)):
            return super().__call__(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        with self.mlora._generation(adapter_names, Call(args, kwargs), _expansion(self, args, kwargs)):
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        refuse_move(self, fn)
        return super()._apply(fn, recurse)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_copy()


def patch(
    model: nn.Module,
    *,
    memory: int | None = None,
    max_adapters: int = 256,
    max_merges: int = 64,
    dtype: torch.dtype | None = None,
    fused: bool = True,
) -> Runtime:
    """Patch every linear, convolution, norm, token embedding and fused experts of `model` in place, so that each row of
    a batch can use its own adapter.

    Until an adapter is used the model computes the same bits as before. Its class, `state_dict`,
    hooks and `save_pretrained` stay as they are.

    Args:
        model: a Hugging Face model, or any module with linears or convolutions in it. A `PeftModel`, or a transformers
            model with adapters, hands its adapters over: PEFT's layers are taken out, its adapters are
            loaded under their names, and the active one becomes the default (`Runtime.set_adapter`). Of a
            `PeftModel` it is the model inside that is patched, `runtime.model`; the wrapper refuses calls.
        memory: bytes of device memory for resident adapters; the others wait on the host. The default
            is half the size of the model's weights, at least 64 MiB, and at most half of what is free.
        max_adapters: how many adapters can be resident at once.
        max_merges: how many results of merges in requests are kept; of more, those that were not used for longest are
            forgotten, and computed again when asked for.
        dtype: in which adapters are stored on the device; the default is the linears' own.
        fused: compute base product and LoRA in one op where that is bit-equal to the library (fp32 and bf16 linears, on
            CPUs with AVX-512), and where it is faster.

    Returns:
        The runtime, also reachable as `model.mlora`.

    Raises:
        PatchError: it is patched already, has no linear, or has PEFT adapters merged or several active.
        AdapterError, UnsupportedAdapterError: an adapter in it cannot be served.
    """
    if not isinstance(model, nn.Module):
        raise errors.PatchError(f"patch takes a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, PatchedModel):
        raise errors.PatchError("this model is patched already; its runtime is model.mlora")
    adapters: dict[str, Adapter] = {}
    active = None
    if has_peft(model):
        model, adapters, active = take_over(model)
    paths = find_layers(model)
    if all(is_norm_like(module) for module in paths.values()):
        raise errors.PatchError(f"{type(model).__name__} has no linear, convolution or token embedding to patch")
    if any(isinstance(m, (LoraLayer, PatchedModel)) for m in model.modules()):
        raise errors.PatchError("a part of this model is patched already; unpatch it first")

    modules: dict[int, tuple[str, nn.Module]] = {}  # by identity: a shared module is one layer
    for name, module in paths.items():
        modules.setdefault(id(module), (name, module))
    stacks = find_stacks(model)
    device = _device(model)
    usual = model_dtype(model)
    dtypes = {key: compute_dtype(module, usual) for key, (_, module) in modules.items()}
    kinds = Counter(dtypes[key] for key, (_, module) in modules.items() if not is_norm_like(module))
    arena_dtype = dtype or kinds.most_common(1)[0][0]
    if memory is None:
        memory = _default_memory(model, device)
    if memory < 1 or max_adapters < 1:
        raise errors.PatchError(f"memory={memory} and max_adapters={max_adapters} must be positive")
    if max_merges < 0:
        raise errors.PatchError(f"max_merges={max_merges} must be at least 0")
    store = Store(device, arena_dtype, memory, len(modules) + len(stacks), max_adapters)
    shared = Shared(store.arena, torch.zeros(PLAN_WORDS, dtype=torch.int32, device=device), fused)
    states = {
        key: LayerState(name, index, shared, store.tables[index], module, dtypes[key])
        for index, (key, (name, module)) in enumerate(modules.items())
    }
    indices = {name: states[id(module)].index for name, module in paths.items()}
    indices.update({path: len(modules) + number for number, path in enumerate(stacks)})
    runtime = Runtime(model, store, shared, indices, paths, stacks, max_merges)
    for path, (module, _) in stacks.items():
        if id(module) not in modules:
            owner = path.rpartition(".")[0]
            own = {stack.name: indices[p] for p, stack in stacks.items() if stack.module is module}
            dtype = getattr(module, next(iter(own))).dtype
            modules[id(module)] = owner, module
            states[id(module)] = ParametersState(owner, shared, store.tables, module, dtype, own)

    for key, (_, module) in modules.items():
        if states[key].outer is not None:
            del module.__dict__["forward"]
        mixin = mixin_of(module)
        swap_forward(module, type(module).forward, mixin.forward)
        module.__dict__["_mlora"] = states[key]
        swap_class(module, mixin)
    for module in _ancestors(model, runtime.bases):
        guard_moves(module)
    swap_class(model, PatchedModel)
    model.__dict__["mlora"] = runtime
    for name, adapter in adapters.items():
        runtime.add_adapter(name, adapter)
    if active is not None:
        runtime.set_adapter(active)
    return runtime


def unpatch(model: nn.Module) -> nn.Module:
    """Undo `patch`: the very same modules, without a trace.

    Raises:
        PatchError: the model is not patched, or a routing is active.
    """
    if not isinstance(model, PatchedModel):
        raise errors.PatchError(f"this {type(model).__name__} is not patched")
    model.mlora._close()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            outer = module._mlora.outer
            del module.__dict__["_mlora"]
            restore_class(module)
            swap_forward(module, mixin_of(module).forward, type(module).forward)
            if outer is not None:
                module.__dict__["forward"] = outer
    for module in _ancestors(model, model.mlora.bases):
        module.__dict__.pop("_apply", None)
    del model.__dict__["mlora"]
    restore_class(model)
    return model


def _ancestors(model: nn.Module, paths: Iterable[str]) -> list[nn.Module]:
    """The modules between `model` and its layers."""
    names = {path[:end] for path in paths for end, letter in enumerate(path) if letter == "."}
    return [module for name, module in model.named_modules(remove_duplicate=False) if name in names]


def _device(model: nn.Module) -> torch.device:
    devices = Counter(p.device for p in model.parameters() if not p.is_meta)
    return devices.most_common(1)[0][0] if devices else torch.device("cpu")


def _default_memory(model: nn.Module, device: torch.device) -> int:
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        import os

        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else weights
    return max(1, min(max(weights // 2, 64 << 20), free // 2))


def _expansion(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many times `generate` repeats each row: for beams, or for several returned sequences.

    As in transformers, an argument counts before the given config, and that before the model's own.
    """
    given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
    configs = (given, getattr(model, "generation_config", None))

    def setting(name: str) -> int:
        values = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
        return next((int(value) for value in values if value is not None), 1)

    return max(setting("num_beams"), setting("num_return_sequences"))
