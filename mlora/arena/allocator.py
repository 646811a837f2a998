"""First-fit allocation in one range of elements."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable


class Allocator:
    """First fit over `capacity` elements. Spans are disjoint; free neighbours are one hole.

    `alloc` and `free` take O(number of spans). Offsets and sizes are in elements; sizes are whatever
    the caller asks for, so alignment is kept by asking for aligned sizes only.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.spans: list[tuple[int, int]] = []  # (offset, size), sorted

    @property
    def free_size(self) -> int:
        return self.capacity - sum(size for _, size in self.spans)

    def alloc(self, size: int) -> int | None:
        """The lowest offset where `size` elements fit, now taken; None where there is no such hole."""
        end = 0
        for index, (offset, taken) in enumerate([*self.spans, (self.capacity, 0)]):
            if offset - end >= size:
                self.spans.insert(index, (end, size))
                return end
            end = offset + taken
        return None

    def free(self, offset: int) -> None:
        """Give back the span that `alloc` returned as `offset`."""
        index = bisect_left(self.spans, (offset, 0))
        if index == len(self.spans) or self.spans[index][0] != offset:
            raise ValueError(f"no span starts at {offset}")
        del self.spans[index]

    def hole(self, offset: int) -> tuple[int, int]:
        """The free range around `offset`, (start, end); it is empty where a span has it."""
        index = bisect_left(self.spans, (offset + 1, 0))
        start = sum(self.spans[index - 1]) if index else 0
        end = self.spans[index][0] if index < len(self.spans) else self.capacity
        return (start, end) if start <= offset else (offset, offset)

    def compact(self, fixed: Iterable[int] = ()) -> list[tuple[int, int, int]]:
        """Slide spans to the lowest offsets, except those at the offsets `fixed`.

        Returns the moves (from, to, size) in an order in which none overwrites a span that has yet to
        move; source and target of one move may overlap.
        """
        pinned = set(fixed)
        moves, spans, end = [], [], 0
        for offset, size in self.spans:
            if offset not in pinned and offset != end:
                moves.append((offset, end, size))
                offset = end
            spans.append((offset, size))
            end = offset + size
        self.spans = spans
        return moves
