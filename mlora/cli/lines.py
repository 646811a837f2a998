"""The prompts file of `mlora generate`: JSON lines, checked before a model is loaded."""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from .adapters import BASE
from .errors import InputError

READ = ("prompt", "messages", "adapter")
WRITTEN = "completion"

# Fields that other programs read, and that would be lost here without a word.
_OPTIONS = {
    "model": "--model", "base_model": "--model", "max_new_tokens": "--max-new-tokens", "max_tokens": "--max-new-tokens",
    "temperature": "--temperature", "top_p": "--top-p", "top_k": "--top-k", "do_sample": "--do-sample",
    "seed": "--seed", "raw": "--raw", "batch_size": "--batch-size", "dtype": "--dtype", "device": "--device",
}  # fmt: skip
_MERGES = ("weight", "weights", "merge", "merge_strategy", "combination_type", "density", "majority_sign_method")
_CHATS = ("system", "system_prompt", "role", "content", "conversation", "conversations", "message")
_UNSERVED = ("stop", "stop_sequences", "tools", "chat_template", "chat_template_kwargs", "num_beams", "n")
_ADAPTERS = ("adapter", "adapters", "lora", "loras", "peft")


def read_lines(file: Path, known: Collection[str]) -> list[dict[str, Any]]:
    """The checked lines of a prompts file, or of stdin for `-`; an InputError names the line.

    Args:
        known: the names that lines may use.
    """
    name = "stdin" if file == Path("-") else str(file)
    try:
        data = sys.stdin.buffer.read() if file == Path("-") else file.read_bytes()
        # splitlines() would also cut where JSON has plain letters; some editors put a mark first, others do not.
        texts = data.decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read --input {name}: {error}") from None
    lines = []
    for number, text in enumerate(texts, start=1):
        if text.strip():
            try:
                lines.append(_check_line(json.loads(text, object_pairs_hook=_unique), known))
            except json.JSONDecodeError as error:
                where = f"{error.msg} at column {error.colno}"
                raise InputError(f"{name} line {number}: {where}; wanted one JSON object a line") from None
            except (ValueError, RecursionError) as error:
                raise InputError(f"{name} line {number}: {error}") from None
    if not lines:
        raise InputError(f"{name} has no prompts")
    return lines


def copied_fields(lines: list[dict[str, Any]]) -> list[str]:
    """The fields that are copied to the output and not read."""
    return sorted({key for line in lines for key in line} - {*READ, WRITTEN})


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise InputError(f"{key!r} is there twice")
        found[key] = value
    return found


def _check_line(line: Any, known: Collection[str]) -> dict[str, Any]:
    if not isinstance(line, dict):
        raise InputError('wanted an object with a string "prompt"')
    for key in line:
        if key not in READ and (hint := _misread(key)):
            raise InputError(f'"{key}" is not read{hint}')
    if "messages" in line:
        if "prompt" in line:
            raise InputError('it has both "prompt" and "messages"; wanted one of them')
        _check_messages(line["messages"])
    elif not isinstance(line.get("prompt"), str):
        near = difflib.get_close_matches("prompt", list(line), 1, 0.5) if "prompt" not in line else []
        hint = f', not "{near[0]}"' if near else ""
        raise InputError(f'wanted an object with a string "prompt"{hint}, or a chat as "messages"')
    json.dumps(line, ensure_ascii=False).encode()  # as it will be written: half a surrogate pair is no text
    _check_entry(line.get("adapter"), known)
    return line


def _misread(key: str) -> str:
    """What to say of a field that has a meaning elsewhere; empty for one that is merely copied."""
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", key)]
    plain = "_".join(words)
    words.append(key.lower())
    if any(word in _ADAPTERS or difflib.get_close_matches(word, ["adapter"], 1, 0.75) for word in words):
        return ': did you mean "adapter"?'
    if plain in READ or difflib.get_close_matches(plain, ["messages"], 1, 0.9):
        return f': did you mean "{plain if plain in READ else "messages"}"?'
    if plain in _OPTIONS:
        option = _OPTIONS[plain]
        return f": {option} is for all lines" + ('; "adapter" is for one' if option == "--model" else "")
    if plain in _MERGES:
        return ': a merge is an object, and that the value of "adapter"'
    if plain in _CHATS:
        return ': a chat is a list of {"role": ..., "content": ...} in "messages"'
    return ", and there is no option for it" if plain in _UNSERVED else ""


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise InputError('"messages" is a list of {"role": ..., "content": ...}, with at least one')
    for message in messages:
        parts = [message.get(key) for key in ("role", "content")] if isinstance(message, dict) else [None]
        if not all(isinstance(part, str) for part in parts):
            raise InputError(f'a message is {message!r}, wanted {{"role": TEXT, "content": TEXT}}')


def _check_entry(entry: Any, known: Collection[str]) -> None:
    if entry is None or entry == BASE:
        return
    names: Collection[Any]
    if isinstance(entry, str):
        names = [entry]
    elif isinstance(entry, dict):
        from mlora.merge import as_merge, is_weight

        if (merge := as_merge(entry)) is not None:
            names = merge.adapters
        else:
            for name, weight in entry.items():
                if not is_weight(weight):
                    raise InputError(f"the weight of {name!r} is {weight!r}, wanted a finite number")
            names = list(entry)
    else:
        raise InputError(f'"adapter" is {entry!r}, wanted a name, null, an object of weights or a merge')
    if unknown := sorted(set(names) - set(known)):
        near = difflib.get_close_matches(unknown[0], list(known), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        wanted = ", ".join(sorted(known)) or "none given"
        raise InputError(f"unknown adapter {unknown[0]!r} (there are: {wanted}){hint}")


def names_in(entry: Any, merges: Mapping[str, Any]) -> list[str]:
    """The adapters that an entry uses. `merges`: name -> the Merge that an entry may name."""
    if entry is None or entry == BASE:
        return []
    if isinstance(entry, str):
        return (
            [name for part in merges[entry].adapters for name in names_in(part, merges)] if entry in merges else [entry]
        )
    from mlora.merge import as_merge

    merge = as_merge(entry)
    parts = merge.adapters if merge is not None else [name for name, weight in entry.items() if weight]
    return [name for part in parts for name in names_in(part, merges)]
