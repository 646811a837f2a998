"""`Trainer`: many runs on one base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import errors
from ..data import Encoded, check_rows, encode, find_target, read_rows
from ..passes import Passes, Wanted
from ..runtime import Runtime
from .active import Active
from .curves import PICTURE, Log, draw
from .order import total_steps
from .progress import Told, shown
from .run import Result, Run, check_name


class Trainer:
    """Trains many adapters of one base at once.

    A round is one optimizer step of each run that has not ended. The rows of all runs are sorted by length and go
    through the model together, `max_tokens` at a time; a run's loss is the mean over the targets of its own step, so a
    run alone and among others gives the same up to rounding. A search over settings is a run each on the same data.

    Each run has a folder of its own under `output_dir`: the adapter, as PEFT reads it; `checkpoint-STEP` folders;
    `log.jsonl`. `output_dir/losses.png` has all curves, where matplotlib is installed. `train` goes on from the last
    checkpoints that it finds.

        runtime = mlora.patch(model)
        trainer = mlora.Trainer(runtime, tokenizer, {
            "sql": mlora.Run("sql.jsonl", LoraConfig(r=8, target_modules=["q_proj", "v_proj"]), learning_rate=1e-4),
            "json": mlora.Run("json.jsonl", LoraConfig(r=16, target_modules="all-linear"), num_train_epochs=1),
        }, "trained")
        trainer.train()

    Args:
        runtime: `mlora.patch(model)`; adapters that are made or loaded stay in it. `tokenizer`: the model's.
        runs: name of the adapter -> its run.
        max_tokens: of one call of the model, with padding; more is faster, up to what memory holds.
        gradient_checkpointing: computes activations again in the backward pass instead of keeping them.
        progress: tells on stderr how far the runs are.

    `encoded`, `judged`: run -> its examples and evaluation examples, with how many were cut off or left out.

    Raises:
        DataError: a data set cannot be read, or has no target at all. TrainError: a run does not fit.
        Nothing of the model or its adapters has changed then.
    """

    def __init__(
        self,
        runtime: Runtime,
        tokenizer: Any,
        runs: Mapping[str, Run],
        output_dir: str | Path,
        *,
        max_tokens: int = 4096,
        gradient_checkpointing: bool = False,
        progress: bool = True,
    ) -> None:
        if not runs:
            raise errors.TrainError("there are no runs to train")
        for name, run in runs.items():
            check_name(name)
            if run.config is None and runtime.adapter(name) is None:
                raise errors.TrainError(
                    f"run {name!r} has no config, and no adapter of that name is loaded; a config makes one"
                )
        self.runtime, self.runs, self.output_dir = runtime, dict(runs), Path(output_dir)
        self.encoded: dict[str, Encoded] = {}
        self.judged: dict[str, Encoded] = {}
        positions = getattr(runtime.model.config, "max_position_embeddings", None)
        for name, run in runs.items():
            self.encoded[name] = _examples(run.data, run, tokenizer, positions, f"data of {name!r}")
            if run.eval_data is not None:
                what = f"eval_data of {name!r}"
                self.judged[name] = _examples(run.eval_data, run, tokenizer, positions, what)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        self._passes = Passes(runtime, pad, max_tokens)
        self._checkpointing, self._progress = gradient_checkpointing, progress

    def train(self, *, resume: bool = True) -> dict[str, Result]:
        """Train until every run has ended.

        Args:
            resume: go on where what is in `output_dir` ended; else it is removed, and all runs start anew.

        Returns:
            Run -> what became of it.

        Raises:
            TrainError: a checkpoint was made with other settings or other data, or is damaged.
            Whatever `add_adapter` and `load_adapter` raise for an adapter that cannot be trained.
        """
        runs = [self._active(name, run, resume) for name, run in self.runs.items()]
        model: Any = self.runtime.model
        training = model.training
        if self._checkpointing:
            model.gradient_checkpointing_enable()
        logs = {run.name: Log(run.folder, run.state.step) for run in runs if run.active}
        totals = {run.name: (run.state.step, run.total) for run in runs}
        try:
            with shown(totals, self._progress) as told:
                while any(run.active for run in runs):
                    self._round(runs, logs, told)
        finally:
            model.train(training)
            if self._checkpointing:
                model.gradient_checkpointing_disable()
        draw({run.name: run.folder for run in runs}, self.output_dir / PICTURE)
        return {run.name: _result(run) for run in runs}

    def steps(self, name: str) -> int:
        """How many steps a run has, from the first to the last."""
        run = self.runs[name]
        return total_steps(len(self.encoded[name].examples), run.rows_per_step, run.num_train_epochs, run.max_steps)

    def _active(self, name: str, run: Run, resume: bool) -> Active:
        judged = self.judged[name].examples if name in self.judged else []
        folder = self.output_dir / name
        return Active(name, run, self.runtime, self.encoded[name].examples, judged, folder, resume)

    def _round(self, runs: Sequence[Active], logs: Mapping[str, Log], told: Told) -> None:
        going = [run for run in runs if run.active]
        sums = self._backward([row for run in runs if run.takes_part for row in run.rows()])
        for run in runs:
            run.rounds += 1
        for run in going:
            self._tell(run, logs, told, run.step(sums[run.name]))
        self._evaluate([run for run in going if run.active and run.evaluates], logs, told)
        for run in going:
            if run.active and run.saves:
                run.save()
            if not run.active or run.state.step == run.total:
                run.finish()
                told.end(run.name, run.state.ended or "")

    def _backward(self, rows: list[Wanted]) -> dict[str, Tensor]:
        """Gradients of each run's loss, and the losses."""
        self.runtime.model.train()
        sums: dict[str, Tensor] = {}
        for losses in self._passes.losses(rows):
            if losses:
                torch.stack(list(losses.values())).sum().backward()
            for group, loss in losses.items():
                name = str(group)
                sums[name] = sums[name] + loss.detach() if name in sums else loss.detach()
        return sums

    def _evaluate(self, runs: Sequence[Active], logs: Mapping[str, Log], told: Told) -> None:
        self.runtime.model.eval()
        sums: dict[str, float] = {}
        with torch.no_grad():
            for losses in self._passes.losses([Wanted(run.name, run.name, one) for run in runs for one in run.judged]):
                for group, loss in losses.items():
                    sums[str(group)] = sums.get(str(group), 0.0) + float(loss)
        for run in runs:
            run.judge(sums[run.name])
            self._tell(run, logs, told, {"eval_loss": sums[run.name]})

    @staticmethod
    def _tell(run: Active, logs: Mapping[str, Log], told: Told, record: Mapping[str, float]) -> None:
        logs[run.name].write({"step": run.state.step, "epoch": round(run.epoch, 4), **record})
        told.step(run.name, run.state.step, record)


def _examples(data: Any, run: Run, tokenizer: Any, positions: int | None, what: str) -> Encoded:
    pairs = check_rows(read_rows(data), run.form, what)
    limit = run.max_length or positions
    find_target(pairs, tokenizer, run.form, limit, what)
    return encode(pairs, tokenizer, run.form, limit, what)


def _result(run: Active) -> Result:
    state = run.state
    return Result(state.step, state.ended or "", state.loss, state.eval_loss, state.best_step, run.folder)
