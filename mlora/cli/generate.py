"""`mlora generate`: a file of prompts, each under its own adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from .errors import InputError, one_line_errors
from .lines import check_tokens, read_lines
from .options import ModelOption, parse_size


def generate(
    input: Annotated[
        Path, typer.Option(help='JSON lines: {"prompt": TEXT, "adapter": NAME | null | {NAME: WEIGHT} | MERGE}.')
    ],
    output: Annotated[Path, typer.Option(help='Where to write the same lines with a "completion" each.')],
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="A PEFT folder or hub id; repeatable.")
    ] = None,
    model: ModelOption = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="A YAML file of a model, its adapters and merges, in place of --model and --adapter. Lines without "
            '"adapter" get its active one.',
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per generate() call, whatever their adapters.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    raw: Annotated[bool, typer.Option("--raw", help="Feed prompts as they are, without the chat template.")] = False,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="For adapters on the device: bytes, or 512MiB, 2GiB, 2GB; those of one batch have to fit. Default: "
            "half the size of the model, at least 64MiB.",
            show_default=False,
        ),
    ] = None,
    max_adapters: Annotated[int, typer.Option(min=1, help="How many adapters are on the device at once.")] = 256,
) -> None:
    """Complete the prompts of a file, each under its own adapter, greedily and in mixed batches.

    A MERGE is {"ids": [NAME, ...], "weights": [...], "merge_strategy": "ties", "density": 0.5}.
    """
    with one_line_errors():
        from rich.console import Console
        from rich.progress import Progress

        folders = _parse_adapters(adapter or [])
        known, active = set(folders), None
        if config is not None:
            known, active, model = _parse_config(config, model, folders)
        lines = read_lines(input, known)
        _check_output(output, input)
        room = None if memory is None else parse_size(memory)
        console = Console(stderr=True)
        with console.status("Loading the model"):
            import mlora
            from mlora.cli.chat import complete
            from mlora.cli.models import load_model, load_tokenizer

            tokenizer = load_tokenizer(model)
            if raw:
                check_tokens(input, lines, tokenizer)
            loaded = load_model(model)
            if config is not None:
                mlora.from_config(config, model=loaded, memory=room, max_adapters=max_adapters)
            else:
                runtime = mlora.patch(loaded, memory=room, max_adapters=max_adapters)
                for name, path in folders.items():
                    runtime.load_adapter(path, name)
        with Progress(console=console) as progress, output.open("w", encoding="utf-8") as sink:
            task = progress.add_task("Generating", total=len(lines))
            for start in range(0, len(lines), batch_size):
                batch = lines[start : start + batch_size]
                entries = [line.get("adapter", active) for line in batch]
                prompts = [line["prompt"] for line in batch]
                answers = complete(loaded, tokenizer, prompts, entries, max_new_tokens, raw)
                for line, answer in zip(batch, answers, strict=True):
                    sink.write(json.dumps({**line, "completion": answer}, ensure_ascii=False) + "\n")
                sink.flush()
                progress.advance(task, len(batch))
        console.print(f"{len(lines)} completions in {output}", markup=False, highlight=False)


def _parse_adapters(options: list[str]) -> dict[str, str]:
    folders: dict[str, str] = {}
    for option in options:
        name, equals, path = option.partition("=")
        if not (name and equals and path):
            raise InputError(f"--adapter {option!r}: wanted NAME=PATH")
        if name in folders:
            raise InputError(f"--adapter {option!r}: the name {name!r} is taken by {folders[name]!r}")
        folders[name] = path
    return folders


def _parse_config(file: Path, model: str | None, folders: Mapping[str, str]) -> tuple[set[str], str | None, str]:
    """A config's names, the active one of them, and its model; nothing is loaded."""
    from mlora.config import parse
    from mlora.errors import MloraError

    if model is not None or folders:
        raise InputError(f"--config excludes {'--model' if model is not None else '--adapter'}: the file says it")
    try:
        parsed = parse(file)
        return set(parsed.names), parsed.active, parsed.model_source()
    except MloraError as error:
        raise InputError(f"--config: {error}") from None


def _check_output(output: Path, input: Path) -> None:
    """Refuse what cannot be written, and what would take the prompts with it if the run broke off."""
    if output.is_dir() or not output.parent.is_dir():
        raise InputError(f"--output {output}: wanted a file in a folder that exists")
    if output.exists() and output.samefile(input):
        raise InputError(f"--output {output} is --input; wanted another file")
