"""Who is next: one line for each entry, and turns between the lines."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """What can wait. `key`: of its line. `passed`: how often others were taken although it was its turn."""

    @property
    def key(self) -> Hashable: ...

    passed: int


T = TypeVar("T", bound=Waiting)


class Full(Exception):
    """The queue, or the line, has as many as it may have."""


class Queue(Generic[T]):
    """Items that wait. Each belongs to a line by its key, and lines take turns: the oldest item of one, then it is the
    next line's turn, so that a line of thousands keeps nobody in another waiting for more than one item.

    Args:
        most: how many items may wait together. `most_in_line`: in one line.
        patience: an item whose turn it is and that does not fit is passed over so often; then all wait for it.

    Not thread-safe.
    """

    def __init__(self, most: int, most_in_line: int, patience: int) -> None:
        self._most = most
        self._most_in_line = most_in_line
        self._patience = patience
        self._lines: OrderedDict[Hashable, deque[T]] = OrderedDict()  # whose turn it is first
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[T]:
        return (item for line in self._lines.values() for item in line)

    def put(self, item: T) -> None:
        """At the end of its line. Raises `Full`."""
        line = self._lines.get(item.key, ())
        if self._size >= self._most or len(line) >= self._most_in_line:
            raise Full
        self._lines.setdefault(item.key, deque()).append(item)
        self._size += 1

    def put_back(self, item: T) -> None:
        """One that was taken and did not fit after all: first of its line, whose turn it is again."""
        item.passed += 1
        self._lines.setdefault(item.key, deque()).appendleft(item)
        self._lines.move_to_end(item.key, last=False)
        self._size += 1

    def take(self, fits: Callable[[T], bool]) -> T | None:
        """The next item that fits; None if there is none, or if one that does not has waited long enough."""
        passed: list[T] = []
        for line in self._lines.values():
            item = line[0]
            if fits(item):
                for other in passed:
                    other.passed += 1
                self.remove(item)
                if item.key in self._lines:
                    self._lines.move_to_end(item.key)
                return item
            if item.passed >= self._patience:
                return None
            passed.append(item)
        return None

    def remove(self, item: T) -> None:
        """Take out one that waits."""
        line = self._lines[item.key]
        line.remove(item)
        self._size -= 1
        if not line:
            del self._lines[item.key]
