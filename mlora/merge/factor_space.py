"""Factor space: A and B are merged apart, as PEFT's `add_weighted_adapter` does where its type does not end in `_svd`,
number for number. A mixture of factors is not the mixture of the deltas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from .. import errors
from ..lowering.delta import BaseLinear, Delta
from .how import Merge
from .strategies import combine, fresh


def merge_factors(terms: Sequence[tuple[Delta, float]], how: Merge, base: BaseLinear, seeds: Sequence[int]) -> Delta:
    """What `how` makes of (delta, weight) terms of one module. `seeds`: of each one's masks.

    Raises:
        MergeError: they have other parts than factors, or different ranks.
    """
    for d, _ in terms:
        if d.a is None or d.changes_outputs or d.changes_inputs or d.shift is not None:
            raise errors.MergeError(
                f"module {base.name}: factor space merges plain LoRA only; one of the adapters has a whole matrix, a "
                f"gain, a turn or a bias. Use space='delta'"
            )
    ranks = sorted({d.rank for d, _ in terms})
    if len(ranks) > 1:
        raise errors.MergeError(
            f"module {base.name}: factor space needs equal ranks; the adapters have {ranks}. Use space='delta'"
        )
    # Each factor takes the root of the weight, and A its sign.
    roots = [math.sqrt(abs(w * d.scale)) for d, w in terms]
    signed = [root if w * d.scale >= 0 else -root for root, (d, w) in zip(roots, terms, strict=True)]
    a = combine([partial(fresh, d.a) for d, _ in terms], signed, how, seeds)
    b = combine([partial(fresh, fresh(d.b).t()) for d, _ in terms], roots, how, [seed + 1 for seed in seeds])
    return Delta(a, b.t().contiguous())
