"""From a request that has come to one whose adapters are on the device and that may run."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from .. import errors
from .queue import Full, Queue
from .request import DONE, PREPARING, READY, RUNNING, WAITING, Request
from .sizes import Vocabulary
from .together import Alone, Lead


@dataclass(frozen=True)
class Limits:
    """How much there may be at once.

    Args:
        running: answers that are being generated. `tokens`: what they may take of the cache together.
        waiting: requests that wait. `waiting_per_entry`: of them, with one entry.
        adapters: adapters of requests that run or are about to.
        ahead: requests whose adapters are fetched while they wait for room.
        patience: a request that does not fit is passed over so often by others.
    """

    running: int
    tokens: int
    waiting: int
    waiting_per_entry: int
    adapters: int
    ahead: int
    patience: int = 64


class Admission:
    """Requests wait in a `Queue`. The first `Limits.ahead` of them beyond those that run are prepared: their adapters
    are prefetched, and pinned on the device. What is prepared starts when there is room.

    Args:
        adapters: fetches and pins them.
        start: called with a request that may run, under `lock`. `fail`: with one that cannot, and the error.
        lock: reentrant; guards all of this. It is held while adapters that are on the device are pinned, never while
            files are read.
    """

    def __init__(
        self,
        adapters: Alone | Lead,
        vocabulary: Vocabulary,
        limits: Limits,
        start: Callable[[Request], None],
        fail: Callable[[Request, Exception], None],
        lock: threading.RLock,
    ) -> None:
        self._adapters = adapters
        self._vocabulary = vocabulary
        self.limits = limits
        self._start = start
        self._fail = fail
        self._lock = lock
        self._queue: Queue[Request] = Queue(limits.waiting, limits.waiting_per_entry, limits.patience)
        self._pending: dict[Request, None] = {}  # those that came and do not run yet
        self._preparing = 0  # of them
        self._ready: deque[Request] = deque()
        self._flights: dict[Any, list[Request]] = {}  # those that wait until the adapters of their entry are read
        self._pinned: Counter[Any] = Counter()  # keys of requests that have pins, or are being prepared
        self._names: Counter[str] = Counter()  # their adapters
        self._blocked: set[Any] = set()  # keys whose adapters had no room on the device, until something is released
        self.running = self.tokens = 0  # answers, and what they take of the cache
        self._closed = False
        self._ends: deque[float] = deque(maxlen=64)  # when the last requests ended

    @property
    def waiting(self) -> int:
        """Requests that came and do not run yet."""
        return len(self._pending)

    @property
    def adapters(self) -> int:
        """Adapters of requests that run or are about to."""
        return len(self._names)

    def submit(self, request: Request) -> None:
        """Raises `Overloaded`."""
        with self._lock:
            try:
                self._queue.put(request)
            except Full:
                limits = self.limits
                raise errors.Overloaded(
                    f"{len(self._queue)} requests wait; at most {limits.waiting} may, and {limits.waiting_per_entry} "
                    f"with one adapter",
                    self._retry_after(),
                ) from None
            self._pending[request] = None
            request.state = WAITING
            self.pump()

    def withdraw(self, request: Request) -> bool:
        """Take out a request that does not run yet; False if it does or is done."""
        with self._lock:
            if request.state == WAITING:
                self._queue.remove(request)
            elif request.state == READY:
                self._ready.remove(request)
                self._unpin(request)
            elif request.state != PREPARING:  # who prepares it sees that it is done
                return False
            request.state = DONE
            del self._pending[request]
            self.pump()
            return True

    def pending(self) -> list[Request]:
        """Those that `withdraw` takes."""
        with self._lock:
            return list(self._pending)

    def ended(self, request: Request) -> None:
        """Of one that ran."""
        with self._lock:
            request.state = DONE
            self.running -= len(request.sequences)
            self.tokens -= request.size
            self._ends.append(time.monotonic())
            self._unpin(request)
            self.pump()

    def close(self) -> None:
        """Nothing is prepared any more."""
        self._closed = True

    def pump(self) -> None:
        """Prepare and start what there is room for."""
        with self._lock:
            limits = self.limits
            while self._preparing + len(self._ready) + self.running < limits.running + limits.ahead:
                request = self._queue.take(self._fits)
                if request is None:
                    break
                self._prepare(request)
            while self._ready:
                request = self._ready[0]
                room = self.running + len(request.sequences) <= limits.running
                if not room or self.tokens + request.size > limits.tokens:
                    break
                del self._pending[self._ready.popleft()]
                request.state = RUNNING
                request.started = time.monotonic()
                self.running += len(request.sequences)
                self.tokens += request.size
                self._start(request)

    def _fits(self, request: Request) -> bool:
        new = sum(name not in self._names for name in request.names)
        return request.key not in self._blocked and len(self._names) + new <= self.limits.adapters

    def _prepare(self, request: Request) -> None:
        """Under the lock."""
        request.state = PREPARING
        self._preparing += 1
        key, known = request.key, not request.names or self._pinned[request.key] > 0
        self._pinned[key] += 1
        self._names.update(request.names)
        if key in self._flights:
            self._flights[key].append(request)
        elif (known or key in request.names) and self._adapters.ready(request.names):
            self._pin(request)
        else:
            self._flights[key] = [request]
            self._adapters.fetch(request.entry).add_done_callback(partial(self._arrived, key))

    def _arrived(self, key: Any, done: Future[Any]) -> None:
        """Pin what was fetched for the requests that wait for it. It runs on the thread that fetched it."""
        with self._lock:
            requests = self._flights.pop(key)
            if self._closed:
                return
        error = done.exception()
        fetched = done.result() if error is None else None
        for request in requests:
            if isinstance(error, Exception) and not isinstance(error, errors.CapacityError):  # which passes
                with self._lock:
                    self._refuse(request, error)
            else:
                self._pin(request, fetched)
        self._adapters.let_go(fetched)
        self.pump()

    def _pin(self, request: Request, fetched: Any = None) -> None:
        """Of one that is being prepared, whose adapters are loaded."""
        try:
            pin = self._adapters.pin(request.entry, fetched)
            try:
                check_tokens(request, *self._vocabulary.under(pin.widths))
            except errors.RequestError:
                pin.release()
                raise
        except errors.CapacityError as error:
            with self._lock:
                if not any(self._pinned[key] > (key == request.key) for key in self._pinned):
                    self._refuse(request, error)  # nothing will be released
                elif request.state != DONE:
                    self._forget(request)
                    self._blocked.add(request.key)
                    request.state = WAITING
                    self._queue.put_back(request)
                else:
                    self._forget(request)
            return
        except Exception as error:
            with self._lock:
                self._refuse(request, error)
            return
        with self._lock:
            self._preparing -= 1
            request.pin, request.content = pin, pin.content
            if request.state == DONE:  # cancelled meanwhile
                self._unpin(request)
                return
            request.starts = _starts(request, pin.invocations)
            request.state = READY
            self._ready.append(request)

    def _refuse(self, request: Request, error: Exception) -> None:
        """One that was being prepared. Under the lock."""
        self._forget(request)
        self._blocked.clear()
        if request.state != DONE:
            request.state = DONE
            del self._pending[request]
            self._fail(request, error)

    def _forget(self, request: Request) -> None:
        """It is not being prepared any more. Under the lock."""
        self._preparing -= 1
        self._uncount(request)

    def _unpin(self, request: Request) -> None:
        """Under the lock."""
        request.pin.release()
        request.pin = None
        self._uncount(request)
        self._blocked.clear()

    def _uncount(self, request: Request) -> None:
        for counter, keys in ((self._pinned, [request.key]), (self._names, request.names)):
            for key in keys:
                counter[key] -= 1
                if not counter[key]:
                    del counter[key]

    def _retry_after(self) -> float:
        """Seconds until about a tenth of those that wait have gone, by the pace of the last ones; 1 to 60."""
        if len(self._ends) < 2:
            return 1.0
        pace = (len(self._ends) - 1) / max(self._ends[-1] - self._ends[0], 1e-3)
        return min(max(len(self._queue) / 10 / pace, 1.0), 60.0)


def check_tokens(request: Request, tokens: int, scores: int) -> None:
    """Note how many tokens the request has in embedding and head. Raises `RequestError` for one that is not there."""
    request.tokens, request.scores = tokens, scores
    for what, ids, most in (("prompt", request.prompt, tokens), ("logit_bias", request.sampling.logit_bias, scores)):
        if bad := [token for token in ids if not 0 <= token < most]:
            raise errors.RequestError(f"{what} has the token {bad[0]}; there are 0 to {most - 1}")


def _starts(request: Request, invocations: Any) -> dict[str, int | None]:
    """Where in the prompt each of its aLoRAs begins to apply: at its last invocation (PEFT); None without one."""
    found: dict[str, int | None] = {}
    prompt = list(request.prompt)
    for name, tokens in invocations.items():
        wanted = list(tokens)
        places = range(len(prompt) - len(wanted), -1, -1)
        found[name] = next((start for start in places if prompt[start : start + len(wanted)] == wanted), None)
    return found
