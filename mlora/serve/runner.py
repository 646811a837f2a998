"""The requests that run, the worker that runs them, and who starts a new worker when one dies."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .. import errors
from ..runtime import Runtime
from . import attention
from .answers import CANCELLED, ERROR, STOP
from .batching import Memory, Worker
from .request import RUNNING, Event, Request, SequenceState
from .together import Lead

_RERUNS = 3  # of a sequence, after failures that it is not known to have caused
_PATIENCE = 60.0  # seconds for a step to end
_STARTS = 3  # of workers, one after the other, that do not come up

log = logging.getLogger(__name__)


class Runner:
    """Runs requests that are admitted.

    A worker's thread may die: by an error in a step, or killed. Then the requests of that step get the error, if there
    is one; all others are run again by a new worker, from the tokens that they have. A thread of its own sees to that.

    Args:
        ended: called with a request none of whose sequences is in the batches any more, under `lock`.
        broke: called with an error when no worker comes up any more, for requests that are not here yet.
        lead: of a model that is split over processes: what asks all of them. There a worker that dies is the last.
    """

    def __init__(
        self,
        runtime: Runtime,
        memory: Memory,
        ended: Callable[[Request], None],
        broke: Callable[[Exception], None],
        lock: threading.RLock,
        lead: Lead | None = None,
    ) -> None:
        self._lead = lead
        self._runtime = runtime
        self._memory = memory
        self._ended = ended
        self._broke = broke
        self._lock = lock
        self._running: dict[str, SequenceState] = {}
        self._holding = 0  # blocks of `together` that are open
        self._held: list[SequenceState] = []  # those of `_running` that start when the last one ends
        self._worker: Worker | None = None
        self._closing = False
        self._up = threading.Event()
        model: Any = runtime.model
        if model.device.type == "cpu":
            attention.check(model)
        self.broken: Exception | None = None  # why no worker comes up any more
        self.capacity = 0
        self.restarts = 0
        self.steps = 0
        self.counts: Counter[str] = Counter()  # answers by finish reason, and tokens
        self._supervisor = threading.Thread(target=self._supervise, name="mlora-serve", daemon=True)
        self._supervisor.start()
        self._up.wait()
        if self.broken is not None:
            raise self.broken

    @property
    def alive(self) -> bool:
        """Whether a worker is at work."""
        worker = self._worker
        return worker is not None and worker.is_running()

    def start(self, request: Request) -> None:
        """Run its sequences; where prompts are shared, the first alone until it has read the prompt for all."""
        with self._lock:
            whole = not self._memory.share or len(request.prompt) <= self._memory.page
            for sequence in request.sequences if whole else request.sequences[:1]:
                self._enter(sequence)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is started inside runs from the same step on, after it."""
        with self._lock:
            self._holding += 1
        try:
            yield
        finally:
            with self._lock:
                self._holding -= 1
                held, self._held = ([], self._held) if self._holding else (self._held, [])
                for sequence in held:
                    if sequence.ended and sequence.id in self._running:
                        self._leave(sequence)
                if self._worker is not None:
                    self._worker.add(sequence for sequence in held if sequence.id in self._running)

    def cancel(self, request: Request, reason: str = CANCELLED, error: Exception | None = None) -> None:
        """End what has not ended of a request, and tell so; it leaves the batches before the next step."""
        with self._lock:
            events = [self.end(sequence, reason, error) for sequence in request.sequences]
        self.post(event for event in events if event is not None)

    def fail(self, request: Request, error: Exception) -> None:
        """`cancel` because of an error."""
        self.cancel(request, ERROR, error)

    def stop(self, sequence: SequenceState) -> None:
        """End a sequence in whose text a stop string was found."""
        self.end(sequence, STOP)

    def end(self, sequence: SequenceState, reason: str, error: Exception | None = None) -> Event | None:
        """End one sequence, and return what is to be told; None if it has ended."""
        with self._lock:
            if sequence.ended:
                return None
            sequence.ended = True
            self.counts[reason] += 1
            if sequence.id in self._running:
                if self._worker is not None:
                    self._worker.cancel_request(sequence.id)
            elif sequence.request.state == RUNNING:
                self._leave(sequence)
            return Event(sequence, finish_reason=reason, error=error)

    def post(self, events: Iterable[Event]) -> None:
        """Tell who waits for them."""
        homes: dict[Callable[[Sequence[Event]], None], list[Event]] = {}
        for event in events:
            homes.setdefault(event.sequence.request.post, []).append(event)
        for post, own in homes.items():
            try:
                post(own)
            except RuntimeError:  # the event loop of those is closed
                for event in own:
                    self.end(event.sequence, CANCELLED)

    def close(self) -> None:
        """Cancel what runs and stop the worker."""
        with self._lock:
            self._closing = True
            worker = self._worker
            requests = {id(sequence.request): sequence.request for sequence in self._running.values()}
        for request in requests.values():
            self.cancel(request)
        if worker is not None and worker.is_running():
            worker.stop(block=True, timeout=_PATIENCE, hard_stop=True)
        if threading.current_thread() is not self._supervisor:
            self._supervisor.join(timeout=_PATIENCE)
        with self._lock:
            for sequence in list(self._running.values()):
                self._leave(sequence)

    def join(self) -> None:
        """Until it is closed, or broken."""
        self._supervisor.join()

    # Of the worker's thread

    def _told(self, events: Sequence[Event]) -> None:
        """A step has run."""
        failed: list[tuple[Request, Exception]] = []
        with self._lock:
            self.steps += 1
            for event in events:
                sequence, request = event.sequence, event.sequence.request
                if event.error is not None:
                    failed.append((request, event.error))
                    continue
                self.counts["tokens"] += 1
                if sequence.index == 0 and len(sequence.tokens) == 1:
                    for other in request.sequences[1:]:
                        if other.id not in self._running and not other.ended:
                            self._enter(other)
                if event.finish_reason is not None:
                    sequence.ended = True
                    self.counts[event.finish_reason] += 1
                    self._leave(sequence)
        self.post(event for event in events if event.error is None)
        for request, error in failed:
            self.fail(request, error)

    def _gone(self, ids: Sequence[str]) -> None:
        """Cancelled ones are out of the batches."""
        with self._lock:
            for id in ids:
                if id in self._running:
                    self._leave(self._running[id])

    # Under the lock

    def _enter(self, sequence: SequenceState) -> None:
        self._running[sequence.id] = sequence
        if self._holding:
            self._held.append(sequence)
        elif self._worker is not None:
            self._worker.add([sequence])

    def _leave(self, sequence: SequenceState) -> None:
        self._running.pop(sequence.id, None)
        sequence.left = True
        if all(other.left for other in sequence.request.sequences):
            self._ended(sequence.request)

    # Of the supervisor's thread

    def _supervise(self) -> None:
        failures = 0
        while not self._closing:
            try:
                orders = None if self._lead is None else self._lead.orders
                worker = Worker(self._runtime, self._memory, self._told, self._gone, orders)
                worker.start()
                while not worker.ready.wait(0.05) and worker.is_running():
                    pass
                if not worker.ready.is_set():
                    raise worker.background_thread_status.fatal_error or errors.ServeError("the worker did not start")
            except Exception as error:
                failures += 1
                if failures >= _STARTS or not self._up.is_set():
                    self._give_up(error)
                    return
                continue
            failures = 0
            if self._lead is not None:
                self._lead.send_by(worker.send)
            with self._lock:
                self.capacity = worker.capacity
                self._worker = worker
                self._held.clear()
                worker.add(self._running.values())
                closing = self._closing
            self._up.set()
            if closing:  # while there was no worker
                worker.stop(block=True, timeout=_PATIENCE, hard_stop=True)
            worker.wait()
            if not self._closing and self._lead is not None:
                self._give_up(worker.background_thread_status.fatal_error or errors.ServeError("the worker has ended"))
                return
            if not self._closing:
                self._recover(worker)

    def _recover(self, worker: Worker) -> None:
        """The worker is dead: of its sequences some fail, and the rest is for the next."""
        error = worker.background_thread_status.fatal_error
        log.warning("mlora.serve: the worker died (%s); a new one takes over", repr(error))
        with self._lock:
            self.restarts += 1
            self._worker = None
            failed = {} if error is None else {id(one.request): one.request for one in worker.step}
            for sequence in list(self._running.values()):
                sequence.reruns += 1
                if sequence.reruns > _RERUNS:
                    failed[id(sequence.request)] = sequence.request
                if sequence.ended:
                    self._leave(sequence)
            why = errors.ServeError(f"the step that ran this request failed: {error!r}")
            why.__cause__ = error
            events = [self.end(sequence, ERROR, why) for request in failed.values() for sequence in request.sequences]
            for request in failed.values():
                for sequence in request.sequences:
                    if not sequence.left:
                        self._leave(sequence)
        self.post(event for event in events if event is not None)
        worker.stop(block=True, timeout=_PATIENCE, hard_stop=True)  # gives back the model's attention

    def _give_up(self, error: Exception) -> None:
        what = "does not start" if self._lead is None or not self._up.is_set() else "has died, and with it the engine"
        broken = errors.ServeError(f"the worker {what}: {error!r}")
        broken.__cause__ = error
        self.broken = broken
        if self._lead is not None:
            self._lead.close()
        if self._up.is_set():
            self._broke(broken)
            self._fail_all(broken)
        self._up.set()

    def _fail_all(self, error: Exception) -> None:
        with self._lock:
            sequences = list(self._running.values())
        for request in {id(sequence.request): sequence.request for sequence in sequences}.values():
            self.fail(request, error)
        with self._lock:
            for sequence in sequences:
                self._leave(sequence)
