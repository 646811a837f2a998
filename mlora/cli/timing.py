"""The timing table of `mlora demo`: a mixed batch against the bare model, one adapter after another, and PEFT's own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .chat import encode, padded

TIMED_ROWS = 12
TIMED_TOKENS = 16
REPEATS = 3
BUDGET_S = 40.0  # no further repeat is started after this: on a slow or busy machine one has to do


@dataclass
class _Line:
    what: str
    call: Callable[[], None]
    rows: int
    seconds: list[float]

    def measure(self) -> None:
        start = time.perf_counter()
        self.call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)


def print_timings(
    out: Console,
    progress: Console,
    bare: Any,
    served: Any,
    tokenizer: Any,
    adapters: Mapping[str, Path],
    texts: list[str],
) -> None:
    """Print the timing table. All lines generate the same number of tokens for the same prompts, in turns."""
    names = list(adapters)
    mixed = [names[i % len(names)] for i in range(TIMED_ROWS)]
    prompts = [texts[i % len(texts)] for i in range(TIMED_ROWS)]
    inputs = padded([encode(tokenizer, prompt) for prompt in prompts], tokenizer.pad_token_id, served.device)

    def generate(model: Any, rows: list[int] | None = None, **routing: Any) -> None:
        batch = inputs if rows is None else {key: value[rows] for key, value in inputs.items()}
        with torch.inference_mode():
            model.generate(
                **batch, **routing, max_new_tokens=TIMED_TOKENS, min_new_tokens=TIMED_TOKENS, do_sample=False
            )

    def one_after_another() -> None:
        for name in names:
            rows = [i for i, row in enumerate(mixed) if row == name]
            generate(served, rows, adapter_names=[name] * len(rows))

    lines = [
        _Line("bare model", lambda: generate(bare), TIMED_ROWS, []),
        _Line("mlora, no adapter", lambda: generate(served, adapter_names=None), TIMED_ROWS, []),
        _Line(
            f"mlora, one adapter ({names[0]})",
            lambda: generate(served, adapter_names=names[0]),
            TIMED_ROWS,
            [],
        ),
        _Line(
            f"mlora, {len(names)} adapters mixed",
            lambda: generate(served, adapter_names=mixed),
            TIMED_ROWS,
            [],
        ),
        _Line("mlora, same rows, one adapter after another", one_after_another, TIMED_ROWS, []),
    ]
    notes = []
    generate(bare)  # warm up
    generate(served, adapter_names=mixed)
    start = time.perf_counter()
    with Progress(console=progress, transient=True) as bar:
        task = bar.add_task("Timing", total=REPEATS * len(lines))
        for _ in range(REPEATS):
            for line in lines:
                line.measure()
                bar.advance(task)
            if time.perf_counter() - start > BUDGET_S:
                break

    if find_spec("peft") is None:
        notes.append("PEFT is not installed: its line is missing (pip install peft).")
    else:
        with progress.status("Timing PEFT's mixed batch"):
            peft_line, note = _peft_line(bare, generate, inputs, adapters)
            notes.append(note)
            if peft_line is not None:
                for _ in lines[0].seconds:
                    peft_line.measure()
                lines.append(peft_line)

    table = Table(title=f"{TIMED_ROWS} rows, {TIMED_TOKENS} new tokens each", title_justify="left")
    table.add_column("run")
    for column in ("seconds", "tokens/s", "time / bare"):
        table.add_column(column, justify="right")
    base = statistics.median(lines[0].seconds)
    for line in lines:
        seconds = statistics.median(line.seconds)
        tokens = line.rows * TIMED_TOKENS / seconds
        table.add_row(line.what, f"{seconds:.2f}", f"{tokens:.0f}", f"{seconds / base:.2f}")
    out.print(table, markup=False)
    notes.append(f"Medians of {len(lines[0].seconds)} runs on {served.device.type}, {torch.get_num_threads()} threads.")
    for note in filter(None, notes):
        out.print(note, markup=False, highlight=False)


def _peft_line(
    bare: Any, generate: Callable[..., None], inputs: Any, adapters: Mapping[str, Path]
) -> tuple[_Line | None, str]:
    """PEFT's mixed batch over the adapters that PEFT can mix, and what it refused, in PEFT's own words.

    `bare` becomes PEFT's: its modules are replaced.
    """
    from peft import PeftModel

    names = list(adapters)
    model: Any = PeftModel.from_pretrained(bare, str(adapters[names[0]]), adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(str(adapters[name]), name)
    model.eval()

    rows = len(inputs["input_ids"])
    mixable, refused = [], []
    for name in names:
        try:
            with torch.inference_mode():
                model(input_ids=inputs["input_ids"][:, -1:], adapter_names=[name] * rows)
            mixable.append(name)
        except ValueError as error:
            refused.append(f"{name} ({error})")
    note = ""
    if refused:
        note = f"PEFT cannot mix {', '.join(refused)}: its line uses {', '.join(mixable) or 'nothing'} instead."
    if not mixable:
        return None, note
    mixed = [mixable[i % len(mixable)] for i in range(rows)]
    what = f"PEFT's mixed batch, {len(mixable)} adapters"
    return _Line(what, lambda: generate(model, adapter_names=mixed), rows, []), note
