"""Where commands write to. The answers of `mlora generate` are in `OUTPUT.part` until all are there, then renamed.
`OUTPUT.part.options` has the options that they depend on meanwhile."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import typer

from .errors import InputError
from .lines import WRITTEN


class Output:
    """Open for answers. `done`: how many lines of the input have one already.

    Args:
        begin: called before the first answer is written, after those of which nothing is to stay are cut off.
        keep: bytes that stay.
    """

    def __init__(self, file: TextIO, done: int = 0, keep: int = 0, begin: Callable[[], object] | None = None) -> None:
        self._file, self.done, self._keep, self._begin = file, done, keep, begin

    def write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        if self._begin is not None:  # not before there is something to put in place of it
            self._file.truncate(self._keep)
            self._begin()
            self._begin = None
        self._file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        self._file.flush()
        self.done += len(lines)


@contextmanager
def open_output(
    output: Path,
    input: Path,
    lines: Sequence[Mapping[str, Any]],
    force: bool,
    resume: bool,
    options: Mapping[str, Any],
) -> Iterator[Output]:
    """Where the answers to `lines` go. What was at `output` stays until all answers are there; if the block fails,
    those that are there stay in `OUTPUT.part`. `options`: name -> value, of those that answers depend on.

    Raises:
        InputError: nothing can be written there, or something is there that was not to be replaced, or other options
            gave the answers that are there.
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
    part, told = (target.with_name(target.name + end) for end in (".part", ".part.options"))
    for path in (target, part, told):
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
    if done and resume:
        _check_options(told, options)
    try:
        file = part.open("a", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output {output}: {part} cannot be written: {error.strerror}") from None
    with file:
        text = json.dumps(options) + "\n"
        out = Output(file, *((done, keep) if resume else (0, 0)), lambda: told.write_text(text, encoding="utf-8"))
        try:
            yield out
        except BaseException:
            if part.stat().st_size == 0:
                part.unlink()
                told.unlink(missing_ok=True)
            elif out.done:
                typer.echo(
                    f"mlora: {out.done} of {len(lines)} answers are in {part}; the same command with --resume goes on",
                    err=True,
                )
            raise
        out.write(())
    part.replace(target)
    told.unlink()


def make_folder(folder: Path, what: str) -> None:
    """Make a folder to write into. Raises InputError, in which `what` names it, where that cannot be."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{what} {folder} is a file; wanted a folder to write into")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{what} {folder}: nothing can be written there: {error.strerror}") from None


def _check_options(told: Path, options: Mapping[str, Any]) -> None:
    """Raise `InputError` unless the file, if it is there, has these options."""
    try:
        before = json.loads(told.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except ValueError:
        before = {}
    for name, value in json.loads(json.dumps(options)).items():
        if (was := before.get(name)) != value:
            raise InputError(f"--resume: {name} is {_shown(value)} and was {_shown(was)}; --force starts anew")


def _shown(value: Any) -> str:
    return "not given" if value is None else json.dumps(value)


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
