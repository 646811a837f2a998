"""The strategies, pure functions of tensors: task arithmetic (`linear`; Ilharco et al., arXiv 2212.04089), TIES (Yadav
et al., arXiv 2306.01708), DARE (Yu et al., arXiv 2311.03099), and pruning by magnitude."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .how import Merge

# Of a small module's deltas, kept between TIES' two passes in place of making them twice.
HELD_BYTES = 1 << 26


def combine(
    tensors: Sequence[Callable[[], Tensor]], weights: Sequence[float], how: Merge, seeds: Sequence[int]
) -> Tensor:
    """The strategy on contiguous tensors of one shape, each made when it is needed, and overwritten: never more than a
    few are held, or HELD_BYTES.

    `seeds`: of each tensor's mask, for dare. TIES elects signs from the unweighted tensors, where a tie counts as
    positive, and divides by the number of tensors that agree, as PEFT does.
    """
    pruned: list[Callable[[], Tensor]] = list(tensors)
    density = how.density
    if density is not None and density < 1:
        if "dare" in how.strategy:
            pruned = [_dropper(make, density, seed) for make, seed in zip(tensors, seeds, strict=True)]
        else:
            pruned = [_pruner(make, density) for make in tensors]
    if "ties" not in how.strategy:
        result = pruned[0]().mul_(weights[0])
        for make, weight in zip(pruned[1:], weights[1:], strict=True):
            result += make().mul_(weight)
        return result
    votes: Tensor | None = None
    held: list[Tensor] = []
    for make in pruned:
        tensor = make()
        if (len(held) + 1) * tensor.nbytes <= HELD_BYTES:
            held.append(tensor)
        vote = tensor if how.majority_sign_method == "total" else tensor.sign()
        votes = vote.clone() if votes is None else votes.add_(vote)
    assert votes is not None
    # A value agrees where it is positive once the elected signs are taken out. Fresh memory costs as much as a pass.
    signs = votes.ge_(0).mul_(2).sub_(1)
    result, agreeing = torch.zeros_like(signs), torch.zeros_like(signs)
    part, sign = torch.empty_like(signs), torch.empty_like(signs)
    for i, weight in enumerate(weights):
        torch.mul(held[i] if i < len(held) else pruned[i](), signs, out=part).clamp_(min=0)
        agreeing += torch.sign(part, out=sign)
        result += part.mul_(weight)
    return result.mul_(signs).div_(agreeing.clamp_(min=1))


def fresh(tensor: Tensor | None) -> Tensor:
    """A contiguous fp32 copy, which `combine` may overwrite."""
    assert tensor is not None
    return torch.empty(tensor.shape).copy_(tensor)


def _pruner(make: Callable[[], Tensor], density: float) -> Callable[[], Tensor]:
    """The int(density * count) values of largest magnitude, and among equals the first; which is worked out once."""
    found: list[tuple[float, Tensor]] = []

    def pruned() -> Tensor:
        tensor = make()
        kept = tensor.abs()
        if not found:
            found.append(_least(kept.flatten(), int(density * tensor.numel())))
        least, surplus = found[0]
        kept.ge_(least)  # 1 or 0: multiplying by numbers is many times as fast as a mask of bools
        kept.view(-1)[surplus] = 0
        return tensor.mul_(kept)

    return pruned


def _least(values: Tensor, keep: int) -> tuple[float, Tensor]:
    """The least of the `keep` largest values, and where the others are that equal it."""
    if keep == 0:
        return math.inf, torch.empty(0, dtype=torch.int64)
    least, surplus = _kth_largest(values.numpy(), keep)
    equal = (values == least).nonzero()[:, 0] if surplus else torch.empty(0, dtype=torch.int64)
    return least, equal[len(equal) - surplus :]


def _kth_largest(values: np.ndarray, k: int) -> tuple[float, int]:
    """The k-th largest of `values`, looked for between bounds that a sample gives, and by how many more than k values
    reach it."""
    count, size, over = len(values), 1 << 15, 0
    if count > 8 * size:
        at, margin = size - 1 - k * size // count, 2 * math.isqrt(size)  # four standard deviations, or more
        low, high = max(at - margin, 0), min(at + margin, size - 1)
        sample = np.partition(values[np.random.default_rng(0).integers(count, size=size)], (low, high))
        reach, above = values >= sample[low], values > sample[high]
        over = int(np.count_nonzero(above))
        if over < k <= np.count_nonzero(reach):
            values = values[reach ^ above]
        else:
            over = 0
    least = np.partition(values, len(values) - (k - over))[len(values) - (k - over)]
    return float(least), over + int(np.count_nonzero(values >= least)) - k


def _dropper(make: Callable[[], Tensor], density: float, seed: int) -> Callable[[], Tensor]:
    """Values kept with probability `density`, and divided by it; every call draws the same mask."""

    def dropped() -> Tensor:
        tensor = make()
        draw = torch.Generator().manual_seed(seed)
        return tensor.mul_(torch.bernoulli(torch.full_like(tensor, density), generator=draw)).div_(density)

    return dropped
