"""`mlora train`: the adapters of a config file, all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import InputError, as_input_errors, one_line_errors
from .models import check_device, check_model
from .options import DeviceOption, DtypeOption
from .output import make_folder
from .progress import Progress, counted


def train(
    config: Annotated[
        Path,
        typer.Argument(
            help="A YAML file in Ludwig's schema: a base model, adapters, and of all or each of them a dataset, a "
            "prompt and a trainer. docs/training.md describes it."
        ),
    ],
    max_tokens: Annotated[
        int, typer.Option(min=2, help="Tokens that go through the model at once, padding included.")
    ] = 4096,
    restart: Annotated[
        bool, typer.Option("--restart", help="Remove what an earlier run has left, and start anew.")
    ] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
) -> None:
    """Train all adapters of a config file in shared batches, then make its merges.

    What it writes goes into the file's output_directory (default: results, beside the file): a folder for each adapter
    and merge, which PEFT reads, and losses.png. `mlora serve --config` and `mlora generate --config` then serve the
    same file. A run that was broken off goes on from its last checkpoints.
    """
    with one_line_errors():
        config = config.expanduser()
        check_device(device, dtype)
        from mlora.config import parse
        from mlora.errors import MloraError
        from mlora.trainer.from_config import check_folders, runs_of

        try:
            parsed = parse(config)
            runs = runs_of(parsed)
            source = check_model(parsed.model_source())
            check_folders(parsed, runs, resume=not restart)
        except MloraError as error:
            told = str(error).replace("resume=False", "--restart")
            raise InputError(told if told.startswith(str(config)) else f"{config}: {told}") from None
        make_folder(parsed.output, f"{config}: output_directory")
        _train(parsed, runs, source, max_tokens, restart, device, dtype)


def _train(
    parsed: Any, runs: Any, source: str | None, max_tokens: int, restart: bool, device: str | None, dtype: str
) -> None:
    from rich.console import Console
    from rich.table import Table

    import mlora
    from mlora.config import LOADING, training_of
    from mlora.errors import MloraError
    from mlora.trainer.from_config import check_texts

    from .models import load_model, load_tokenizer, positions_of

    progress, show = Progress(), Console(soft_wrap=True, highlight=False)
    with progress.step("loading the model"):
        tokenizer = load_tokenizer(source)
        with as_input_errors():
            check_texts(runs, tokenizer, positions_of(source))
        model = load_model(source, device, dtype)
    try:
        runtime = mlora.patch(model)
        for name, entry in parsed.adapters.items():
            if (weights := parsed.weights(name)) is not None:
                loading = {key: entry[key] for key in LOADING if key in entry}
                runtime.load_adapter(weights, name, is_trainable=name in runs, **loading)
        checkpointing = any(one.gradient_checkpointing for one in training_of(parsed).values())
        trainer = mlora.Trainer(
            runtime, tokenizer, runs, parsed.output, max_tokens=max_tokens, gradient_checkpointing=checkpointing
        )
        _tell(trainer, progress)
        results = trainer.train(resume=not restart)
    except MloraError as error:
        raise InputError(str(error).replace("resume=False", "--restart")) from None
    merged = {}
    for name, how in parsed.merges:
        with progress.step(f"merging {name}"):
            runtime.add_merge(name, how)
            runtime.save_adapter(name, parsed.output / name)
            merged[name] = how
    table = Table("adapter", "steps", "ended", "loss", "evaluation", "folder", box=None, pad_edge=False)
    for name, result in results.items():
        losses = (_figure(result.loss), _figure(result.eval_loss))
        table.add_row(name, str(result.steps), result.ended, *losses, str(result.folder))
    for name, how in merged.items():
        table.add_row(name, "", f"merge of {', '.join(how.adapters)}", "", "", str(parsed.output / name))
    show.print(table)
    if wild := [name for name, result in results.items() if result.ended == "diverged"]:
        raise RuntimeError(
            f"the loss of {', '.join(wild)} was no finite number; what is saved is from before. Try a smaller "
            f"learning_rate, with --restart"
        )


def _tell(trainer: Any, progress: Progress) -> None:
    """What there is to train on."""
    for name, run in trainer.runs.items():
        found, judged = trainer.encoded[name], trainer.judged.get(name)
        text = f"{name}: {counted(len(found.examples), 'row')} to train on"
        if judged is not None:
            text += f", {len(judged.examples)} to validate with"
        if found.truncated:
            text += f", {found.truncated} cut off"
        if found.dropped:
            text += f", {len(found.dropped)} left out without a target within the limit"
        rows = min(run.rows_per_step, len(found.examples))
        progress.note(f"{text}; {counted(trainer.steps(name), 'step')} of {counted(rows, 'row')}")


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
