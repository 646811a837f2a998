"""Which merge keeps what the adapters can do? Strategies, densities, weights and ranks, on the adapters of this folder.

    python examples/merging.py --out merging.jsonl     # some minutes; docs/merging.md shows what it found
    python examples/merging.py --prompts 8 --only svd  # a quick look
    python bench/plot.py --out docs merging.jsonl      # draws docs/merging.png

`sql` and `json`, or all four adapters, become one, which does their tasks on the held-out rows of
examples/adapters/held_out. All entries are rows of the same batches: this is `mlora.evaluate`, as `mlora evaluate` has
it, on a grid of several ranks. For each task two figures:

loss      cross entropy of the wanted answer's tokens (for `pirate`: of the bare model's answer in a pirate's words).
accuracy  the share of greedy answers that are right, as in examples/adapters/README.md.

The last column is the least share, over the tasks, of what the best entry gains there over the bare model in loss.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from tasks import right
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed
import mlora
from mlora.cli.demo_model import resolve_model
from mlora.data import Form, read_rows
from mlora.evaluation import Score, grid, kept

ADAPTERS = Path(__file__).resolve().parent / "adapters"
TWO, FOUR = ("sql", "json"), ("sql", "json", "emoji", "pirate")
DENSITIES = (0.1, 0.3, 0.6, 0.9)
RANK = 64
BARE = "no adapter"


def merges_of_two() -> dict[str, mlora.Merge]:
    found = {
        **grid(TWO, ["linear"], weights=(0.3, 0.5, 0.7, 1.0)),
        **grid(TWO, ["ties"], (0.3,), (0.7, 1.5), RANK),
        **grid(TWO, ["ties", "dare_ties"], DENSITIES, (1.0,), RANK),
        **grid(TWO, ["magnitude_prune", "dare_linear"], DENSITIES, (0.7,), RANK),
    }
    for rank in (4, 16):
        found.update(grid(TWO, ["ties"], (0.3,), (1.0,), rank))
    for rank in (4, 8, 16):
        found.update(grid(TWO, ["svd"], weights=(0.7,), svd_rank=rank))
    return found


def merges_of_four() -> dict[str, mlora.Merge]:
    return {
        **grid(FOUR, ["linear"], weights=(0.25, 0.5)),
        **grid(FOUR, ["ties"], (0.3, 0.9), (1.0,), RANK),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder; default SmolLM2-135M-Instruct")
    parser.add_argument("--adapters", type=Path, default=ADAPTERS, help="their folder; default examples/adapters")
    parser.add_argument("--prompts", type=int, default=24, help="held-out rows a task, 40 at most")
    parser.add_argument("--only", help="merges whose strategy contains this")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--out", type=Path, help="file for JSON lines, which bench/plot.py draws")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    two, four = (
        {label: merge for label, merge in found.items() if args.only is None or args.only in merge.combination_type}
        for found in (merges_of_two(), merges_of_four())
    )
    if not two:
        parser.error(f"--only {args.only}: no strategy of a merge of two contains that")

    source = resolve_model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(source)
    runtime = mlora.patch(AutoModelForCausalLM.from_pretrained(source, dtype="auto"))
    for name in FOUR:
        runtime.load_adapter(args.adapters / name, name)
    tasks = {name: read_rows(args.adapters / "held_out" / f"{name}.jsonl")[: args.prompts] for name in FOUR}
    longest = max(len(tokenizer(row["completion"]).input_ids) for rows in tasks.values() for row in rows)

    def judge(names: Sequence[str], entries: Mapping[str, Any]) -> list[Score]:
        return mlora.evaluate(
            runtime,
            tokenizer,
            {name: tasks[name] for name in names},
            entries,
            metrics=("loss", right),
            form=Form(chat=True),
            max_new_tokens=longest + 4,
        )

    console = Console(stderr=True)
    with console.status("one adapter or all four, on four tasks"):
        scores = judge(FOUR, {BARE: None, **{name: name for name in FOUR}, **four})
    with console.status(f"{len(two)} merges of {' and '.join(TWO)}, on two tasks"):
        scores += judge(TWO, two)
    singles = {BARE, *FOUR}
    out = Console(width=160)  # Markdown, whose cells must not be broken
    out.print(table_of([s for s in scores if s.task in TWO and s.entry in singles.union(two) - {"emoji", "pirate"}]))
    out.print(table_of([s for s in scores if s.entry in singles.union(four)]))
    if args.out is not None:
        lines = [json.dumps(record) + "\n" for record in records_of(scores, {**two, **four}, args.prompts)]
        args.out.write_text("".join(lines), encoding="utf-8")


def table_of(scores: Sequence[Score]) -> Table:
    """In Markdown, for docs/merging.md."""
    tasks = list(dict.fromkeys(score.task for score in scores))
    table = Table("loss / accuracy", *(f"`{task}`" for task in tasks), "least share of the best", box=box.MARKDOWN)
    shares = kept(scores, "loss", BARE)
    found = {(score.entry, score.task): score.values for score in scores}
    for entry in dict.fromkeys(score.entry for score in scores):
        values = [found[entry, task] for task in tasks]
        cells = [f"{one['loss']:.2f} / {one['right']:.0%}" for one in values]
        table.add_row(entry if entry == BARE else f"`{entry}`", *cells, f"{shares[entry]:.0%}")
    return table


def records_of(scores: Sequence[Score], merges: Mapping[str, mlora.Merge], prompts: int) -> list[dict[str, Any]]:
    """A record a merge; of single adapters there are "bare" and, each on its own task, "alone"."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for score in scores:
        label = "alone" if score.entry == score.task else score.entry
        figures = {"loss": score.values["loss"], "accuracy": score.values["right"]}
        found.setdefault(label, {})[score.task] = figures
    records = []
    for label, strategy in ((BARE, "bare"), ("alone", "alone"), *((label, None) for label in merges)):
        merge = merges.get(label)
        how: dict[str, Any] = {"adapters": FOUR, "strategy": strategy}
        if merge is not None:
            how = {"adapters": merge.adapters, "strategy": merge.combination_type, "weight": merge.weights[0]}
            how |= {"density": merge.density, "rank": merge.svd_rank}
        records.append({"bench": "merging", **how, "tasks": found[label], "prompts": prompts})
    return records


if __name__ == "__main__":
    main()
