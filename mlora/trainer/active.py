"""`Active`: a run as it is being trained."""

from __future__ import annotations

import array
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import errors
from ..data import Example
from ..passes import Wanted
from ..runtime import Runtime
from . import checkpoint
from .checkpoint import State
from .order import rows_of, steps_per_epoch, total_steps
from .run import Run

_OF_EXAMPLES = ("data", "eval_data")  # of a run's settings, those that digest its examples


class Active:
    """Args:
    examples, judged: of its data and its evaluation data. `folder`: its own. `resume`: go on from what is there.

    Raises:
        TrainError: what is there was made with other settings, or by no run.
    """

    def __init__(
        self,
        name: str,
        run: Run,
        runtime: Runtime,
        examples: list[Example],
        judged: list[Example],
        folder: Path,
        resume: bool,
    ) -> None:
        self.name, self.run, self.folder, self.examples, self.judged = name, run, folder, examples, judged
        self._runtime = runtime
        self.total = total_steps(len(examples), run.rows_per_step, run.num_train_epochs, run.max_steps)
        self.per_epoch = steps_per_epoch(len(examples), run.rows_per_step)
        data = dict(zip(_OF_EXAMPLES, map(_digest, (examples, judged)), strict=True))
        self.state = State(rows=len(examples), settings={**run.settings(), **data})
        self._kept: Mapping[str, Any] | None = None
        checkpoint.check_own(folder)
        if not resume:
            checkpoint.clear(folder)
        if (found := checkpoint.newest(folder)) is not None:
            now, (self.state, where) = self.state, found
            _check_same(name, now, *found)
            self._kept = checkpoint.read_optimizer(where) if where != folder else None
            self._load(where)
        elif run.config is not None:
            try:
                runtime.add_adapter(name, run.config, seed=run.seed)
            except errors.MloraError as error:
                error.args = (f"run {name!r}: {error}",)
                raise
        self.rounds = self.state.step  # that it took part in; its steps, while it is active
        self.parameters: list[torch.nn.Parameter] = []
        if self.active:
            self._begin()
        else:
            runtime.set_requires_grad(name, False)

    def _begin(self) -> None:
        from transformers import get_scheduler

        self._runtime.set_requires_grad(self.name)
        self.parameters = [one for _, one in self._runtime.named_parameters(self.name) if one.requires_grad]
        run = self.run
        self._optimizer = optimizer = _optimizer(run, self.parameters)
        warmup = run.warmup_steps if run.warmup_steps >= 1 else math.ceil(run.warmup_steps * self.total)
        self._schedule = get_scheduler(run.lr_scheduler_type, optimizer, int(warmup), self.total)
        if self._kept is not None:
            optimizer.load_state_dict(self._kept["optimizer"])
            self._schedule.load_state_dict(self._kept["schedule"])
            self._runtime.set_rng_state(self.name, self._kept["rng"])
            self._kept = None

    @property
    def active(self) -> bool:
        return self.state.ended is None

    @property
    def epoch(self) -> float:
        return self.state.step / self.per_epoch

    @property
    def takes_part(self) -> bool:
        """Whether its rows are in the next round. Those of a run that has diverged are, as rows of the base, while it
        would have gone on: so the calls keep their shapes, and with them the other runs every bit."""
        return self.active or (self.state.ended == "diverged" and self.rounds < self.total)

    def rows(self) -> list[Wanted]:
        """Of the next round."""
        seed = self.run.seed if self.run.shuffle else None
        numbers = rows_of(self.rounds, len(self.examples), self.run.rows_per_step, seed)
        entry = self.name if self.active else None
        return [Wanted(entry, entry, self.examples[number]) for number in numbers]

    def step(self, loss: Tensor) -> dict[str, float]:
        """One step of the optimizer, by the gradients that are there; `loss` is a scalar. A loss, a gradient or a
        weight that is no finite number ends the run, with the weights of before. Returns what is to be told of it."""
        rate = float(self._schedule.get_last_lr()[0])
        with torch.no_grad():
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        record = {"loss": float(loss), "grad_norm": float(norm), "learning_rate": rate}
        if not (math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])):
            self._drop_gradients()
            self.state.ended = "diverged"
            return record
        if self.run.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.run.max_grad_norm, norm)
        before = [one.detach().clone() for one in self.parameters]
        self._optimizer.step()
        self._drop_gradients()
        with torch.no_grad():
            if not math.isfinite(float(torch.nn.utils.get_total_norm(self.parameters))):
                for one, kept in zip(self.parameters, before, strict=True):
                    one.copy_(kept)
                self.state.ended = "diverged"
                return record
        self._schedule.step()
        self.state.step += 1
        self.state.loss = record["loss"]
        return record

    def _drop_gradients(self) -> None:
        for one in self.parameters:
            one.grad = None

    # What is due after a step

    @property
    def evaluates(self) -> bool:
        return bool(self.judged) and self._due(self.run.eval_steps)

    @property
    def saves(self) -> bool:
        best = self.run.load_best_model_at_end and self.state.best_step == self.state.step
        return best or self._due(self.run.save_steps or (self.run.eval_steps if self.judged else None))

    def _due(self, every: int | None) -> bool:
        """After so many steps, or each epoch; and at the end."""
        return self.state.step % (every or self.per_epoch) == 0 or self.state.step == self.total

    def judge(self, loss: float) -> None:
        """Take the loss of an evaluation."""
        state = self.state
        state.eval_loss = loss
        if state.best_loss is None or loss < state.best_loss:
            state.best_loss, state.best_step, state.worse = loss, state.step, 0
        else:
            state.worse += 1
            if self.run.early_stopping_patience is not None and state.worse >= self.run.early_stopping_patience:
                state.ended = "early"

    def save(self) -> None:
        checkpoint.save(
            self.folder,
            self.name,
            self._runtime,
            self.state,
            self._optimizer,
            self._schedule,
            self.run.save_total_limit,
        )

    def finish(self) -> None:
        """The last of it: the adapter that is kept, in its folder; no more to be trained."""
        state = self.state
        state.ended = state.ended or "finished"
        if self.run.load_best_model_at_end and state.best_step not in (None, state.step):
            best = checkpoint.at(self.folder, state.best_step or 0)
            self._load(best)
            state.eval_loss = state.best_loss
        checkpoint.finish(self.folder, self.name, self._runtime, state)
        self._runtime.set_requires_grad(self.name, False)

    def _load(self, folder: Path) -> None:
        """Have the runtime hold the adapter of `folder` under the run's name."""
        if self._runtime.adapter(self.name) is not None:
            self._runtime.delete_adapter(self.name)
        self._runtime.load_adapter(folder, self.name, is_trainable=True)


