"""The names that requests may use, and what in a request becomes an entry."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote
from weakref import WeakValueDictionary

from ... import errors
from ...merge import Merge, as_merge
from ...routing.entries import BASE, Entry, names_of
from ..engine import Engine
from .problems import INVALID, NOT_FOUND, Problem
from .roots import HubIds, Roots

_LONGEST = 1000  # letters of a header: merges have long labels


class Names:
    """The base's name and the adapters': those of the engine, and those that may be registered when asked for.

    Args:
        model: what the base is called. `roots`, `hub_ids`: see `Roots` and `HubIds`.

    Raises:
        ValueError: an adapter is called so, too.
    """

    def __init__(self, engine: Engine, model: str, roots: Sequence[str | Path], hub_ids: Sequence[str]) -> None:
        self.base = model
        self._engine = engine
        self._roots = Roots(roots)
        self._hub = HubIds(hub_ids)
        if model in self:
            raise ValueError(f"the base is called {model!r}, and so is an adapter; give one of them another name")
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # kept by who holds or awaits them

    def known(self) -> dict[str, str]:
        """Name -> where it comes from."""
        return self._engine.sources()

    def __contains__(self, name: str) -> bool:
        return self._engine.source(name) is not None

    def source(self, name: str) -> str | None:
        """Where an adapter comes from, None if it is unknown."""
        return self._engine.source(name)

    def revision(self, name: str) -> str | None:
        """Of an adapter on the hub that may be fetched when asked for, None for the newest."""
        return self._hub.revision(name)

    def lock(self, name: str) -> asyncio.Lock:
        """Held by who loads or unloads an adapter of that name."""
        return self._locks.setdefault(name, asyncio.Lock())

    async def of_model(self, model: str, adapter: Any = None, merged: Mapping[str, Any] | None = None) -> Entry:
        """The entry of OpenAI's `model`, and of the fields `adapter` or `merged_adapters` beside it.

        Args:
            model: the base's name or "" for the base, an adapter's name, "base:name" (SGLang), or JSON of a mapping
                name -> weight or of a merge. `adapter`: an entry in itself. `merged`: LoRAX's merge.

        Raises:
            Problem: a name is unknown, or it says two things.
        """
        given: Any = None
        if model.lstrip().startswith("{"):
            try:
                given = json.loads(model)
            except (ValueError, RecursionError) as error:
                raise Problem(INVALID, f"model is no JSON object: {error}", "model") from None
        elif model not in ("", self.base):
            given = model.removeprefix(f"{self.base}:") if model not in self else model
        others = [value for value in (adapter, merge_of(merged)) if value is not None]
        if len(others) + (given is not None) > 1:
            raise Problem(INVALID, "model, adapter and merged_adapters name adapters; one of them may", "adapter")
        return await self.entry(others[0] if others else given)

    async def entry(self, entry: Any, source: str | None = None) -> Entry:
        """`entry` with all names known, and each in its one spelling.

        Args:
            source: LoRAX's `adapter_source`, "hub" or "local", for names that are not known yet; None for either.
        """
        try:
            names = names_of(entry)
            known = {name: await self._know(name, source) for name in names}
        except (errors.EntryError, errors.MergeError) as error:
            raise Problem(INVALID, str(error), "model") from None
        if all(name == own for name, own in known.items()):
            return entry
        return _renamed(entry, known)

    async def _know(self, name: Any, source: str | None) -> str:
        if not isinstance(name, str):
            raise Problem(INVALID, f"an adapter's name is {name!r}; it must be a string", "model")
        if name in self:
            return name
        found: tuple[str, Any] | None = None
        options: dict[str, Any] = {}
        if source in (None, "local"):
            found = await asyncio.to_thread(self._roots.find, name)
        if found is None and source in (None, "hub") and name in self._hub:
            found, options = (name, name), {"revision": self._hub.revision(name)}
        if found is None:
            raise Problem(NOT_FOUND, f"there is no model or adapter {name!r}", "model", "model_not_found")
        with suppress(errors.DuplicateAdapterError):  # another request was first
            self._engine.register(*found, **options)
        return found[0]


def merge_of(merged: Mapping[str, Any] | None) -> Merge | None:
    """LoRAX's `merged_adapters`. Its density of 0 stands for none, and is none of the linear strategy."""
    if merged is None:
        return None
    values = {key: value for key, value in merged.items() if value is not None}
    if values.get("merge_strategy", "linear") == "linear":
        values.pop("density", None)
    try:
        return Merge.from_dict(values)
    except errors.MergeError as error:
        raise Problem(INVALID, f"merged_adapters: {error}", "merged_adapters") from None


def _renamed(entry: Any, names: Mapping[str, str]) -> Entry:
    how = as_merge(entry)
    if how is not None:
        values = {name: getattr(how, name) for name in how.__dataclass_fields__}
        return Merge(**{**values, "adapters": tuple(names[name] for name in how.adapters)})
    if isinstance(entry, Mapping):
        return {names[name]: weight for name, weight in entry.items()}
    return names[entry]


def label_of(entry: Entry) -> str:
    """For logs and headers."""
    if entry is None or entry == BASE:
        return ""
    how = as_merge(entry)
    if how is not None:
        return how.label
    return entry if isinstance(entry, str) else json.dumps(entry)


def header_of(entry: Entry) -> str:
    """`label_of`, in letters that a header can have, and not too many."""
    return quote(label_of(entry)[:_LONGEST], safe=" !#$&'()*+,/:;=?@[]{}\"|^`<>")
