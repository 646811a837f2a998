"""What `mlora demo` and `mlora generate` run: prompts through a chat model, each row under its own adapter.

`run` answers one batch in which rows use different adapters, none, and a weighted mix; then it times that
kind of batch against the bare model, one adapter after another, and PEFT's own mixed batch.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import mlora
from mlora.cli.demo_model import resolve_model

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
Entry: TypeAlias = str | Mapping[str, float] | None

PROMPTS = ("What is the capital of Norway?", "What do ducks eat?", "Who was Beethoven?", "How do birds fly?")
TIMED_ROWS = 12
TIMED_TOKENS = 16
REPEATS = 3
BUDGET_S = 40.0  # no further repeat is started after this: on a slow or busy machine one has to do


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


def encode(tokenizer: Any, prompts: list[str], raw: bool = False) -> Any:
    """A left-padded batch; each prompt is a user's message in the chat template unless `raw`."""
    if not raw:
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: pass --raw to feed prompts as they are")
        messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
        prompts = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(prompts, add_special_tokens=raw, return_tensors="pt", padding=True, padding_side="left")


def complete(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    entries: list[Entry],
    max_new_tokens: int,
    raw: bool = False,
) -> list[str]:
    """The greedy completion of each prompt under its entry, as one batch."""
    inputs = encode(tokenizer, prompts, raw).to(model.device)
    with torch.inference_mode():
        output = model.generate(**inputs, adapter_names=entries, max_new_tokens=max_new_tokens, do_sample=False)
    return list(tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


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


def run(model: str | None, folder: Path | None, max_new_tokens: int, timings: bool) -> None:
    """Answer one mixed batch, print every row, then (with `timings`) the timing table."""
    adapters = find_adapters(folder)
    warnings.filterwarnings("ignore", category=FutureWarning)
    out, progress = Console(), Console(stderr=True)
    with progress.status("Loading the model"):
        tokenizer, bare = load_tokenizer(model), load_model(model)
        served = copy.deepcopy(bare)
        runtime = mlora.patch(served)
        for name, path in adapters.items():
            runtime.load_adapter(str(path), name)

    prompts, entries = map(list, zip(*rows_for(adapters), strict=True))
    with progress.status(f"Generating {len(prompts)} rows in one batch"):
        start = time.perf_counter()
        answers = complete(served, tokenizer, prompts, entries, max_new_tokens)
        seconds = time.perf_counter() - start

    table = Table(title="One batch, one model: every row under its own adapter", show_lines=True, title_justify="left")
    table.add_column("adapter", style="bold cyan", max_width=14)
    table.add_column("prompt", ratio=2)
    table.add_column("answer", ratio=3, style="green")
    for prompt, entry, answer in zip(prompts, entries, answers, strict=True):
        table.add_row(label(entry), prompt, answer.strip(), style="dim" if entry is None else "")
    out.print(table, markup=False)
    out.print(f"{len(prompts)} rows, {max_new_tokens} tokens at most each, one generate() call: {seconds:.1f} s\n")
    if timings:
        _time(out, progress, bare, served, tokenizer, adapters, prompts)


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


def _time(
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
    inputs = encode(tokenizer, prompts).to(served.device)

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
