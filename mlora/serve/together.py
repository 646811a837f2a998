"""One engine over the processes of a model that is split: process 0 takes requests, and the others follow.

transformers' continuous batching broadcasts new requests and schedules them alike in all processes, each in a thread of
its own. What else they must do alike are `Order`s, which travel between the requests, in the same queue: adapters are
loaded, pinned and let go between two steps, by that thread, in one order everywhere. Tokens are drawn by process 0.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from .. import errors
from ..ops import threads
from ..routing.entries import Entry
from ..routing.pin import Pin
from ..runtime import Runtime
from . import attention
from .batching import Worker
from .orders import Order, Orders

_THREADS = 8  # that load adapters and delete them, each begun when it is first needed


class Share:
    """A pin in all processes, of which several requests of process 0 have a share. As a `Pin` to them."""

    def __init__(self, lead: Lead, number: int, pin: Pin) -> None:
        self._lead, self.number, self._pin = lead, number, pin
        self._count = 1
        self.entry, self.content, self.invocations, self.widths = pin.entry, pin.content, pin.invocations, pin.widths

    def shared(self) -> Share:
        """For one more."""
        with self._lead.lock:
            self._count += 1
        return self

    def release(self) -> None:
        """Of one. With the last, all processes let go."""
        with self._lead.lock:
            self._count -= 1
            last = self._count == 0
        if last:
            self._lead.ask("release", self.number)


class Lead:
    """What process 0's engine asks of the runtime, done by all. It has the methods of `Alone`."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.orders = Orders(runtime, self._answered)
        self.lock = threading.Lock()
        self._numbers, self._pins = itertools.count(), itertools.count()
        self._asked: dict[int, Future[Any]] = {}
        self._send: Callable[[Order], None] | None = None
        self._closed = False

    def send_by(self, send: Callable[[Order], None]) -> None:
        """`send` puts an order where the worker takes it from."""
        self._send = send

    def ask(self, kind: str, *arguments: Any) -> Future[Any]:
        """Have all processes carry out an order; when they have, the future has what came of it in this one."""
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()  # who asked may go; what was ordered is done
        with self.lock:
            closed = self._closed or self._send is None
            if not closed:
                assert self._send is not None
                number = next(self._numbers)
                self._asked[number] = future
                self._send(Order(number, kind, arguments))
        if closed:
            future.set_exception(errors.ServeError("the engine is closed"))
        return future

    def _answered(self, order: Order, result: Any, error: Exception | None) -> None:
        with self.lock:
            future = None if order.number is None else self._asked.pop(order.number, None)
        if future is None:
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    def close(self) -> None:
        """The worker has ended: nothing that was asked will be done."""
        with self.lock:
            self._closed = True
            asked, self._asked = list(self._asked.values()), {}
        for future in asked:
            future.set_exception(errors.ServeError("the engine is closed"))
        self.orders.close()

    # For admission

    def ready(self, names: Sequence[str]) -> bool:
        """Whether adapters can be pinned at once."""
        return False

    def fetch(self, entry: Entry) -> Future[Any]:
        """Pin what an entry needs, in all processes."""
        number = next(self._pins)
        done: Future[Any] = Future()

        def made(asked: Future[Any]) -> None:
            if (error := asked.exception()) is not None:
                done.set_exception(error)
            else:
                done.set_result(Share(self, number, asked.result()))

        self.ask("pin", number, entry).add_done_callback(made)
        return done

    def pin(self, entry: Entry, fetched: Share | None) -> Share:
        """A share of what was fetched."""
        if fetched is None:
            raise errors.CapacityError(f"the adapters of {entry!r} have no room on the device now")
        return fetched.shared()

    def let_go(self, fetched: Share | None) -> None:
        """Of what was fetched, when all have their shares."""
        if fetched is not None:
            fetched.release()


class Alone:
    """What the engine asks of the runtime of a model in one process.

    What is asked of one adapter is done in the order in which it is asked, so that of two contents for a name the later
    stays: all of it runs on one thread. A file that is slow to come keeps few others waiting, as there are several.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._orders = Orders(runtime)
        self._threads = [ThreadPoolExecutor(1, f"mlora-adapters-{number}") for number in range(_THREADS)]

    def ask(self, kind: str, name: str, *arguments: Any) -> Future[Any]:
        """As `Lead`'s, of an order about one adapter."""
        thread = self._threads[hash(str(name)) % _THREADS]
        try:
            return thread.submit(self._obey, kind, name, arguments)
        except RuntimeError:
            raise errors.ServeError("the engine is closed") from None

    def _obey(self, kind: str, name: str, arguments: Sequence[Any]) -> Any:
        try:
            return getattr(self._orders, kind)(name, *arguments)
        finally:
            threads.let_go()

    def close(self) -> None:
        """What was asked is done, and nothing more can be."""
        for thread in self._threads:
            thread.shutdown(wait=False)

    # For admission

    def ready(self, names: Sequence[str]) -> bool:
        """Whether adapters are on the device, so that to pin them is a matter of microseconds."""
        infos = map(self._runtime.adapter, names)
        return all(info is not None and info.location == "device" for info in infos)

    def fetch(self, entry: Entry) -> Future[Any]:
        """Bring what an entry needs to the device."""
        return self._runtime.prefetch(entry)

    def pin(self, entry: Entry, fetched: Any) -> Pin:
        """Raises as `Runtime.check_packed` and `Runtime.pin`."""
        self._runtime.check_packed(entry)
        return self._runtime.pin(entry)

    def let_go(self, fetched: Any) -> None:
        """Nothing is held."""


def follow(runtime: Runtime) -> None:
    """In the processes beside the first of those that a model is split over: take part in the steps of the engine that
    process 0 makes, until that is closed.

        if torch.distributed.get_rank() == 0:
            with mlora.serve.Engine(runtime, tokenizer) as engine:
                ...
        else:
            mlora.serve.follow(runtime)

    Raises:
        ServeError: a step failed here, or another process is gone. End this process then, so that the others see it.
            Or this is the first process, or the model is not split.
        UnsupportedModelError: as `Engine`.
    """
    if not runtime.process:
        raise errors.ServeError("follow is for the processes beside the first of those that a model is split over")
    memory = runtime.from_first(None)
    model: Any = runtime.model
    if model.device.type == "cpu":
        attention.check(model)
    orders = Orders(runtime)
    worker = Worker(runtime, memory, lambda events: None, lambda ids: None, orders)
    worker.start()
    worker.wait()
    error = worker.background_thread_status.fatal_error
    worker.stop(block=True, timeout=1.0, hard_stop=True)  # gives back the model's attention
    orders.close()
    if error is not None:
        raise errors.ServeError(f"the engine's steps have ended: {error!r}") from error
