"""Options that several commands have."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from .errors import InputError

ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Hub id or folder; default: SmolLM2-135M-Instruct.", show_default=False),
]


def parse_size(text: str) -> int:
    """Bytes, of `--memory`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([KMGT])(i?))?B?", text.strip(), re.IGNORECASE)
    if found is None:
        raise InputError(f"--memory {text!r}: wanted bytes, or a size such as 512MiB, 2GiB or 2GB")
    number, prefix, binary = found.groups()
    size = int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(prefix.upper()) + 1 if prefix else 0))
    if size < 1:
        raise InputError(f"--memory {text!r}: wanted at least one byte")
    return size
