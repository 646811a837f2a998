"""A tiny chat model in a folder: its tokens are the numbers' own words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = 67  # as many as the tiny models have
TEMPLATE = "{% for m in messages %}3 {{ m['content'] }} 4 {% endfor %}"


def tokenizer(template: str | None = TEMPLATE, new: tuple[str, ...] = (), pad: str | None = "2") -> Any:
    core = Tokenizer(models.WordLevel({str(word): word for word in range(WORDS)}, unk_token="2"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=pad, unk_token="2")
    fast.add_tokens(list(new))
    fast.chat_template = template
    return fast


def save(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer(**options).save_pretrained(folder)
    return folder
