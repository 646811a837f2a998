"""`evaluate`: every entry on every task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from .. import errors
from ..data import Encoded, Form, Pair, Rows, check_rows, encode, find_target, prompt_ids, read_rows, reference_of
from ..merge import Merge, as_merge
from ..passes import Passes, Wanted, calls_of
from ..runtime import Runtime

Metric: TypeAlias = str | Callable[[str, str], float]
METRICS = ("loss", "perplexity", "exact_match")
_OF_LOSSES = ("loss", "perplexity")


@dataclass(frozen=True)
class Score:
    """What one entry does on one task.

    Args:
        entry: its label. `values`: metric -> its mean: of "loss" over all targets, of others over the rows;
            "perplexity" is the exponential of the loss. `answers`: of the rows, where a metric reads them.
        truncated: how many rows are longer than the model's positions, so that their losses leave out the end.
        dropped: the numbers of those rows, from 1, of which no target is left, and no loss.
    """

    entry: str
    task: str
    values: Mapping[str, float]
    answers: Sequence[str] = ()
    truncated: int = 0
    dropped: Sequence[int] = ()


def evaluate(
    runtime: Runtime,
    tokenizer: Any,
    tasks: Mapping[str, Rows],
    entries: Mapping[str, Any],
    *,
    metrics: Sequence[Metric] = ("loss",),
    form: Form | Mapping[str, Form] | None = None,
    max_new_tokens: int = 64,
    max_tokens: int = 4096,
    max_running: int = 32,
    told: Callable[[int], None] | None = None,
) -> list[Score]:
    """What each entry does on each task.

    Rows of all entries and tasks go through the model together: to be judged by their losses, sorted by length, and to
    be answered, greedily, by the engine of `mlora.serve`.

    Args:
        tasks: name -> rows of prompts and references, as `mlora.data.read_rows` takes them.
        entries: label -> an entry of `adapter_names`: an adapter's name, None, a mix, a `Merge`.
        metrics: "loss", "perplexity", "exact_match" (of the answer and the reference without white space around them),
            or functions of an answer and its reference that give a number. A function is tried before anything is
            computed, on the first row of each task with the reference as the answer.
        form: how rows are read, for all tasks or for each.
        max_new_tokens: of an answer. `max_running`: how many answers are written at once.
        max_tokens: of a call that computes losses, with padding.
        told: is called with how many losses and answers are there; `size` tells how many there will be.

    Returns:
        A score for each entry and task, in their order.

    Raises:
        DataError: a data set cannot be read, a row has not what its form wants, or a prompt with its answer is longer
            than the model's positions. MetricError: a metric is none, or gave no number.
        UnknownAdapterError, EntryError, MergeError: an entry is none.
    """
    named = _named(metrics)
    forms = {task: form if isinstance(form, Form) else (form or {}).get(task, Form()) for task in tasks}
    pairs = {task: check_rows(read_rows(rows), forms[task], f"task {task!r}") for task, rows in tasks.items()}
    check_metrics(metrics, pairs)
    losses: dict[tuple[str, str], float] = {}
    answers: dict[tuple[str, str], list[str]] = {}
    encoded: dict[str, Encoded] = {}
    prompts: dict[str, list[list[int]]] = {}
    limit = getattr(runtime.model.config, "max_position_embeddings", None)
    if any(function is None for function in named.values()):
        encoded = _encoded(tokenizer, pairs, forms, limit)
    if any(function is not None for function in named.values()):
        prompts = _prompts(tokenizer, pairs, max_new_tokens, limit)
    done = _Done(told)

    def judge(labels: Sequence[str]) -> None:
        with _merged(runtime, {label: entries[label] for label in labels}) as loaded:
            if encoded:
                losses.update(_losses(runtime, tokenizer, encoded, loaded, max_tokens, done))
            if prompts:
                answers.update(_answers(runtime, tokenizer, prompts, loaded, max_new_tokens, max_running, done))

    with _as_it_is(runtime.model):
        _in_parts(judge, list(entries))
    scores = []
    for label in entries:
        for task in tasks:
            key = (label, task)
            values = {}
            for name, function in named.items():
                if function is None:
                    values[name] = losses[key] if name == "loss" else _exp(losses[key])
                else:
                    values[name] = _mean(name, function, answers[key], pairs[task], f"task {task!r}")
            cut = encoded.get(task, Encoded())
            scores.append(Score(label, task, values, answers.get(key, ()), cut.truncated, tuple(cut.dropped)))
    return scores


def check_metrics(metrics: Sequence[Metric], tasks: Mapping[str, Sequence[Pair]]) -> None:
    """Raise MetricError where a metric is none, or a function gives no number of the first row of a task, with the
    reference as the answer."""
    for name, function in _named(metrics).items():
        if function is not None:
            for task, pairs in tasks.items():
                _mean(name, function, [reference_of(pairs[0])], pairs[:1], f"task {task!r}")


def check_texts(
    tokenizer: Any,
    tasks: Mapping[str, Sequence[Pair]],
    metrics: Sequence[Metric],
    form: Form,
    max_new_tokens: int,
    limit: int | None,
) -> None:
    """Raise DataError where `evaluate` does for what the tokenizer makes of the rows; no model is needed.

    Args:
        limit: the model's positions.
    """
    named = _named(metrics)
    for task, pairs in tasks.items() if None in named.values() else ():
        find_target(pairs, tokenizer, form, limit, f"task {task!r}")
    if any(function is not None for function in named.values()):
        _prompts(tokenizer, tasks, max_new_tokens, limit)


def size(tasks: Mapping[str, Sequence[Any]], entries: Mapping[str, Any], metrics: Sequence[Metric]) -> int:
    """How many losses and answers `evaluate` makes."""
    names = _named(metrics)
    kinds = any(name in _OF_LOSSES for name in names) + any(name not in _OF_LOSSES for name in names)
    return kinds * len(entries) * sum(map(len, tasks.values()))


class _Done:
    """Counts what is done."""

    def __init__(self, told: Callable[[int], None] | None) -> None:
        self._told, self._count = told, 0

    def more(self, count: int) -> None:
        self._count += count
        if self._told is not None:
            self._told(self._count)


def _named(metrics: Sequence[Metric]) -> dict[str, Callable[[str, str], float] | None]:
    """Name -> its function; None of those that are made of losses."""
    found: dict[str, Callable[[str, str], float] | None] = {}
    function: Callable[[str, str], float] | None
    for metric in metrics:
        if callable(metric):
            name, function = getattr(metric, "__name__", "metric"), metric
        elif metric in METRICS:
            name, function = metric, None if metric in _OF_LOSSES else _exact_match
        else:
            raise errors.MetricError(f"metric {metric!r} is none; there are {', '.join(METRICS)}, and functions")
        if name in found:
            raise errors.MetricError(f"the metric {name!r} is there twice; give each function a name of its own")
        found[name] = function
    if not found:
        raise errors.MetricError("there is no metric to judge by")
    return found


def _mean(
    name: str, function: Callable[[str, str], float], answers: Sequence[str], pairs: Sequence[Pair], where: str
) -> float:
    total = 0.0
    for row, (answer, pair) in enumerate(zip(answers, pairs, strict=True), start=1):
        try:
            total += float(function(answer, reference_of(pair)))
        except (Exception, SystemExit) as error:
            raise errors.MetricError(
                f"metric {name!r} of {where} row {row}, answer {answer!r} and reference {reference_of(pair)!r}: "
                f"{type(error).__name__}: {error}; wanted a number"
            ) from error
    return total / len(pairs)


def _exact_match(answer: str, reference: str) -> float:
    return float(answer.strip() == reference.strip())


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _encoded(
    tokenizer: Any, pairs: Mapping[str, Sequence[Pair]], forms: Mapping[str, Form], limit: int | None
) -> dict[str, Encoded]:
    found = {}
    for task, own in pairs.items():
        find_target(own, tokenizer, forms[task], limit, f"task {task!r}")
        found[task] = encode(own, tokenizer, forms[task], limit, f"task {task!r}")
    return found


def _prompts(
    tokenizer: Any, pairs: Mapping[str, Sequence[Pair]], max_new_tokens: int, limit: int | None
) -> dict[str, list[list[int]]]:
    found = {task: [prompt_ids(pair, tokenizer) for pair in own] for task, own in pairs.items()}
    for task, prompts in found.items():
        for row, ids in enumerate(prompts, start=1):
            if not ids:
                raise errors.DataError(f"task {task!r} row {row}: its prompt is empty, and cannot be answered")
            if limit is not None and len(ids) + max_new_tokens > limit:
                raise errors.DataError(
                    f"task {task!r} row {row}: its prompt of {len(ids)} tokens and max_new_tokens {max_new_tokens} are "
                    f"more than the model's {limit} positions"
                )
    return found


def _losses(
    runtime: Runtime,
    tokenizer: Any,
    tasks: Mapping[str, Encoded],
    entries: Mapping[str, Any],
    max_tokens: int,
    done: _Done,
) -> dict[tuple[str, str], float]:
    passes = Passes(runtime, tokenizer.pad_token_id or 0, max_tokens)
    sums: dict[Any, float] = {}
    rows = [
        Wanted(entry, (label, task), example)
        for label, entry in entries.items()
        for task, encoded in tasks.items()
        for example in encoded.examples
    ]
    with torch.inference_mode():
        for call, losses in zip(calls_of(rows, max_tokens), passes.losses(rows), strict=True):
            for group, loss in losses.items():
                sums[group] = sums.get(group, 0.0) + float(loss)
            done.more(len(call))
    return sums


def _answers(
    runtime: Runtime,
    tokenizer: Any,
    prompts: Mapping[str, Sequence[list[int]]],
    entries: Mapping[str, Any],
    max_new_tokens: int,
    max_running: int,
    done: _Done,
) -> dict[tuple[str, str], list[str]]:
    from ..serve import Engine, Sampling  # which imports what generates, half of transformers

    sampling = Sampling.like_generate(runtime.model, do_sample=False, max_new_tokens=max_new_tokens)
    found: dict[tuple[str, str], list[str]] = {
        (label, task): [""] * len(own) for label in entries for task, own in prompts.items()
    }
    places = [(label, task, row) for task, own in prompts.items() for row in range(len(own)) for label in entries]
    requests = ((prompts[task][row], entries[label], sampling) for label, task, row in places)
    with Engine(runtime, max_running=max_running) as engine:
        for one in engine.generate_many(requests):
            if one.error is not None:
                raise one.error
            label, task, row = places[one.request]
            ids = [token.id for token in one.tokens]
            ids = ids[:-1] if one.finish_reason == "stop" else ids
            found[label, task][row] = tokenizer.decode(ids, skip_special_tokens=True)
            done.more(1)
    return found


def _in_parts(judge: Callable[[Sequence[str]], None], labels: Sequence[str]) -> None:
    """All entries at once, or, where their adapters do not fit on the device together, by halves."""
    try:
        judge(labels)
    except errors.CapacityError:
        if len(labels) == 1:
            raise
        half = len(labels) // 2
        _in_parts(judge, labels[:half])
        _in_parts(judge, labels[half:])


@contextmanager
def _merged(runtime: Runtime, entries: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The entries, with merges as adapters of a name of their own, which are gone afterwards: each is computed once,
    however many there are."""
    made: list[str] = []
    loaded = {}
    try:
        for label, entry in entries.items():
            merge = entry if isinstance(entry, Merge) else as_merge(entry)
            if merge is not None:
                name = f"merge to be evaluated: {label}"
                runtime.add_merge(name, merge)
                made.append(name)
                entry = name
            loaded[label] = entry
        yield loaded
    finally:
        for name in made:
            runtime.delete_adapter(name, when_unused=True)


@contextmanager
def _as_it_is(model: Any) -> Iterator[None]:
    """Without dropout."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
