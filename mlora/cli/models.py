"""Base models and their tokenizers, as the commands load them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import InputError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
DTYPES = ("auto", "float32", "float16", "bfloat16")


def check_model(model: str | None) -> str | None:
    """`model` with ~ expanded. Raises InputError if it is neither a folder of a model nor a hub id."""
    if model is None:
        return None
    path = Path(model).expanduser() if model.startswith("~") else Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            what = "an adapter's; wanted its base" if (path / "adapter_config.json").is_file() else "no model's"
            raise InputError(f"model {model!r}: the folder has no config.json, it is {what}")
    elif path.exists():
        raise InputError(f"model {model!r} is a file; wanted a model's folder, or a hub id")
    elif not _HUB_ID.fullmatch(model):
        raise InputError(f"model {model!r}: there is no such folder, and it is not a hub id of the form 'org/name'")
    return str(path)


def check_device(device: str | None, dtype: str) -> None:
    """Raises InputError if torch does not know or have them."""
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype!r}: wanted {', '.join(DTYPES)}")
    if device is None:
        return
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--device {device!r}: wanted cpu, cuda or cuda:0, of which this machine has: {reason}"
        ) from None


@contextmanager
def _named(model: str | None) -> Iterator[None]:
    """Errors of transformers say what is wrong, and rarely with what."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        if model is None:
            raise
        reason = " ".join(str(error).split())
        what = "could not be loaded" if Path(model).is_dir() else "is no folder, and as a hub id could not be loaded"
        raise InputError(f"model {model!r} {what}: {reason}") from None


def load_tokenizer(model: str | None) -> Any:
    """The tokenizer of `load_model`'s model, ready to pad. Raises as that does."""
    from transformers import AutoTokenizer

    from .demo_model import resolve_model

    with _named(model):
        tokenizer = AutoTokenizer.from_pretrained(str(resolve_model(model)))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def positions_of(model: str | None) -> int | None:
    """How many tokens `load_model`'s model has positions for, from its config alone; None where that does not say.
    Raises as that does."""
    from transformers import AutoConfig

    from .demo_model import resolve_model

    with _named(model):
        config = AutoConfig.from_pretrained(str(resolve_model(model)))
    return getattr(config, "max_position_embeddings", None)


def load_model(model: str | None, device: str | None = None, dtype: str = "auto", split: bool = False) -> Any:
    """The causal language model.

    Args:
        model: a hub id or a folder; None stands for the demo's own small model.
        device: default: the GPU if there is one. `dtype`: one of DTYPES; "auto" is the checkpoint's.
        split: over the processes that torchrun has started, by the model's own plan.

    Raises:
        InputError: it cannot be read.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from .demo_model import resolve_model

    logging.disable_progress_bar()
    options: dict[str, Any] = {"tp_plan": "auto"} if split else {}
    with _named(model):
        loaded = AutoModelForCausalLM.from_pretrained(str(resolve_model(model)), dtype=dtype, **options).eval()
    if split:
        return loaded
    return loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
