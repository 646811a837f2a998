"""Which learning rate? Four runs on one data set, at once: each batch of the model has rows of all of them.

    python examples/learning_rates.py                      # some minutes on two CPU cores
    python examples/learning_rates.py --steps 10 --rates 1e-4 1e-3

The task is `sql` of examples/tasks.py: a request in English becomes a query. Curves are drawn to OUT/losses.png.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tasks import made_up
from train import RECIPES
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed
import mlora
from mlora.cli.demo_model import resolve_model
from mlora.data import Form


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 5e-4, 2e-3, 1e-2])
    parser.add_argument("--steps", type=int, default=40, help="of 8 rows, of each run")
    parser.add_argument("--model", help="hub id or folder; default SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path, default=Path("learning-rates"))
    parser.add_argument("--restart", action="store_true", help="start anew, whatever is in --out")
    args = parser.parse_args()

    source = resolve_model(args.model)
    runtime = mlora.patch(AutoModelForCausalLM.from_pretrained(source, dtype="auto"))
    rows, judged = made_up("sql", 8 * args.steps, False), made_up("sql", 32, True)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", **RECIPES["sql"].config}
    runs = {
        f"{rate:g}": mlora.Run(
            rows, config, eval_data=judged, form=Form(chat=True), learning_rate=rate, lr_scheduler_type="cosine",
            warmup_steps=0.1, max_steps=args.steps, eval_steps=max(1, args.steps // 4), seed=0,
        )
        for rate in args.rates
    }  # fmt: skip
    trainer = mlora.Trainer(runtime, AutoTokenizer.from_pretrained(source), runs, args.out)
    try:
        results = trainer.train(resume=not args.restart)
    except mlora.errors.TrainError as error:  # what is there is of other steps
        parser.error(str(error).replace("resume=False", "--restart"))
    table = Table("learning rate", "last loss", "loss on held-out requests")
    best = min(results, key=lambda name: results[name].eval_loss or float("inf"))
    for name, result in results.items():
        losses = [f"{value:.3f}" if value is not None else result.ended for value in (result.loss, result.eval_loss)]
        table.add_row(f"{name} *" if name == best else name, *losses)
    Console().print(table)
    print(f"* the best; curves are in {args.out / 'losses.png'}")


if __name__ == "__main__":
    main()
