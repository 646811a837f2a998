"""CUDA streams on which adapters are copied beside what calls compute. This has not run on a GPU yet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch


class Streams:
    """One for copies a CUDA device; of other devices nothing. Called under the store's lock.

    What is on the way to an arena is ordered against the streams of calls on both sides. A copy may overwrite an
    adapter that was released while kernels which read it still run, so it waits for all that was asked of the callers'
    streams. And whoever acquires adapters, or writes to arenas and tables itself, has its stream wait for the copies.
    The host waits for neither.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._callers: dict[torch.device, set[torch.cuda.Stream]] = {d: set() for d in devices if d.type == "cuda"}
        self._copies: dict[torch.device, torch.cuda.Stream] = {}
        self._copied: dict[torch.device, torch.cuda.Event] = {}

    def follow(self) -> None:
        """This thread's streams go on behind the copies; later copies go on behind what these were asked by then."""
        for device, callers in self._callers.items():
            stream = torch.cuda.current_stream(device)
            if stream == self._copies.get(device):
                continue
            callers.add(stream)
            if (copied := self._copied.get(device)) is not None:
                stream.wait_event(copied)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is copied inside is copied beside the callers."""
        with ExitStack() as own:
            for device, callers in self._callers.items():
                stream = self._copies.get(device)
                if stream is None:
                    stream = self._copies[device] = torch.cuda.Stream(device)
                for caller in callers:
                    stream.wait_stream(caller)
                own.enter_context(torch.cuda.stream(stream))
            try:
                yield
            finally:
                for device, stream in self._copies.items():
                    self._copied[device] = stream.record_event()
