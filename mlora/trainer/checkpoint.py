"""Checkpoints of a run: its adapter as PEFT has it, its optimizer, and where it stood. One is written beside its place
and then renamed, so that there is none or a whole one, whenever the process ends."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import errors
from ..runtime import Runtime

STATE = "trainer_state.json"
_OPTIMIZER = "optimizer.pt"
_NAME = re.compile(r"checkpoint-(\d+)")
_ADAPTER = ("adapter_model.safetensors", "adapter_config.json")  # the config last: a folder with it is whole


@dataclass
class State:
    """Where a run stands.

    Args:
        step: optimizer steps that it has taken. `ended`: as `Result` has it, or None. `loss`: of the last step.
        best_loss, best_step: of its evaluations. `worse`: how many since were not better.
        eval_loss: of the last one. `settings`: what it was started with. `rows`: how many examples it has.
    """

    step: int = 0
    ended: str | None = None
    loss: float | None = None
    eval_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    worse: int = 0
    rows: int = 0
    settings: dict[str, Any] = field(default_factory=dict)


def save(
    folder: Path,
    name: str,
    runtime: Runtime,
    state: State,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    keep: int,
) -> Path:
    """Write `folder/checkpoint-STEP`, and remove all but the newest `keep` and the best one's."""
    place = folder / f"checkpoint-{state.step}"
    part = folder / f"{place.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    runtime.save_adapter(name, part)
    kept = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "rng": runtime.get_rng_state(name)}
    torch.save(kept, part / _OPTIMIZER)
    (part / STATE).write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
    _to_disk(part.iterdir())
    if place.exists():
        shutil.rmtree(place)
    os.replace(part, place)
    for old in checkpoints(folder)[:-keep]:
        if old != place and _step(old) != state.best_step:
            shutil.rmtree(old, ignore_errors=True)
    return place


def finish(folder: Path, name: str, runtime: Runtime, state: State) -> None:
    """Put the adapter into `folder` itself: each file in one move, and last what tells that the run has ended."""
    part = folder / "adapter.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    runtime.save_adapter(name, part)
    (part / STATE).write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
    _to_disk(part.iterdir())
    written = sorted(part.iterdir(), key=lambda file: [*_ADAPTER, STATE].index(file.name))
    for file in written:
        os.replace(file, folder / file.name)
    part.rmdir()


def newest(folder: Path) -> tuple[State, Path] | None:
    """Where the run that wrote to `folder` stood, and its adapter: in `folder` itself where it has ended, else in its
    last checkpoint; None where there is none.

    Raises:
        TrainError: what is there is damaged.
    """
    if (folder / STATE).is_file() and (folder / _ADAPTER[1]).is_file():
        return _read(folder), folder
    there = checkpoints(folder)
    return (_read(there[-1]), there[-1]) if there else None


def check_own(folder: Path) -> None:
    """Raise TrainError where an adapter is in `folder` that no run has put there."""
    if (folder / _ADAPTER[1]).is_file() and not (folder / STATE).is_file() and not checkpoints(folder):
        raise errors.TrainError(
            f"{folder} has an adapter that no run has trained; move it away, or give the run another name or folder"
        )


def checkpoints(folder: Path) -> list[Path]:
    """The whole ones, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name) and (path / STATE).is_file()]
    return sorted(found, key=_step)


def at(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step}"


def read_optimizer(path: Path) -> Mapping[str, Any]:
    """What the optimizer and schedule of a checkpoint held. Raises TrainError if it is damaged."""
    try:
        kept: Mapping[str, Any] = torch.load(path / _OPTIMIZER, map_location="cpu", weights_only=True)
        return kept
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise errors.TrainError(f"checkpoint {path} cannot be read: {error}; remove it to go on without") from None


def clear(folder: Path) -> None:
    """Remove what an earlier run left in `folder`."""
    for path in (*folder.glob("checkpoint-*"), folder / "adapter.part"):
        shutil.rmtree(path, ignore_errors=True)
    for file in (STATE, *_ADAPTER):
        (folder / file).unlink(missing_ok=True)


def _read(folder: Path) -> State:
    try:
        return State(**json.loads((folder / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise errors.TrainError(f"{folder / STATE} cannot be read: {error}; remove {folder} to go on without") from None


def _step(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    assert found is not None
    return int(found.group(1))


def _to_disk(files: Iterable[Path]) -> None:
    """A rename must not come to the disk before what is renamed."""
    for file in files:
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
