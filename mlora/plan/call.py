"""What a call of a model says of its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_CACHES = ("cache", "past_key_values", "cache_params", "past_buckets_states", "mems", "state", "past")  # of any version
# The arguments that may be a model's main input. A decoder's come last: with the encoder's beside them, those count.
_INPUTS = (
    "input_ids", "inputs", "inputs_embeds", "pixel_values", "input_values", "input_features", "decoder_input_ids",
    "decoder_inputs_embeds",
)  # fmt: skip


@dataclass(slots=True)  # torch 2.10 compiles no properties of named tuples
class Call:
    """The arguments of a call of a model, or of its `generate`."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its main input; `()` if it has none."""
        for name in _INPUTS:
            if isinstance(self.kwargs.get(name), Tensor):
                return tuple(self.kwargs[name].shape)
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, Tensor) and value.dim():
                return tuple(value.shape)
        encoded = self.kwargs.get("encoder_outputs")  # of an encoder that ran before, which `generate` goes on from
        return () if encoded is None else tuple(encoded[0].shape)

    @property
    def choices(self) -> int:
        """Of a model of multiple choice: into how many rows of its own it cuts each, (rows, choices, length)."""
        shape = self.shape
        embeds = self.kwargs.get("input_ids") is None and self.kwargs.get("inputs_embeds") is not None
        return shape[1] if len(shape) == (4 if embeds else 3) else 1

    @property
    def ids(self) -> Tensor | None:
        """Its token ids, (rows, length); None where it has none, or embeddings of another length beside them."""
        ids = next(
            (v for v in (self.kwargs.get("input_ids"), self.kwargs.get("inputs"), *self.args[:1]) if v is not None),
            None,
        )
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype is torch.bool or ids.dim() not in (1, 2):
            return None
        ids = ids if ids.dim() == 2 else ids[None]
        embeds = self.kwargs.get("inputs_embeds")
        return ids if embeds is None or embeds.shape[:2] == ids.shape else None

    @property
    def past(self) -> int | None:
        """How many tokens a row its cache holds; None where that cannot be told."""
        caches = [cache for name in _CACHES if (cache := self.kwargs.get(name)) is not None]
        caches += [value for value in self.args if hasattr(value, "get_seq_length")]
        if not caches:
            return 0
        try:
            return int(caches[0].get_seq_length())
        except (AttributeError, ValueError):  # not transformers' own, or of recurrent states only
            return None

    @property
    def picks(self) -> bool:
        """Whether the caller says of which tokens he wants answers, in whatever order."""
        return isinstance(self.kwargs.get("logits_to_keep"), Tensor)
