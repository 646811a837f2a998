"""`mlora merge`: several adapters into a new one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mlora.serve.tokenizers import FILES, TEMPLATES, files_of, own_tokenizer, serving

from .adapters import GRAMMAR, Given, find, parse_adapters
from .errors import InputError, as_input_errors, one_line_errors
from .models import DTYPES, check_device, check_model
from .options import BaseOption, DeviceOption, ForceOption, IgnoreOption, PickleOption
from .progress import Progress, counted
from .shapes import linears_of

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
WAY_OUT = "--base-tokenizer leaves them out"


def merge(
    out: Annotated[Path, typer.Argument(help="Folder to write; new or empty, or with --force an adapter's.")],
    adapter: Annotated[
        list[str],
        typer.Option(
            metavar=GRAMMAR, help="A PEFT folder, .safetensors file, URL or hub id, of weight 1 by default. Repeatable."
        ),
    ],
    type: Annotated[
        str,
        typer.Option(help="linear, cat, svd, ties, dare_linear, dare_ties, magnitude_prune."),
    ] = "linear",
    density: Annotated[
        float | None, typer.Option(help="The share of values that ties, dare and magnitude_prune keep.")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(help="Of the result; default: exact for linear and cat, else the adapters' largest."),
    ] = None,
    space: Annotated[
        str, typer.Option(help='"delta" merges what adapters do to weights; "factor" merges A and B, as PEFT does.')
    ] = "delta",
    sign: Annotated[str, typer.Option(help="How ties elects signs: total or frequency.")] = "total",
    seed: Annotated[int, typer.Option(help="Of dare's masks, which also depend on an adapter's name.")] = 0,
    normalize: Annotated[bool, typer.Option("--normalize", help="Divide the weights by their sum.")] = False,
    model: BaseOption = None,
    device: DeviceOption = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of the result: float32, float16, bfloat16. Default: the adapters', if all have one; else float32.",
            show_default=False,
        ),
    ] = None,
    base_tokenizer: Annotated[
        bool, typer.Option("--base-tokenizer", help="Leave out the tokenizers and chat templates that adapters bring.")
    ] = False,
    ignore: IgnoreOption = None,
    allow_pickle: PickleOption = False,
    force: ForceOption = False,
) -> None:
    """Merge adapters into a new one, without the base model where the method allows."""
    with one_line_errors():
        out, model = out.expanduser(), check_model(model)
        _check_out(out, force)
        if dtype is not None and dtype not in DTYPES[1:]:
            raise InputError(f"--dtype {dtype!r}: wanted {', '.join(DTYPES[1:])}")
        given = parse_adapters(adapter)
        weights = [1.0 if one.weight is None else one.weight for one in given]
        folders = {one.name: find(one) for one in given}
        check_device(device, "auto")

        from rich.console import Console
        from rich.table import Table

        from mlora import Adapter, Merge
        from mlora.errors import MloraError
        from mlora.merge.offline import distance, merge_files, widths_of

        try:
            how = Merge(
                tuple(folders), tuple(weights), type, density, sign, rank, None, seed, normalize, space
            )  # fmt: skip
        except MloraError as error:
            raise InputError(str(error)) from None
        progress = Progress()
        show = Console(soft_wrap=True, highlight=False, markup=False)
        with progress.step(f"reading {counted(len(given), 'adapter')}"):
            loading: dict[str, Any] = {"allow_pickle": allow_pickle, "ignore": ignore or ()}
            adapters = {one.name: Adapter.from_pretrained(one.source, **loading) for one in given}
            with as_input_errors():
                tokenizer, tokenizer_note = ([], "") if base_tokenizer else _tokenizer_files(given, folders)
        bases = None
        if model is not None:
            with progress.step(f"loading the model {model}"):
                import mlora
                from mlora.cli.models import load_model

                bases = mlora.patch(load_model(model, device)).bases
        try:
            merged, deltas = merge_files(adapters, how, bases, progress.track)
        except MloraError as error:
            hint = "; pass --model BASE" if str(error).endswith("the base model is needed") else ""
            raise RuntimeError(f"{error}{hint}") from None
        merged, rounded = _in_dtype(merged, adapters.values(), dtype)
        _write(merged, tokenizer, out)

        table = Table("adapter", "weight", "type", "ranks", "modules", "bytes", box=None, pad_edge=False)
        total = sum(weights) if normalize else 1.0
        for (name, one), weight in zip(adapters.items(), weights, strict=True):
            ranks = sorted({rank for rank, _, _ in linears_of(one.tensors).values()})
            size = sum(tensor.nbytes for tensor in one.tensors.values())
            row = (name, f"{weight / total:g}", one.peft_type, _listed(ranks), str(len(widths_of(one))), f"{size:,}")
            table.add_row(*row)
        show.print(table)
        names = sorted({str(one.config.get("base_model_name_or_path")) for one in adapters.values()})
        if len(names) > 1:
            show.print(f"note     their configs name different bases: {', '.join(names)}")
        size = sum(tensor.nbytes for tensor in merged.tensors.values())
        ranks = sorted({delta.rank for delta in deltas.values()})
        show.print(f"merged   {merged.source}")
        show.print(f"out      {out}: {merged.peft_type}, ranks {_listed(ranks)}, {len(deltas)} modules, {size:,} bytes")
        if merged.peft_type == "DELTA":
            show.print(
                "note     with gains, or a module without rank rows, it is a DELTA: mlora reads it, PEFT does not"
            )
        if tokenizer_note:
            show.print(f"note     {tokenizer_note}")
        if tokenizer:
            show.print(f"brings   the adapters' tokenizer ({', '.join(file.name for file in tokenizer)})")
        if rounded:
            show.print(
                f"dtype    {rounded}, to which the result is rounded; --dtype float32 keeps what merging computes"
            )
        if how.in_factors:
            show.print("error    none is defined: factor space merges A and B, not what they do")
        else:
            worst, where, mean = distance(deltas)
            end = f", but for rounding to {rounded}" if rounded else ""
            show.print(
                f"error    worst {worst:.1e} ({where}), mean {mean:.1e}{end}" if worst else f"error    0: exact{end}"
            )


def _check_out(out: Path, force: bool) -> None:
    """Refuse what cannot be written, and what was not to be replaced."""
    there = out.exists() or out.is_symlink()
    if there and not out.is_dir():
        raise InputError(f"{out} is a file; wanted a folder to write")
    if there and any(out.iterdir()) and not force:
        raise InputError(
            f"{out} exists and is not an empty folder; wanted another, or --force to replace the adapter in it"
        )
    parent = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.exists())
    if not os.access(parent if parent != out.resolve() else parent.parent, os.W_OK):
        raise InputError(f"{out} cannot be written: no permission in {parent}")


def _tokenizer_files(adapters: Sequence[Given], folders: Mapping[str, Path]) -> tuple[list[Path], str]:
    """The tokenizer files that the merged adapter brings, and what to say of those that it does not.

    Raises:
        InputError, AdapterError: the adapters' tokenizers or chat templates differ.
    """
    brought = {given.name: files_of(given.name, given.source, folders[given.name]) for given in adapters}
    own = {name: files for name, files in brought.items() if files}
    contents = {name: {file.name: file.read_bytes() for file in files} for name, files in own.items()}
    first, *rest = own or [""]
    if any(contents[name] != contents[first] for name in rest):
        if bare := [name for name in own if set(contents[name]) <= set(TEMPLATES)]:
            raise InputError(f"adapter {bare[0]!r} brings another chat template than the others; {WAY_OUT}")
        serving(own, None, {name: own_tokenizer(name, files, None) for name, files in own.items()}, way_out=WAY_OUT)
    if own and len(own) < len(brought):
        return (
            [],
            f"{', '.join(own)} brings a tokenizer and others do not: the merged adapter is to be used with its base's",
        )
    return own.get(first, []), ""


def _in_dtype(merged: Any, adapters: Iterable[Any], dtype: str | None) -> tuple[Any, str]:
    """The merged adapter in a dtype, by default that of the adapters where all have one; and what was rounded to, if it
    was."""
    import torch

    kinds = {tensor.dtype for one in adapters for tensor in one.tensors.values() if tensor.is_floating_point()}
    kind = getattr(torch, dtype) if dtype else kinds.pop() if len(kinds) == 1 else torch.float32
    if kind not in (torch.float16, torch.bfloat16):
        return merged, ""
    tensors = {key: t.to(kind) if t.is_floating_point() else t for key, t in merged.tensors.items()}
    if worst := [key for key, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise RuntimeError(f"{worst[0]} is beyond what {kind} holds; wanted --dtype float32")
    return replace(merged, tensors=tensors), str(kind).removeprefix("torch.")


def _write(adapter: Any, tokenizer: Sequence[Path], out: Path) -> None:
    """Write a PEFT folder, whole or not at all; of one that is there, the files of the same names are replaced."""
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".mlora-", dir=out.parent) as temp:
        new = Path(temp) / out.name
        adapter.save_pretrained(new)
        for file in tokenizer:
            shutil.copyfile(file, new / file.name)
        if not out.is_dir() or not any(out.iterdir()):
            new.replace(out)
            return
        for stale in (WEIGHTS, PICKLE, *FILES):  # the config goes in last: with it, the folder is an adapter
            if not (new / stale).exists():
                (out / stale).unlink(missing_ok=True)
        for file in sorted(new.iterdir(), key=lambda file: file.name == CONFIG):
            file.replace(out / file.name)


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks)) or "-"
