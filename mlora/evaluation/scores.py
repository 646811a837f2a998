"""`evaluate`: every entry on every task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from .. import errors
from ..data import Form, Pair, Rows, check_rows, encode, prompt_ids, read_rows, reference_of
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
    """

    entry: str
    task: str
    values: Mapping[str, float]
    answers: Sequence[str] = ()


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
            or functions of an answer and its reference that give a number.
        form: how rows are read, for all tasks or for each.
        max_new_tokens: of an answer. `max_running`: how many answers are written at once.
        max_tokens: of a call that computes losses, with padding.
        told: is called with how many losses and answers are there; `size` tells how many there will be.

    Returns:
        A score for each entry and task, in their order.

    Raises:
        DataError: a data set cannot be read, or a row has not what its form wants. ValueError: a metric is none.
        UnknownAdapterError, EntryError, MergeError: an entry is none.
    """
    named = _named(metrics)
    forms = {task: form if isinstance(form, Form) else (form or {}).get(task, Form()) for task in tasks}
    pairs = {task: check_rows(read_rows(rows), forms[task], f"task {task!r}") for task, rows in tasks.items()}
    losses: dict[tuple[str, str], float] = {}
    answers: dict[tuple[str, str], list[str]] = {}
    done = _Done(told)
    if any(name in _OF_LOSSES for name in named):
        losses = _losses(runtime, tokenizer, pairs, forms, entries, max_tokens, done)
    if any(name not in _OF_LOSSES for name in named):
        answers = _answers(runtime, tokenizer, pairs, entries, max_new_tokens, max_running, done)
    scores = []
    for label in entries:
        for task in tasks:
            key = (label, task)
            values = {}
            for name, function in named.items():
                if function is None:
                    values[name] = losses[key] if name == "loss" else _exp(losses[key])
                else:
                    judged = zip(answers[key], pairs[task], strict=True)
                    values[name] = sum(float(function(a, reference_of(pair))) for a, pair in judged) / len(pairs[task])
            scores.append(Score(label, task, values, answers.get(key, ())))
    return scores


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
    for metric in metrics:
        if callable(metric):
            found[getattr(metric, "__name__", "metric")] = metric
        elif metric in METRICS:
            found[metric] = None if metric in _OF_LOSSES else _exact_match
        else:
            raise ValueError(f"metric {metric!r} is none; there are {', '.join(METRICS)}, and functions")
    if not found:
        raise ValueError("there is no metric to judge by")
    return found


def _exact_match(answer: str, reference: str) -> float:
    return float(answer.strip() == reference.strip())


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _losses(
    runtime: Runtime,
    tokenizer: Any,
    pairs: Mapping[str, Sequence[Pair]],
    forms: Mapping[str, Form],
    entries: Mapping[str, Any],
    max_tokens: int,
    done: _Done,
) -> dict[tuple[str, str], float]:
    examples = {}
    limit = getattr(runtime.model.config, "max_position_embeddings", None)
    for task, own in pairs.items():
        examples[task] = encode(own, tokenizer, forms[task], limit).examples
        if not examples[task]:
            raise errors.DataError(f"task {task!r}: no row of it has a target within {limit} tokens")
    passes = Passes(runtime, tokenizer.pad_token_id or 0, max_tokens)
    found: dict[tuple[str, str], float] = {}

    def judge(labels: Sequence[str]) -> None:
        sums: dict[Any, float] = {}
        with _merged(runtime, {label: entries[label] for label in labels}) as loaded:
            rows = [
                Wanted(entry, (label, task), example)
                for label, entry in loaded.items()
                for task in pairs
                for example in examples[task]
            ]
            for call, losses in zip(calls_of(rows, max_tokens), passes.losses(rows), strict=True):
                for group, loss in losses.items():
                    sums[group] = sums.get(group, 0.0) + float(loss)
                done.more(len(call))
        found.update(sums)

    with _as_it_is(runtime.model), torch.inference_mode():
        _in_parts(judge, list(entries))
    return found


def _answers(
    runtime: Runtime,
    tokenizer: Any,
    pairs: Mapping[str, Sequence[Pair]],
    entries: Mapping[str, Any],
    max_new_tokens: int,
    max_running: int,
    done: _Done,
) -> dict[tuple[str, str], list[str]]:
    from ..serve import Engine, Sampling  # which imports what generates, half of transformers

    prompts = {task: [prompt_ids(pair, tokenizer) for pair in own] for task, own in pairs.items()}
    sampling = Sampling.like_generate(runtime.model, do_sample=False, max_new_tokens=max_new_tokens)
    found: dict[tuple[str, str], list[str]] = {
        (label, task): [""] * len(own) for label in entries for task, own in pairs.items()
    }

    def answer(labels: Sequence[str]) -> None:
        with _merged(runtime, {label: entries[label] for label in labels}) as loaded:
            places = [
                (label, task, row) for task, own in prompts.items() for row in range(len(own)) for label in labels
            ]
            requests = ((prompts[task][row], loaded[label], sampling) for label, task, row in places)
            with Engine(runtime, max_running=max_running) as engine:
                for one in engine.generate_many(requests):
                    if one.error is not None:
                        raise one.error
                    label, task, row = places[one.request]
                    ids = [token.id for token in one.tokens]
                    ids = ids[:-1] if one.finish_reason == "stop" else ids
                    found[label, task][row] = tokenizer.decode(ids, skip_special_tokens=True)
                    done.more(1)

    with _as_it_is(runtime.model):
        _in_parts(answer, list(entries))
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
