"""What the shapes of an adapter's tensors tell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def linears_of(tensors: Mapping[str, Any]) -> dict[str, tuple[int, int, int]]:
    """Module -> (rank, in, out), from the shapes of its lora_A and lora_B."""
    found = {}
    for key, a in tensors.items():
        b = tensors.get(key.replace(".lora_A.", ".lora_B."))
        if key.endswith(".lora_A.weight") and b is not None and a.dim() == b.dim() >= 2:
            found[key.removesuffix(".lora_A.weight")] = (a.shape[0], math.prod(a.shape[1:]), b.shape[0])
    return found
