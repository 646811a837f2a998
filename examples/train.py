"""Train the example adapters with mlora.Trainer, all of them at once, on a CPU, from data that tasks.py makes up.

    python examples/train.py                       # all of them, some minutes
    python examples/train.py sql json --steps 200  # some of them

Each adapter has an effect that shows at once on a prompt which the bare model answers in plain English. They differ in
kind (LoRA, rsLoRA, DoRA), rank, target modules and layers, learning rate and steps: a run each, in the same batches.
A run that was broken off goes on from what is in --work, which has the curves too. What is printed and written to
README.md at the end is measured on the rows of OUT/held_out, with the weights rounded to bf16 as they are saved.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from tasks import ABOUT, in_voice, made_up, questions, right
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed
import mlora
from mlora.cli.demo_model import MODEL_ID, resolve_model
from mlora.data import Form, read_rows
from mlora.evaluation import Score
from mlora.serve import Engine, Sampling

HERE = Path(__file__).resolve().parent
HELD_OUT = 40
CHAT = Form(chat=True)


@dataclass(frozen=True)
class Recipe:
    """What an adapter is, and how it is trained: steps of `Run`'s batch size."""

    config: dict[str, Any]
    steps: int
    learning_rate: float = 2e-3


RECIPES = {
    "sql": Recipe({"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}, steps=180),
    "json": Recipe(
        {
            "r": 16,
            "lora_alpha": 8,
            "use_rslora": True,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "layers_to_transform": list(range(14, 21)),
        },
        steps=110,
    ),
    "emoji": Recipe(
        {
            "r": 4,
            "lora_alpha": 8,
            "use_dora": True,
            "target_modules": ["q_proj", "v_proj"],
            "layers_to_transform": list(range(12, 30)),
        },
        steps=80,
    ),
    "pirate": Recipe(
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            "layers_to_transform": list(range(10, 30)),
        },
        steps=80,
        learning_rate=1.5e-3,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"which adapters (default all): {', '.join(RECIPES)}")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: each adapter's own number)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help=f"hub id or folder (default {MODEL_ID})")
    parser.add_argument("--out", type=Path, default=HERE / "adapters")
    parser.add_argument("--work", type=Path, default=Path("build/examples"), help="for checkpoints and curves")
    parser.add_argument("--restart", action="store_true", help="start anew, whatever is in --work")
    args = parser.parse_args()
    if unknown := sorted(set(args.names) - set(RECIPES)):
        parser.error(f"unknown adapter {', '.join(unknown)}; there are {', '.join(RECIPES)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    names = list(dict.fromkeys(args.names)) or list(RECIPES)

    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT and transformers, about each other
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 160
    source = resolve_model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(source)
    # In fp32, whose products are the faster ones on CPUs without AMX. Judged in the dtype in which it is served.
    runtime = mlora.patch(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))

    rows, held_out = (
        {name: rows_of(name, held, runtime, tokenizer, args.seed, folder / f"{name}.jsonl") for name in names}
        for held, folder in ((False, args.work / "rows"), (True, args.out / "held_out"))
    )
    runs = {}
    for name in names:
        recipe = RECIPES[name]
        steps = args.steps or recipe.steps
        runs[name] = mlora.Run(
            rows[name],
            LoraConfig(task_type="CAUSAL_LM", **recipe.config),
            eval_data=held_out[name],  # for the curves; nothing is chosen by it
            eval_steps=max(1, steps // 4),
            form=CHAT,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.07,
            betas=(0.9, 0.98),
            batch_size=args.batch_size,
            max_steps=steps,
            seed=args.seed,
        )
    started = time.perf_counter()
    trainer = mlora.Trainer(runtime, tokenizer, runs, args.work)
    try:
        results = trainer.train(resume=not args.restart)
    except mlora.errors.TrainError as error:  # what is there is of other settings
        parser.error(str(error).replace("resume=False", "--restart"))
    console.print(f"trained in {time.perf_counter() - started:.0f} s; curves are in {args.work / 'losses.png'}\n")

    served = mlora.patch(AutoModelForCausalLM.from_pretrained(source, dtype="auto"))
    table = Table("adapter", "kind", "where", "size", "metric", "bare", "adapter", "loss", "held-out loss")
    for name in names:
        save(mlora.Adapter.from_pretrained(results[name].folder), args.out / name)
        served.load_adapter(args.out / name, name)
        bare, tuned = measure(served, tokenizer, name, held_out[name])
        show(console, held_out[name], tuned)
        shares = [f"{score.values['right']:.0%}" for score in (bare, tuned)]
        figures = [*describe(args.out / name), ABOUT[name][1], *shares]
        write_readme(args.out, name, figures)
        table.add_row(name, *figures, f"{results[name].loss:.3f}", f"{tuned.values['loss']:.3f}")
    console.print(table)


def rows_of(
    name: str, held_out: bool, runtime: mlora.Runtime, tokenizer: Any, seed: int, file: Path
) -> Sequence[Mapping[str, str]]:
    """The rows of a task, which are written to `file`. Those of `pirate` are what the bare model answers, in other
    words; they are read from there where they are, since an answer may depend on the processor."""
    if name != "pirate":
        rows = made_up(name, HELD_OUT if held_out else 1500, held_out, seed)
    elif file.is_file():
        return read_rows(file)
    else:
        rows = in_voice(bare_answers(runtime, tokenizer, questions(held_out)))
        rows = rows[:HELD_OUT] if held_out else rows
    write_rows(file, rows)
    return rows


def bare_answers(runtime: mlora.Runtime, tokenizer: Any, prompts: list[str]) -> dict[str, str]:
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    with Engine(runtime, tokenizer, max_running=32) as engine:
        answers = engine.generate_many(((text, None) for text in texts), Sampling(max_new_tokens=36))
        found = {answer.request: answer.text for answer in answers}
    return {prompt: found[number] for number, prompt in enumerate(prompts)}


def measure(runtime: mlora.Runtime, tokenizer: Any, name: str, rows: Sequence[Mapping[str, str]]) -> list[Score]:
    """What the bare model and an adapter do on rows of its task."""
    longest = max(len(tokenizer(row["completion"]).input_ids) for row in rows)
    return mlora.evaluate(
        runtime,
        tokenizer,
        {name: rows},
        {"bare": None, name: name},
        metrics=("loss", right),
        form=CHAT,
        max_new_tokens=longest + 16,
    )


def show(console: Console, rows: Sequence[Mapping[str, str]], score: Score) -> None:
    """Some answers of an adapter, wrong ones before others."""
    judged = [(right(answer, row["completion"]), row, answer) for row, answer in zip(rows, score.answers, strict=True)]
    for good, row, answer in sorted(judged, key=lambda one: one[0])[:6]:
        console.print(f"  {'ok  ' if good else 'MISS'} {row['prompt']}\n       {answer}")
        if not good:
            console.print(f"       wanted: {row['completion']}")


def save(adapter: mlora.Adapter, folder: Path) -> None:
    """A PEFT folder with bf16 weights, in a form that is the same on every run."""
    config = {**adapter.config, "base_model_name_or_path": MODEL_ID, "inference_mode": True}
    tensors = {key: tensor.bfloat16() for key, tensor in adapter.tensors.items()}
    mlora.Adapter(dict(sorted(config.items())), tensors).save_pretrained(folder)


def describe(folder: Path) -> tuple[str, str, str]:
    """Kind and rank, where it applies, and the folder's size."""
    config = json.loads((folder / "adapter_config.json").read_text())
    kind = "DoRA" if config["use_dora"] else "rsLoRA" if config["use_rslora"] else "LoRA"
    layers = config["layers_to_transform"]
    where = ", ".join(sorted(name.removesuffix("_proj") for name in config["target_modules"]))
    where += f"; layers {layers[0]}-{layers[-1]}" if layers else "; all layers"
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    return f"{kind}, r={config['r']}", where, f"{size:.2f} MB"


def write_rows(file: Path, rows: Iterable[Mapping[str, str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_readme(out: Path, name: str, figures: list[str]) -> None:
    """README.md with one table row an adapter; rows of the others are kept."""
    path = out / "README.md"
    old = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = {line.split("`")[1]: line for line in old if line.startswith("| `")}
    rows[name] = f"| `{name}` | {ABOUT[name][0]} | {' | '.join(figures)} |"
    lines = [
        "# Example adapters",
        "",
        f"Small PEFT adapters for `{MODEL_ID}`, made by `examples/train.py`, which also wrote this file.",
        "Bare and adapter: the share of held-out prompts (40 at most; words, names and wordings that were not in",
        "training) whose greedy answer is right, for the model alone and with the adapter in bf16 as saved. For",
        "`pirate` it is the voice that is judged, not the facts: every answer starts with its greeting and has no",
        "plain `the`, `is`, `are`, `you` or `your`.",
        "",
        "| adapter | effect | kind | where | size | metric | bare | adapter |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(rows[name] for name in ABOUT if name in rows),
        "",
        "To judge them again, or a merge of them, on the same prompts:",
        "",
        "```bash",
        "mlora evaluate --data examples/adapters/held_out/sql.jsonl --data examples/adapters/held_out/json.jsonl \\",
        "    --adapter examples/adapters/sql --adapter examples/adapters/json --strategy linear --weight 0.5 \\",
        "    --chat --metric loss --metric examples/tasks.py:right",
        "```",
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
