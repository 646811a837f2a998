"""Lines -> tokens, each by the tokenizer and in the chat template of its adapters, before the model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .errors import InputError, as_input_errors
from .served import Served


@dataclass(frozen=True)
class Prompts:
    """One a line: its tokens, its entry, and what turns its answer into text. `pad` is a token of the base's."""

    ids: list[list[int]]
    entries: list[Any]
    tokenizers: list[Any]
    pad: int


def encode_lines(
    lines: Sequence[dict[str, Any]], entries: Sequence[Any], served: Served, raw: bool, base_tokenizer: bool
) -> Prompts:
    """Raises InputError for a line that cannot be one prompt: its adapters' tokenizers differ, there is no chat
    template, the template refuses it, or it gives no token."""
    from mlora.serve.tokenizers import files_of, own_tokenizer, serving

    from . import models
    from .chat import encode

    base = models.load_tokenizer(served.model)
    own = {}
    for name, source in () if base_tokenizer else served.sources.items():
        hub = {key: source.loading.get(key) for key in ("revision", "token")}
        with as_input_errors():
            own[name] = own_tokenizer(name, files_of(name, source.source, source.folder, **hub), base) or base
    ids, tokenizers = [], []
    for number, (line, entry) in enumerate(zip(lines, entries, strict=True), start=1):
        if raw and "messages" in line:
            raise InputError(f'prompt {number}: --raw has no template for "messages"; wanted "prompt"')
        prompt = line["messages"] if "messages" in line else line["prompt"]
        try:
            tokenizer = serving(served.members(entry), base, own, raw)
            tokens = encode(tokenizer, prompt, raw)
        except Exception as error:  # templates raise what they like
            raise InputError(f"prompt {number}: {error}") from None
        if not tokens:
            raise InputError(f"prompt {number}: {prompt!r} gives no token, so that there is nothing to complete")
        ids.append(tokens)
        tokenizers.append(tokenizer)
    return Prompts(ids, list(entries), tokenizers, base.pad_token_id if base.pad_token_id is not None else 0)
