"""`Scope`: what a `with use_adapters`, a call or a `generate` routes; `Scopes`: which one code runs in.

The active scope is in a context variable: asyncio gives each task a copy, so tasks do not see each other's, and
`threads.py` hands it to threads. Scopes may end in any order, and in another task than they began in. One that has
ended is never active again.

Generators share the variable with their callers. A scope that began in one counts while that generator runs, and while
it waits nobody can tell whether it was meant for its caller, so that is an error.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from types import FrameType
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from torch import Tensor

from .. import errors
from . import frames
from .activation import Activation, Prompt
from .late import Late
from .modality import Others
from .packing import Packing
from .plan import Plan


class Siblings:
    """What the layer with number `first` left for those that read the same input after it.

    Args:
        input, version, plan: of its call. `results`: number of a layer -> its output.
    """

    __slots__ = ("first", "input", "plan", "results", "version")

    def __init__(self, first: int, input: Tensor, plan: Plan, results: dict[int, Tensor]) -> None:
        self.first = first
        self.input = input
        self.version = input._version
        self.plan = plan
        self.results = results


class Scope:
    """Made when something begins to route, inside of `outer`.

    Args:
        own: its plan. `entries`: those it came from. Both None where nothing is routed.
        kept: whether it only goes on with what `outer` routes, which then counts when it has ended.
        frame: of the generator that it began in, if it did.
        since: in what a backward pass computes again, how many adapters had been registered before the forward pass.
        source: what it stands for in another thread, if it does; it ends with that. `open`: until it ends.

    Of the call that is running: the `length` of its sequences (0 if there is none), into how many `choices` each row is
    cut, `unobserved`, whether nothing looked at the operators when it began, what its layers left for their `siblings`,
    `tokens`, which gives layers a plan whose rows are tokens where one is needed, the `prompt` of the `generate` that
    is running if it has some, `late`, what is asked of the call when it ends (None if none runs), `counted`, whether
    its rows, or those of the `generate`, were found to be as many as the entries, of a model that reads more than text
    what the call tells of `others`, `read`, what layers whose rank rows are shared out left for those that read the
    same (`layers.sharded.Read`), and `drops`, what layers ask about dropout (`gradients.dropout.Drops`).

    Layers read `plan` of whatever is in the variable. It is `own`, and missing where that need not be what counts, as
    Python then asks `__getattr__`.
    """

    plan: Plan | None
    kept = False
    since: int | None = None
    frame: FrameType | None = None
    source: Scope | None = None
    length = 0
    choices = 1
    unobserved = False
    counted = False
    siblings: Siblings | None = None
    read: Any = None
    tokens: Activation | Packing | None = None
    prompt: Prompt | None = None
    late: list[Late] | None = None
    others: Others | None = None
    drops: Any = None
    _token: Token[None] | None = None

    def __init__(self, scopes: Scopes, outer: Scope | None, own: Plan | None, entries: Any) -> None:
        self._scopes = scopes
        self._before = outer or self
        self._backward = torch._C._current_graph_task_id()  # -1 outside of any backward pass
        self.open = True
        self.outer = outer
        self.own = own
        self.entries = entries
        if outer is not None and outer.outer is not None:  # as most calls, the outermost is in no other
            self.since, self.length, self.choices = outer.since, outer.length, outer.choices
            self.unobserved = outer.unobserved
            self.prompt, self.late, self.others = outer.prompt, outer.late, outer.others
            if outer.own is own:
                self.tokens, self.counted, self.drops = outer.tokens, outer.counted, outer.drops

    def __getattr__(self, name: str) -> Any:
        if name == "plan":
            return self._scopes.current().own
        raise AttributeError(name)

    def check_told(self, what: str) -> None:
        """Raise `RoutingError` where `what` runs in a backward pass that did not begin this scope: it may compute part
        of some forward pass again, and nobody knows of which."""
        task = torch._C._current_graph_task_id()
        if task not in (-1, self._backward):
            raise errors.RoutingError(
                f"{what} runs in a backward pass, and it cannot be told which adapters it had in the forward pass. "
                f"torch.utils.checkpoint hands them over: use it in place of a checkpointing of your own, or name "
                f"adapters in the call (adapter_names=)"
            )

    def hide(self) -> None:
        """Make who reads `plan` ask what counts."""
        self.__dict__.pop("plan", None)

    def forget(self) -> None:
        """Let go of what has ended around it, or chains of that would grow while scopes overlap."""
        self._before = _remaining(self._before)
        while self.outer is not None and not self.outer.open:
            self.outer = self.outer.outer

    def lineage(self) -> Iterator[Scope]:
        """Itself and what it is inside of."""
        scope: Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.outer


class Scopes:
    """Those of one patched model. `active` has the one that began last in this context, and layers read it there."""

    live: ClassVar[WeakSet[Scopes]] = WeakSet()

    def __init__(self) -> None:
        self._root = Scope(self, None, None, None)
        self._root.plan = None
        self.active: ContextVar[Scope] = ContextVar("mlora", default=self._root)
        self._lasting = {self._root: None}  # that are open, and no calls
        self._suspendable: dict[Scope, None] = {}  # of those the ones that began in generators
        self.lock = threading.RLock()  # the runtime's: a generator may be collected, and end its scope, under any
        Scopes.live.add(self)

    def current(self) -> Scope:
        """The scope that code runs in here; one without a plan where nothing is routed.

        Raises:
            RoutingError: it has ended, or cannot be told.
        """
        active = self.active.get()
        if active.open and not self._suspendable:
            return active
        active = self._settled()
        found = self._found(active)
        if found is active and active.open:
            return found
        if found in active.lineage():
            if active.open:
                raise errors.RoutingError(
                    "use_adapters was opened in a generator that now waits inside of it, and it cannot be told whether "
                    "it was opened for this call too. Name adapters in the call (adapter_names=, '__base__' for none), "
                    "close the generator, or make it a context manager (contextlib.contextmanager)"
                )
            raise errors.RoutingError(
                "the use_adapters or call in which this task or thread was started has ended; name adapters in the "
                "call (adapter_names=), or open use_adapters inside of the task or thread"
            )
        return found

    def begin(self, plan: Plan | None, entries: Any, *, lasting: bool = False, kept: bool = False) -> Scope:
        """A scope of this plan. A `lasting` one may end before others that begin in it, and wait in a generator."""
        before = self._settled()
        outer = self._found(before)
        if before is not self._root:
            before.forget()
            outer.forget()
        scope = Scope(self, outer if outer.open else self._root, plan, entries)
        scope._before, scope._token = before, _HERE.set(None)
        if kept:
            scope.kept, scope._backward = True, outer._backward
        if lasting:
            scope.frame = frames.generator()
            self._add(scope)
        else:
            scope.plan = plan
        self.active.set(scope)
        return scope

    def end(self, scope: Scope) -> None:
        """From any context, and in any order."""
        with self.lock:
            scope.open, scope.own = False, None
            scope.hide()
            if scope in self._lasting:
                del self._lasting[scope]
                if self._suspendable.pop(scope, self) is None:
                    scope.frame = None
                    for alias in [alias for alias in self._suspendable if alias.source is scope]:
                        self.end(alias)
                self._show()
        self._settled()

    def handed(self) -> Scope | None:
        """What is to be in the variable for code that another thread will run; None where nothing is routed here. The
        scope of a generator, which does not run there, has one to stand for it."""
        active = self._settled()
        found = self._found(active)
        if found is not active and found in active.lineage():
            return active  # it cannot be told here, nor there
        if found.frame is None:
            return None if found is self._root else found
        scope = Scope(self, found, found.own, found.entries)
        scope.source = found.source or found
        self._add(scope)
        if not scope.source.open:
            self.end(scope)
        return scope

    @contextmanager
    def inside(self, scope: Scope, frame: FrameType | None = None) -> Iterator[None]:
        """Run what was handed over with `scope`: in a thread of its own, or else in this frame."""
        token = self.active.set(scope)
        if scope.source is not None:
            scope.frame = frame
        try:
            yield
        finally:
            self.active.reset(token)
            if scope.source is not None:
                self.end(scope)

    def clear(self) -> None:
        """Leave nothing in the variable of this context."""
        self.active.set(self._root)

    def _add(self, scope: Scope) -> None:
        with self.lock:
            self._lasting[scope] = None
            if scope.frame is not None or scope.source is not None:
                self._suspendable[scope] = None
            self._show()

    def _show(self) -> None:
        """Let layers read lasting scopes' plans in passing where no other can count."""
        for scope in self._lasting:
            if self._suspendable:
                scope.hide()
            else:
                scope.plan = scope.own

    def _settled(self) -> Scope:
        """What is in the variable, after what has ended of that which began in this context."""
        scope = self.active.get()
        if not scope.open:
            scope = _remaining(scope)
            self.active.set(scope)
        return scope

    def _found(self, active: Scope) -> Scope:
        """Of `active`, what is around it, and the generators that run: the innermost that is no waiting generator's."""
        if not self._suspendable:
            return active
        by_frame = {scope.frame: scope for scope in tuple(self._suspendable)}  # of one frame's the last
        running = [by_frame[frame] for frame in frames.running() if frame in by_frame]
        found = active
        while (found.frame is not None and found not in running) or not (found.open or found is active):
            assert found.outer is not None  # the root has neither a frame nor an end
            found = found.outer
        inner = running[0] if running else found
        return found if inner in found.lineage() else inner


_HERE: ContextVar[None] = ContextVar("mlora_here")  # a token can be used in the context that gave it only


def _remaining(scope: Scope) -> Scope:
    """`scope`, or if it has ended what counts in its place: what was active before it; or if it began in another
    context, of which this one is a copy made inside of it, what it went on with. Else the one that has ended."""
    while not scope.open:
        if _began_here(scope):
            scope = scope._before
        elif scope.kept and scope.outer is not None:
            scope = scope.outer
        else:
            break
    return scope


def _began_here(scope: Scope) -> bool:
    """In this context; asked once."""
    if scope._token is None:
        return False
    try:
        _HERE.reset(scope._token)
    except (ValueError, RuntimeError):  # it is another context's; it was used there
        return False
    return True
