"""The frames that are running: which generator a `with` is opened in, and whether it runs now or waits.

A generator shares its caller's context variables, so those alone do not tell what it routes from what its caller does.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from types import FrameType

_GENERATORS = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_COROUTINES = inspect.CO_COROUTINE | inspect.CO_ITERABLE_COROUTINE


def running() -> Iterator[FrameType]:
    """Of this thread, from the innermost outwards."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def generator() -> FrameType | None:
    """The innermost generator that is running, and may wait with what it opens still open; None if there is none.

    Those that contextlib makes context managers of are left out: what they open is for their caller. So are coroutines
    in an event loop, which gives each task context variables of its own; one that is run by hand is a generator.
    """
    looped = sys.get_asyncgen_hooks() != (None, None)  # as every event loop sets them
    wanted = _GENERATORS if looped else _GENERATORS | _COROUTINES
    for frame in running():
        if frame.f_code.co_flags & wanted and not (_contextlib(frame) or _contextlib(frame.f_back)):
            return frame
    return None


def _contextlib(frame: FrameType | None) -> bool:
    return frame is not None and frame.f_globals is vars(contextlib)
