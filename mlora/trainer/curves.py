"""What a run's steps were like: JSON lines as they come, and a picture of the losses at the end."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LOG = "log.jsonl"
PICTURE = "losses.png"


class Log:
    """Appends to `folder/log.jsonl`, after what of it belongs to steps up to `step`: a run that goes on from a
    checkpoint takes those after it again."""

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / LOG
        kept = [record for record in read_log(folder) if record.get("step", 0) <= step] if step else []
        self._path.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")

    def write(self, record: Mapping[str, float]) -> None:
        told = {key: value if math.isfinite(value) else None for key, value in record.items()}  # JSON has no NaN
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(told) + "\n")


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Its records; a last line that was not written to its end is none."""
    records = []
    path = folder / LOG
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def draw(folders: Mapping[str, Path], file: Path) -> bool:
    """The losses of runs over their steps, dots where they were evaluated. False where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for number, (name, folder) in enumerate(folders.items()):
        records, color = read_log(folder), f"C{number % 10}"
        steps = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
        judged = [(r["step"], r["eval_loss"]) for r in records if r.get("eval_loss") is not None]
        if steps:
            axis.plot(*zip(*steps, strict=True), color=color, alpha=0.35, linewidth=0.8)
            axis.plot(*zip(*_smooth(steps), strict=True), color=color, label=name)
        if judged:
            axis.plot(*zip(*judged, strict=True), "o", color=color, markersize=4)
    axis.set(xlabel="step", ylabel="loss", title="Losses (lines: training, smoothed; dots: evaluation)")
    axis.grid(alpha=0.3)
    if folders:
        axis.legend(fontsize=8)
    figure.savefig(file, dpi=120)
    return True


def _smooth(steps: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """An exponential mean, over about a tenth of the steps."""
    keep = 1 - 1 / max(1.0, len(steps) / 10)
    mean, found = steps[0][1], []
    for step, loss in steps:
        mean = keep * mean + (1 - keep) * loss
        found.append((step, mean))
    return found
