"""Which plan is active: in each thread that of its call or `use_adapters`, and the default in the others."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import errors
from ..arena.store import Store
from ..ops import direct
from ..plan.activation import activation_of, prompt_of
from ..plan.call import Call
from ..plan.modality import Others
from ..plan.shared import Shared
from .entries import Entry, is_single
from .merge_cache import MergeCache
from .planner import Planner
from .readers import Readers


class Router:
    """Puts plans where layers look for them, in `Shared.local` and `Shared.default`, and takes them back.

    Args:
        lock: the runtime's, see its `__init__`; reentrant.

    `default_entry` is what the default was made of, its merges resolved.
    """

    def __init__(
        self,
        planner: Planner,
        merges: MergeCache,
        readers: Readers,
        store: Store,
        shared: Shared,
        lock: threading.RLock,
    ) -> None:
        self.default_entry: Entry = None
        self._planner = planner
        self._merges = merges
        self._readers = readers
        self._store = store
        self._shared = shared
        self._local = shared.local
        self._lock = lock
        self._words = _bytes_of(shared.plan)
        self._header = _bytes_of(shared.header)

    def set_default(self, entry: Entry) -> None:
        """Route what has no entries of its own; raises as `Planner.acquire`."""
        with self._merges.resolved(entry) as resolved:  # under the lock: nothing is folded in before the plan is set
            plan = self._planner.acquire(resolved, 1, 1)
            self.arrive()
            previous, self._shared.default = self._shared.default, None if resolved is None else plan
            self.default_entry = resolved
            if previous is not None:
                self._store.release(previous.names)
        self._publish()

    @contextmanager
    def route(self, entries: Any, rows: int, expansion: int) -> Iterator[None]:
        """All that this thread runs inside; `rows` in a batch, each of which `generate` repeats `expansion` times."""
        local = self._local
        with self._readers:
            plan = self._planner.acquire(entries, rows, expansion)
            previous = local.plan, local.entries
            try:
                local.plan, local.entries = plan, entries
                self._publish()
                yield
            finally:
                local.plan, local.entries = previous
                self._publish()
                self._store.release(plan.names)

    def arrive(self) -> None:
        """Wait until plans are on the device: what they route may run on other streams than this one."""
        device = self._store.arena.device
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()

    @contextmanager
    def forward(self, entries: Any, call: Call) -> Iterator[None]:
        """A call of the model."""
        local, shape = self._local, call.shape
        previous = local.length, local.activation, local.late, local.unobserved, local.others
        local.unobserved = direct.unobserved()
        local.length, local.activation, local.late = shape[1] if len(shape) > 1 else 0, None, []
        local.others = self._others(call)
        try:
            if entries is not None:
                with self.route(entries, shape[0] if shape else 1, 1):
                    self._activate(call)
                    yield
            else:
                plan = local.plan
                listed = plan is not None and not is_single(local.entries)
                if plan is not None and listed and shape and shape[0] not in plan.row_counts:
                    raise errors.EntryError(
                        f"the active routing has {plan.rows} entries; the model was called with {shape[0]} rows"
                    )
                with self._default():
                    self._activate(call)
                    yield
            for late in local.late:
                late.settle()
        finally:
            local.length, local.activation, local.late, local.unobserved, local.others = previous
            local.siblings = None

    @contextmanager
    def generation(self, entries: Any, call: Call, expansion: int) -> Iterator[None]:
        """A `generate` that repeats each row `expansion` times."""
        if entries is None:
            entries = self._local.entries
        if entries is None:
            with self._default(), self._prompted(call):
                yield
            return
        with self.route(entries, call.shape[0] if call.shape else 1, expansion), self._prompted(call):
            yield

    def _activate(self, call: Call) -> None:
        """Find out to which tokens of a forward the aLoRAs of the active plan apply."""
        local = self._local
        plan = local.plan
        if plan is not None and plan.invocations:
            prompt = local.prompt
            prompt = prompt if prompt is not None and prompt.plan is plan else None
            local.activation = activation_of(plan, call, prompt, self._store.terms)

    @contextmanager
    def _prompted(self, call: Call) -> Iterator[None]:
        """A `generate` under the active plan."""
        local = self._local
        plan, previous = local.plan, (local.prompt, local.others)
        local.prompt = prompt_of(plan, call) if plan is not None and plan.invocations else None
        local.others = self._others(call)
        try:
            yield
        finally:
            local.prompt, local.others = previous

    def _others(self, call: Call) -> Others | None:
        placeholders = self._shared.placeholders
        return Others(call, placeholders) if placeholders else None

    @contextmanager
    def _default(self) -> Iterator[None]:
        """Keep to the default of now, and keep its adapters, though another thread may set a new one."""
        local, shared = self._local, self._shared
        with self._readers:
            if local.plan is not None or shared.default is None:
                yield
                return
            with self._lock:
                plan = shared.default
                names = () if plan is None else plan.names
                self._store.acquire(names)
            local.plan = plan
            try:
                yield
            finally:
                local.plan = None
                self._store.release(names)

    def _publish(self) -> None:
        """Copy the current plan into the buffer that compiled code reads. Of one that is too large only the header:
        kernels on the host refuse a plan that is shorter than its header says, and on other devices `Planner` did."""
        shared = self._shared
        plan, buffer = self._local.plan or shared.default or shared.blank, shared.plan
        if self._words is None or self._header is None:
            buffer[: plan.tensor.numel()].copy_(plan.tensor)
            shared.header.copy_(plan.header)
            return
        # As bytes: torch's copies, whose code a step leaves cold, take ten times as long.
        size = len(self._header)
        raw = plan.raw if len(plan.raw) <= len(self._words) else plan.raw[:size]
        self._words[: len(raw)] = raw
        self._header[:] = raw[:size]


def _bytes_of(words: Tensor) -> memoryview | None:
    """Its memory, where that is on the CPU."""
    if words.device.type != "cpu" or type(words) is not Tensor:
        return None
    memory: Any = words.numpy()
    return memoryview(memory).cast("B")
