"""`mlora evaluate`: adapters, mixes and a grid of merges, on data."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import InputError, as_input_errors, one_line_errors
from .models import check_device
from .options import (
    AdapterOption,
    ApproximateOption,
    DenseOption,
    DeviceOption,
    DtypeOption,
    ForceOption,
    IgnoreOption,
    ModelOption,
    PickleOption,
    StrictOption,
)
from .output import make_folder
from .progress import Progress, counted
from .served import choose

BASE = "base"
SCORES, ANSWERS, PICTURE = WRITTEN = ("scores.jsonl", "answers.jsonl", "scores.png")


def evaluate(
    data: Annotated[
        list[str],
        typer.Option(
            metavar="[TASK=]FILE",
            help="JSON lines or CSV of prompts and references (columns as for training); the name is the file's. "
            "Repeatable.",
        ),
    ],
    adapter: AdapterOption = None,
    model: ModelOption = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="A YAML file of a model, its adapters and merges, in place of --model and --adapter.",
            show_default=False,
        ),
    ] = None,
    entry: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ENTRY",
            help='An entry to judge beside the base and each adapter: {"sql": 0.5, "json": 0.5}, or a merge as JSON. '
            "Repeatable.",
            show_default=False,
        ),
    ] = None,
    merge: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,NAME,...",
            help="Adapters to merge by each --strategy, --density and --weight. Repeatable; default: all of them, "
            "where a --strategy is given.",
            show_default=False,
        ),
    ] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            help="linear, svd, ties, dare_linear, dare_ties, magnitude_prune. Repeatable.", show_default=False
        ),
    ] = None,
    density: Annotated[
        list[float] | None,
        typer.Option(help="The share that pruning strategies keep. Repeatable; default: 0.5.", show_default=False),
    ] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option(help="Of every adapter of a merge. Repeatable; default: 1.", show_default=False),
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Of the merges.", show_default=False)] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="loss, perplexity, exact_match, or FILE.py:FUNCTION of an answer and its reference. Repeatable; "
            "default: loss.",
            show_default=False,
        ),
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="Of prompts, with {columns}; the answer is in --completion.", show_default=False)
    ] = None,
    completion: Annotated[str | None, typer.Option(help="The column of the reference.", show_default=False)] = None,
    chat: Annotated[bool, typer.Option("--chat", help="A prompt is a user's message, in the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens that go through the model at once.")] = 4096,
    output: Annotated[
        Path | None,
        typer.Option(help="A folder for scores.jsonl, answers.jsonl and scores.png.", show_default=False),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    approximate: ApproximateOption = None,
    dense: DenseOption = False,
    strict: StrictOption = False,
    ignore: IgnoreOption = None,
    allow_pickle: PickleOption = False,
    force: ForceOption = False,
) -> None:
    """Judge the base, every adapter, mixes and a grid of merges on data, all in the same batches.

    The last column tells which entry is good at all tasks: the least share, over the tasks, of what the best entry
    gains there over the base.
    """
    with one_line_errors():
        check_device(device, dtype)
        files = _tasks(data)
        if output is not None and not force and (there := [name for name in WRITTEN if (output / name).exists()]):
            raise InputError(f"--output {output} has {there[0]} already; --force replaces what is there")
        if not (strategy or merge) and (unused := _given(density=density, weight=weight, rank=rank)):
            raise InputError(f"--{unused[0]} is of merges, and there are none; --strategy or --merge makes some")
        served = choose(config, model, "--model", adapter, approximate, dense, strict, ignore, allow_pickle)
        if BASE in served.names:
            raise InputError(f"an adapter has the name {BASE!r}, which is the bare model's here; give it another")
        if fresh := [name for name in served.names if name not in (*served.sources, *served.merges)]:
            raise InputError(f"--config: adapter {fresh[0]!r} has no weights yet; `mlora train {config}` makes them")
        metrics = [_metric(one) for one in dict.fromkeys(metric or ["loss"])]
        entries: dict[str, Any] = {BASE: None, **{name: name for name in served.sources}}
        entries.update(served.merges)
        from mlora.data import Form, check_rows, read_rows
        from mlora.evaluation import check_metrics, check_texts, grid

        form = Form(template=template, completion=completion, chat=chat)
        with as_input_errors():
            tasks = {task: read_rows(file) for task, file in files.items()}
            pairs = {task: check_rows(rows, form, str(files[task])) for task, rows in tasks.items()}
            for text in entry or ():
                entries[text] = _entry(text, served.names)
            if strategy or merge:
                if not served.names:
                    raise InputError("there are no adapters to merge; --adapter gives them")
                groups = [one.split(",") for one in merge or [",".join(served.sources)]]
                for names in groups:
                    _check_names(names, served.names)
                    if len(set(names)) < len(names):
                        raise InputError(f"a merge of {', '.join(names)} has an adapter twice")
                    found = grid(names, strategy or ["linear"], density or [0.5], weight or [1.0], rank)
                    entries.update(found)
                if density and not any(one.prunes for one in found.values()):
                    raise InputError(
                        f"--density is of strategies that prune; {', '.join(strategy or ['linear'])} does not"
                    )
            check_metrics(metrics, pairs)
        if output is not None:
            make_folder(output, "--output")
        progress = Progress()
        with progress.step("reading adapters"):
            served.read()
        from .models import load_tokenizer, positions_of

        with progress.step("loading the model"):
            tokenizer = load_tokenizer(served.model)
            with as_input_errors():
                check_texts(tokenizer, pairs, metrics, form, max_new_tokens, positions_of(served.model))
            loaded = served.load(device, dtype)
            served.patch(loaded)
        _judge(loaded, tokenizer, tasks, entries, metrics, form, max_new_tokens, max_tokens, output, progress)


def _judge(
    model: Any,
    tokenizer: Any,
    tasks: dict[str, Any],
    entries: dict[str, Any],
    metrics: Sequence[Any],
    form: Any,
    max_new_tokens: int,
    max_tokens: int,
    output: Path | None,
    progress: Progress,
) -> None:
    from rich.console import Console

    from mlora.evaluation import draw, evaluate, size, table_of

    what = "the base" if len(entries) == 1 else f"{len(entries)} entries"
    progress.note(f"judging {what} on {counted(sum(map(len, tasks.values())), 'row')}")
    with as_input_errors(), progress.counting("judged", 0, size(tasks, entries, metrics)) as told:
        scores = evaluate(
            model.mlora,
            tokenizer,
            tasks,
            entries,
            metrics=metrics,
            form=form,
            max_new_tokens=max_new_tokens,
            max_tokens=max_tokens,
            told=told,
        )
    show = Console(soft_wrap=True, highlight=False, markup=False)
    for score in scores[: len(tasks)]:  # of the first entry: what is left out is the same for all
        if score.truncated:
            progress.note(
                f"{score.task}: {counted(score.truncated, 'row')} cut off at the model's positions, "
                f"{len(score.dropped)} left out without a target within them"
            )
    show.print(table_of(scores, BASE))
    if output is None:
        return
    for name in WRITTEN:
        (output / name).unlink(missing_ok=True)
    with (output / SCORES).open("w", encoding="utf-8") as file:
        for score in scores:
            file.write(json.dumps({"entry": score.entry, "task": score.task, **score.values}) + "\n")
    if any(score.answers for score in scores):
        with (output / ANSWERS).open("w", encoding="utf-8") as file:
            for score in scores:
                for row, answer in zip(tasks[score.task], score.answers, strict=True):
                    record = {"entry": score.entry, "task": score.task, "row": row, "answer": answer}
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    first = next(iter(scores[0].values))
    try:
        draw(scores, first, output / PICTURE)
    except ImportError:
        progress.note("pip install matplotlib for a picture")
    show.print(f"\nout  {output}")


def _given(**options: Any) -> list[str]:
    return [name for name, value in options.items() if value is not None]


def _tasks(data: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for option in data:
        name, equals, path = option.partition("=")
        file = Path(path if equals else option).expanduser()
        name = name if equals else file.stem
        if equals and not (name and path):
            raise InputError(f"--data {option!r}: wanted [TASK=]FILE")
        if not file.is_file():
            raise InputError(f"--data {option!r}: there is no file {file}")
        if name in found:
            raise InputError(f"--data {option!r}: the name {name!r} is taken by {found[name]}; TASK=FILE gives another")
        found[name] = file
    return found


def _entry(text: str, names: Sequence[str]) -> Any:
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except ValueError as error:
        if text.lstrip().startswith("{"):
            raise InputError(f"--entry {text!r} is no JSON: {error}") from None
        value = text
    if isinstance(value, str):
        _check_names([value], names)
        return value
    if not isinstance(value, dict):
        raise InputError(f"--entry {text!r}: wanted a name, an object of weights or a merge")
    from mlora.merge import as_merge
    from mlora.merge.how import is_weight

    merge = as_merge(value)
    _check_names(list(merge.adapters if merge is not None else value), names)
    if merge is None and (wrong := [weight for weight in value.values() if not is_weight(weight)]):
        raise InputError(f"--entry {text!r}: the weight {wrong[0]!r} is no finite number")
    return merge if merge is not None else value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a name comes twice in {', '.join(name for name, _ in pairs)}")
    return found


def _check_names(wanted: Sequence[str], names: Sequence[str]) -> None:
    if unknown := [name for name in wanted if name not in names]:
        raise InputError(f"unknown adapter {unknown[0]!r} (there are: {', '.join(names) or 'none given'})")


def _metric(text: str) -> str | Callable[[str, str], float]:
    """A metric's name, or the function that FILE.py:FUNCTION names."""
    path, colon, name = text.rpartition(":")
    if not colon or not path.endswith(".py"):
        if text not in ("loss", "perplexity", "exact_match"):
            raise InputError(f"--metric {text!r}: wanted loss, perplexity, exact_match or FILE.py:FUNCTION")
        return text
    spec = importlib.util.spec_from_file_location(f"metric {path}", Path(path).expanduser())
    if spec is None or spec.loader is None or not Path(path).expanduser().is_file():
        raise InputError(f"--metric {text!r}: there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise InputError(f"--metric {text!r}: {path} cannot be run: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"--metric {text!r}: {path} has no function {name!r}")
    made: Callable[[str, str], float] = function
    return made
