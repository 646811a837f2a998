"""Packed adapters that `patch(packed_cache=)` keeps on disk, and what they hold for.

An entry's name is made of the bytes of the adapter's files, the options of its loading, the modules of the model, and
the versions of what lowers and packs. In it stands which of the base's weights the lowering read, and what they were.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.same import content
from ..arena.cache import Cache
from ..arena.store import Store
from ..lowering import BaseLinear
from .files import Read
from .info import AdapterInfo, same_tuple
from .registry import Content

_INFO = ("peft_type", "variant", "rank", "ranks", "modules", "errors", "dense", "missing", "unused", "zero", "ignored")

_ROOMS = ("adapters", "lowering", "arena")  # whose code makes a blob of files


class Kept:
    """Args: as the registry's."""

    def __init__(
        self, cache: Cache, store: Store, model: nn.Module, bases: Mapping[str, BaseLinear], indices: Mapping[str, int]
    ) -> None:
        self._cache = cache
        self._store = store
        self._model = model
        self._bases = bases
        self._layout = _layout(model, bases, indices, store)
        self._digests: dict[tuple[str, str], tuple[Any, str]] = {}  # of weights, and of which state

    def find(self, name: str, read: Read, options: Mapping[str, Any]) -> Content | None:
        """What lowering and packing would make of these files; None where it is not there, or not for this base.

        Raises:
            CapacityError: as `Store.pack`.
        """
        entry, store = self._entry(read, options), self._store
        try:
            beside = self._cache.beside(entry)
            if any(self._digest(path, what) != digest for path, what, digest in beside["reads"]):
                return None
            packed = store.fill(
                f"adapter {name!r}", lambda memory: self._cache.read(entry, memory, store.empty_rows, store.dtype)
            )
            told: dict[str, Any] = {key: _tuple(value) for key, value in beside["info"].items()}
        except (OSError, ValueError, KeyError, TypeError):
            return None
        told["modules"] = same_tuple(told["modules"])
        info = AdapterInfo(name=name, source=read.source, bytes=packed.nbytes, location="host", **told)
        return Content(packed, None, info)

    def keep(self, read: Read, options: Mapping[str, Any], made: Content, reads: Iterable[tuple[str, str]]) -> None:
        """Make the entry. `reads`: what the lowering read of the base."""
        info = {key: getattr(made.info, key) for key in _INFO}
        digests = [(path, what, self._digest(path, what)) for path, what in reads]
        self._cache.write(self._entry(read, options), made.packed, {"info": info, "reads": digests})

    def _entry(self, read: Read, options: Mapping[str, Any]) -> str:
        told = json.dumps({key: options[key] for key in sorted(options)}, default=list)
        return hashlib.sha256("\n".join((content(read.found.raw), told, self._layout)).encode()).hexdigest()

    def _digest(self, path: str, what: str) -> str:
        """Of a weight or bias of the base, read once as long as nothing writes to its module."""
        state = _state(self._model, path)
        known = self._digests.get((path, what))
        if known is None or known[0] != state:
            base = self._bases[path]
            tensor = base.weight() if what == "weight" else base.bias()
            known = self._digests[path, what] = state, _of(tensor)
        return known[1]


def _tuple(value: Any) -> Any:
    """Of a list of JSON."""
    return tuple(value) if isinstance(value, list) else value


def _of(tensor: Tensor | None) -> str:
    if tensor is None:
        return ""
    return f"{tuple(tensor.shape)} {content([tensor.contiguous().view(-1).view(torch.uint8)])}"


def _state(model: nn.Module, path: str) -> list[tuple[int, int]]:
    """Changes whenever something writes to the tensors of the module that has, or is, what is at `path`."""
    try:
        module = model.get_submodule(path)
    except AttributeError:  # a parameter of experts
        module = model.get_submodule(path.rpartition(".")[0])
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return [(id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]


def _layout(model: nn.Module, bases: Mapping[str, BaseLinear], indices: Mapping[str, int], store: Store) -> str:
    """Of all that a blob and its rows depend on beside the files, and the base's weights."""
    plain = [field.name for field in fields(BaseLinear) if field.name not in ("weight", "bias", "held")]
    lines = [_code(), *(f"{name} {version(name)}" for name in ("torch", "transformers", "mlora-runtime"))]
    lines += [f"{type(model).__module__}.{type(model).__qualname__}", store.form]
    lines += [f"{indices[path]} {[getattr(base, name) for name in plain]}" for path, base in bases.items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@cache
def _code() -> str:
    """Of the code that reads, lowers and packs."""
    room = Path(__file__).parents[1]
    files = [
        room / "layout.py",
        *sorted(p for name in ("adapters", "lowering", "arena") for p in (room / name).glob("*.py")),
    ]
    found = hashlib.sha256()
    for file in files:
        found.update(file.read_bytes())
    return found.hexdigest()
