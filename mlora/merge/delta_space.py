"""Delta space, the default: the strategies work on the true change of a weight,

    D = gain * W + W * in_gain + scale B^T A, and (T - I) W or W (T - I) of turns,

and the result is returned at a rank, with its relative error, or whole where one of them is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .. import errors
from ..lowering.delta import BaseLinear, Delta, Matrix
from .how import Merge
from .strategies import combine, fresh
from .sums import weighted_sum
from .truncate import truncate, truncate_sum


def merge_deltas(terms: Sequence[tuple[Delta, float]], how: Merge, base: BaseLinear, seeds: Sequence[int]) -> Delta:
    """What `how`, which is no plain sum, makes of (delta, weight) terms of one module. `seeds`: of each one's masks.

    Raises:
        MergeError: a gain is no change of the weight there.
    """
    deltas, weights = [d for d, _ in terms], [w for _, w in terms]
    rank = how.svd_rank or max(1, *(d.rank for d in deltas))
    norm = base.offset is not None  # whose weight is its gain
    if norm:
        gain = combine(_vectors([d.gain for d in deltas], base), weights, how, seeds)
        result = Delta(gain=gain)
    elif how.prunes or any(d.changes_outputs or d.changes_inputs or d.matrix is not None for d in deltas):
        dense = combine([partial(_dense, d, base) for d in deltas], weights, how, seeds)
        if rank >= min(dense.shape) and how.svd_clamp is None and any(d.matrix is not None for d in deltas):
            result = Delta(matrix=Matrix.of(dense))
        else:
            result = truncate(dense, deltas, rank, how.svd_clamp)
    else:
        result = truncate_sum(weighted_sum(terms, base.name), rank, how.svd_clamp)
    shifts = [d.shift if norm else _bias_change(d, base) for d in deltas]
    if all(shift is None for shift in shifts):
        return result
    return replace(result, shift=combine(_vectors(shifts, base), weights, how, [seed + 1 for seed in seeds]))


def _vectors(parts: Sequence[Tensor | None], base: BaseLinear) -> list[Callable[[], Tensor]]:
    """Makers of (out,) tensors for `combine`, of zeros where a delta has no such part."""
    zeros = torch.zeros(base.out_features)
    return [partial(fresh, zeros if part is None else part) for part in parts]


def _dense(delta: Delta, base: BaseLinear) -> Tensor:
    """The true change of the weight, (out, in) in fp32."""
    dense = delta.product()
    if dense is None:
        dense = torch.zeros(base.out_features, base.in_features)
    if (delta.changes_outputs or delta.changes_inputs) and base.conv is not None and not base.conv.zero_padded:
        raise errors.MergeError(
            f"module {base.name}: it is a convolution that does not pad with zeros, where a gain is no change of the "
            f"weight that adapters add to; use combination_type='linear'"
        )
    if delta.gain is not None:
        dense += delta.gain.float()[:, None] * base.weight()
    if delta.in_gain is not None:
        dense += delta.in_gain.float() * base.weight()
    if delta.turn is not None:
        dense += delta.turn.times(base.weight().t()).t()
    if delta.in_turn is not None:
        dense += delta.in_turn.times(base.weight(), transposed=True)
    return dense


def _bias_change(delta: Delta, base: BaseLinear) -> Tensor | None:
    """The true change of the bias, (out,), which gains and turns of outputs change too."""
    shift = delta.shift
    if not delta.changes_outputs or (bias := base.bias()) is None:
        return shift
    total = torch.zeros(base.out_features) if shift is None else shift.float()
    if delta.gain is not None:
        total = total + delta.gain.float() * bias
    return total if delta.turn is None else total + delta.turn.times(bias)
