"""Tokens on their way to a client, who may go away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ... import errors
from ...routing.entries import Entry, names_of
from ..answers import CANCELLED, Token
from ..sampling import Sampling
from ..stream import Stream
from .metrics import Followed
from .problems import UNAVAILABLE, Problem, problem_of
from .server import Server

T = TypeVar("T")


class Gone(Exception):
    """The client has closed its connection."""


class Answers:
    """The tokens of an HTTP request's prompts, as they come: answer i of prompt p has the index p * n + i.

        async with Answers(server, asked) as answers:
            answers.submit(prompts, entry, samplings)
            async for index, token in answers: ...

    To leave the block cancels what has not ended. `asked`: as of `problem_of`.
    """

    def __init__(self, server: Server, asked: Mapping[str, str]) -> None:
        self._server = server
        self._asked = asked
        self._n = 1
        self._streams: list[Stream] = []
        self._tasks: list[asyncio.Task[None]] = []
        self.followed: list[Followed] = []

    async def __aenter__(self) -> Answers:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        for stream in self._streams:
            await stream.aclose()
        for one in self.followed:
            one.end()

    def submit(self, prompts: Sequence[Sequence[int]], entry: Entry, samplings: Sequence[Sampling]) -> None:
        """Ask for all of them: token ids under one entry, each with its own sampling, whose `n` are the same.

        Raises:
            Problem: the engine refuses one of them.
        """
        if self._server.draining:
            raise Problem(UNAVAILABLE, "the server is shutting down", retry_after=1.0)
        self._n = samplings[0].n
        names = names_of(entry)
        try:
            for prompt, sampling in zip(prompts, samplings, strict=True):
                self._streams.append(self._server.engine.generate(prompt, entry, sampling))
                self.followed.append(self._server.metrics.follow(names))
        except errors.ServeError as error:
            raise Problem(UNAVAILABLE, str(error), retry_after=5.0) from error
        except errors.MloraError as error:
            raise problem_of(error, self._asked) from error

    async def __aiter__(self) -> AsyncIterator[tuple[int, Token]]:
        """Raises Problem: of what befell one of them."""
        try:
            if len(self._streams) == 1:
                async for token in self._streams[0]:
                    self._see(0, token)
                    yield token.index, token
                return
            queue: asyncio.Queue[tuple[int, Token] | Exception | None] = asyncio.Queue()
            self._tasks = [asyncio.create_task(self._pass_on(number, queue)) for number in range(len(self._streams))]
            left = len(self._tasks)
            while left:
                found = await queue.get()
                if isinstance(found, Exception):
                    raise found
                if found is None:
                    left -= 1
                else:
                    yield found
        except errors.MloraError as error:
            raise problem_of(error, self._asked) from error

    async def _pass_on(self, number: int, queue: asyncio.Queue[Any]) -> None:
        try:
            async for token in self._streams[number]:
                self._see(number, token)
                queue.put_nowait((number * self._n + token.index, token))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    def _see(self, number: int, token: Token) -> None:
        if token.finish_reason == CANCELLED:
            raise Problem(UNAVAILABLE, "the server is shutting down", retry_after=1.0)
        self.followed[number].token(token)


async def or_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes away.

    Raises:
        Gone: it has.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Events(Response):
    """Server-sent events; the client's going away ends them within the step.

    Args:
        events: whole ones, as they are sent. They are closed in any case.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], headers: Mapping[str, str]) -> None:
        self._events = events
        own = {"cache-control": "no-cache", "x-accel-buffering": "no", **headers}
        super().__init__(None, 200, own)
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        write = asyncio.ensure_future(self._write(send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait((write, gone), return_when=asyncio.FIRST_COMPLETED)
            if not write.done():
                raise Gone
            await write
        finally:
            gone.cancel()
            if not write.done():
                write.cancel()
                await asyncio.wait((write,))

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def begun(request: Request, events: AsyncIterator[str]) -> AsyncIterator[str]:
    """`events`, of which the first is there: what goes wrong before it can still be told by the status."""
    first = await or_gone(request, anext(events, ""))

    async def all_of_them() -> AsyncIterator[str]:
        yield first
        async for event in events:
            yield event

    return all_of_them()
