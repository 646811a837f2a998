"""Options that several commands have."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from .adapters import GRAMMAR
from .errors import InputError

ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Hub id or folder; default: SmolLM2-135M-Instruct.", show_default=False),
]
BaseOption = Annotated[
    str | None,
    typer.Option("--model", help="The base model (hub id or folder), for what the adapters alone do not tell."),
]
AdapterOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar=GRAMMAR,
        help="A PEFT folder, .safetensors file, URL or hub id; its name is the path's last part. Repeatable.",
        show_default=False,
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(help="Of the model: cpu, cuda, cuda:1; default: a GPU if there is one.", show_default=False),
]
DtypeOption = Annotated[str, typer.Option(help="Of the model: auto (as it was saved), float32, float16 or bfloat16.")]
PickleOption = Annotated[
    bool, typer.Option("--allow-pickle", help="Also read adapter_model.bin, with torch's weights_only unpickler.")
]
ApproximateOption = Annotated[
    int | None,
    typer.Option(min=1, metavar="RANK", help="Serve deltas of full rank at this one, which are refused otherwise."),
]
DenseOption = Annotated[
    bool, typer.Option("--dense", help="Serve deltas of full rank exactly, each at the price of a copy of its weight.")
]
StrictOption = Annotated[
    bool,
    typer.Option("--strict", help="Refuse adapters whose config targets modules that their files have nothing for."),
]
IgnoreOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="A config field, a tensor or a pattern of tensors (v_head.*) to do without. Repeatable.",
        show_default=False,
    ),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


def parse_size(text: str, option: str = "--memory") -> int:
    """Bytes, of an option."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([KMGT])(i?))?B?", text.strip(), re.IGNORECASE)
    if found is None:
        raise InputError(f"{option} {text!r}: wanted bytes, or a size such as 512MiB, 2GiB or 2GB")
    number, prefix, binary = found.groups()
    size = int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(prefix.upper()) + 1 if prefix else 0))
    if size < 1:
        raise InputError(f"{option} {text!r}: wanted at least one byte")
    return size


def check_full_rank(approximate: int | None, dense: bool) -> None:
    """Raise InputError where both ways of serving deltas of full rank are asked for."""
    if approximate is not None and dense:
        raise InputError("--approximate excludes --dense: a delta of full rank is served at a rank, or all of it")
