"""Which rows make up a step: a new order every epoch, which depends on the seed and the epoch alone. So a run that goes
on from a checkpoint needs no more than the number of its step."""

from __future__ import annotations

import math
from functools import lru_cache

import torch


def steps_per_epoch(rows: int, rows_per_step: int) -> int:
    return max(1, math.ceil(rows / rows_per_step))


def total_steps(rows: int, rows_per_step: int, epochs: float, max_steps: int | None) -> int:
    """As transformers' Trainer counts them: the last step of an epoch may have fewer rows."""
    if max_steps is not None:
        return max_steps
    return max(1, math.ceil(epochs * steps_per_epoch(rows, rows_per_step)))


def rows_of(step: int, rows: int, rows_per_step: int, seed: int | None) -> list[int]:
    """The rows of a step, which count from 0. `seed`: None keeps them in their own order."""
    epoch, within = divmod(step, steps_per_epoch(rows, rows_per_step))
    order = range(rows) if seed is None else _order(rows, seed, epoch)
    return list(order[within * rows_per_step : (within + 1) * rows_per_step])


@lru_cache(maxsize=256)
def _order(rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**64)
    return tuple(torch.randperm(rows, generator=generator).tolist())
