"""What a caller asks for becomes a `Request`, checked."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .. import errors
from ..merge import as_merge
from ..routing.entries import Entry, key_of, names_of, resolve_entry
from ..runtime import Runtime
from .admission import Limits, check_tokens
from .drawing import Drawing
from .request import Event, Request, SequenceState
from .sampling import Sampling
from .sizes import Vocabulary, ends, longest, text_config


class Intake:
    """Makes requests that can only fail by their adapters' files, or by the model, from there on.

    Args:
        tokenizer: None where prompts are token ids. `page`: tokens of a block of the cache.
    """

    def __init__(self, runtime: Runtime, vocabulary: Vocabulary, tokenizer: Any, limits: Limits, page: int) -> None:
        self._runtime = runtime
        self._tokenizer = tokenizer
        self._limits = limits
        self._page = page
        config = text_config(runtime.model)
        self._vocabulary = vocabulary
        self._ends = ends(runtime.model)
        self._most = min(limits.tokens, longest(config))
        self._numbers = itertools.count()

    def request(
        self, prompt: Any, entry: Entry, sampling: Sampling | None, post: Callable[[Sequence[Event]], None]
    ) -> Request:
        """See `Engine.generate`, also for what it raises."""
        sampling = Sampling() if sampling is None else sampling
        ids = self._ids(prompt)
        if sampling.stop and self._tokenizer is None:
            raise errors.RequestError("stop has strings, which an engine without a tokenizer cannot look for")
        size = self._size(ids, sampling)
        names = self._names(entry)
        own_ends = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self._ends)
        seed = int.from_bytes(os.urandom(7), "little") if sampling.seed is None else sampling.seed
        request = Request(ids, entry, key_of(entry), names, sampling, own_ends, size, post)
        if not names:  # adapters may bring other tokens
            check_tokens(request, self._vocabulary.tokens, self._vocabulary.scores)
        number = next(self._numbers)
        for index in range(sampling.n):
            drawing = Drawing(sampling, seed + index, ids, own_ends)
            request.sequences.append(SequenceState(request, f"{number}.{index}", index, drawing))
        return request

    def _ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise errors.RequestError("the prompt is text; an engine without a tokenizer takes token ids")
            prompt = self._tokenizer(prompt)["input_ids"]
        ids = prompt.tolist() if hasattr(prompt, "tolist") else prompt
        listed = isinstance(ids, Sequence) and not isinstance(ids, (str, bytes))
        if not listed or not ids or not all(isinstance(token, int) for token in ids):
            raise errors.RequestError(f"the prompt is {prompt!r}; it must be text or a list of token ids, not empty")
        return list(ids)

    def _size(self, ids: Sequence[int], sampling: Sampling) -> int:
        """Tokens of the cache that all answers take at most."""
        length = len(ids) + sampling.max_new_tokens
        if length > self._most:
            raise errors.RequestError(
                f"a prompt of {len(ids)} tokens and max_new_tokens of {sampling.max_new_tokens} make {length}; at most "
                f"{self._most} are served"
            )
        size = min(-(-length // self._page) * self._page, self._limits.tokens) * sampling.n
        if sampling.n > self._limits.running or size > self._limits.tokens:
            raise errors.RequestError(f"n is {sampling.n}; so many answers of {length} tokens do not fit at once")
        return size

    def _names(self, entry: Entry) -> tuple[str, ...]:
        """The adapters of an entry, all of which are known."""
        names = names_of(entry)
        for name in names:
            if self._runtime.adapter(name) is None:
                raise errors.UnknownAdapterError(f"no adapter {name!r} is loaded or registered")
        if isinstance(entry, Mapping) and as_merge(entry) is None:
            resolve_entry(entry, str)  # its weights
        return names
