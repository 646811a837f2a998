"""Which weights of the base a lowering reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_noted: ContextVar[dict[tuple[str, str], None] | None] = ContextVar("noted", default=None)


@contextmanager
def noting() -> Iterator[dict[tuple[str, str], None]]:
    """What is read inside: (dotted path, "weight" or "bias"), in the order of reading."""
    noted: dict[tuple[str, str], None] = {}
    token = _noted.set(noted)
    try:
        yield noted
    finally:
        _noted.reset(token)


def note(path: str, what: str) -> None:
    """It is being read."""
    noted = _noted.get()
    if noted is not None:
        noted[path, what] = None