def check_folder(name: str, run: Run, folder: Path, *, resume: bool) -> None:
    """Raise TrainError where what is in the folder of a run is not its own, as far as that can be told without its
    examples."""
    checkpoint.check_own(folder)
    if resume and (found := checkpoint.newest(folder)) is not None:
        then = found[0]
        examples = {key: then.settings[key] for key in _OF_EXAMPLES if key in then.settings}
        _check_same(name, State(rows=then.rows, settings={**run.settings(), **examples}), *found)


def _check_same(name: str, now: State, then: State, where: Path) -> None:
    is_, was = ({"rows": state.rows, **state.settings} for state in (now, then))
    for key in dict.fromkeys((*is_, *was)):
        if is_.get(key) != was.get(key):
            told = f"was {was.get(key)!r} in {where}, and is {is_.get(key)!r}"
            if key in _OF_EXAMPLES:
                told = f"has other examples than in {where}"
            raise errors.TrainError(f"run {name!r}: {key} {told}; resume=False starts anew")


def _digest(examples: Sequence[Example]) -> str:
    """Two that differ are of other examples, or of another order."""
    found = hashlib.blake2b(digest_size=8)
    for example in examples:
        for numbers in example:
            found.update(array.array("q", [len(numbers), *numbers]))
    return found.hexdigest()


def _optimizer(run: Run, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if not isinstance(run.optimizer, str):
        return run.optimizer(parameters)
    options: dict[str, Any] = {"lr": run.learning_rate, "weight_decay": run.weight_decay}
    if run.optimizer == "sgd":
        return torch.optim.SGD(parameters, fused=True, **options)
    kind = torch.optim.AdamW if run.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, betas=run.betas, eps=run.eps, fused=True, **options)
