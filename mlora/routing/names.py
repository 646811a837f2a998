"""Keywords that name adapters: what takes them, and what must not swallow them in a `**kwargs`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from .. import errors

# What users of PEFT and of serving engines write for `adapter_names`.
_OTHERS = frozenset(
    {
        "active_adapter", "active_adapters", "adapter", "adapter_id", "adapter_ids", "adapter_name", "adapter_weights",
        "adapters", "lora", "lora_id", "lora_name", "lora_names", "lora_path", "lora_request", "loras",
    }
)  # fmt: skip


@functools.cache
def unrouted(forward: Callable[..., Any]) -> frozenset[str]:
    """The keywords that `forward` would take for something of its own, or pass on, though they name adapters."""
    return _OTHERS - inspect.signature(forward).parameters.keys()


def takes_any(forward: Callable[..., Any]) -> bool:
    """Whether `forward` has a `**kwargs`."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(forward).parameters.values())


def check_names(what: str, kwargs: Mapping[str, Any], refused: frozenset[str]) -> None:
    """Raise `EntryError` if one of `refused` is among `kwargs`, which were given to `what`."""
    if refused.isdisjoint(kwargs):
        return
    name = next(name for name in kwargs if name in refused)
    if name == "adapter_names":
        raise errors.EntryError(
            f"adapter_names is given to {what}, a part of the patched model, which routes nothing itself; call the "
            f"patched model, or route with `with runtime.use_adapters(names):` around the call"
        )
    raise errors.EntryError(f"{name} is given to {what}, and would be ignored; adapters are named by adapter_names=")
