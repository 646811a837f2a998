"""What the processes of a split model do alike beside their steps, carried out in each.

Orders travel between requests, in the queue by which transformers' continuous batching broadcasts those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..routing.entries import Entry
from ..routing.pin import Pin
from ..runtime import Runtime
from .drawing import Drawing
from .request import Request, SequenceState
from .sampling import Sampling


@dataclass
class Order:
    """What all processes do before their next step.

    Args:
        number: by which process 0 knows who waits for what comes of it; None where nobody does. `kind`: a method of
            `Orders`. `arguments`: its own, which can be pickled.

    The rest is what transformers reads of everything in its queue.
    """

    number: int | None
    kind: str
    arguments: tuple[Any, ...]
    request_id: None = None
    logit_processor_kwargs: dict[str, Any] = field(default_factory=dict)
    generated_tokens: list[int] = field(default_factory=list)


class Orders:
    """Carries orders out in one process, in its worker's thread.

    Args:
        answer: takes an order, what came of it, and the error if it failed; in process 0.

    `worker` is the one that takes part in the steps here, which sets it.
    """

    worker: Any

    def __init__(self, runtime: Runtime, answer: Callable[[Order, Any, Exception | None], None] | None = None) -> None:
        self._runtime = runtime
        self._answer = answer
        self._pins: dict[int, Pin] = {}
        self.leads = answer is not None

    def obey(self, order: Order) -> None:
        """An error is the asker's. The runtime sees to it that there is one in all processes or in none."""
        result, failed = None, None
        try:
            result = getattr(self, order.kind)(*order.arguments)
        except Exception as error:
            failed = error
        if self._answer is not None:
            self._answer(order, result, failed)

    def close(self) -> None:
        """Let go of everything."""
        for pin in self._pins.values():
            pin.release()
        self._pins.clear()

    # What can be ordered

    def load(self, name: str, source: Any, options: Mapping[str, Any]) -> Any:
        return self._runtime.load_adapter(source, name, **options)

    def replace(self, name: str, source: Any, options: Mapping[str, Any]) -> Any:
        return self._runtime.replace_adapter(name, source, **options)

    def delete(self, name: str) -> None:
        self._runtime.delete_adapter(name, when_unused=True)

    def pin(self, number: int, entry: Entry) -> Pin:
        self._runtime.check_packed(entry)
        self._pins[number] = pin = self._runtime.pin(entry)
        return pin

    def release(self, number: int) -> None:
        self._pins.pop(number).release()

    def enter(self, id: str, pin: int, starts: Mapping[str, int | None]) -> None:
        """A sequence whose tokens transformers brings next. Process 0 knows it, and the others need no more of it."""
        if self.leads:
            return
        sampling, ends = Sampling(), frozenset[int]()
        request = Request((), None, None, (), sampling, ends, 0, lambda events: None)
        request.pin = self._pins[pin]
        request.content, request.starts = request.pin.content, starts
        self.worker.follow(SequenceState(request, id, 0, Drawing(sampling, 0, (), ends)))

    def cancel(self, id: str) -> None:
        self.worker.cancel_now(id)
