"""The random matrices that VeRA and RandLora share among modules: from the file, or drawn again.

Without `save_projection` the file has only the seed, and PEFT draws them anew from torch's CPU generator,
in the widest shape that any targeted module needs. So does this, in the same order.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from .module import Module


def widest(module: Module) -> tuple[int, int]:
    """(out, in): the largest of each among the adapter's modules."""
    return max(base.out_features for base in module.peers), max(base.in_features for base in module.peers)


def seed(module: Module) -> int:
    """`projection_prng_key`, checked."""
    return module.integer("projection_prng_key", 0, least=0)


@lru_cache(maxsize=2)
def vera(key: int, rank: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """A, (rank, inputs), and B, (outputs, rank): Kaiming-uniform with gain sqrt(2)."""
    generator = torch.Generator().manual_seed(key)

    def draw(rows: int, columns: int) -> Tensor:
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))
        return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)

    return draw(rank, inputs), draw(outputs, rank)
