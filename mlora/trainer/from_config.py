"""The runs that a config in Ludwig's schema stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .. import errors
from ..config import Config, Training, lora_fields, training_of
from ..data import Form, check_rows, find_target, read_rows
from . import checkpoint
from .active import check_folder
from .order import steps_per_epoch
from .run import Run, check_name


def runs_of(config: Config) -> dict[str, Run]:
    """The run of each adapter that the config trains, its data sets read and checked. No model is needed.

    Raises:
        ConfigError: as `training_of`. TrainError: a folder cannot have the name. DataError: a data set cannot be
            read, or a row has not what the config wants.
    """
    found = training_of(config)
    for name in (*found, *(name for name, _ in config.merges)):
        check_name(name)
    return {name: _run(name, training, config) for name, training in found.items()}


def check_folders(config: Config, runs: Mapping[str, Run], *, resume: bool) -> None:
    """Raise TrainError where `output_directory` has something else in the place of a run or a merge, as far as that can
    be told without the tokenizer."""
    for name, run in runs.items():
        check_folder(name, run, config.output / name, resume=resume)
    for name, _ in config.merges:
        if checkpoint.newest(config.output / name) is not None:
            raise errors.TrainError(f"{config.output / name} has a run's adapter; name the merge otherwise")


def check_texts(runs: Mapping[str, Run], tokenizer: Any, limit: int | None) -> None:
    """Raise DataError where a tokenizer has no chat template, or finds no target in a run's data; no model is needed.

    Args:
        limit: the model's positions.
    """
    for name, run in runs.items():
        for data, what in ((run.data, "dataset"), (run.eval_data, "validation")):
            if data is not None:
                what = f"{what} of adapter {name!r}"
                pairs = check_rows(read_rows(data), run.form, what)
                find_target(pairs, tokenizer, run.form, run.max_length or limit, what)


def _run(name: str, training: Training, config: Config) -> Run:
    form = Form(training.prompt, training.completion, training.template, training.chat)
    rows, judged = _split(name, training, form)
    if not len(rows):
        raise errors.DataError(f"dataset of adapter {name!r}: no row is left to train on")
    per_epoch = steps_per_epoch(len(rows), training.batch_size * training.accumulation)
    each = training.steps_per_checkpoint or -(-per_epoch // max(1, training.checkpoints_per_epoch))
    evaluates = bool(len(judged)) and training.evaluate
    entry = config.adapters[name]
    return Run(
        data=rows,
        config=None if "pretrained_adapter_weights" in entry else {**lora_fields(entry), **training.lora},
        eval_data=judged if evaluates else None,
        form=form,
        max_length=training.max_length,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule,
        warmup_steps=training.warmup,
        optimizer=training.optimizer,
        weight_decay=training.weight_decay,
        betas=training.betas,
        eps=training.eps,
        batch_size=training.batch_size,
        gradient_accumulation_steps=training.accumulation,
        num_train_epochs=training.epochs,
        max_steps=training.train_steps,
        max_grad_norm=training.max_grad_norm,
        eval_steps=each if evaluates else None,
        early_stopping_patience=training.early_stop if evaluates else None,
        load_best_model_at_end=evaluates,  # as Ludwig does
        save_steps=each,
        shuffle=training.shuffle,
        seed=training.seed,
    )


def _split(name: str, training: Training, form: Form) -> tuple[Sequence[Any], Sequence[Any]]:
    """Rows to train on and to validate with, checked while their numbers are those of the files."""
    rows = read_rows(training.training)
    check_rows(rows, form, f"dataset of adapter {name!r}")
    if training.sample_ratio < 1:
        few = _shuffled(len(rows), training.seed)[: max(1, round(training.sample_ratio * len(rows)))]
        rows = [rows[at] for at in sorted(few)]
    if training.validation is not None:
        judged = read_rows(training.validation)
        check_rows(judged, form, f"validation of adapter {name!r}")
        return rows, judged
    if training.split_column is not None:
        column = training.split_column
        if column not in rows[0]:
            raise errors.DataError(
                f"dataset of adapter {name!r} has no column {column!r}, which preprocessing.split names; it has "
                f"{', '.join(map(repr, rows[0]))}"
            )
        parts = [[row for row in rows if str(row.get(column)) == part] for part in "01"]
        if not parts[0]:
            raise errors.DataError(f"dataset of adapter {name!r}: no row has 0, to be trained on, in {column!r}")
        return parts[0], parts[1]
    train, validate, _ = training.probabilities
    order = _shuffled(len(rows), training.seed)
    first = max(1, round(train * len(rows)))
    second = first + round(validate * len(rows))
    return [rows[at] for at in sorted(order[:first])], [rows[at] for at in sorted(order[first:second])]


def _shuffled(count: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order
