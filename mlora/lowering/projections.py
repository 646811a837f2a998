"""The random matrices that VeRA, PVeRA and RandLora share among modules: from the file, or drawn again.

Without `save_projection` the file has only the seed, and PEFT draws them anew from torch's CPU generator,
in the widest shape that any targeted module needs. So does this, in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .module import Module


def widest(module: Module) -> tuple[int, int]:
    """(out, in): the largest of each among the adapter's modules."""
    return max(base.out_features for base in module.peers), max(base.in_features for base in module.peers)


def seed(module: Module) -> int:
    """`projection_prng_key`, checked."""
    return module.integer("projection_prng_key", 0, least=0)


@contextmanager
def seeded(module: Module) -> Iterator[None]:
    """torch's generators as they are after `random_seed`, in the block only: of randomized decompositions."""
    device = module.base.device
    how: dict[str, Any] = {"devices": []} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
    with torch.random.fork_rng(**how):
        torch.manual_seed(module.integer("random_seed", 0, least=0))
        yield


@lru_cache(maxsize=2)
def kaiming(key: int, a: tuple[int, int], b: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A and B of these shapes, one drawn after the other: Kaiming-uniform with gain sqrt(2)."""
    generator = torch.Generator().manual_seed(key)

    def draw(rows: int, columns: int) -> Tensor:
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))
        return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)

    return draw(*a), draw(*b)
