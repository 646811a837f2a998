"""Rows of a data set: mappings of columns, read from what users have."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from .. import errors

Row: TypeAlias = Mapping[str, Any]
Rows: TypeAlias = str | Path | Iterable[Row]

_TABLES = {".csv": ",", ".tsv": "\t"}
_SEPARATORS = ",;\t|"
_LINES = (".jsonl", ".ndjson", ".json")


def read_rows(source: Rows, *, split: str = "train") -> Sequence[Row]:
    """The rows of a data set.

    Args:
        source: a file of JSON lines (`.jsonl`, `.ndjson`), JSON (`.json`: a list of objects, or lines), or a table with
            a header (`.csv`, `.tsv`); whatever else `datasets.load_dataset` takes by one string, where that library is
            installed: a hub id, a folder; or rows that are there already, a `datasets.Dataset` among them.
        split: of what `datasets` reads.

    Raises:
        DataError: there is no such file, a row of it cannot be read (the message names its line), or it has none.
    """
    rows: Sequence[Row]
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        suffix = path.suffix.lower()
        if suffix in _LINES or suffix in _TABLES:
            text = _text(path)
            rows = _table(path, text, _TABLES[suffix]) if suffix in _TABLES else _json(path, text)
        elif path.is_file():
            raise errors.DataError(f"{path} is none of the files that are read: {', '.join((*_LINES, *_TABLES))}")
        else:
            rows = _with_datasets(str(source), split)
    elif isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise errors.DataError(f"a data set is {source!r}; wanted a file, a hub id, or rows, each a mapping of columns")
    else:
        given: Iterable[Row] = source
        rows = given if isinstance(given, Sequence) else list(given)
    if not len(rows):
        raise errors.DataError(f"{_called(source)} has no rows")
    return rows


def _called(source: Any) -> str:
    return str(source) if isinstance(source, (str, Path)) else "the data set"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise errors.DataError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise errors.DataError(f"cannot read {path}: its line {line} is not UTF-8; save it in UTF-8") from None


def _json(path: Path, text: str) -> Sequence[Row]:
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise errors.DataError(f"{path}{_why(error)}; wanted a list of objects, or one object a line") from None
        numbered = list(enumerate(rows, start=1))
        what = "row"
    else:
        numbered, what = [], "line"
        for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would cut inside of strings, too
            if line.strip():
                try:
                    numbered.append((number, json.loads(line, object_pairs_hook=_once)))
                except (ValueError, RecursionError) as error:
                    raise errors.DataError(f"{path}{_why(error, number)}; wanted one JSON object a line") from None
    for number, row in numbered:
        if not isinstance(row, dict):
            raise errors.DataError(f"{path} {what} {number} is {_short(row)}; wanted an object of columns")
    return [row for _, row in numbered]


def _why(error: Exception, line: int | None = None) -> str:
    """Where the JSON of a file, or of a line of it, ends to be any, and what is wrong."""
    if not isinstance(error, json.JSONDecodeError):
        return f"{'' if line is None else f' line {line}'}: {error}"
    return f" line {error.lineno if line is None else line} column {error.colno}: {error.msg}"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, of which json keeps the last of two values."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} comes twice")
    return found


def _table(path: Path, text: str, delimiter: str) -> Sequence[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows = []
    limit = csv.field_size_limit(max(len(text), csv.field_size_limit()))  # of the process; 128 KiB at first
    try:
        header = reader.fieldnames or []
        if len(header) == 1 and (other := next((mark for mark in _SEPARATORS if mark in header[0]), None)):
            raise errors.DataError(
                f"{path}: its header {header[0]!r} is one column with a {other!r} in it; wanted commas between "
                f"the columns of a .csv, tabs in a .tsv"
            )
        if len(set(header)) != len(header):
            raise errors.DataError(f"{path}: its header {header} has a column twice")
        for row in reader:
            if None in row or None in row.values():
                raise errors.DataError(
                    f"{path} line {reader.line_num} has another number of columns than the header {header}"
                )
            rows.append(row)
    except csv.Error as error:
        raise errors.DataError(f"{path} line {reader.line_num}: {error}") from None
    finally:
        csv.field_size_limit(limit)
    return rows


def _with_datasets(source: str, split: str) -> Sequence[Row]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise errors.DataError(
            f"{source!r} is no .jsonl, .json, .csv or .tsv file; pip install datasets to read hub ids and folders"
        ) from None
    try:
        rows: Sequence[Row] = load_dataset(source, split=split)
    except Exception as error:  # the library's errors have no common base
        reason = " ".join(str(error).split()) or type(error).__name__
        raise errors.DataError(f"{source!r} could not be read by datasets.load_dataset: {reason}") from None
    return rows


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
