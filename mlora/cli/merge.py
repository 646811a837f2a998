"""`mlora merge`: several adapters into a new one."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import InputError, one_line_errors
from .shapes import linears_of


def merge(
    out: Annotated[Path, typer.Argument(help="Folder to write; new or empty.")],
    adapter: Annotated[
        list[str],
        typer.Option(metavar="FOLDER[=WEIGHT]", help="A PEFT folder or hub id, of weight 1 by default; repeatable."),
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
    seed: Annotated[
        int, typer.Option(help="Of dare's masks, which also depend on an adapter's name: its folder's last part.")
    ] = 0,
    normalize: Annotated[bool, typer.Option("--normalize", help="Divide the weights by their sum.")] = False,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Base model (hub id or folder), for what the adapters alone do not tell."),
    ] = None,
) -> None:
    """Merge adapters into a new one, without the base model where the method allows."""
    with one_line_errors():
        from rich.console import Console
        from rich.progress import track
        from rich.table import Table

        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out} exists and is not an empty folder")
        folders, weights = _parse_weighted(adapter)

        from mlora import Adapter, Merge
        from mlora.errors import MloraError
        from mlora.merge.offline import distance, merge_files, widths_of

        try:
            how = Merge(
                tuple(folders), tuple(weights), type, density, sign, rank, None, seed, normalize, space
            )  # fmt: skip
        except MloraError as error:
            raise InputError(str(error)) from None
        console = Console(stderr=True)
        show = Console(soft_wrap=True, highlight=False, markup=False)
        adapters = {name: Adapter.from_pretrained(folder) for name, folder in folders.items()}
        bases = None
        if model is not None:
            with console.status("Loading the model"):
                import mlora
                from mlora.cli.models import load_model

                bases = mlora.patch(load_model(model)).bases
        try:
            merged, deltas = merge_files(
                adapters, how, bases, lambda modules, total: track(modules, "Merging", total, console=console)
            )
        except MloraError as error:
            hint = "; pass --model BASE" if str(error).endswith("the base model is needed") else ""
            raise RuntimeError(f"{error}{hint}") from None
        _write(merged, out)

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
        if how.in_factors:
            show.print("error    none is defined: factor space merges A and B, not what they do")
        else:
            worst, where, mean = distance(deltas)
            show.print(f"error    worst {worst:.1e} ({where}), mean {mean:.1e}" if worst else "error    0: exact")


def _parse_weighted(options: list[str]) -> tuple[dict[str, str], list[float]]:
    """FOLDER[=WEIGHT] options -> name -> folder, and the weights. Names are the folders' last parts where those
    differ."""
    found: list[tuple[str, float]] = []
    for option in options:
        folder, equals, text = option.rpartition("=")
        if not equals or Path(option).exists():
            folder, text = option, "1"
        try:
            weight = float(text)
        except ValueError:
            raise InputError(f"--adapter {option!r}: the weight is {text!r}, wanted a number") from None
        if not math.isfinite(weight):
            raise InputError(f"--adapter {option!r}: the weight is {text!r}, wanted a finite number")
        if not folder:
            raise InputError(f"--adapter {option!r}: wanted FOLDER[=WEIGHT]")
        if folder in [known for known, _ in found]:
            raise InputError(f"--adapter {option!r}: {folder!r} is given twice")
        found.append((folder, weight))
    short = [Path(folder).name or folder for folder, _ in found]
    names = [name if short.count(name) == 1 else folder for name, (folder, _) in zip(short, found, strict=True)]
    return {name: folder for name, (folder, _) in zip(names, found, strict=True)}, [weight for _, weight in found]


def _write(adapter: Any, out: Path) -> None:
    """Write a PEFT folder, whole or not at all."""
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".mlora-", dir=out.parent) as temp:
        adapter.save_pretrained(Path(temp) / out.name)
        (Path(temp) / out.name).replace(out)


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks)) or "-"
