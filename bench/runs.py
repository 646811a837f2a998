"""Time of whole runs: many at once against one after another, a trainer of TRL's with and without mlora, evaluation.

    runs       16 runs of `mlora.Trainer` on 16 small data sets, against transformers' Trainer with PEFT, one run after
               another, to the same number of steps; files are written by both
    sft        TRL's SFTTrainer on a PeftModel that mlora computes (`mlora.attach`), against the same without
    evaluate   losses of 24 entries (adapters, mixes, merges) on a task in shared batches, against one entry after
               another: by mlora at the same tokens a call, and by PEFT as its users do it (`add_weighted_adapter`,
               `set_adapter`, batches of 8 rows), with the time of its `add_weighted_adapter` and without

bf16, rank 8 on all seven linears. Kinds take turns in one process; figures are medians of the ratios within a turn.
Before a figure is told, the losses of both kinds are compared.

    python bench/runs.py --out bench/results/runs.jsonl
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Log, add_arguments, machine, quantiles, seconds, set_up
from generate import load, make_adapter, tiny_llama, twin
from rich.table import Table

import mlora
from mlora.data import batch_of, check_rows, encode
from mlora.evaluation import grid

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WORDS = (
    "the", "a", "small", "old", "red", "river", "house", "cat", "tree", "stone", "walks", "sleeps", "stands", "near",
    "under", "over", "and", "then", "sings", "far",
)  # fmt: skip
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": LINEARS}

Figure = tuple[str, str, str, list[float], float]  # case, of what, over what, ratios, seconds of the latter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder; default SmolLM2-135M-Instruct")
    parser.add_argument("--only", nargs="*", default=["runs", "sft", "evaluate"], help="which of the above")
    parser.add_argument("--turns", type=int, default=3, help="after one on a small part, which warms up")
    parser.add_argument("--prompts", type=int, default=200, help="rows that entries are judged by")
    parser.add_argument("--words", type=int, default=8, help="of a prompt that entries are judged by, at most")
    add_arguments(parser)
    args = parser.parse_args()
    console = set_up(args)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    bench = Bench(args)
    log = Log(args.out, benchmark="runs", rank=8, **machine())
    table = Table(title="Whole runs: how many times as fast (sft: ratio of times)")
    for column in ("figure", "case", "times of", "ratio", "20 % to 80 %", "seconds"):
        table.add_column(column, justify="right" if column == "ratio" else "left")
    for name in args.only:
        for case, of, over, values, spent in getattr(bench, name)():
            middle, low, high = quantiles(values)
            log.write(figure=name, case=case, of=of, over=over, ratio=[middle, low, high], seconds=spent)
            table.add_row(name, case, f"{of} / {over}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}", f"{spent:.2f}")
    console.print(table)


def rows_of(seed: int, count: int, most: int = 32) -> list[dict[str, str]]:
    """A prompt of `most` / 4 to `most` words, a token each, and as many to be answered."""
    draw = random.Random(seed)
    sentences = [" ".join(draw.choices(WORDS, k=draw.randint(most // 4, most))) for _ in range(count)]
    return [{"prompt": f"{sentence}:", "completion": f" {' '.join(sentence.split()[::-1])}"} for sentence in sentences]


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.smoke, self.turns = args.smoke, 1 if args.smoke else args.turns
        self.prompts, self.words = 4 if self.smoke else args.prompts, args.words
        self.folder = Path(tempfile.mkdtemp())
        if self.smoke:
            self.base, self.tokenizer = tiny_llama(), _letters()
        else:
            from mlora.cli.models import load_tokenizer

            self.base, self.tokenizer = load(args.model), load_tokenizer(args.model)
        self.base.requires_grad_(False)

    def runs(self) -> list[Figure]:
        count, steps, batch = (3, 2, 2) if self.smoke else (16, 6, 2)
        data = {f"run{number}": rows_of(number, 8 * batch, 16) for number in range(count)}
        losses: dict[str, float] = {}

        def together(count: int) -> None:
            folder = self._fresh()
            runtime = mlora.patch(twin(self.base), memory=1 << 30)
            config = {"peft_type": "LORA", **LORA}
            runs = {
                name: mlora.Run(rows, config, learning_rate=1e-3, batch_size=batch, max_steps=steps, seed=0)
                for name, rows in list(data.items())[:count]
            }
            mlora.Trainer(runtime, self.tokenizer, runs, folder, progress=False).train()
            scores = mlora.evaluate(runtime, self.tokenizer, {"own": data["run0"]}, {"run0": "run0"})
            losses["mlora"] = scores[0].values["loss"]

        def alone(count: int) -> None:
            from peft import LoraConfig, get_peft_model
            from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

            for name, rows in list(data.items())[:count]:
                torch.manual_seed(0)
                model = get_peft_model(twin(self.base), LoraConfig(**LORA))
                folder = self._fresh()
                arguments = TrainingArguments(
                    str(folder), per_device_train_batch_size=batch, max_steps=steps, learning_rate=1e-3, report_to=[],
                    save_strategy="no", logging_steps=1, use_cpu=True, disable_tqdm=True, seed=0,
                )  # fmt: skip
                found = [{"input_ids": one.ids, "labels": one.labels} for one in self._examples(rows)]
                trainer = Trainer(model, arguments, DataCollatorForSeq2Seq(self.tokenizer), train_dataset=found)
                trainer.log = lambda *_: None  # type: ignore[method-assign]
                trainer.train()
                trainer.save_model(str(folder))
                if name == "run0":
                    losses["peft"] = self._loss(model, rows)

        times = self._alternate({"peft": alone, "mlora": together}, count, 2)
        start = self._loss(self.base, data["run0"])
        apart = abs(losses["mlora"] - losses["peft"])  # rows come in another order
        if not (self.smoke or (losses["mlora"] < start and apart < 0.2 * (start - losses["peft"]) + 0.05)):
            raise SystemExit(f"refused to report: losses are {losses}, and {start:.3f} at the start")
        return [_ratio(times, f"{count} runs of {steps} steps", "peft", "mlora")]

    def sft(self) -> list[Figure]:
        from datasets import Dataset, disable_progress_bars
        from peft import LoraConfig, get_peft_model
        from transformers import PrinterCallback
        from trl import SFTConfig, SFTTrainer

        disable_progress_bars()
        steps, batch = (2, 2) if self.smoke else (6, 4)
        data = Dataset.from_list(rows_of(0, 8 * batch))
        losses: dict[str, list[float]] = {}

        def train(attached: bool) -> Callable[[], None]:
            def run() -> None:
                torch.manual_seed(0)
                model = get_peft_model(twin(self.base), LoraConfig(**LORA, task_type="CAUSAL_LM"))
                if attached:
                    mlora.attach(model)
                options = SFTConfig(
                    str(self._fresh()), per_device_train_batch_size=batch, max_steps=steps, learning_rate=1e-3,
                    report_to=[], save_strategy="no", logging_steps=1, use_cpu=True, disable_tqdm=True, seed=0,
                    bf16=False, gradient_checkpointing=False,
                )  # fmt: skip
                trainer = SFTTrainer(model, options, train_dataset=data, processing_class=self.tokenizer)
                trainer.remove_callback(PrinterCallback)
                spent["own"] = seconds(trainer.train)
                losses[str(attached)] = [one["loss"] for one in trainer.state.log_history if "loss" in one]

            return run

        spent: dict[str, float] = {}
        times: dict[str, list[float]] = {"with": [], "without": []}
        kinds = {"with": train(True), "without": train(False)}
        for turn in range(self.turns + 1):
            for name in list(kinds) if turn % 2 else list(kinds)[::-1]:
                kinds[name]()
                if turn:
                    times[name].append(spent["own"])
        worst = max(abs(a - b) for a, b in zip(losses["True"], losses["False"], strict=True))
        if not worst < 0.05 * max(losses["False"]):
            raise SystemExit(f"refused to report: losses with mlora are {losses['True']}, without {losses['False']}")
        return [_ratio(times, "SFTTrainer with mlora", "with", "without")]

    def evaluate(self) -> list[Figure]:
        from peft import PeftModel

        names = ["a", "b"]
        folders = [make_adapter(self.base, self.folder / name, 8, seed) for seed, name in enumerate(names)]
        tasks = rows_of(1, self.prompts, self.words)
        merges = {} if self.smoke else grid(names, ["linear"], weights=[0.1 * n for n in range(1, 11)])
        merges.update(grid(names, ["ties"], [0.5] if self.smoke else [0.2, 0.5, 0.8], [0.5, 1.0], 16))
        entries: dict[str, Any] = {"bare": None, "a": "a", "b": "b", **merges}
        mixes = 0 if self.smoke else 24 - len(entries)
        entries.update({f"mix {n}": {"a": 0.2 * n, "b": 1 - 0.2 * n} for n in range(mixes)})
        runtime = mlora.patch(twin(self.base), memory=1 << 30)
        for name, folder in zip(names, folders, strict=True):
            runtime.load_adapter(folder, name)
        peft = PeftModel.from_pretrained(twin(self.base), folders[0], adapter_name="a")
        peft.load_adapter(folders[1], "b")
        losses: dict[str, dict[str, float]] = {}

        def shared(count: int) -> None:
            scores = mlora.evaluate(runtime, self.tokenizer, {"task": tasks[:count]}, entries)
            losses["shared"] = {score.entry: score.values["loss"] for score in scores}

        def turns(count: int) -> None:
            losses["turns"] = {}
            for label, entry in entries.items():
                (score,) = mlora.evaluate(runtime, self.tokenizer, {"task": tasks[:count]}, {label: entry})
                losses["turns"][label] = score.values["loss"]

        merging: list[float] = []  # seconds of PEFT's merges, a turn

        def with_peft(count: int) -> None:
            rows, spent = tasks[:count], 0.0
            losses["peft"] = {}
            for label, entry in entries.items():
                if count < len(tasks) and isinstance(entry, mlora.Merge):
                    continue  # its merges take minutes, and warm nothing up
                if entry is None:
                    with peft.disable_adapter():
                        losses["peft"][label] = self._loss(peft, rows)
                    continue
                if isinstance(entry, str):
                    peft.set_adapter(entry)
                else:
                    kind, weights = "cat", entry
                    options: dict[str, Any] = {}
                    if isinstance(entry, mlora.Merge):
                        weights = dict(zip(entry.adapters, entry.weights, strict=True))
                        if entry.combination_type != "linear":
                            kind, options = "ties_svd", {"density": entry.density, "svd_rank": 16}
                    weights = {name: weight for name, weight in weights.items() if weight} or {"a": 0.0}
                    called = (list(weights), list(weights.values()), "merged", kind)
                    spent += seconds(lambda: peft.add_weighted_adapter(*called, **options))  # noqa: B023
                    peft.set_adapter("merged")
                losses["peft"][label] = self._loss(peft, rows)
                if not isinstance(entry, str):
                    peft.set_adapter("a")
                    peft.delete_adapter("merged")
            if count == len(tasks):
                merging.append(spent)

        times = self._alternate({"shared": shared, "turns": turns, "peft": with_peft}, len(tasks), 2)
        for label in ("bare", "a", "b"):
            if not abs(losses["shared"][label] - losses["peft"][label]) < 0.05 * losses["peft"][label]:
                raise SystemExit(f"refused to report: the loss of {label} is {losses['shared'][label]}, of PEFT's "
                                 f"{losses['peft'][label]}")  # fmt: skip
        case = f"{len(entries)} entries on {len(tasks)} prompts"
        times["peft, merges made before"] = [
            whole - merges for whole, merges in zip(times["peft"], merging, strict=True)
        ]
        return [_ratio(times, case, theirs, "shared") for theirs in times if theirs != "shared"]

    def _alternate(self, kinds: dict[str, Callable[[int], None]], size: int, few: int) -> dict[str, list[float]]:
        """Times of kinds at their full size, after one turn of a few, which warms up."""
        times: dict[str, list[float]] = {name: [] for name in kinds}
        for turn in range(self.turns + 1):
            for name in list(kinds) if turn % 2 else list(kinds)[::-1]:
                spent = seconds(lambda: kinds[name](size if turn else few))  # noqa: B023
                if turn:
                    times[name].append(spent)
        return times

    def _examples(self, rows: list[dict[str, str]]) -> Any:
        return encode(check_rows(rows), self.tokenizer).examples

    @torch.no_grad()
    def _loss(self, model: Any, rows: list[dict[str, str]]) -> float:
        """The mean over all targets, 8 rows at a time."""
        model.eval()
        total, count = 0.0, 0
        examples = self._examples(rows)
        for start in range(0, len(examples), 8):
            part = examples[start : start + 8]
            batch = batch_of(part, self.tokenizer.pad_token_id or 0)
            own = sum(one.targets for one in part)
            total += float(model(**batch.inputs, labels=batch.labels).loss) * own
            count += own
        return total / count

    def _fresh(self) -> Path:
        folder = self.folder / "out"
        shutil.rmtree(folder, ignore_errors=True)
        return folder


def _ratio(times: dict[str, list[float]], case: str, of: str, over: str) -> Figure:
    values = [a / b for a, b in zip(times[of], times[over], strict=True)]
    return case, of, over, values, quantiles(times[over])[0]


def _letters() -> Any:
    """A tokenizer of words for the smoke run's model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<end>", "?", ":", *dict.fromkeys(WORDS)]
    core = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>", unk_token="?")


if __name__ == "__main__":
    main()
