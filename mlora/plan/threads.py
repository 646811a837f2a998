"""Threads go on with what is routed where they are started, and pools of threads with what is where work is submitted.

Python gives a thread context variables of its own, so `Thread.start` and `ThreadPoolExecutor.submit` are wrapped in
what hands scopes over. Where nothing is routed they do what they always did.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import copy_context
from types import FrameType
from typing import Any

from .scope import Scope, Scopes

_submitting = threading.local()  # `pool`: whether the threads that this one starts are a pool's, for anybody's work


@functools.cache
def hand_over() -> None:
    """Wrap both, once."""
    thread: Any = threading.Thread
    pool: Any = ThreadPoolExecutor
    thread.start, pool.submit = _wrapped_start(thread.start), _wrapped_submit(pool.submit)


def _wrapped_start(start: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
    @functools.wraps(start)
    def wrapped(self: threading.Thread) -> None:
        handed = [] if hasattr(_submitting, "pool") or self.ident is not None else _handed()
        if not handed:
            return start(self)
        run = self.run

        def run_inside() -> None:
            del self.run  # or the thread would hold itself
            with _inside(handed):
                run()

        self.run = run_inside  # type: ignore[method-assign]
        try:
            start(self)
        except BaseException:
            vars(self).pop("run", None)
            raise

    return wrapped


def _wrapped_submit(submit: Callable[..., Future[Any]]) -> Callable[..., Future[Any]]:
    @functools.wraps(submit)
    def wrapped(self: ThreadPoolExecutor, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        handed = _handed()
        if not handed:
            return submit(self, fn, *args, **kwargs)

        def work(*args: Any, **kwargs: Any) -> Any:
            with _inside(handed, sys._getframe()):
                return fn(*args, **kwargs)

        context = copy_context()
        for scopes, _ in handed:
            context.run(scopes.clear)
        _submitting.pool = True
        try:
            return context.run(submit, self, work, *args, **kwargs)
        finally:
            del _submitting.pool

    return wrapped


def _handed() -> list[tuple[Scopes, Scope]]:
    return [(scopes, scope) for scopes in tuple(Scopes.live) if (scope := scopes.handed()) is not None]


def _inside(handed: Sequence[tuple[Scopes, Scope]], frame: FrameType | None = None) -> ExitStack:
    with ExitStack() as stack:
        for scopes, scope in handed:
            stack.enter_context(scopes.inside(scope, frame))
        return stack.pop_all()
