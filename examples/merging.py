"""Which merge keeps what the adapters can do? Strategies, densities, weights and ranks, on the adapters of this folder.

    python examples/merging.py --out merging.jsonl     # some minutes; docs/merging.md shows what it found
    python examples/merging.py --prompts 8 --only svd  # a quick look
    python bench/plot.py --out docs merging.jsonl      # draws docs/merging.png

Adapters are merged into one, `sql` and `json` or all four, and every merge does their tasks, on the held-out examples
that examples/train.py trained without. For each task two figures:

loss      cross entropy of the wanted answer's tokens (for `pirate`: of the bare model's answer in a pirate's words).
accuracy  the share of greedy answers that are right, as in examples/adapters/README.md.

"alone" is each task with its own adapter, which is what a batch with one adapter a row gives; "bare" is no adapter.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from train import TASKS, Example, Task, Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed
import mlora
from mlora.cli.demo_model import resolve_model

ADAPTERS = Path(__file__).resolve().parent / "adapters"
DENSITIES = (0.1, 0.3, 0.6, 0.9)
SWEPT = {"ties": 1.0, "dare_ties": 1.0, "magnitude_prune": 0.7, "dare_linear": 0.7}  # strategy -> weight
RANK = 64


@dataclass(frozen=True)
class Setting:
    """One way to serve the tasks of `adapters`: with none ("bare"), each with its own ("alone"), or with one merge.

    Args:
        weight: of every adapter. `rank`: the merge's `svd_rank`.
    """

    adapters: tuple[str, ...]
    strategy: str
    weight: float = 1.0
    density: float | None = None
    rank: int | None = None

    @property
    def merge(self) -> mlora.Merge | None:
        if self.strategy in ("bare", "alone"):
            return None
        weights = (self.weight,) * len(self.adapters)
        return mlora.Merge(self.adapters, weights, self.strategy, density=self.density, svd_rank=self.rank)


def settings() -> list[Setting]:
    two, four = ("sql", "json"), tuple(TASKS)
    found = [Setting(four, "bare"), Setting(four, "alone")]
    found += [Setting(two, "linear", weight) for weight in (0.3, 0.5, 0.7, 1.0)]
    found += [Setting(two, "ties", weight, 0.3, RANK) for weight in (0.7, 1.5)]
    for strategy, weight in SWEPT.items():
        found += [Setting(two, strategy, weight, density, RANK) for density in DENSITIES]
    found += [Setting(two, "ties", 1.0, 0.3, rank) for rank in (4, 16)]
    found += [Setting(two, "svd", 0.7, None, rank) for rank in (4, 8, 16)]
    found += [Setting(four, "linear", weight) for weight in (0.25, 0.5)]
    found += [Setting(four, "ties", 1.0, density, RANK) for density in (0.3, 0.9)]
    return found


class Study:
    """The patched model, and the held-out examples of each task."""

    def __init__(self, source: str | Path, prompts: int, console: Console) -> None:
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
        self.trainer = Trainer(model, AutoTokenizer.from_pretrained(source), console, seed=0)
        self.examples = {name: self.trainer.examples(task, held_out=True)[:prompts] for name, task in TASKS.items()}
        self.runtime = mlora.patch(model)
        for name in TASKS:
            self.runtime.load_adapter(ADAPTERS / name, name)

    @torch.inference_mode()
    def measure(self, setting: Setting) -> dict[str, dict[str, float]]:
        """Task -> loss and accuracy."""
        found = {}
        merge = setting.merge
        if merge is not None:
            self.runtime.add_merge("merged", merge)
        for name in setting.adapters:
            with self.runtime.use_adapters({"bare": None, "alone": name}.get(setting.strategy, "merged")):
                examples = self.examples[name]
                found[name] = {"loss": self._loss(examples), "accuracy": self._accuracy(TASKS[name], examples)}
        if merge is not None:
            self.runtime.delete_adapter("merged")
        return found

    def _loss(self, examples: list[Example]) -> float:
        """The mean over all tokens of the wanted answers."""
        inputs, targets = self.trainer.batch(examples)
        hidden = self.trainer.model.model(**inputs, use_cache=False).last_hidden_state
        wanted = targets != -100
        return float(
            torch.nn.functional.cross_entropy(self.trainer.model.lm_head(hidden[wanted]).float(), targets[wanted])
        )

    def _accuracy(self, task: Task, examples: list[Example]) -> float:
        longest = max(len(self.trainer.tokenizer(example.answer).input_ids) for example in examples)
        answers = self.trainer.answer([example.prompt for example in examples], longest + 4, batch=len(examples))
        right = [task.passes(answer, example.answer) for answer, example in zip(answers, examples, strict=True)]
        return sum(right) / len(right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder; default SmolLM2-135M-Instruct")
    parser.add_argument("--prompts", type=int, default=24, help="held-out examples a task, 40 at most")
    parser.add_argument("--only", help="settings whose strategy contains this")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--out", type=Path, help="file for JSON lines, which bench/plot.py draws")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    chosen = [s for s in settings() if s.merge is None or args.only is None or args.only in s.strategy]
    console = Console(stderr=True)
    study = Study(resolve_model(args.model), args.prompts, console)
    table = Table("merged", "strategy", "weights", "density", "rank", *TASKS, "seconds", title="loss / accuracy")
    sink = args.out.open("w", encoding="utf-8") if args.out else None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("merging", total=len(chosen))
        for setting in chosen:
            progress.update(bar, description=f"{setting.strategy} of {len(setting.adapters)}")
            started = time.perf_counter()
            found = study.measure(setting)
            seconds = time.perf_counter() - started
            table.add_row(
                " ".join(setting.adapters) if setting.merge else "",
                setting.strategy,
                f"{setting.weight:g}" if setting.merge else "",
                f"{setting.density:g}" if setting.density else "",
                str(setting.rank or ""),
                *(f"{f['loss']:.2f} / {f['accuracy']:.0%}" if (f := found.get(name)) else "" for name in TASKS),
                f"{seconds:.0f}",
            )
            if sink is not None:
                record = {"bench": "merging", **asdict(setting), "tasks": found, "prompts": args.prompts}
                sink.write(json.dumps(record) + "\n")
                sink.flush()
            progress.advance(bar)
    out = Console()
    if not out.is_terminal:
        out.width = 160
    out.print(table)


if __name__ == "__main__":
    main()
