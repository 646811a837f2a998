"""What a command is doing, on stderr: a spinner and a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

SECONDS = 10.0  # between two lines


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class Progress:
    """`quiet`: say nothing."""

    def __init__(self, quiet: bool = False) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False, quiet=quiet)

    def note(self, text: str) -> None:
        if not self.console.quiet:
            typer.echo(f"mlora: {text}", err=True)

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """`text` is what the block does."""
        if not self.console.is_terminal:
            self.note(text)
            yield
            return
        from rich.markup import escape

        with self.console.status(escape(text)):
            yield

    def track(self, modules: Iterable[Any], total: int) -> Iterator[Any]:
        """`modules`, as they are merged."""
        with self.counting("modules merged", 0, total) as count:
            for number, module in enumerate(modules, start=1):
                yield module
                count(number)

    @contextmanager
    def counting(self, text: str, done: int, total: int) -> Iterator[Callable[[int], None]]:
        """The block calls what it is given with how many are done by then."""
        if not self.console.is_terminal:
            last = time.monotonic()

            def line(done: int) -> None:
                nonlocal last
                if done == total or time.monotonic() - last >= SECONDS:
                    self.note(f"{text}: {done} of {total}")
                    last = time.monotonic()

            yield line
            return
        from rich.markup import escape
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Bar(*columns, console=self.console) as bar:
            task = bar.add_task(escape(text), total=total, completed=done)
            yield lambda done: bar.update(task, completed=done)
