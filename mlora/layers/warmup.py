"""Compiling the Triton kernels that a patched model needs, before its first request. Importing this imports Triton."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import apply_, apply_keep_, config, embed_, rank_gradients_, scale_input, turn_output
from ..ops.dispatch import kernels_take
from .norm import NormLayer


def warmup(model: torch.nn.Module, tokens: Sequence[int] = (1, config.DECODE_TOKENS + 1)) -> int:
    """Compile every kernel that a patched model's layers use, before the first request.

    Runs each layer shape once on a plan that routes nothing, in both forms; Triton keeps what it compiled on disk.

    Args:
        tokens: tokens of the forwards to prepare for; one number of each form is enough.

    Returns:
        How many operator calls were made.
    """
    calls = 0
    seen = set()
    for module in model.modules():
        state = getattr(module, "_mlora", None)
        if state is None:
            continue
        if isinstance(module, torch.nn.Embedding) and not state.shared.embeddings:
            continue
        if isinstance(module, NormLayer) and not state.shared.norms:  # norms, which no adapter trains yet
            continue
        arena, words = state.arena, state.shared.blank.tensors[state.home]
        shape = (state.table.shape[0], *_widths(module))
        taken = arena.device.type in ("cuda", "cpu") and kernels_take(state.dtype, arena.dtype)
        if not taken or (shape, state.dtype) in seen:
            continue
        seen.add((shape, state.dtype))
        _, width, width_out = shape
        if isinstance(module, torch.nn.Embedding):
            y, ids = torch.zeros(1, shape[2], dtype=state.dtype, device=arena.device), state.table.new_zeros(1)
            embed_(y, ids, arena, state.table, words, shape[1])
            calls += 1
            continue
        for count in tokens:
            x, y = (torch.zeros(count, n, dtype=state.dtype, device=arena.device) for n in (width, width_out))
            apply_(y, None, x, arena, state.table, words)
            scale_input(x, arena, state.table, words)
            calls += 2
            if state.shared.turns:
                turn_output(y, None, arena, state.table, words)
                calls += 1
            if state.shared.training is not None:
                calls += _train(x, y, arena, state.table, words)
    return calls


def _train(x: Tensor, y: Tensor, arena: Tensor, table: Tensor, words: Tensor) -> int:
    """What a linear's forward and backward pass call beside; returns how many calls that are."""
    v, offsets = x.new_empty(0, dtype=torch.float32), torch.full_like(table[:, 0], -1)
    for one, other in ((x, y), (y, x)):
        apply_keep_(other, v, None, one, arena, table, words)
        rank_gradients_(v, v, one, offsets, arena, table, words)
    return 4


def _widths(module: Any) -> tuple[int, int]:
    """(in, out) of a linear, a Conv1D, a convolution, an embedding or a norm."""
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    if hasattr(module, "kernel_size"):
        return module.in_channels * math.prod(module.kernel_size), module.out_channels
    return module.weight.shape[0], module.weight.shape[-1]
