"""The rows of a long-form transcription by Whisper, which decodes a segment of each audio that is not at its end, and
again, under the next temperature, those rows whose result it does not trust."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

from torch import Tensor

from .router import Router


class Fallbacks:
    """Routes the entries of one segment's rows, and of those that are decoded again.

    Args:
        entries: of each row of the segment.
        expansion: beams of a row.
        least: how many rows a batch has at least: it is filled up with rows that are thrown away.
        segment: the features that were cut out, (rows, ...).
    """

    def __init__(self, router: Router, entries: Sequence[Any], expansion: int, least: int, segment: Any) -> None:
        self.segment: Tensor | None = segment
        self._router = router
        self._entries = list(entries)
        self._now = self._entries
        self._expansion = expansion
        self._least = least
        self._again: list[bool] = []
        self._open = ExitStack()

    def __enter__(self) -> Fallbacks:
        self._open.enter_context(self._routed(self._now))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._open.close()

    def told(self, again: bool) -> None:
        """Whether the next row of those that were decoded is decoded again. After the last one those are routed."""
        self._again.append(again)
        if len(self._again) == len(self._now):
            rows = [entry for entry, wanted in zip(self._now, self._again, strict=True) if wanted]
            self._again = []
            if rows and len(rows) < len(self._now):
                self._now = rows
                self._open.close()
                self._open.enter_context(self._routed(rows))

    def whole(self) -> Any:
        """Routes the whole segment, which is looked at again for silence while some rows of it are decoded."""
        return self._routed(self._entries)

    @contextmanager
    def _routed(self, entries: Sequence[Any]) -> Iterator[None]:
        filled = [*entries, *[None] * (self._least - len(entries))]
        with self._router.route(filled, len(filled), self._expansion):
            yield
