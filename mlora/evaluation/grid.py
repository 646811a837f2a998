"""Merges of some adapters, by every strategy, density and weight."""

from __future__ import annotations

from collections.abc import Sequence

from .. import errors
from ..merge import Merge

_PRUNE = ("ties", "dare_linear", "dare_ties", "magnitude_prune")  # these keep a share of the values


def grid(
    adapters: Sequence[str],
    strategies: Sequence[str] = ("linear",),
    densities: Sequence[float] = (0.5,),
    weights: Sequence[float] = (1.0,),
    svd_rank: int | None = None,
) -> dict[str, Merge]:
    """A label -> merge of `adapters`, for each strategy with each weight, which all adapters have, and, of strategies
    that prune, with each density.

    Args:
        svd_rank: of the results; see `Merge`.

    Raises:
        MergeError: a value is none that a merge can have, or there are fewer than two adapters.
    """
    if len(adapters) < 2:
        raise errors.MergeError(f"adapters is {list(adapters)!r}; a merge needs two or more")
    found = {}
    names = "+".join(adapters)
    for strategy in strategies:
        base = strategy.removesuffix("_svd")
        for density in densities if base in _PRUNE else (None,):
            for weight in weights:
                kept = "" if density is None else f" {density:g}"
                rank = "" if svd_rank is None else f" r{svd_rank}"
                label = f"{strategy}{kept}{rank} x{weight:g} {names}"
                found[label] = Merge(
                    tuple(adapters), (weight,) * len(adapters), strategy, density=density, svd_rank=svd_rank
                )
    return found
