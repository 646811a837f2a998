"""Options that several commands have."""

from __future__ import annotations

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
    from mlora.arena.size import WANTED, size_of

    size = size_of(text)
    if size is None:
        raise InputError(f"{option} {text!r}: wanted {WANTED}")
    return size


def check_full_rank(approximate: int | None, dense: bool) -> None:
    """Raise InputError where both ways of serving deltas of full rank are asked for."""
    if approximate is not None and dense:
        raise InputError("--approximate excludes --dense: a delta of full rank is served at a rank, or all of it")
