"""Which plan is active: that of the call or `use_adapters` that code runs in, and the default outside of any."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import errors
from ..arena.store import Store
from ..ops import direct
from ..ops.checks import add_publisher
from ..plan.activation import Starts, activation_of, prompt_of
from ..plan.call import Call
from ..plan.modality import Others
from ..plan.packing import packing_of
from ..plan.plan import Plan
from ..plan.scope import Scope
from ..plan.shared import Shared
from ..plan.threads import hand_over
from .entries import Entry, is_single
from .merge_cache import MergeCache
from .pin import Pin
from .planner import Made, Planner
from .readers import Readers
from .recompute import follow


class Router:
    """Puts plans where layers look for them, in `Shared.scopes` and `Shared.default`, and takes them back.

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
        self._lock = lock
        # As good as none, and no default counts beside it.
        self._nothing = replace(shared.blank, touches=bytes(store.modules))
        hand_over()
        follow(self)
        shared.number = add_publisher(self)
        self._buffers = [(words, _bytes_of(words)) for words in shared.words]
        self._header = _bytes_of(shared.header)
        self._published: Plan | None = None  # what they hold, if that is known

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
    def use(
        self, entries: Any, rows: int, lengths: Sequence[int] = (), starts: Sequence[Starts] = ()
    ) -> Iterator[Scope]:
        """All that runs inside, however long; `rows` in a batch, or packed sequences of these `lengths`."""

        def acquire() -> tuple[Plan, Any]:
            return self._planner.acquire(entries, rows, 1, lengths, starts), entries

        with self._scope(acquire, lasting=True) as scope:
            if scope.own is not None and scope.own.lengths and not scope.own.invocations:
                # For modules that are called by themselves; a call of the model tells more.
                scope.tokens = packing_of(scope.own, Call((), {}), self._planner.of_tokens, self._shared)
            yield scope

    def pin(self, entry: Any) -> Pin:
        """See `Runtime.pin`."""
        with ExitStack() as held:
            held.enter_context(self._readers)
            plan = self._planner.acquire(entry, 1, 1)
            held.callback(self._store.release, plan.names)
            self.arrive()
            planner = self._planner
            return Pin(planner.pinned(plan), plan.invocations, planner.widths(plan), held.pop_all().close)

    def route(self, entries: Any, rows: int, expansion: int) -> AbstractContextManager[Scope]:
        """A call; each of `rows` is repeated `expansion` times."""
        return self._scope(lambda: (self._planner.acquire(entries, rows, expansion), entries))

    def arrive(self) -> None:
        """Wait until plans are on the device: what they route may run on other streams than this one."""
        for device in self._store.devices:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()

    @contextmanager
    def forward(self, entries: Any, call: Call) -> Iterator[None]:
        """A call of the model."""
        shape = call.shape
        with self._kept() if entries is None else self.route(entries, shape[0] if shape else 1, 1) as scope:
            plan = scope.plan
            if plan is not None and plan.names and direct.in_forward_mode():
                raise errors.EntryError(
                    "adapters are routed within torch.autograd.forward_ad, for which their operators have no formula; "
                    "differentiate backward, or a model into which they are folded (merge_adapter)"
                )
            self.check_rows(call)
            scope.unobserved, scope.counted = direct.unobserved(), True
            scope.choices = call.choices if self._shared.choices else 1
            lengths = shape[1 if scope.choices == 1 else 2 :]
            scope.length, scope.tokens, scope.late = lengths[0] if lengths else 0, None, []
            scope.others = self._others(call)
            if plan is not None and self._shared.training is not None and torch.is_grad_enabled():
                plan = self._dropping(scope, plan, shape[0] if shape else 1)
            if plan is not None and plan.lengths:
                scope.tokens = packing_of(plan, call, self._planner.of_tokens, self._shared)
            elif plan is not None and plan.invocations:  # to which tokens do its aLoRAs apply?
                prompt = scope.prompt if scope.prompt is not None and scope.prompt.plan is plan else None
                scope.tokens = activation_of(plan, call, prompt, self._store.terms)
            yield
            for late in scope.late:
                late.settle()

    def _dropping(self, scope: Scope, plan: Plan, rows: int) -> Plan:
        """The plan of a call of the model that autograd may record, after its scope was told about dropout."""
        scope.drops = self._shared.training.begin(plan, rows * scope.choices)
        if scope.drops is not None:
            scope.own = scope.plan = plan = scope.drops.plan
        return plan

    def check_rows(self, call: Call) -> None:
        """Raise `EntryError` unless a call of the model has as many rows as entries are routed, or tokens as its packed
        sequences have."""
        scope, shape = self._shared.local, call.shape
        plan = scope.plan
        if plan is not None and plan.lengths and shape:
            tokens = shape[1] if len(shape) > 1 and shape[0] == 1 else shape[0]
            if tokens != sum(plan.lengths):
                raise errors.EntryError(
                    f"the active routing is of {len(plan.lengths)} packed sequences, {sum(plan.lengths)} tokens in one "
                    f"row; the model was called with inputs of shape {shape}"
                )
        elif plan is not None and not is_single(scope.entries) and shape and shape[0] not in plan.row_counts:
            raise errors.EntryError(
                f"the active routing has {plan.entries} entries; the model was called with {shape[0]} rows"
            )

    @contextmanager
    def generation(self, entries: Any, call: Call, expansion: int) -> Iterator[None]:
        """A `generate` that repeats each row `expansion` times."""
        rows = call.shape[0] if call.shape else 1
        if entries is not None:
            with self.route(entries, rows, expansion) as scope:
                self._prompt(scope, call)
                yield
            return
        with self._kept() as scope:
            if scope.entries is None:
                self._prompt(scope, call)
                yield
                return
            if scope.plan is not None and scope.plan.lengths:
                raise errors.EntryError(
                    "generate is called in a use_adapters of packed sequences (lengths=), which is for single calls "
                    "of the model; give generate a batch of rows and adapter_names"
                )
            with self.route(scope.entries, rows, expansion) as scope:
                self._prompt(scope, call)
                yield

    def _prompt(self, scope: Scope, call: Call) -> None:
        """Tell a scope what `generate` was given."""
        plan, scope.counted = scope.plan, True
        scope.prompt = prompt_of(plan, call) if plan is not None and plan.invocations else None
        scope.others = self._others(call)

    def made(self, plan: Plan) -> Made:
        """What `again` takes, of a plan whose adapters are pinned."""
        with self._lock:
            return self._planner.made(plan)

    @contextmanager
    def again(self, made: Made) -> Iterator[Plan]:
        """The plan, for a backward pass; raises as `Planner.again`."""
        with self._readers:
            plan = self._planner.again(made)
            try:
                yield plan
            finally:
                self._store.release(plan.names)

    def remember(self) -> Callable[[], AbstractContextManager[Any]] | None:
        """What `recompute.py` asks: a context of the very plan, call and default of now, which raises `RoutingError`
        where an adapter of it is gone by then."""
        with self._lock:
            try:
                scope = self._shared.local
            except errors.RoutingError:
                return None
            plan = scope.plan or self._shared.default or self._nothing
            made = self._planner.made(plan)
        return lambda: self._again(scope, made)

    @contextmanager
    def _again(self, was: Scope, made: Made) -> Iterator[None]:
        with self._scope(lambda: (self._planner.again(made), was.entries)) as scope:
            scope.length, scope.choices, scope.counted, scope.since = was.length, was.choices, was.counted, made.since
            scope.late = None if was.late is None else []  # what it asked was answered in the forward pass
            scope.others = None if was.others is None else was.others.again()
            scope.prompt, plan = was.prompt, scope.plan
            if was.drops is not None and plan is not None:
                scope.drops = was.drops
                if plan is not was.drops.plan:
                    scope.own = scope.plan = plan = self._shared.training.resume(plan)
            if was.tokens is not None and plan is not None:
                same = was.tokens.plan is plan
                scope.tokens = was.tokens if same else replace(was.tokens, plan=plan)
            yield

    def _others(self, call: Call) -> Others | None:
        placeholders = self._shared.placeholders
        return Others(call, placeholders) if placeholders else None

    def _kept(self) -> AbstractContextManager[Scope]:
        """Go on under what is active or the default of now, with its adapters pinned: another task or thread may end
        the one, or set a new default, meanwhile."""
        return self._scope(self._pin_active, kept=True)

    def _pin_active(self) -> tuple[Plan | None, Any]:
        with self._lock:  # under which scopes end and defaults change
            active = self._shared.local
            if self._shared.recorded:
                active.check_told("the model")
            plan = active.plan or self._shared.default
            if self._planner.ranks is not None and not active.counted:  # else it is within a call that was agreed on
                self._planner.ranks.agree_on(plan)
            if plan is not None and plan.names:
                self._store.acquire(plan.names)
            return plan, active.entries

    @contextmanager
    def _scope(self, acquire: Callable[[], tuple[Plan | None, Any]], **kind: bool) -> Iterator[Scope]:
        """One of the plan that `acquire` pins, and the entries that it came from. `kind`: as `Scopes.begin` has it."""
        scopes = self._shared.scopes
        with self._readers:
            plan, entries = acquire()
            scope = scopes.begin(plan, entries, **kind)
            names = () if plan is None else plan.names
            try:
                if names:
                    self._shared.recorded |= torch.is_grad_enabled()
                    if scope.since is not None:
                        self._planner.check_since(names, scope.since)
                self._publish()
                yield scope
            finally:
                with self._lock:
                    scopes.end(scope)
                    if names:
                        self._store.release(names)
                self._publish()

    def publish(self, buffer: Tensor, header: Tensor) -> None:
        """Copy the plan of what runs here into buffers of compiled code, which end up in the shared ones; raises as
        `Scopes.current`."""
        shared = self._shared
        plan = shared.local.plan or shared.default or shared.blank
        if plan.lengths and not plan.uniform:
            raise errors.AttributionError(
                "compiled code got packed sequences (lengths=) under several entries, which are served in eager code "
                "only; call the model without torch.compile, or use one entry for all of them"
            )
        words = next((view for own, view in self._buffers if own is buffer), None) or _bytes_of(buffer)
        first = self._header if header is shared.header else _bytes_of(header)
        with self._lock:
            self._published = None
            self._copy(plan, buffer, words, header, first)

    def touched(self) -> Sequence[int]:
        return (self._shared.local.plan or self._shared.default or self._nothing).touches

    def _publish(self) -> None:
        """As `publish`, into the shared buffers."""
        shared = self._shared
        try:
            plan = shared.local.plan
        except errors.RoutingError:  # compiled code on the host asks itself, and this is raised there
            plan = None
        plan = plan or shared.default or shared.blank
        with self._lock:
            if plan is not self._published:
                for buffer, words in self._buffers:
                    self._copy(plan, buffer, words, shared.header, self._header)
                self._published = plan

    @staticmethod
    def _copy(plan: Plan, buffer: Tensor, words: memoryview | None, header: Tensor, first: memoryview | None) -> None:
        """`words` and `first` are the buffers' memory, where that is on the host. Of a plan that is too large only the
        header: kernels on the host refuse one that is shorter than its header says, and on other devices `Planner`
        did."""
        if words is None or first is None:
            tensor = next(tensor for tensor in plan.tensors if tensor.device == buffer.device)
            buffer[: tensor.numel()].copy_(tensor)
            header.copy_(plan.header)
            return
        # As bytes: torch's copies, whose code a step leaves cold, take ten times as long.
        size = len(first)
        raw = plan.raw if len(plan.raw) <= len(words) else plan.raw[:size]
        words[: len(raw)] = raw
        first[:] = raw[:size]


def _bytes_of(words: Tensor) -> memoryview | None:
    """Its memory, where that is on the CPU."""
    if words.device.type != "cpu" or type(words) is not Tensor:
        return None
    memory: Any = words.numpy()
    return memoryview(memory).cast("B")
