"""Scores as a table and as a picture, and the entry that is good at all tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .scores import Score

_LOW_IS_GOOD = ("loss", "perplexity")


def kept(scores: Sequence[Score], metric: str, bare: str | None) -> dict[str, float]:
    """Label -> the least share, over all tasks, of what the best entry gains there over the bare model.

    1 is an entry that is the best at every task; 0 one that at some task is no better than no adapter.

    Args:
        metric: of the scores. `bare`: the label of the base; without one, gains count from the worst entry.
    """
    sign = -1.0 if metric in _LOW_IS_GOOD else 1.0
    by_task: dict[str, dict[str, float]] = {}
    for score in scores:
        by_task.setdefault(score.task, {})[score.entry] = sign * score.values[metric]
    found: dict[str, float] = {}
    for values in by_task.values():
        start = values[bare] if bare is not None else min(values.values())
        most = max(values.values()) - start
        for label, value in values.items():
            share = (value - start) / most if most > 0 and math.isfinite(value) else 0.0
            found[label] = min(found.get(label, math.inf), share)
    return found


def table_of(scores: Sequence[Score], bare: str | None = None) -> Any:
    """A `rich` table: a row an entry, a column a task and metric; last what `kept` says of the first metric."""
    from rich.table import Table

    tasks = list(dict.fromkeys(score.task for score in scores))
    metrics = list(scores[0].values)
    shares = kept(scores, metrics[0], bare)
    table = Table("entry", box=None, pad_edge=False)
    for task in tasks:
        for metric in metrics:
            table.add_column(f"{task}\n{metric}", justify="right")
    table.add_column("least share\nof the best", justify="right")
    found = {(score.entry, score.task): score.values for score in scores}
    best = max(shares, key=lambda label: shares[label])
    for label in dict.fromkeys(score.entry for score in scores):
        cells = [f"{found[label, task][metric]:.4g}" for task in tasks for metric in metrics]
        mark = " *" if label == best else ""
        table.add_row(label, *cells, f"{shares[label]:.0%}{mark}")
    return table


def draw(scores: Sequence[Score], metric: str, file: Path) -> None:
    """A PNG: a row an entry, a column a task, each cell its value. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(score.task for score in scores))
    labels = list(dict.fromkeys(score.entry for score in scores))
    values: Mapping[tuple[str, str], float] = {(score.entry, score.task): score.values[metric] for score in scores}
    grid = [[values[label, task] for task in tasks] for label in labels]
    figure = Figure(figsize=(3.5 + 1.3 * len(tasks), 1.2 + 0.32 * len(labels)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    shades = [[_shade([row[at] for row in grid], row[at], metric) for at in range(len(tasks))] for row in grid]
    axis.imshow(shades, aspect="auto", cmap="Blues", vmin=0, vmax=1.4)
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            axis.text(x, y, f"{value:.3g}", ha="center", va="center", fontsize=8)
    axis.set_xticks(range(len(tasks)), tasks)
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.xaxis.tick_top()
    axis.set_title(f"{metric} (darker is better)", fontsize=10)
    figure.savefig(file, dpi=130)


def _shade(column: Sequence[float], value: float, metric: str) -> float:
    """From 0, the worst of a task, to 1, the best."""
    finite = [one for one in column if math.isfinite(one)]
    if not math.isfinite(value) or not finite or max(finite) == min(finite):
        return 0.0
    share = (value - min(finite)) / (max(finite) - min(finite))
    return 1 - share if metric in _LOW_IS_GOOD else share
