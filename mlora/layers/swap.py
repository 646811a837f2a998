"""Swapping a module's class and its forward, and what a patched module refuses."""

from __future__ import annotations

from collections.abc import Callable
from types import CellType, FunctionType, MethodType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .. import errors
from ..plan.shared import Shared

_swapped: dict[tuple[type, type], type] = {}


def swap_class(module: nn.Module, mixin: type, forward_over: Callable[[Any], Callable[..., Any]] | None = None) -> None:
    """Give `module` a subclass of (mixin, its own class) that keeps the class's name.

    Args:
        forward_over: makes the subclass's forward of the class, where the mixin has none for all of them.
    """
    cls = type(module)
    if (mixin, cls) not in _swapped:
        body: dict[str, Any] = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        if forward_over is not None:
            body["forward"] = forward_over(cls)
        _swapped[mixin, cls] = type(cls.__name__, (mixin, cls), body)
    module.__class__ = _swapped[mixin, cls]


def restore_class(module: nn.Module) -> None:
    """Undo `swap_class`."""
    module.__class__ = type(module).__bases__[1]


def twin_of(module: nn.Module) -> tuple[Any, Any]:
    """An object with all that `module` holds but a `forward` of its own, to put other tensors into, and the class that
    `module` had before it was patched."""
    cls: Any = type(module).__bases__[1] if type(module) in _swapped.values() else type(module)
    twin: Any = object.__new__(cls)
    twin.__dict__.update({key: value for key, value in module.__dict__.items() if key != "forward"})
    return twin, cls


def alias_of(module: nn.Module) -> Any:
    """An object of the class of `module`, which is not patched yet, with the very same `__dict__`: it stays the module
    as it was, whatever class `module` gets and whatever becomes of its parameters."""
    alias: Any = object.__new__(type(module))
    object.__setattr__(alias, "__dict__", module.__dict__)
    return alias


def bound_forwards(module: nn.Module, forward: Callable[..., Any]) -> list[str]:
    """The attributes in which `module` itself holds `forward`, bound to it, or a forward of transformers' tensor or
    expert parallelism around it that a layer stands inside of."""
    return [
        name
        for name, value in module.__dict__.items()
        if _is_bound(value, module, forward) or any(_is_bound(_held(h), module, forward) for h in _holders(value))
    ]


def swap_forward(module: nn.Module, old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Put `new` wherever `module` itself holds `old`, bound to it."""
    for name in bound_forwards(module, old):
        if not (holders := _holders(module.__dict__[name])):
            module.__dict__[name] = MethodType(new, module)
        for holder in holders:
            if isinstance(holder, CellType):
                holder.cell_contents = MethodType(new, module)
            else:
                holder.experts_forward = MethodType(new, module)


def _is_bound(value: Any, module: nn.Module, forward: Callable[..., Any]) -> bool:
    return isinstance(value, MethodType) and value.__self__ is module and value.__func__ is forward


# The modules of transformers whose styles put a forward around a module's; and those styles whose inside computes on
# tensors of all processes, so that layers stand around them.
_STYLES, _EXPERTS = "transformers.distributed.tensor_parallel", "transformers.distributed.expert_parallel"
_AROUND = ("EmbeddingParallel", "SequenceParallel")


def style_of(module: nn.Module) -> str:
    """The class of the tensor or expert parallel style that transformers has put around the module's forward; "" if
    none."""
    return _style_of(module.__dict__.get("forward"))


def _style_of(forward: Any) -> str:
    if getattr(forward, "__module__", "") not in (_STYLES, _EXPERTS) or not isinstance(forward, FunctionType):
        return ""
    owner = _cells(forward).get("self")
    return forward.__qualname__.partition(".")[0] if owner is None else type(owner.cell_contents).__name__


def _cells(forward: Any) -> dict[str, CellType]:
    return dict(zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True))


def _holders(forward: Any) -> list[Any]:
    """What in such a forward keeps the one that it is around, if a layer stands inside of it: a cell; or of expert
    parallelism those of its ways to reach the experts that bring each process the whole batch when nothing is recorded
    (`AllReduceEP`), and what they leave to others when something is."""
    style = _style_of(forward)
    if not style or style in _AROUND:
        return []
    cells = _cells(forward)
    if (cell := cells.get("original_forward")) is not None:
        return [cell]
    if (cell := cells.get("implementation")) is None:
        return []
    way = cell.cell_contents
    ways = [way, *(getattr(way, name, None) for name in ("all_reduce", "all_to_all"))]
    whole = type(way).__name__ == "AllReduceEP" or (
        type(way).__name__ == "AutoEP" and way.all_reduce is not None and way.megamoe is None
    )
    return [one for one in ways if one is not None] if whole else []


def _held(holder: Any) -> Any:
    return holder.cell_contents if isinstance(holder, CellType) else holder.experts_forward


def guard_moves(module: nn.Module, shared: Shared) -> None:
    """Make a module that has layers below it refuse a move before it moves any of its other children. Within a call of
    the model it is a hook that moves: one that casts what rests in another dtype, and casts it back."""

    def apply(fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if shared.active.get().late is None:
            refuse_move(module, fn, shared.moves)
        return type(module)._apply(module, fn, recurse)

    module.__dict__["_apply"] = apply


def refuse_copy() -> NoReturn:
    raise errors.PatchError(
        "a patched model can be neither copied nor pickled; unpatch it first, or save it with save_pretrained or its "
        "state_dict"
    )


def refuse_move(module: nn.Module, fn: Callable[[Tensor], Tensor], moves: bool) -> None:
    """Raise if `fn`, which `nn.Module.to` and its like pass to `_apply`, would move a parameter. With `moves` a hook
    brings it back for its call, wherever it rests: it may only keep its dtype."""
    for tensor in (*module.parameters(), *module.buffers()):
        probe = torch.empty(0, dtype=tensor.dtype, device=tensor.device)  # quantized tensors lack new_empty
        moved = fn(probe)
        if moved.dtype != probe.dtype or (moved.device != probe.device and not moves):
            raise errors.ModelMovedError(
                f"the model is patched in {probe.dtype} on {probe.device} and cannot be moved to {moved.dtype} on "
                f"{moved.device}; unpatch it, move it, patch it again"
            )
