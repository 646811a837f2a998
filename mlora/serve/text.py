"""Tokens become text one by one, and text ends where a stop string begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_CONTEXT = 6  # tokens of the prompt that the first ones of an answer are decoded behind
_INCOMPLETE = "\ufffd"  # what a decoder writes for bytes that are no whole letter yet


class Detokenizer:
    """The text of an answer, as far as it is certain.

    A token's text may depend on those before it (spaces, letters of several tokens). So the last few tokens are decoded
    with the new ones and without them, and what one has more than the other is new, unless it ends in the middle of a
    letter.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids = list(prompt[-_CONTEXT:])
        self._start, self._read = 0, len(self._ids)  # decoded behind _start; told up to _read
        self._told = self._decode(self._ids)

    def push(self, token: int) -> str:
        """What the next token adds; empty while it is uncertain."""
        self._ids.append(token)
        text = self._decode(self._ids[self._start :])
        if len(text) <= len(self._told) or text.endswith(_INCOMPLETE):
            return ""
        return self._tell(text)

    def rest(self) -> str:
        """What is left when no token follows, letters that are not whole included."""
        return self._tell(self._decode(self._ids[self._start :]))

    def _tell(self, text: str) -> str:
        new = text[len(self._told) :]
        self._start, self._read = self._read, len(self._ids)
        self._told = self._decode(self._ids[self._start :])
        return new

    def _decode(self, ids: Sequence[int]) -> str:
        return str(
            self._tokenizer.decode(ids, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False)
            if ids
            else ""
        )


class StopStrings:
    """Text passes through until one of `stops` is in it. An end that may begin one is held back."""

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._stops = stops
        self._include = include
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What may be told now."""
        text = self._held + text
        places = [(text.find(stop), len(stop)) for stop in self._stops if stop in text]
        if places:  # the one that is complete first; of several, the longest
            start, length = min(places, key=lambda place: (sum(place), -place[1]))
            self.found, self._held = True, ""
            return text[: start + length if self._include else start]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back, when no text follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How long the longest end of `text` is that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
