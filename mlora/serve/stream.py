"""Where the events of a request become its tokens: with the caller, on an event loop or not."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from .answers import STOP, Token, Usage
from .request import Event, Request, SequenceState
from .text import Detokenizer, StopStrings


class Reader:
    """Events of one request -> tokens with text, up to a stop string.

    Args:
        tokenizer: None makes no text. `stopped`: called with a sequence whose text has a stop string.
    """

    def __init__(self, request: Request, tokenizer: Any, stopped: Callable[[SequenceState], None]) -> None:
        sampling = request.sampling
        self._include = sampling.include_stop
        self._stopped = stopped
        self._ends = request.ends
        self._texts = [
            None if tokenizer is None else Detokenizer(tokenizer, request.prompt, sampling.skip_special_tokens)
            for _ in range(sampling.n)
        ]
        self._stops = [StopStrings(sampling.stop, sampling.include_stop) for _ in range(sampling.n)]
        self._over = [False] * sampling.n
        self._counts = [0] * sampling.n

    @property
    def over(self) -> bool:
        """Whether every answer has ended."""
        return all(self._over)

    def read(self, event: Event) -> Token | None:
        """Its token; None for one behind the end. Raises the event's error."""
        sequence = event.sequence
        index = sequence.index
        if self._over[index]:
            return None
        if event.error is not None:
            self._over = [True] * len(self._over)
            raise event.error
        detokenizer, stops, reason = self._texts[index], self._stops[index], event.finish_reason
        text = ""
        if detokenizer is not None:
            if event.token is not None and (self._include or event.token not in self._ends):
                text = detokenizer.push(event.token)
            if reason is not None:
                text += detokenizer.rest()
            text = stops.push(text)
            if stops.found:
                if reason is None:
                    self._stopped(sequence)
                reason = STOP
            elif reason is not None:
                text += stops.rest()
        self._over[index] = reason is not None
        self._counts[index] += event.token is not None
        usage = None
        if reason is not None:
            request = sequence.request
            usage = Usage(len(request.prompt), self._counts[index], sequence.cached, request.started - request.came)
        return Token(event.token, text, event.logprob, event.top_logprobs, index, reason, usage)


class Stream:
    """The tokens of a request, for `async for`. One whose loop is left early is cancelled: as soon as nothing refers to
    it, when its task is cancelled as it waits, or with `aclose`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, cancel: Callable[[], None]) -> None:
        self._loop = loop
        self._cancel = cancel
        self._tokens: deque[Token] = deque()
        self._error: Exception | None = None
        self._changed = asyncio.Event()
        self.reader: Reader

    def receive(self, event: Event) -> None:
        """On the event loop."""
        try:
            token = self.reader.read(event)
            if token is not None:
                self._tokens.append(token)
        except Exception as error:
            self._error = error
        self._changed.set()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Token:
        """The next token, of whichever answer.

        Raises:
            MloraError: the request cannot be served: of its adapters, or what befell its step.
        """
        while not self._tokens:
            if self._error is not None:
                raise self._error
            if self.reader.over:
                raise StopAsyncIteration
            self._changed.clear()
            try:
                await self._changed.wait()
            except BaseException:  # the task is cancelled
                self._cancel()
                raise
        return self._tokens.popleft()

    async def aclose(self) -> None:
        """Cancel what has not ended."""
        self._cancel()

    def __del__(self) -> None:
        # The collector may call this in any thread, whatever locks it holds: what takes some has to wait.
        try:
            self._loop.call_soon_threadsafe(self._cancel)
        except RuntimeError:  # the loop is closed
            threading.Thread(target=self._cancel, daemon=True).start()


def on_loop(loop: asyncio.AbstractEventLoop) -> Callable[[Sequence[Event]], None]:
    """What takes events to the receivers of their requests on `loop`."""

    def post(events: Sequence[Event]) -> None:
        loop.call_soon_threadsafe(_receive, events)

    return post


def _receive(events: Sequence[Event]) -> None:
    for event in events:
        if (receive := event.sequence.request.receive) is not None:
            receive(event)
