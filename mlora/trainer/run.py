"""`Run`: what one adapter is trained on, and how."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias

import torch

from .. import errors
from ..data import Form, Rows
from .curves import PICTURE

OPTIMIZERS = ("adamw", "adam", "sgd")
SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
)  # fmt: skip
_NAME = re.compile(r"[^/\\\0]+")
_LONGEST = 255  # bytes of a folder's name
MakesOptimizer: TypeAlias = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Run:
    """One adapter's training. Names and defaults are those of transformers' TrainingArguments, where these have one.

    Args:
        data: its rows, as `mlora.data.read_rows` takes them: a file, a hub id, or mappings of columns.
        config: a `peft.LoraConfig` or its fields, of the adapter that is made for it; None trains one of that name that
            is there, loaded with `is_trainable=True`.
        eval_data: rows to be judged by, as `data`. `form`: how rows of both are read.
        max_length: of an example, in tokens; what is beyond is cut off. None: of the model's positions.
        learning_rate: the highest. `lr_scheduler_type`: of `transformers.get_scheduler`, one of `SCHEDULES`.
            `warmup_steps`: of it; below 1 a share of all steps.
        optimizer: "adamw", "adam", "sgd", or a function from parameters to an optimizer.
        weight_decay, betas, eps: the optimizer's.
        batch_size: rows of one step, before `gradient_accumulation_steps` multiplies them. How many rows go through
            the model at once is for `Trainer(max_tokens=)` to say; a step's loss is the mean over all its targets.
        num_train_epochs: how often each row is seen. `max_steps`: so many steps, whatever that makes of epochs.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them.
        eval_steps: evaluate after so many steps, and at the end; None: after each epoch.
        early_stopping_patience: stop when so many evaluations were not better than the best one.
        load_best_model_at_end: what is kept in the end is the adapter of the best evaluation.
        save_steps: write a checkpoint after so many steps; None: with each evaluation, or after each epoch.
        save_total_limit: how many checkpoints are kept, beside the best one's.
        shuffle: rows come in a new order each epoch; else in their own.
        seed: of the first numbers of a new adapter, of the order of the rows, and of dropout.

    Raises:
        TrainError: a value is none that it can have.
    """

    data: Rows
    config: Any = None
    eval_data: Rows | None = None
    form: Form = field(default_factory=Form)
    max_length: int | None = None
    learning_rate: float = 5e-5
    lr_scheduler_type: str = "linear"
    warmup_steps: float = 0
    optimizer: str | MakesOptimizer = "adamw"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    num_train_epochs: float = 3.0
    max_steps: int | None = None
    max_grad_norm: float = 1.0
    eval_steps: int | None = None
    early_stopping_patience: int | None = None
    load_best_model_at_end: bool = False
    save_steps: int | None = None
    save_total_limit: int = 1
    shuffle: bool = True
    seed: int = 42

    def __post_init__(self) -> None:
        for names, fits, wanted in _CHECKS:
            for name in names:
                value = getattr(self, name)
                if not fits(value):
                    raise errors.TrainError(f"{name} is {value!r}; it must be {wanted}")
        if isinstance(self.optimizer, str) and self.optimizer not in OPTIMIZERS:
            raise errors.TrainError(
                f"optimizer is {self.optimizer!r}; it must be one of {', '.join(OPTIMIZERS)}, or a function from "
                f"parameters to an optimizer"
            )
        if self.lr_scheduler_type not in SCHEDULES:
            raise errors.TrainError(
                f"lr_scheduler_type is {self.lr_scheduler_type!r}; it must be one of {', '.join(SCHEDULES)}"
            )
        if self.eval_data is None:
            for name in ("early_stopping_patience", "load_best_model_at_end", "eval_steps"):
                if getattr(self, name):
                    raise errors.TrainError(f"{name} needs eval_data")

    @property
    def rows_per_step(self) -> int:
        """How many rows one step of the optimizer has."""
        return self.batch_size * self.gradient_accumulation_steps

    def settings(self) -> dict[str, Any]:
        """What a checkpoint remembers, to go on with the same: everything but data. Of the config by its fields."""
        own: dict[str, Any] = {f"config.{key}": value for key, value in _plain_config(self.config).items()}
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name not in ("data", "eval_data", "config", "save_steps", "save_total_limit"):
                own[one.name] = value if isinstance(value, (int, float, str, bool, type(None))) else repr(value)
        if callable(self.optimizer):
            own["optimizer"] = getattr(self.optimizer, "__qualname__", "a function")
        return own


@dataclass(frozen=True)
class Result:
    """What became of a run.

    Args:
        steps: optimizer steps taken. `ended`: "finished", "early" (its evaluations got no better) or "diverged" (its
            loss or a gradient was no finite number; the adapter is that before this step).
        loss: of the last step that was taken, or None. `eval_loss`: of the adapter that is kept, if it was evaluated.
            Both are means over targets.
        best_step: the step with the best evaluation. `folder`: the adapter's, which PEFT reads.
    """

    steps: int
    ended: str
    loss: float | None
    eval_loss: float | None
    best_step: int | None
    folder: Path


def check_name(name: Any) -> None:
    """Raise `TrainError` unless a folder beside the picture can have the name."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in (".", "..", PICTURE):
        raise errors.TrainError(f"the name of a run is {name!r}; it must be text that can name a folder")
    if len(name.encode()) > _LONGEST:
        raise errors.TrainError(f"the name of a run is {name!r}; a folder's takes at most {_LONGEST} bytes")


def _plain_config(config: Any) -> dict[str, Any]:
    """The fields of a config that say something, as JSON has them, whichever way they are given."""
    fields = dict(config if isinstance(config, Mapping) else config.to_dict()) if config is not None else {}
    fields.pop("peft_version", None)
    said = {key: value for key, value in fields.items() if value not in (None, False, {}, [])}
    plain: dict[str, Any] = json.loads(json.dumps(said, default=lambda v: sorted(v) if isinstance(v, set) else str(v)))
    return plain


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


_CHECKS: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (("learning_rate", "num_train_epochs", "eps"), lambda v: _finite(v) and v > 0, "a finite number above 0"),
    (("warmup_steps", "weight_decay", "max_grad_norm"), lambda v: _finite(v) and v >= 0, "a finite number, at least 0"),
    (("batch_size", "gradient_accumulation_steps", "save_total_limit"), _count, "a positive integer"),
    (
        ("max_steps", "eval_steps", "save_steps", "early_stopping_patience"),
        lambda v: v is None or _count(v),
        "a positive integer or None",
    ),
    (("max_length",), lambda v: v is None or (_count(v) and v >= 2), "an integer of at least 2, or None"),
    (
        ("betas",),
        lambda v: isinstance(v, (tuple, list)) and len(v) == 2 and all(_finite(b) and 0 <= b < 1 for b in v),
        "two numbers from 0 to below 1",
    ),
    (
        ("seed",),
        lambda v: isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**64,
        "an integer from 0 to 2**64 - 1",
    ),
    (("config",), lambda v: v is None or isinstance(v, Mapping) or hasattr(v, "to_dict"), "a LoraConfig or its fields"),
    (("form",), lambda v: isinstance(v, Form), "an mlora.data.Form"),
)
