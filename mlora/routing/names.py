"""Keywords that name adapters: what takes them, and what must not swallow them in a `**kwargs`."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
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


_PIPELINES = "transformers.pipelines.base"


@functools.cache
def guard_pipelines() -> None:
    """Wrap transformers' pipelines, once: most give keywords that they do not know to a tokenizer, or to nothing. They
    are not imported for it, which takes a second: if they are not there yet, when somebody imports them."""
    if _PIPELINES in sys.modules:
        _guard(sys.modules[_PIPELINES])
    else:
        sys.meta_path.insert(0, _AtImport())


class _AtImport(MetaPathFinder):
    """Finds the pipelines' module as others do, and guards it when it has run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _PIPELINES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            run = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _guard(module)

            loader.exec_module = exec_module
        return spec


def _guard(module: Any) -> None:
    pipeline = module.Pipeline
    pipeline.__init__, pipeline.__call__ = _checking(pipeline.__init__), _checking(pipeline.__call__)


def _checking(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = {name: value for name, value in kwargs.items() if name in _OTHERS or name == "adapter_names"}
        model = kwargs.get("model", args[0] if args else None) if method.__name__ == "__init__" else self.model
        if names and "mlora" in vars(model):
            own = inspect.signature(self._sanitize_parameters).parameters
            check_names(type(self).__name__, names, _OTHERS - own.keys())
            _, forward, _ = self._sanitize_parameters(**names)
            if "adapter_names" in names and "adapter_names" not in {**forward, **forward.get("generate_kwargs", {})}:
                raise errors.EntryError(
                    f"adapter_names is given to {type(self).__name__}, which does not hand it to its model; route with "
                    f"`with runtime.use_adapters(entry):` around the call"
                )
        return method(self, *args, **kwargs)

    return checked


def check_names(what: str, kwargs: Mapping[str, Any], refused: frozenset[str]) -> None:
    """Raise `EntryError` if one of `refused` is among `kwargs`, which were given to `what`."""
    if refused.isdisjoint(kwargs):
        return
    name = next(name for name in kwargs if name in refused)
    if name == "adapter_names":
        raise errors.EntryError(
            f"adapter_names is given to {what}, which routes nothing itself; give it to the patched model's call or "
            f"generate, or route with `with runtime.use_adapters(names):` around the call"
        )
    raise errors.EntryError(f"{name} is given to {what}, and would be ignored; adapters are named by adapter_names=")
