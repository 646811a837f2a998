"""The class that a patched model's root gets, and the way back to what it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import torch
from torch import nn

from . import errors
from .layers import LoraLayer, mixin_of, refuse_copy, refuse_move, restore_class, swap_forward
from .lowering import BaseLinear
from .ops.checks import check_rows, fetch_plan
from .plan.call import Call
from .plan.shared import Shared
from .routing.router import Router

_PACKED = (
    "it packs many prompts into one row, in a thread of its own; choose one entry for all with set_adapter, or call "
    "generate"
)


class Routed(Protocol):
    """What the model's root asks of its `Runtime`."""

    bases: Mapping[str, BaseLinear]
    _shared: Shared
    _router: Router

    def _close(self) -> None:
        """Raises `PatchError` where something is routed or folded in."""


class PatchedModel(nn.Module):
    """Mixed in before the root model's class: `adapter_names=` on calls and on `generate`."""

    if TYPE_CHECKING:  # transformers evaluates the hints of its models' subclasses
        mlora: Routed

    def __call__(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            if adapter_names is not None:
                raise errors.EntryError(
                    "adapter_names= cannot be given inside torch.compile, where every new list of names would be a "
                    "new graph; route with `with runtime.use_adapters(names):` around the compiled call"
                )
            shared = self.mlora._shared
            fetch_plan(shared.plan, shared.header, shared.number)
            if shape := Call(args, kwargs).shape:
                check_rows(shared.plan, shape[0])
            return super().__call__(*args, **kwargs)
        with self.mlora._router.forward(adapter_names, Call(args, kwargs)):
            return super().__call__(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        with self.mlora._router.generation(adapter_names, Call(args, kwargs), _expansion(self, args, kwargs)):
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def generate_batch(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        if adapter_names is not None:
            raise errors.EntryError(f"adapter_names is given to generate_batch: {_PACKED}")
        return super().generate_batch(*args, **kwargs)  # type: ignore[misc]

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        if self.mlora._shared.local.plan is not None:
            raise errors.EntryError(f"use_adapters is open around continuous batching: {_PACKED}")
        return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        refuse_move(self, fn)
        return super()._apply(fn, recurse)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_copy()


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
    for module in ancestors(model, model.mlora.bases):
        module.__dict__.pop("_apply", None)
    del model.__dict__["mlora"]
    restore_class(model)
    return model


def ancestors(model: nn.Module, paths: Iterable[str]) -> list[nn.Module]:
    """The modules between `model` and its layers."""
    names = {path[:end] for path in paths for end, letter in enumerate(path) if letter == "."}
    return [module for name, module in model.named_modules(remove_duplicate=False) if name in names]
