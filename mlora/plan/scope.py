"""`Scope`: what a `with use_adapters`, a call or a `generate` routes; `Scopes`: which one code runs in.

The scope that is active is a context variable: asyncio gives each task a copy, so tasks do not see each other's. Scopes
may end in any order, and in another task than they began in. One that has ended is never active again.
"""

from __future__ import annotations

from contextvars import ContextVar, Token
from typing import Any

from torch import Tensor

from .. import errors
from .activation import Activation, Prompt
from .late import Late
from .modality import Others
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
    """Made when something begins to route, from `outer`, what is active around it.

    Args:
        plan: the active plan. `entries`: those it came from. Both None where nothing is routed.

    Of the call that is running: the `length` of its sequences (0 if there is none), `unobserved`, whether nothing
    looked at the operators when it began, what its layers left for their `siblings`, `activation`, to what aLoRAs apply
    in it, the `prompt` of the `generate` that is running if it has some, `late`, what is asked of the call when it ends
    (None if none runs), and, of a model that reads more than text, what the call tells of `others`.

    Layers read `plan` of whatever scope is active. One that has ended has none: `__getattr__` finds what counts then.
    """

    __slots__ = (
        "_before", "_scopes", "_token", "activation", "entries", "late", "length", "open", "others", "plan", "prompt",
        "siblings", "unobserved",
    )  # fmt: skip

    plan: Plan | None
    _before: Scope
    _token: Token[None]

    def __init__(self, scopes: Scopes, outer: Scope | None, plan: Plan | None, entries: Any) -> None:
        self._scopes = scopes
        self.open = True
        self.plan = plan
        self.entries = entries
        self.length: int = 0 if outer is None else outer.length
        self.unobserved: bool = False if outer is None else outer.unobserved
        self.late: list[Late] | None = None if outer is None else outer.late
        self.others: Others | None = None if outer is None else outer.others
        self.prompt: Prompt | None = None if outer is None else outer.prompt
        self.activation: Activation | None = None if outer is None or outer.plan is not plan else outer.activation
        self.siblings: Siblings | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "plan":
            return self._scopes.current().plan
        raise AttributeError(name)


class Scopes:
    """Those of one patched model. `active` has the one that began last in this context, and layers read it there."""

    def __init__(self) -> None:
        self._root = Scope(self, None, None, None)
        self.active: ContextVar[Scope] = ContextVar("mlora", default=self._root)

    def current(self) -> Scope:
        """The scope that code runs in here; one without a plan where nothing is routed.

        Raises:
            RoutingError: it has ended.
        """
        scope = self._settled()
        if not scope.open:
            raise errors.RoutingError(
                "the use_adapters or call in which this task or thread was started has ended; name adapters in the "
                "call (adapter_names=), or open use_adapters inside of the task or thread"
            )
        return scope

    def begin(self, plan: Plan | None, entries: Any) -> Scope:
        before = self._settled()
        scope = Scope(self, before if before.open else self._root, plan, entries)
        if before is not self._root:
            before._before = _remaining(before._before)  # or chains of what has ended would grow
        scope._before, scope._token = before, _HERE.set(None)
        self.active.set(scope)
        return scope

    def end(self, scope: Scope) -> None:
        """From any context, and in any order."""
        scope.open = False
        del scope.plan
        self._settled()

    def _settled(self) -> Scope:
        """What is active, after what has ended of that which began in this context."""
        scope = self.active.get()
        if not scope.open:
            scope = _remaining(scope)
            self.active.set(scope)
        return scope


_HERE: ContextVar[None] = ContextVar("mlora_here")  # a token can be used in the context that gave it only


def _remaining(scope: Scope) -> Scope:
    """`scope`, or if it has ended what was active before it. One that has ended and began in another context stays:
    this context is a copy, made inside of it."""
    while not scope.open:
        try:
            _HERE.reset(scope._token)
        except (ValueError, RuntimeError):  # of another context; used there already
            break
        scope = scope._before
    return scope
