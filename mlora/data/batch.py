"""Examples, padded to one width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .examples import IGNORED, Example


class Batch(NamedTuple):
    """`inputs`: `input_ids` and `attention_mask`, int64 (rows, longest), padded on the right. `labels`: int64 (rows,
    longest), the ids themselves, -100 where there is no target, as `mlora.losses` takes them."""

    inputs: dict[str, Tensor]
    labels: Tensor


def batch_of(examples: Sequence[Example], pad: int, device: Any = None) -> Batch:
    """`pad`: a token that every row's embedding has; it is masked."""
    width = max(len(example.ids) for example in examples)
    ids = [[*example.ids, *[pad] * (width - len(example.ids))] for example in examples]
    mask = [[1] * len(example.ids) + [0] * (width - len(example.ids)) for example in examples]
    labels = [[*example.labels, *[IGNORED] * (width - len(example.ids))] for example in examples]
    inputs = {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}
    return Batch(inputs, torch.tensor(labels, device=device))
