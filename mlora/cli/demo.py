"""`mlora demo`: one batch in which rows use different adapters, none, and a weighted mix."""

from __future__ import annotations

import copy
import json
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import one_line_errors
from .models import check_device, check_model
from .options import DeviceOption, DtypeOption, ModelOption

if TYPE_CHECKING:
    from .chat import Entry

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PROMPTS = ("What is the capital of Norway?", "What do ducks eat?", "Who was Beethoven?", "How do birds fly?")


def demo(
    model: ModelOption = None,
    adapters: Annotated[
        Path | None,
        typer.Option(help="Folder of PEFT adapter folders; default: examples/adapters.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 40,
    table: Annotated[
        bool, typer.Option("--table/--no-table", help="Also time it against the bare model and PEFT.")
    ] = True,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
) -> None:
    """Answer one batch whose rows use different adapters, none, and a weighted mix; then time it."""
    with one_line_errors():
        check_device(device, dtype)
        adapters = adapters.expanduser() if adapters else None
        _run(check_model(model), adapters, max_new_tokens, table, device, dtype)


def _run(
    model: str | None, folder: Path | None, max_new_tokens: int, timings: bool, device: str | None, dtype: str
) -> None:
    """Answer one mixed batch, print every row, then (with `timings`) the timing table."""
    adapters = find_adapters(folder)
    from rich.console import Console
    from rich.table import Table

    from .chat import complete
    from .models import load_tokenizer
    from .progress import Progress
    from .prompts import encode_lines
    from .served import Served, Source
    from .timing import print_timings

    warnings.filterwarnings("ignore", category=FutureWarning)
    out, progress = Console(), Progress()
    texts, entries = map(list, zip(*rows_for(adapters), strict=True))
    sources = {name: Source(str(path), path, {}) for name, path in adapters.items()}
    wanted = Served(model, sources, list(sources), {}, None, None)
    with progress.step("reading adapters and tokenizers"):
        wanted.read()
        prompts = encode_lines([{"prompt": text} for text in texts], entries, wanted, False, False)
    with progress.step("loading the model"):
        bare = wanted.load(device, dtype)
        served = copy.deepcopy(bare)
        wanted.patch(served)

    with progress.step(f"generating {len(texts)} rows in one batch"):
        start = time.perf_counter()
        tokens = complete(served, prompts.ids, entries, prompts.pad, max_new_tokens=max_new_tokens, do_sample=False)
        seconds = time.perf_counter() - start
    decoded = zip(prompts.tokenizers, tokens, strict=True)
    answers = [tokenizer.decode(row, skip_special_tokens=True) for tokenizer, row in decoded]

    table = Table(title="One batch, one model: every row under its own adapter", show_lines=True, title_justify="left")
    table.add_column("adapter", style="bold cyan", max_width=14)
    table.add_column("prompt", ratio=2)
    table.add_column("answer", ratio=3, style="green")
    for text, entry, answer in zip(texts, entries, answers, strict=True):
        table.add_row(label(entry), text, answer.strip(), style="dim" if entry is None else "")
    out.print(table, markup=False)
    out.print(f"{len(texts)} rows, {max_new_tokens} tokens at most each, one generate() call: {seconds:.1f} s\n")
    if timings:
        print_timings(out, progress.console, bare, served, load_tokenizer(model), adapters, texts)


def find_adapters(folder: Path | None) -> dict[str, Path]:
    """The PEFT folders directly inside `folder` (default: `examples/adapters` of a source checkout), by name.

    Raises ValueError when there are none.
    """
    where = folder or EXAMPLES / "adapters"
    found = {file.parent.name: file.parent for file in sorted(where.glob("*/adapter_config.json"))}
    if not found:
        raise ValueError(
            f"no adapters in {where}: pass --adapters FOLDER, a folder that holds PEFT adapter folders"
            + ("" if folder else " (the examples come with a source checkout)")
        )
    return found


def rows_for(adapters: Mapping[str, Path]) -> list[tuple[str, Entry]]:
    """One batch of (prompt, entry): the examples' prompts if their adapters are these, else questions."""
    file = next(iter(adapters.values())).parent.parent / "prompts.jsonl"
    if file.is_file():
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        rows = [(line["prompt"], line["adapter"]) for line in lines if names_of(line["adapter"]) <= set(adapters)]
        if set().union(*(names_of(entry) for _, entry in rows)) == set(adapters):
            return rows
    names = list(adapters)
    entries: list[Entry] = [None, *names]
    if len(names) > 1:
        entries.append({names[0]: 0.5, names[1]: 0.5})
    return [(PROMPTS[i % len(PROMPTS)], entry) for i, entry in enumerate(entries)]


def names_of(entry: Entry) -> set[str]:
    """The adapters that an entry uses."""
    if entry is None or entry == "__base__":
        return set()
    return {entry} if isinstance(entry, str) else set(entry)


def label(entry: Entry) -> str:
    """An entry as a reader writes it: `sql`, `none`, `0.7 json + 0.9 pirate`."""
    if isinstance(entry, Mapping):
        return " + ".join(f"{weight:g} {name}" for name, weight in entry.items())
    return "none" if entry is None else entry
