"""Texts and chats -> tokens, in the template of the model or of the adapter that brings its own."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from ... import errors
from ...adapters.sources import local_path
from ...routing.entries import Entry, names_of
from ..tokenizers import files_of, own_tokenizer, serving
from .names import Names
from .problems import ADAPTER, INVALID, Problem
from .roots import is_hub_id

_LONG = 2000  # letters, from which on a text is encoded off the event loop
_WAY_OUT = "a server with --base-tokenizer uses the base's for every request"

_KEPT = 256  # entries

T = TypeVar("T")


class Prompts:
    """Encodes prompts, by one thread beside the event loop's where it takes long.

    Args:
        tokenizer: of the base. `base_tokenizer`: whether it is used for all adapters, whatever they bring.
    """

    def __init__(self, tokenizer: Any, names: Names, base_tokenizer: bool) -> None:
        self._base = tokenizer
        self._names = names
        self._base_only = base_tokenizer
        self._own: dict[str, tuple[str | None, Any]] = {}  # adapter -> its source, and the tokenizer that it brings
        # (adapter, which tokenizer) of an entry -> the one for it, and what keeps their numbers
        self._chosen: dict[tuple[tuple[str, int], ...], tuple[Any, Any]] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="mlora-prompts")
        self.special: frozenset[int] = frozenset(tokenizer.all_special_ids)
        taken = inspect.signature(type(tokenizer).apply_chat_template).parameters
        self._reserved = frozenset({*taken, "messages"})

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def forget(self, name: str) -> None:
        """Of an adapter that was deleted or replaced."""
        self._own.pop(name, None)

    async def check(self, entry: Entry) -> Any:
        """The tokenizer that brings the entry's chat template.

        Raises:
            Problem: its adapters bring tokenizers with other tokens than the base's, or different templates.
        """
        if entry is None or self._base_only:
            return self._base
        names = names_of(entry)
        for name in names:
            source = self._names.source(name)
            if name not in self._own or self._own[name][0] != source:
                self._own[name] = source, await self._off_loop(self._read, name, source)
        own = {name: self._own[name][1] for name in names if name in self._own and self._own[name][1] is not None}
        if not own:
            return self._base
        key = tuple((name, id(own.get(name))) for name in names)
        if key not in self._chosen:
            if len(self._chosen) >= _KEPT:
                self._chosen.clear()
            self._chosen[key] = await self._off_loop(self._choose, names, own), own
        return self._chosen[key][0]

    def _choose(self, names: Sequence[str], own: Mapping[str, Any]) -> Any:
        """Of an entry whose adapters bring some."""
        try:
            chosen = serving(names, self._base, own, way_out=_WAY_OUT)
            serving(["base", "adapter"], self._base, {"adapter": chosen}, raw=True)
            return chosen
        except errors.AdapterError as error:
            alone = f"adapter {names[0]!r} has a tokenizer of its own; {_WAY_OUT}"
            raise Problem(ADAPTER, alone if len(names) == 1 else str(error), "model") from None

    def _read(self, name: str, source: str | None) -> Any:
        """The tokenizer that an adapter brings, if it is none of the base's."""
        if source is None or not (is_hub_id(source) or "://" in source or _is_path(source)):  # of one in memory
            return None
        revision = self._names.revision(name)
        try:
            files = files_of(name, source, local_path(source, revision, None), revision=revision)
            return own_tokenizer(name, files, self._base)
        except Exception as error:  # the hub client's errors have no common base
            raise Problem(ADAPTER, f"the tokenizer of adapter {name!r} cannot be read: {error}", "model") from None

    async def encode(self, text: str, special: bool = True) -> list[int]:
        """The tokens of a text. `special`: with those that the tokenizer puts around it."""

        def work() -> list[int]:
            return list(self._base(text, add_special_tokens=special)["input_ids"])

        return work() if len(text) < _LONG else await self._off_loop(work)

    async def places(self, text: str, special: bool) -> tuple[list[int], list[tuple[int | None, int | None]]]:
        """The tokens of a text, and where in it each begins and ends; None where the tokenizer does not say."""

        def work() -> Any:
            fast = bool(self._base.is_fast)
            return self._base(text, add_special_tokens=special, return_offsets_mapping=fast)

        found = await self._off_loop(work)
        ids = list(found["input_ids"])
        return ids, list(found.get("offset_mapping") or [(None, None)] * len(ids))

    async def chat(
        self, messages: Sequence[Mapping[str, Any]], tokenizer: Any, options: Mapping[str, Any], **own: Any
    ) -> list[int]:
        """The tokens of a chat.

        Args:
            tokenizer: of `check`. `options`: of the request for the template. `own`: of `apply_chat_template`.

        Raises:
            Problem: there is no template, or what it refuses.
        """
        if not tokenizer.chat_template:
            raise Problem(INVALID, "the model has no chat template; /v1/completions takes prompts as they are")
        if reserved := sorted(self._reserved & options.keys()):
            raise Problem(INVALID, f"chat_template_kwargs.{reserved[0]} is not served", "chat_template_kwargs")

        def work() -> list[int]:
            given = {"add_generation_prompt": True, **own}
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, **given, **options)
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        try:
            return await self._off_loop(work)
        except Exception as error:  # templates raise what they like
            raise Problem(INVALID, f"the chat template refuses the messages: {error}", "messages") from None

    async def _off_loop(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)


def _is_path(source: str) -> bool:
    try:
        return Path(source).exists()
    except OSError:  # longer than paths may be, as what merges are called
        return False
