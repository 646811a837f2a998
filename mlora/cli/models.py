"""Base models and their tokenizers, as the commands load them."""

from __future__ import annotations

from typing import Any

import torch

from .demo_model import resolve_model


def load_tokenizer(model: str | None) -> Any:
    """The tokenizer of `load_model`'s model, ready to pad. Raises as that does."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(resolve_model(model)))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(model: str | None) -> Any:
    """The causal language model, on the GPU if there is one.

    `model` is a hub id or a folder; None stands for the demo's own small model. Raises OSError or
    ValueError when it cannot be read.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    loaded = AutoModelForCausalLM.from_pretrained(str(resolve_model(model)), dtype="auto").eval()
    return loaded.to("cuda" if torch.cuda.is_available() else "cpu")
