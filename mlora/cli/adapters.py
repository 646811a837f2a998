"""`--adapter`: one grammar, [NAME=]PATH[@WEIGHT], in every command that takes it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .errors import InputError

BASE = "__base__"
GRAMMAR = "[NAME=]PATH[@WEIGHT]"


@dataclass(frozen=True)
class Given:
    """One `--adapter`. `name` is the path's last part where none was given, and the whole path where two have the same
    last part; `weight` is None where none was given."""

    option: str
    name: str
    source: str
    weight: float | None


def parse_adapters(options: Sequence[str]) -> list[Given]:
    """Raises InputError: an option is not of the grammar, or a name or a path is there twice."""
    found = [_parse(option) for option in options]
    short = [given.name for given in found]
    named: list[Given] = []
    for given in found:
        if not given.name:
            last = Path(given.source).name or given.source
            others = [Path(other.source).name for other in found if not other.name]
            given = replace(given, name=last if others.count(last) < 2 and last not in short else given.source)
        for other in named:
            if other.name == given.name and other.source == given.source:
                raise InputError(f"--adapter {given.option!r}: {given.source!r} is given twice")
            if other.name == given.name:
                raise InputError(f"--adapter {given.option!r}: the name {given.name!r} is taken by {other.source!r}")
        named.append(given)
    return named


def _parse(option: str) -> Given:
    wanted = InputError(f"--adapter {option!r}: wanted {GRAMMAR}")
    if _there(option):
        return Given(option, "", expanded(option), None)
    text, weight = option, None
    head, at, tail = option.rpartition("@")
    if at:
        weight = _number(tail)
        if weight is not None:
            text = head
        elif _there(head) or _there(head.partition("=")[2]):
            raise InputError(f"--adapter {option!r}: the weight is {tail!r}, wanted a number")
    name, equals, source = text.partition("=")
    if not equals or "://" in name:
        name, source = "", text
    elif not name:
        raise wanted
    if not source:
        raise wanted
    if name and _number(source) is not None and not _there(source):
        raise InputError(f"--adapter {option!r}: a weight follows an @, as in {name}@{source}")
    if name == BASE:
        raise InputError(f"--adapter {option!r}: the name {BASE!r} is the bare model's")
    if weight is not None and not math.isfinite(weight):
        raise InputError(f"--adapter {option!r}: the weight is {tail!r}, wanted a finite number")
    return Given(option, name, expanded(source), weight)


def find(given: Given, what: str = "--adapter") -> Path:
    """The adapter's folder or file, fetched if it is not local. Raises InputError where there is none."""
    from mlora.adapters.sources import local_path
    from mlora.errors import AdapterError

    try:
        return local_path(given.source, None, None)
    except AdapterError as error:
        path = Path(given.source)
        near: list[str] = []
        if path.parent.is_dir():
            near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir() if p.is_dir()], 1)
        hint = f" (did you mean {str(path.parent / near[0])!r}?)" if near else ""
        raise InputError(f"{what} {given.option!r}: {error}{hint}") from None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _there(path: str) -> bool:
    try:
        return bool(path) and Path(expanded(path)).exists()
    except OSError:  # no path at all: too long, or with a character that none has
        return False


def expanded(path: str) -> str:
    """A shell expands ~ at the start of an argument only."""
    return str(Path(path).expanduser()) if path.startswith("~") else path
