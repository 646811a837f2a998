"""The answers of `mlora generate`: in `OUTPUT.part` until all are there, then renamed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import typer

from .errors import InputError
from .lines import WRITTEN


class Output:
    """Open for answers. `done`: how many lines of the input have one already."""

    def __init__(self, file: TextIO, done: int = 0, keep: int | None = None) -> None:
        self._file, self.done, self._keep = file, done, keep

    def write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        if self._keep is not None:  # not before there is something to put in place of it
            self._file.truncate(self._keep)
            self._keep = None
        self._file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        self._file.flush()
        self.done += len(lines)


@contextmanager
def open_output(
    output: Path, input: Path, lines: Sequence[Mapping[str, Any]], force: bool, resume: bool
) -> Iterator[Output]:
    """Where the answers to `lines` go. What was at `output` stays until all answers are there; if the block fails,
    those that are there stay in `OUTPUT.part`.

    Raises:
        InputError: nothing can be written there, or something is there that was not to be replaced.
    """
    if output == Path("-"):
        if resume:
            raise InputError("--resume goes on after the answers in a file, and --output is stdout")
        yield Output(sys.stdout)
        return
    target = output.resolve()
    if output.is_dir() or not target.parent.is_dir():
        raise InputError(f"--output {output}: wanted a file in a folder that exists")
    if output.exists() and not output.is_file():  # a device or a pipe
        with output.open("w", encoding="utf-8") as file:
            yield Output(file)
        return
    part = target.with_name(target.name + ".part")
    for path in (target, part):
        if path.exists() and input.exists() and path.samefile(input):
            raise InputError(f"--output {output}: {path.name} is --input; wanted another file")
    if target.exists() and not force:
        raise InputError(f"--output {output} exists; wanted another file, or --force to replace it")
    done, keep = _answered(part, lines, resume)
    if done and not resume and not force:
        raise InputError(
            f"{part} has {done} answers of a run that broke off; wanted --resume to go on after them, or --force to "
            f"start anew"
        )
    try:
        file = part.open("a", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output {output}: {part} cannot be written: {error.strerror}") from None
    with file:
        out = Output(file, done if resume else 0, keep if resume else 0)
        try:
            yield out
        except BaseException:
            if part.stat().st_size == 0:
                part.unlink()
            elif out.done:
                typer.echo(
                    f"mlora: {out.done} of {len(lines)} answers are in {part}; the same command with --resume goes on",
                    err=True,
                )
            raise
        out.write(())
    part.replace(target)


def _answered(part: Path, lines: Sequence[Mapping[str, Any]], check: bool) -> tuple[int, int]:
    """How many whole lines are in `part`, and their bytes; with `check` they have to answer the first of `lines`."""
    if not part.exists():
        return 0, 0
    data = part.read_bytes()
    data = data[: data.rfind(b"\n") + 1]  # the last line may have been cut off
    answers = data.splitlines()
    if check and len(answers) > len(lines):
        raise InputError(f"{part} has {len(answers)} answers, --input {len(lines)} lines: it is of another input")
    for number, (answer, line) in enumerate(zip(answers, lines, strict=False) if check else (), start=1):
        try:
            own = json.loads(answer)
        except ValueError:
            own = None
        if not isinstance(own, dict) or WRITTEN not in own or {**own, WRITTEN: ""} != {**line, WRITTEN: ""}:
            raise InputError(f"{part} line {number} answers another line than that of --input; --force starts anew")
    return len(answers), len(data)
