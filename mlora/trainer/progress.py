"""How far each run is, on stderr: a bar a run on a terminal, now and then a line a run elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

SECONDS = 20.0  # between two lines of a run


class Told(Protocol):
    def step(self, name: str, step: int, record: Mapping[str, Any]) -> None: ...

    def end(self, name: str, how: str) -> None: ...


@contextmanager
def shown(totals: Mapping[str, tuple[int, int]], wanted: bool) -> Iterator[Told]:
    """Args:
    totals: run -> the steps that it has taken, and all of them. `wanted`: False tells nothing.
    """
    if not wanted:
        yield _Silent()
    elif sys.stderr.isatty():
        with _bars() as bars:
            yield _Bars(bars, totals)
    else:
        yield _Lines(totals)


class _Silent:
    def step(self, name: str, step: int, record: Mapping[str, Any]) -> None:
        pass

    def end(self, name: str, how: str) -> None:
        pass


class _Lines:
    def __init__(self, totals: Mapping[str, tuple[int, int]]) -> None:
        self._totals = totals
        self._last = dict.fromkeys(totals, time.monotonic())

    def step(self, name: str, step: int, record: Mapping[str, Any]) -> None:
        if "eval_loss" in record or time.monotonic() - self._last[name] >= SECONDS:
            self._last[name] = time.monotonic()
            print(f"mlora: {name} step {step} of {self._totals[name][1]}, {_figures(record)}", file=sys.stderr)

    def end(self, name: str, how: str) -> None:
        print(f"mlora: {name} {how}", file=sys.stderr)


class _Bars:
    def __init__(self, bars: Any, totals: Mapping[str, tuple[int, int]]) -> None:
        from rich.markup import escape

        self._bars, self._escape = bars, escape
        self._tasks = {
            name: bars.add_task(escape(name), total=total, completed=done, figures="")
            for name, (done, total) in totals.items()
        }
        self._figures: dict[str, dict[str, Any]] = {name: {} for name in totals}

    def step(self, name: str, step: int, record: Mapping[str, Any]) -> None:
        self._figures[name].update(record)
        self._bars.update(self._tasks[name], completed=step, figures=_figures(self._figures[name]))

    def end(self, name: str, how: str) -> None:
        figures = f"{_figures(self._figures[name])} {self._escape(how)}"
        self._bars.update(self._tasks[name], figures=figures)
        self._bars.stop_task(self._tasks[name])


def _bars() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[figures]}"), console=Console(stderr=True))


def _figures(record: Mapping[str, Any]) -> str:
    told = (("loss", "loss"), ("eval_loss", "evaluation"))
    return ", ".join(f"{word} {record[key]:.4f}" for key, word in told if record.get(key) is not None)
