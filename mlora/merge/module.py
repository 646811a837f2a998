"""What a merge makes of one module, and of all of them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from .. import errors
from ..lowering.delta import BaseLinear, Delta
from .delta_space import merge_deltas
from .factor_space import merge_factors
from .how import Merge
from .sums import weighted_sum, without_cancelled


def merge_adapters(
    adapters: Sequence[Mapping[str, Delta]], how: Merge, bases: Mapping[str, BaseLinear]
) -> Iterator[tuple[str, Delta]]:
    """Module by module, what `merge_module` makes of the deltas that are there: (dotted path, delta)."""
    for name in dict.fromkeys(name for deltas in adapters for name in deltas):
        yield name, merge_module([deltas.get(name) for deltas in adapters], how, bases[name])


def kept(deltas: Mapping[str, Delta], bases: Mapping[str, BaseLinear]) -> dict[str, Delta]:
    """What an adapter holds of a merge's deltas (dotted path -> delta): those that have parts. Where none has, zeros: a
    merge to nothing is an adapter that changes nothing."""
    return {name: d for name, d in deltas.items() if not d.is_empty} or {name: _zeros(bases[name]) for name in deltas}


def _zeros(base: BaseLinear) -> Delta:
    if base.offset is not None:  # a norm, which has no rank rows
        return Delta(gain=torch.zeros(base.out_features))
    return Delta(torch.zeros(1, base.in_features), torch.zeros(1, base.out_features))


def merge_module(deltas: Sequence[Delta | None], how: Merge, base: BaseLinear) -> Delta:
    """What `how` makes of one module; at least one delta is not None, which is an adapter that leaves it alone.

    Shapes: as in `Delta`, all of one module. The result is in fp32, its scale is 1, and its `error` is the relative
    Frobenius distance of its low-rank part from what it stands for.

    Raises:
        MergeError: factor space cannot hold these deltas.
    """
    present = [(d, w, n) for d, w, n in zip(deltas, how.shares, how.adapters, strict=True) if d is not None]
    terms = [(d, w) for d, w, _ in present]
    _refuse_unmergeable([d for d, _ in terms], base)
    if how.is_sum:
        merged = without_cancelled(weighted_sum(terms, base.name))
    else:
        seeds = [zlib.crc32(f"{how.seed}/{base.name}/{name}".encode()) for _, _, name in present]
        merged = (merge_factors if how.in_factors else merge_deltas)(terms, how, base, seeds)
    return replace(merged, trained=any(d.trained for d, _ in terms))


def _refuse_unmergeable(deltas: Sequence[Delta], base: BaseLinear) -> None:
    if base.experts:
        raise errors.MergeError(
            f"parameter {base.name}: experts' weights and other parameters (target_parameters) are served in weighted "
            f"entries, and not in merges that make a new adapter"
        )
    if any(d.replaces for d in deltas):
        raise errors.MergeError(
            f"module {base.name}: an adapter has weights of another size there, in place of the model's: there is "
            f"nothing that they could be merged with"
        )
    if any(d.invocation for d in deltas):
        raise errors.MergeError(
            f"module {base.name}: an aLoRA applies to a part of the tokens (alora_invocation_tokens), so there is no "
            f"merge with it; it is served in weighted entries"
        )
