"""Attention of decode steps on the CPU, for models that are patched with `fused="always"`.

Torch's attention cuts its work for many queries. With one query a row and a hundred keys it takes a seventh of a decode
step (16 rows, a model of width 2048) to two fifths (64 rows of SmolLM2-135M). The operator `attend_step` reads each
row's keys and values once, where they lie in the cache, and only those that the row sees. Its sums are in fp32, rounded
once, in an order of its own: its bits are not torch's, and a row's bits depend on nothing but the row. All other calls
are left to transformers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import direct, dispatch

INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # by which transformers' models choose their attention


class Interface:
    """In place of transformers' `ALL_ATTENTION_FUNCTIONS` in the forward of an attention, whose module has `names`: the
    same, with decode steps of "sdpa" by `attend_step`."""

    def __init__(self, names: Mapping[str, Any]) -> None:
        self._names = names

    def get_interface(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        return _stepping(self._names[INTERFACE].get_interface(name, default))

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return _stepping(self._names[INTERFACE][name])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._names[INTERFACE], name)


@functools.cache
def _sdpa() -> Callable[..., Any]:
    """Transformers' own, imported when a model of it asks."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward


def _stepping(function: Callable[..., Any]) -> Callable[..., Any]:
    return _attend if function is _sdpa() else function


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers' `sdpa_attention_forward`."""
    if direct.usable(query, key, value) and query.shape[2] == 1 and not dropout:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if isinstance(scale, float) and _is_step(module, query, key, value, attention_mask, kwargs):
            return dispatch.attend_step(query, key, value, attention_mask, scale), None
    return _sdpa()(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def _is_step(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: Mapping[str, Any]
) -> bool:
    """Whether `attend_step` computes what "sdpa" does for one query a row."""
    batch, heads, _, dim = query.shape
    kv_heads, keys = key.shape[1:3]
    if any(kwargs.get(name) is not None for name in ("position_bias", "softcap")) or kwargs.get("output_attentions"):
        return False
    if not query.is_cpu or not dispatch.attends(query.dtype):
        return False
    if not query.dtype == key.dtype == value.dtype or not key.shape == value.shape == (batch, kv_heads, keys, dim):
        return False
    if heads != kv_heads * getattr(module, "num_key_value_groups", 1):
        return False
    return mask is None or (mask.dtype == torch.bool and mask.shape in ((batch, 1, 1, keys), (1, 1, 1, keys)))
