"""The prompts file of `mlora generate`: JSON lines, checked before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import InputError


def read_lines(file: Path, known: set[str]) -> list[dict[str, Any]]:
    """The lines of a prompts file, checked before any model is loaded; an InputError names the line."""
    try:
        # splitlines() would also cut where JSON has plain letters; some editors put a mark first, others do not.
        texts = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read --input: {error}") from None
    lines = []
    for number, text in enumerate(texts, start=1):
        if text.strip():
            try:
                lines.append(_check_line(json.loads(text), known))
            except ValueError as error:
                raise InputError(f"{file} line {number}: {error}") from None
    if not lines:
        raise InputError(f"{file} has no prompts")
    return lines


def _check_line(line: Any, known: set[str]) -> dict[str, Any]:
    if not isinstance(line, dict) or not isinstance(line.get("prompt"), str):
        raise InputError('wanted an object with a string "prompt"')
    json.dumps(line, ensure_ascii=False).encode()  # as it will be written: half a surrogate pair is no text
    from mlora.merge import as_merge, is_weight

    entry = line.get("adapter")
    if (merge := as_merge(entry)) is not None:
        names: set[str | None] = set(merge.adapters)
    elif isinstance(entry, dict):
        for name, weight in entry.items():
            if not is_weight(weight):
                raise InputError(f"the weight of {name!r} is {weight!r}, wanted a finite number")
        names = set(entry)
    elif entry is None or isinstance(entry, str):
        names = {entry} - {None, "__base__"}
    else:
        raise InputError(f'"adapter" is {entry!r}, wanted a name, null, an object of weights or a merge')
    if unknown := names - known:
        wanted = ", ".join(sorted(known)) or "none given"
        raise InputError(f"unknown adapter {min(map(str, unknown))!r} (there are: {wanted})")
    return line


def check_tokens(file: Path, lines: list[dict[str, Any]], tokenizer: Any) -> None:
    """Refuse prompts that are no tokens by themselves: there is nothing to go on from."""
    prompts = [line["prompt"] for line in lines]
    for prompt, ids in zip(prompts, tokenizer(prompts, add_special_tokens=True)["input_ids"], strict=True):
        if not ids:
            raise InputError(f"{file}: the prompt {prompt!r} gives no token, so that --raw has nothing to complete")
