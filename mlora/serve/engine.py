"""`Engine`: what users hold; requests that come when they come, each with its own adapter, mix or merge."""

from __future__ import annotations

import asyncio
import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from .. import errors
from ..adapters.adapter import Adapter
from ..ops import threads
from ..routing.entries import Entry
from ..routing.files import default_name
from ..routing.info import AdapterInfo
from ..runtime import Runtime
from .admission import Admission, Limits
from .answers import ERROR, Answer, Stats, Token
from .batching import Memory
from .intake import Intake
from .request import Event, Request
from .runner import Runner
from .sampling import Sampling
from .sizes import Vocabulary, default_tokens
from .stream import Reader, Stream, on_loop
from .together import Alone, Lead


class Engine:
    """Serves a patched model to requests that come at any time, by transformers' continuous batching.

        async with mlora.serve.Engine(runtime, tokenizer) as engine:
            async for token in engine.generate("Hello", "sql", mlora.serve.Sampling(temperature=0.7)):
                print(token.text, end="")

    Each answer is what `model.generate` of that request alone gives, whatever else runs: to the token, but where the
    base's own products, which round by the size of the batch, leave two tokens within rounding.

    An engine runs in threads of its own. Its methods may be called from any thread and event loop. `limits` are those
    that it keeps.

    Args:
        runtime: of the patched model, which may be used beside it.
        tokenizer: for prompts and answers as text; without it both are token ids.
        max_running: answers that are generated at once.
        max_waiting: requests that may wait beside them; `max_waiting_per_adapter`: of them, with one entry.
        max_adapters: adapters of requests that run or are about to; default: as many as the device has room for names.
        cache_tokens: room for keys and values, in tokens. A request takes up its prompt and its most new tokens,
            whether it comes to them or not. Default: 1,024 for each of `max_running`, or what a quarter of the free
            memory has room for, but one request of the model's length at least.
        page: tokens of a block of it: prompts that begin alike share whole ones.
        batch_tokens: most tokens of one step. Long prompts are read in pieces of that size.
        share_prefixes: whether requests of one entry share what their prompts have in common.
        ahead: requests whose adapters are fetched while others run.

    Raises:
        ServeError: this transformers is not one that it knows, or there is no room for the cache.
        UnsupportedModelError: on the CPU, a layer does not attend as its kernel does, see `attention.py`.

    Of a model that is split over processes, the first has the engine, and the others `follow`; see there.
    """

    def __init__(
        self,
        runtime: Runtime,
        tokenizer: Any = None,
        *,
        max_running: int = 64,
        max_waiting: int = 1024,
        max_waiting_per_adapter: int = 1024,
        max_adapters: int | None = None,
        cache_tokens: int | None = None,
        page: int = 16,
        batch_tokens: int = 512,
        share_prefixes: bool = True,
        ahead: int = 8,
    ) -> None:
        if runtime.process:
            raise errors.ServeError(
                f"this is process {runtime.process} of those that the model is split over: the engine is in the first, "
                f"and this one has to call mlora.serve.follow(runtime)"
            )
        self._lead = Lead(runtime) if runtime.processes > 1 else None
        self.runtime = runtime
        self.tokenizer = tokenizer
        self._closed = False
        self._homes: weakref.WeakKeyDictionary[Any, Callable[[Sequence[Event]], None]] = weakref.WeakKeyDictionary()
        self._lock = threading.RLock()
        tokens = cache_tokens or default_tokens(runtime.model, max_running)
        memory = runtime.from_first(Memory(tokens, page, batch_tokens, share_prefixes))
        self._runner = Runner(runtime, memory, self._ended, self._broke, self._lock, self._lead)
        limits = Limits(
            max_running,
            self._runner.capacity,
            max_waiting,
            max_waiting_per_adapter,
            runtime.slots if max_adapters is None else max_adapters,
            ahead,
        )
        self.limits = limits
        vocabulary = Vocabulary(runtime.model)
        self._adapters = self._lead or Alone(runtime)
        self._admission = Admission(
            self._adapters, vocabulary, limits, self._runner.start, self._runner.fail, self._lock
        )
        self._intake = Intake(runtime, vocabulary, tokenizer, limits, page)

    # Requests

    def generate(self, prompt: str | Sequence[int], entry: Entry = None, sampling: Sampling | None = None) -> Stream:
        """The tokens of a request as they come, for `async for`; those of several answers (`Sampling.n`) in any order.
        To leave the loop cancels it.

        Args:
            prompt: text, which the tokenizer encodes with its special tokens, or token ids.
            entry: an adapter's name, None for the base, a mapping name -> weight, or a `Merge`; see `Runtime`.
            sampling: default: greedy, at most 64 tokens.

        Raises:
            RequestError: the prompt, a limit or an option is none that can be served.
            UnknownAdapterError, EntryError, MergeError: the entry names no adapter, or is none.
            Overloaded: too many requests wait.
            ServeError: the engine is closed, or broken.
        The loop raises what befalls the request later: an adapter that cannot be read, a step that failed.
        """
        loop = asyncio.get_running_loop()
        if loop not in self._homes:
            self._homes[loop] = on_loop(loop)
        request = self._intake.request(prompt, entry, sampling, self._homes[loop])
        stream = Stream(loop, partial(self._cancel, request))
        stream.reader = self._reader(request)
        request.receive = _weak(stream)
        self._submit(request)
        return stream

    def generate_many(self, requests: Iterable[tuple[Any, ...]], sampling: Sampling | None = None) -> Iterator[Answer]:
        """The answers of many requests, each when it is done, in any order. One that fails is an answer with an error.

        Args:
            requests: (prompt, entry), or (prompt, entry, sampling), as `generate` takes them; read as there is room.
            sampling: of those that have none.
        """
        events: queue.SimpleQueue[Sequence[Event]] = queue.SimpleQueue()
        readers: dict[Request, tuple[int, Reader, list[list[Token]]]] = {}
        numbered = iter(enumerate(requests))
        held: tuple[int, tuple[Any, ...]] | None = next(numbered, None)
        # Prompts that are here already are read in one step; of an iterator nobody knows when the next one comes.
        together = self._runner.together if isinstance(requests, Sequence) else nullcontext
        try:
            while held is not None or readers:
                refused: list[Answer] = []
                room = True
                with together():
                    while held is not None and room and events.empty():
                        number, (prompt, entry, *own) = held
                        try:
                            request = self._intake.request(prompt, entry, own[0] if own else sampling, events.put)
                            reader = self._reader(request)
                            self._submit(request)
                        except errors.Overloaded:
                            if not readers:
                                raise
                            room = False
                            continue
                        except errors.MloraError as error:
                            refused.append(Answer(number, 0, "", (), ERROR, None, error))
                        else:
                            readers[request] = number, reader, [[] for _ in request.sequences]
                        held = next(numbered, None)
                yield from refused
                for event in events.get() if readers else ():
                    if (request := event.sequence.request) in readers:
                        yield from _answers(event, *readers[request])
                        if readers[request][1].over:
                            del readers[request]
        finally:
            for request in readers:
                self._cancel(request)

    # Adapters

    async def load_adapter(
        self, path_or_id: str | Path, adapter_name: str | None = None, **options: Any
    ) -> AdapterInfo:
        """`Runtime.load_adapter`, off the event loop, under traffic. What is asked of one name, here and by the next
        two, is done in the order in which it is asked."""
        name = adapter_name if adapter_name is not None else default_name(path_or_id, options.get("subfolder"))
        return await asyncio.wrap_future(self._adapters.ask("load", name, path_or_id, options))

    async def replace_adapter(self, adapter_name: str, source: str | Path | Adapter, **options: Any) -> AdapterInfo:
        """`Runtime.replace_adapter`, off the event loop: requests that run, or whose adapters are pinned already,
        finish with the old content, others get the new."""
        return await asyncio.wrap_future(self._adapters.ask("replace", adapter_name, source, options))

    async def delete_adapter(self, adapter_name: str) -> None:
        """The name is free at once; requests that run finish. Those that wait for it fail.

        Raises:
            UnknownAdapterError: there is none of that name.
        """
        await asyncio.wrap_future(self._adapters.ask("delete", adapter_name))

    def register(self, adapter_name: str, path_or_id: str | Path, **options: Any) -> None:
        """`Runtime.register_adapter`: it is read when a request first asks for it."""
        self.runtime.register_adapter(path_or_id, adapter_name, **options)

    def source(self, adapter_name: str) -> str | None:
        """Where an adapter comes from that is loaded or registered: a folder, a hub id or "memory"; None if there is
        none of that name."""
        info = self.runtime.adapter(adapter_name)
        return None if info is None else info.source

    def sources(self) -> dict[str, str]:
        """`source` of all that requests may name. Merges that requests made are not among them."""
        return self.runtime.sources

    # Its life

    def stats(self) -> Stats:
        """As of now."""
        admission, runner, host = self._admission, self._runner, self.runtime.host
        with self._lock:
            counts = dict(runner.counts)
            return Stats(
                admission.running, admission.waiting, admission.adapters, host.registered, host.used, host.loads,
                host.drops, runner.steps, counts.pop("tokens", 0), runner.restarts, counts, runner.alive,
                runner.capacity, admission.tokens,
            )  # fmt: skip

    def close(self) -> None:
        """Cancel what waits and runs, and end the threads. Nothing can be asked for after it."""
        with self._lock:
            self._closed = True
            waiting = self._admission.pending()
        for request in waiting:
            self._cancel(request)
        self._runner.close()
        self._admission.close()
        self._adapters.close()

    @property
    def broken(self) -> Exception | None:
        """Why it serves nothing any more; None as long as it does."""
        return self._runner.broken

    def join(self) -> None:
        """Until it is closed, or broken."""
        self._runner.join()

    async def __aenter__(self) -> Engine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _cancel(self, request: Request) -> None:
        """End a request, whether it waits or runs; nothing happens if it has ended."""
        self._admission.withdraw(request)
        self._runner.cancel(request)

    def _ended(self, request: Request) -> None:
        self._admission.ended(request)

    def _broke(self, error: Exception) -> None:
        for request in self._admission.pending():
            if self._admission.withdraw(request):
                self._runner.fail(request, error)

    def _reader(self, request: Request) -> Reader:
        return Reader(request, self.tokenizer, self._runner.stop)

    def _submit(self, request: Request) -> None:
        threads.let_go()  # who asks has computed, and waits now
        with self._lock:
            if self._closed or self._runner.broken is not None:
                raise errors.ServeError("the engine is closed") from self._runner.broken
            self._admission.submit(request)


def _weak(stream: Stream) -> Callable[[Event], None]:
    """Its `receive`, which does not keep it alive."""
    method = weakref.WeakMethod(stream.receive)

    def receive(event: Event) -> None:
        if (found := method()) is not None:
            found(event)

    return receive


def _answers(event: Event, number: int, reader: Reader, tokens: list[list[Token]]) -> Iterator[Answer]:
    """The answers that end with an event. `tokens`: of each answer of the request, so far."""
    try:
        token = reader.read(event)
    except Exception as error:
        for index, own in enumerate(tokens):
            if not own or own[-1].finish_reason is None:
                yield Answer(number, index, "".join(one.text for one in own), own, ERROR, None, error)
        return
    if token is not None:
        own = tokens[token.index]
        own.append(token)
        if token.finish_reason is not None:
            text = "".join(one.text for one in own)
            yield Answer(number, token.index, text, own, token.finish_reason, token.usage)
