"""The classes that a patched model's root and its parts get, and the way back to what they were."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, cast

import torch
from torch import nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback

from . import errors
from .layers import (
    LoraLayer,
    gated,
    is_gated,
    refuse_copy,
    refuse_move,
    refuse_training,
    restore_class,
    swap_class,
    swap_forward,
    with_kernels,
)
from .lowering import BaseLinear
from .ops.checks import check_rows, fetch_plan
from .plan.call import Call
from .plan.shared import Shared
from .routing.fallbacks import Fallbacks
from .routing.loops import LOOPS, check_kept, is_whisper, refuse
from .routing.names import check_names, guard_pipelines, takes_any, unrouted
from .routing.router import Router

_PACKED = (
    "it packs many prompts into one row, in a thread of its own; choose one entry for all with set_adapter, or call "
    "generate"
)
_fallbacks: ContextVar[Fallbacks | None] = ContextVar("fallbacks", default=None)


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
            _refuse_compiled(adapter_names)
            return super().__call__(*args, **kwargs)
        with self.mlora._router.forward(adapter_names, Call(args, kwargs)):
            return super().__call__(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        own = self.__dict__.get("_mlora_generate")
        check_names("generate", kwargs, unrouted(type(self).forward))
        for config in _configs(self, args, kwargs):
            check_names(
                "generate in a GenerationConfig", getattr(config, "__dict__", {}), _refused_in(type(self).forward)
            )
        with self.mlora._router.generation(adapter_names, Call(args, kwargs), _expansion(self, args, kwargs)):
            if _is_mixed(self.mlora._shared):
                if own is not None:
                    refuse(self, f"the one that was put on the model ({own!r})")
                self._check_loops(kwargs)
            return (own or super().generate)(*args, **kwargs)  # type: ignore[misc]

    def _check_loops(self, kwargs: Mapping[str, Any]) -> None:
        """Raise unless the rows of a `generate` with `kwargs` can be followed."""
        check_kept(self, type(self).__bases__[1], kwargs)

    def load_custom_generate(self, *args: Any, **kwargs: Any) -> Any:
        """What transformers calls for code that decodes in place of its own."""
        if _is_mixed(self.mlora._shared):
            refuse(self, f"code that is loaded for it ({', '.join(map(repr, args))})")
        return super().load_custom_generate(*args, **kwargs)  # type: ignore[misc]

    def generate_batch(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        if adapter_names is not None:
            raise errors.EntryError(f"adapter_names is given to generate_batch: {_PACKED}")
        return super().generate_batch(*args, **kwargs)  # type: ignore[misc]

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        if self.mlora._shared.local.plan is not None:
            raise errors.EntryError(f"use_adapters is open around continuous batching: {_PACKED}")
        return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        refuse_move(self, fn, self.mlora._shared.moves)
        return super()._apply(fn, recurse)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_copy()


class PatchedWhisper(PatchedModel):
    """Of a Whisper, whose `generate` drops rows, and decodes some again."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        rows = _fallbacks.get()
        if rows is not None and rows.segment is not None and kwargs.get("input_features") is rows.segment:
            with rows.whole():
                return super().__call__(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def _check_loops(self, kwargs: Mapping[str, Any]) -> None:
        check_kept(self, type(self).__bases__[1], kwargs, [name for name in LOOPS if name != "generate"])

    def generate_with_fallback(self, *args: Any, **kwargs: Any) -> Any:
        """Decodes a segment of the rows `batch_idx_map`."""
        own: Any = super()
        shared = self.mlora._shared
        if not _is_mixed(shared):
            return own.generate_with_fallback(*args, **kwargs)
        entries, config = shared.local.entries, kwargs["generation_config"]
        repeats = len(kwargs["seek"]) // len(entries)  # of each audio, for the sequences that are returned
        mine = [entries[index // repeats] for index in kwargs["batch_idx_map"]]
        least = kwargs["batch_size"] if config.cache_implementation == "static" else 0
        beams = config.num_beams or 1
        with Fallbacks(self.mlora._router, mine, beams, least, kwargs["segment_input"]) as rows:
            token = _fallbacks.set(rows)
            try:
                return own.generate_with_fallback(*args, **kwargs)
            finally:
                _fallbacks.reset(token)

    def _need_fallback(self, *args: Any, **kwargs: Any) -> Any:
        """Asked of each row that was decoded, in order: whether it is decoded again, and whether it is silence."""
        answer = super()._need_fallback(*args, **kwargs)  # type: ignore[misc]
        if (rows := _fallbacks.get()) is not None:
            rows.told(bool(answer[0]))
        return answer


class Part(nn.Module):
    """Mixed in before the class of a module inside the model that takes any keyword: one that names adapters would go
    astray there."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_copy()


class Generator(Part):
    """A part that generates."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        check_names(f"generate of {type(self).__name__}", kwargs, _refused_in(type(self).forward))
        if _is_mixed(self.__dict__["_mlora_shared"]):
            check_kept(self, type(self).__bases__[1], kwargs)
        return super().generate(*args, **kwargs)  # type: ignore[misc]


class Gated(Part):
    """An MLP whose activation and product are computed in one pass."""


def mix_in(model: nn.Module, runtime: Routed) -> None:
    """Give the root and its parts their classes; its layers have theirs already."""
    guard_pipelines()
    for module in ancestors(model, runtime.bases):
        if not isinstance(module, (LoraLayer, Part)) and (takes_any(type(module).forward) or _generates(module)):
            _swap(module, Generator if _generates(module) else Part, _guarding)
            module.__dict__["_mlora_shared"] = runtime._shared
        elif runtime._shared.fused and module is not model and is_gated(module):
            _swap(module, Gated, gated)
    _swap(model, PatchedWhisper if is_whisper(type(model)) else PatchedModel, _routing)
    model.__dict__["mlora"] = runtime
    if "generate" in model.__dict__:  # code that decodes in place of the class's
        model.__dict__["_mlora_generate"] = model.__dict__.pop("generate")


def _generates(module: nn.Module) -> bool:
    return callable(getattr(type(module), "generate", None))


def _swap(module: nn.Module, mixin: type, forward_over: Callable[[Any], Callable[..., Any]]) -> None:
    old = type(module).forward
    swap_class(module, mixin, forward_over)
    swap_forward(module, old, type(module).forward)


def _routing(cls: Any) -> Callable[..., Any]:
    """The root's forward. A call comes here with what `__call__` has routed already; names are given to it where it is
    called by itself, or by what got hold of the model's call before it was patched."""
    own, refused = cls.forward, unrouted(cls.forward)

    @functools.wraps(own)  # transformers looks at the signature
    def forward(self: PatchedModel, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        check_names(cls.__name__, kwargs, refused)
        if adapter_names is not None:
            _refuse_compiled(adapter_names)
            with self.mlora._router.forward(adapter_names, Call(args, kwargs)):
                return own(self, *args, **kwargs)
        shared = self.mlora._shared
        if shared.training is not None and torch.is_grad_enabled() and _in_compiler():
            refuse_training(cls.__name__)
        if torch.compiler.is_compiling():
            for words in shared.words:
                fetch_plan(words, shared.header, shared.number)
            if shape := Call(args, kwargs).shape:
                check_rows(shared.words[0], shape[0])
        elif not shared.active.get().counted:
            self.mlora._router.check_rows(Call(args, kwargs))
        return own(self, *args, **kwargs)

    return forward


def _guarding(cls: Any) -> Callable[..., Any]:
    """A part's forward."""
    own, refused = cls.forward, _refused_in(cls.forward)
    by_fused = {True: with_kernels(own), "always": with_kernels(own, attention=True)}

    @functools.wraps(own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        check_names(cls.__name__, kwargs, refused)
        if not torch.compiler.is_compiling():
            return (by_fused.get(self.__dict__["_mlora_shared"].fused) or own)(self, *args, **kwargs)
        return own(self, *args, **kwargs)

    return forward


def _refused_in(forward: Callable[..., Any]) -> frozenset[str]:
    return unrouted(forward) | {"adapter_names"}


def _refuse_compiled(adapter_names: Any) -> None:
    """Raise for names in code that is compiled, or would be: what raises while it is compiled is run as it is."""
    if adapter_names is not None and _in_compiler():
        raise errors.EntryError(
            "adapter_names= cannot be given inside torch.compile, where every new list of names would be a new graph; "
            "route with `with runtime.use_adapters(names):` around the compiled call"
        )


def _in_compiler() -> bool:
    return torch.compiler.is_compiling() or get_eval_frame_callback() is not None


def _is_mixed(shared: Shared) -> bool:
    """Whether several entries are routed that differ."""
    plan = shared.local.plan
    return plan is not None and not plan.uniform


def _expansion(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many times `generate` repeats each row: for beams, or for several returned sequences.

    As in transformers, an argument counts before the given config, and that before the model's own.
    """
    configs = _configs(model, args, kwargs)

    def setting(name: str) -> int:
        values = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
        return next((int(value) for value in values if value is not None), 1)

    return max(setting("num_beams"), setting("num_return_sequences"))


def _configs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """What a `generate` is given as its config, and the model's own."""
    given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
    return given, getattr(model, "generation_config", None)


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
            outer, mixin = module._mlora.outer, cast(Any, type(module)).__bases__[0]
            del module.__dict__["_mlora"]
            restore_class(module)
            swap_forward(module, mixin.forward, type(module).forward)
            if outer is not None:
                module.__dict__["forward"] = outer
        elif isinstance(module, (Part, PatchedModel)):
            guard = cast(Any, type(module)).forward
            restore_class(module)
            swap_forward(module, guard, type(module).forward)
            module.__dict__.pop("_mlora_shared", None)
    for module in ancestors(model, model.mlora.bases):
        module.__dict__.pop("_apply", None)
    if (own := model.__dict__.pop("_mlora_generate", None)) is not None:
        model.__dict__["generate"] = own
    del model.__dict__["mlora"]
    return model


def ancestors(model: nn.Module, paths: Iterable[str]) -> list[nn.Module]:
    """The modules between `model` and its layers."""
    names = {path[:end] for path in paths for end, letter in enumerate(path) if letter == "."}
    return [module for name, module in model.named_modules(remove_duplicate=False) if name in names]
