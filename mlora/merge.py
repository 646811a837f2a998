"""Several adapters -> one: `Merge`, which says how, and the strategies, pure functions of tensors.

Delta space, the default, works on the true change of a weight, D_i = gain_i * W + W * in_gain_i + scale_i B_i^T A_i,
and (T - I) W or W (T - I) of turns, and returns the result at a rank, with its relative error; `linear` and `cat` are
exact there, by concatenation of rank rows. Factor space works on A and B separately, as PEFT's `add_weighted_adapter`
does where its type does not end in `_svd`, number for number; a mixture of factors is not the mixture of the deltas.

Strategies: task arithmetic (`linear`; Ilharco et al., arXiv 2212.04089), TIES (Yadav et al., arXiv 2306.01708), DARE
(Yu et al., arXiv 2311.03099), and pruning by magnitude.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import errors
from .lowering.delta import BaseLinear, Delta
from .lowering.module import FLOAT32_MAX
from .lowering.turn import Turn

STRATEGIES = ("linear", "cat", "ties", "dare_linear", "dare_ties", "magnitude_prune")
COMBINATION_TYPES = (*STRATEGIES, "svd", *(s + "_svd" for s in STRATEGIES[2:]))
SPACES = ("delta", "factor")
SIGNS = ("total", "frequency")

# Other names of the fields: LoRAX's and Ludwig's.
ALIASES = {"ids": "adapters", "sources": "adapters", "merge_strategy": "combination_type"}


# Of a small module's deltas, kept between TIES' two passes in place of making them twice.
HELD_BYTES = 1 << 26
# A step of the low-rank factorisation that lowers its squared error by less than this share ends it.
SETTLED = 1e-3


@dataclass(frozen=True)
class Merge:
    """How to merge named adapters; also an entry of `adapter_names`, computed once and cached.

    Args:
        adapters: their names. `weights`: one finite number each, of any sign.
        combination_type: "linear" (the weighted sum), "cat" (the same in delta space), "ties", "dare_linear",
            "dare_ties", "magnitude_prune", or PEFT's "svd" ("linear" cut to a rank) and "..._svd" (delta space).
        density: the share of values that ties, dare and magnitude_prune keep, in (0, 1].
        majority_sign_method: how ties elects a sign: "total" (of the sum) or "frequency" (of the signs).
        svd_rank: rank of the result; default: exact for linear and cat, else the largest of the adapters.
        svd_clamp: clamp the factors to this quantile of their values, in (0, 1].
        seed: of dare's masks; an adapter's mask also depends on its name and the module's, and on nothing else.
        normalize: divide the weights by their sum.
        space: "delta" or "factor".

    Raises:
        MergeError: a value is not one of these, or an option does not belong to the type.
    """

    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    combination_type: str = "linear"
    density: float | None = None
    majority_sign_method: str = "total"
    svd_rank: int | None = None
    svd_clamp: float | None = None
    seed: int = 0
    normalize: bool = False
    space: str = "delta"

    def __post_init__(self) -> None:
        listed = isinstance(self.adapters, Sequence) and not isinstance(self.adapters, str)
        if not listed or not all(isinstance(name, str) for name in self.adapters):
            raise errors.MergeError(f"adapters is {self.adapters!r}; it must be a list of adapters' names")
        if not isinstance(self.weights, (Sequence, np.ndarray)) or isinstance(self.weights, str):
            raise errors.MergeError(f"weights is {self.weights!r}; it must be a list of numbers, one for each adapter")
        object.__setattr__(self, "adapters", tuple(self.adapters))
        if not self.adapters:
            raise errors.MergeError("adapters is empty; a merge takes at least one")
        if len(self.adapters) != len(self.weights):
            raise errors.MergeError(
                f"{len(self.weights)} weights for {len(self.adapters)} adapters; a merge takes one for each"
            )
        for weight in self.weights:
            if not is_weight(weight):
                raise errors.MergeError(f"a weight is {weight!r}; it must be a finite number of fp32's range")
        object.__setattr__(self, "weights", tuple(map(float, self.weights)))
        _one_of("combination_type", self.combination_type, COMBINATION_TYPES)
        _one_of("majority_sign_method", self.majority_sign_method, SIGNS)
        _one_of("space", self.space, SPACES)
        if self.prunes and (self.density is None or not _is_number(self.density) or not 0 < self.density <= 1):
            raise errors.MergeError(
                f"density is {self.density!r}; {self.combination_type} needs the share of values to keep, in (0, 1]"
            )
        if not self.prunes and self.density is not None:
            raise errors.MergeError(f"{self.combination_type} takes no density")
        if self.svd_rank is not None and (type(self.svd_rank) is not int or self.svd_rank < 1):
            raise errors.MergeError(f"svd_rank is {self.svd_rank!r}; it must be a positive integer")
        if self.svd_clamp is not None and not (_is_number(self.svd_clamp) and 0 < self.svd_clamp <= 1):
            raise errors.MergeError(f"svd_clamp is {self.svd_clamp!r}; it must be a quantile in (0, 1]")
        if type(self.seed) is not int or self.seed < 0:
            raise errors.MergeError(f"seed is {self.seed!r}; it must be an integer of at least 0")
        if self.space == "factor" and not self.in_factors and self.combination_type != "cat":
            raise errors.MergeError(f"{self.combination_type} works on deltas, not in factor space")
        if self.svd_rank is not None and self.in_factors:
            raise errors.MergeError(f"{self.combination_type} in factor space keeps the adapters' rank: no svd_rank")
        if self.svd_clamp is not None and not self.truncates:
            raise errors.MergeError("svd_clamp needs an svd: give an svd_rank, or a type that has one")
        if self.normalize and sum(self.weights) == 0:
            raise errors.MergeError(f"the weights {self.weights} sum to 0 and cannot be normalised")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Merge:
        """From JSON or YAML; LoRAX's and Ludwig's field names are accepted too.

        Ludwig's `sources` makes the weights relative: they are normalised, and equal where none are given.
        """
        known = {f.name for f in fields(cls)}
        given: dict[str, Any] = {}
        for key, value in values.items():
            name = ALIASES.get(key, key)
            if name not in known:
                raise errors.MergeError(f"a merge has no {key!r}; it takes {', '.join(sorted({*known, *ALIASES}))}")
            if name in given:
                raise errors.MergeError(f"a merge has {key!r} beside another name of {name!r}")
            given[name] = value
        if "sources" in values:
            given.setdefault("normalize", True)
        names = given.get("adapters")
        if not isinstance(names, Sequence):
            raise errors.MergeError(f"a merge's adapters are {names!r}; they must be a list of names")
        if given.get("weights") is None:
            given["weights"] = [1.0] * len(names)
        return cls(**given)

    @property
    def strategy(self) -> str:
        return "linear" if self.combination_type == "svd" else self.combination_type.removesuffix("_svd")

    @property
    def prunes(self) -> bool:
        return self.strategy not in ("linear", "cat")

    @property
    def in_factors(self) -> bool:
        """Whether A and B are merged separately."""
        return self.space == "factor" and self.combination_type in STRATEGIES and self.strategy != "cat"

    @property
    def truncates(self) -> bool:
        """Whether the result is cut to a rank."""
        return not self.in_factors and (self.prunes or self.combination_type == "svd" or self.svd_rank is not None)

    @property
    def is_sum(self) -> bool:
        """Whether it is the plain weighted sum of the deltas."""
        return not self.in_factors and not self.truncates

    def canonical(self) -> Merge:
        """The same merge in one spelling: sorted adapters, plain weights, and no option that has no effect."""
        return _canonical(self)

    @property
    def label(self) -> str:
        """A name that says all that matters: equal for merges that are equal."""
        return _label(self)


# A request asks for both in every row.
@lru_cache(maxsize=1024)
def _canonical(how: Merge) -> Merge:
    total = sum(how.weights) if how.normalize else 1.0
    pairs = sorted(zip(how.adapters, (w / total for w in how.weights), strict=True))
    plain = how.strategy
    if not how.in_factors and how.truncates:
        plain = "svd" if plain in ("linear", "cat") else plain
    elif how.is_sum:
        plain = "linear"
    return Merge(
        tuple(name for name, _ in pairs),
        tuple(weight for _, weight in pairs),
        plain,
        density=how.density,
        majority_sign_method=how.majority_sign_method if "ties" in plain else "total",
        svd_rank=how.svd_rank,
        svd_clamp=how.svd_clamp,
        seed=how.seed if "dare" in plain else 0,
        space="factor" if how.in_factors else "delta",
    )


@lru_cache(maxsize=1024)
def _label(how: Merge) -> str:
    how = how.canonical()
    parts = [f"{weight:.9g}*{name}" for name, weight in zip(how.adapters, how.weights, strict=True)]
    defaults = {f.name: f.default for f in fields(Merge)}
    parts += [
        f"{name}={getattr(how, name)}"
        for name in ("density", "majority_sign_method", "svd_rank", "svd_clamp", "seed", "space")
        if getattr(how, name) != defaults[name]
    ]
    return f"{how.combination_type}({', '.join(parts)})"


def as_merge(entry: Any) -> Merge | None:
    """`entry` if it is a `Merge`, or one written as a mapping (told by its list of adapters); None for the others."""
    if isinstance(entry, Merge):
        return entry
    if isinstance(entry, Mapping) and any(isinstance(entry.get(key), (list, tuple)) for key in ("adapters", *ALIASES)):
        return Merge.from_dict(entry)
    return None


def merge_adapters(
    adapters: Sequence[Mapping[str, Delta]], how: Merge, bases: Mapping[str, BaseLinear]
) -> Iterator[tuple[str, Delta]]:
    """Module by module, what `merge_module` makes of the deltas that are there: (dotted path, delta)."""
    for name in dict.fromkeys(name for deltas in adapters for name in deltas):
        yield name, merge_module([deltas.get(name) for deltas in adapters], how, bases[name])


def _one_of(option: str, value: Any, allowed: Iterable[str]) -> None:
    if value not in tuple(allowed):
        raise errors.MergeError(f"{option} is {value!r}; it must be one of {', '.join(allowed)}")


def is_weight(value: Any) -> bool:
    """Whether it can be a weight: a number, also of NumPy, finite in fp32, in which kernels take weights."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        return False
    try:
        return abs(float(value)) <= FLOAT32_MAX  # which NaN is not
    except OverflowError:  # an int beyond the range of float
        return False


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def merge_module(deltas: Sequence[Delta | None], how: Merge, base: BaseLinear) -> Delta:
    """What `how` makes of one module; at least one delta is not None, which is an adapter that leaves it alone.

    Shapes: as in `Delta`, all of one module. The result is in fp32, its scale is 1, and its `error` is the relative
    Frobenius distance of its low-rank part from what it stands for.

    Raises:
        MergeError: factor space cannot hold these deltas.
    """
    if base.experts:
        raise errors.MergeError(
            f"parameter {base.name}: experts' weights and other parameters (target_parameters) are served in weighted "
            f"entries, and not in merges that make a new adapter"
        )
    if any(d is not None and d.replaces for d in deltas):
        raise errors.MergeError(
            f"module {base.name}: an adapter has weights of another size there, in place of the model's: there is "
            f"nothing that they could be merged with"
        )
    if any(d is not None and d.invocation for d in deltas):
        raise errors.MergeError(
            f"module {base.name}: an aLoRA applies to a part of the tokens (alora_invocation_tokens), so there is no "
            f"merge with it; it is served in weighted entries"
        )
    total = sum(how.weights) if how.normalize else 1.0
    present = [(d, w / total, n) for d, w, n in zip(deltas, how.weights, how.adapters, strict=True) if d is not None]
    if how.is_sum:
        return _sum([(d, w) for d, w, _ in present], base.name)
    seeds = [zlib.crc32(f"{how.seed}/{base.name}/{name}".encode()) for _, _, name in present]
    if how.in_factors:
        return _in_factors([(d, w) for d, w, _ in present], how, base, seeds)

    weights = [w for _, w, _ in present]
    gain: Tensor | None = None
    if base.offset is not None:  # a norm's weight is its gain
        zero = torch.zeros(base.out_features)
        gains = [partial(_copy, zero if d.gain is None else d.gain) for d, _, _ in present]
        result, gain = Delta(), combine(gains, weights, how, seeds)
    elif how.prunes or any(_scales(d) for d, _, _ in present):
        dense = combine([partial(_dense, d, base) for d, _, _ in present], weights, how, seeds)
        result = _truncate(dense, [d for d, _, _ in present], _rank(how, present), how.svd_clamp)
    else:
        result = _truncate_sum(_sum([(d, w) for d, w, _ in present], base.name), _rank(how, present), how.svd_clamp)
    shifted = [d.shift if base.offset is not None else _bias_change(d, base) for d, _, _ in present]
    if any(shift is not None for shift in shifted):
        none = torch.zeros(base.out_features)
        shifts = [partial(_copy, none if shift is None else shift) for shift in shifted]
        result = replace(result, shift=combine(shifts, weights, how, [seed + 1 for seed in seeds]))
    return result if gain is None else replace(result, gain=gain)


def relative(recipe: Sequence[tuple[Delta, float]], folded: Sequence[tuple[Delta, float]], where: str) -> Delta:
    """What to add to a module that has `folded` in its weight, so that it does what `recipe` would do alone.

    Let f, G' and U' be the folded sum's low-rank part with its shift, and what it does to outputs and inputs by gains
    and turns; G and U what the recipe does to them. The module gives y'(x) = G' base(U' x) + f(x), so that
        G base(x) = G G'^-1 (y'(x) - f(x))   and   base(U x) = y'(U'^-1 U x) - f(U'^-1 U x).

    Raises:
        MergeError: what is folded in has no inverse, or changes of outputs meet those of inputs, or turns of blocks of
            different sizes each other.
    """
    if any(d.replaces for d, _ in (*recipe, *folded)):
        raise errors.MergeError(
            f"module {where}: weights of another size are no sum with what is folded in; unmerge_adapter first"
        )
    if any(d.invocation for d, _ in recipe):
        raise errors.MergeError(
            f"module {where}: an aLoRA (alora_invocation_tokens) is served beside something folded in only where none "
            f"of the adapters has gains, as DoRA and IA3 do; unmerge_adapter first"
        )
    want, have = _sum(recipe, where), _sum(folded, where)
    if not folded:
        return want
    if any(getattr(d, gain) is not None for d in (want, have) for gain in ("gain", "turn")) and any(
        getattr(d, gain) is not None for d in (want, have) for gain in ("in_gain", "in_turn")
    ):
        raise errors.MergeError(f"module {where}: gains and input gains, of which one is folded in, do not combine")
    minus = Delta(have.a, have.b, -1.0, shift=None if have.shift is None else -have.shift)
    made: dict[str, Any] = {}
    for gain, turn in (("gain", "turn"), ("in_gain", "in_turn")):
        ours, theirs = ((getattr(d, gain), getattr(d, turn)) for d in (want, have))
        if all(part is None for part in (*ours, *theirs)):
            continue
        if ours[1] is None and theirs[1] is None:
            ratio: Tensor | Turn = (scales := _ratio(ours[0], theirs[0], where))
            made[gain] = (scales - 1).float()
        else:
            ratio = turned = _turn_ratio(ours, theirs, gain, where)
            made[turn] = Turn(turned.values.float(), turned.stride)
        if gain == "gain":
            minus = replace(minus, b=_scaled(minus.b, ratio), shift=_scaled(minus.shift, ratio))
        else:
            minus = replace(minus, a=_scaled(minus.a, ratio, transposed=True))
    rest = replace(want, gain=None, in_gain=None, turn=None, in_turn=None)
    return replace(_sum([(rest, 1.0), (minus, 1.0)], where), **made)


def _ratio(ours: Tensor | None, theirs: Tensor | None, where: str) -> Tensor:
    """Of a gain to that which is folded in, as 1 + what `Delta` has of either."""
    below = torch.ones(1, dtype=torch.float64) if theirs is None else 1 + theirs.double()
    if (below == 0).any():
        raise errors.MergeError(f"module {where}: a gain of 0 is folded in, which nothing undoes")
    return (1 if ours is None else 1 + ours.double()) / below


def _turn_ratio(ours: Any, theirs: Any, gain: str, where: str) -> Turn:
    """The same of turns, each with the gain beside it: T T'^-1 of outputs, T'^-1 T of inputs."""
    shapes = {turn.shape for _, turn in (ours, theirs) if turn is not None}
    if len(shapes) > 1:
        raise errors.MergeError(
            f"module {where}: turns of blocks of different sizes, of which one is folded in, do not combine"
        )
    ((size, stride),) = shapes
    eye = torch.eye(size, dtype=torch.float64)

    def blocks(scale: Tensor | None, turn: Turn | None) -> Tensor:
        found = eye if turn is None else eye + turn.blocks().double()
        return found if scale is None else found + _in_blocks(scale.double(), size, stride).diag_embed()

    mine, folded = blocks(*ours), blocks(*theirs)
    inverse, info = torch.linalg.inv_ex(folded)
    if info.any():
        raise errors.MergeError(f"module {where}: a turn is folded in that has no inverse: nothing undoes it")
    ratio = mine @ inverse if gain == "gain" else inverse @ mine
    return Turn.of_blocks(ratio - eye, stride)


def _in_blocks(vector: Tensor, size: int, stride: int) -> Tensor:
    """(blocks, size) of (width,)."""
    return vector.reshape(-1, size, stride).transpose(1, 2).reshape(-1, size)


def _scaled(tensor: Tensor | None, by: Tensor | Turn, transposed: bool = False) -> Tensor | None:
    """by x along the last dimension; `transposed`: by^T x, where that is no gain."""
    if tensor is None:
        return None
    wide = tensor.double()
    return ((wide + by.times(wide, transposed)) if isinstance(by, Turn) else wide * by).float()


def _rank(how: Merge, present: Sequence[tuple[Delta, float, str]]) -> int:
    return how.svd_rank or max(1, *(d.rank for d, _, _ in present))


def _scales(delta: Delta) -> bool:
    """Whether it is more than what it adds."""
    return any(getattr(delta, part) is not None for part in ("gain", "in_gain", "turn", "in_turn"))


def _sum(terms: Sequence[tuple[Delta, float]], where: str) -> Delta:
    """The exact weighted sum, by concatenation. The weights go to A, as in PEFT's `cat`.

    Raises:
        MergeError: turns of blocks of different sizes, whose sum is no turn.
    """
    ranked = [(d, w) for d, w in terms if d.a is not None and d.b is not None]
    a = torch.cat([d.a.float() * w * d.scale for d, w in ranked if d.a is not None]) if ranked else None
    b = torch.cat([d.b.float() for d, _ in ranked if d.b is not None]) if ranked else None

    def weighted(part: str) -> Tensor | None:
        found = [w * getattr(d, part).float() for d, w in terms if getattr(d, part) is not None]
        return torch.stack(found).sum(0) if found else None

    def turned(part: str) -> Turn | None:
        found = [(turn, w) for d, w in terms if (turn := getattr(d, part)) is not None]
        if len({turn.shape for turn, _ in found}) > 1:
            raise errors.MergeError(
                f"module {where}: turns of blocks of different sizes are served in weighted entries, and not in one "
                f"adapter"
            )
        return Turn(sum(w * turn.values.float() for turn, w in found), found[0][0].stride) if found else None

    # A sum's relative error is bounded by its terms': what is known of it.
    error = max((d.error for d, _ in terms), default=0.0)
    gains: dict[str, Any] = {part: weighted(part) for part in ("gain", "in_gain", "shift")}
    return Delta(a, b, **gains, turn=turned("turn"), in_turn=turned("in_turn"), error=error)


def _in_factors(terms: Sequence[tuple[Delta, float]], how: Merge, base: BaseLinear, seeds: Sequence[int]) -> Delta:
    for d, _ in terms:
        if d.a is None or _scales(d) or d.shift is not None:
            raise errors.MergeError(
                f"module {base.name}: factor space merges plain LoRA only; one of the adapters has a gain, a turn or a "
                f"bias. Use space='delta'"
            )
    ranks = sorted({d.rank for d, _ in terms})
    if len(ranks) > 1:
        raise errors.MergeError(
            f"module {base.name}: factor space needs equal ranks; the adapters have {ranks}. Use space='delta'"
        )
    # Each factor takes the root of the weight, and A its sign.
    roots = [math.sqrt(abs(w * d.scale)) for d, w in terms]
    signed = [root if w * d.scale >= 0 else -root for root, (d, w) in zip(roots, terms, strict=True)]
    a = combine([partial(_copy, d.a) for d, _ in terms], signed, how, seeds)
    b = combine([partial(_copy, _copy(d.b).t()) for d, _ in terms], roots, how, [seed + 1 for seed in seeds])
    return Delta(a, b.t().contiguous())


def _copy(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return torch.empty(tensor.shape).copy_(tensor)


def _dense(delta: Delta, base: BaseLinear) -> Tensor:
    """The true change of the weight, (out, in) in fp32."""
    if delta.a is not None and delta.b is not None:
        dense = delta.b.float().t() @ (delta.a.float() * delta.scale)
    else:
        dense = torch.zeros(base.out_features, base.in_features)
    if _scales(delta) and base.conv is not None and not base.conv.zero_padded:
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
    if (delta.gain is None and delta.turn is None) or (bias := base.bias()) is None:
        return shift
    total = torch.zeros(base.out_features) if shift is None else shift.float()
    if delta.gain is not None:
        total = total + delta.gain.float() * bias
    return total if delta.turn is None else total + delta.turn.times(bias)


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


def _truncate_sum(delta: Delta, rank: int, clamp: float | None) -> Delta:
    """The best `rank` rank rows of a low-rank delta, from the QR of its stacked factors: B^T A is never formed."""
    if delta.a is None or delta.b is None:
        return replace(delta, a=None, b=None)
    qa, ra = torch.linalg.qr(delta.a.t().double())
    qb, rb = torch.linalg.qr(delta.b.t().double())
    u, s, vh = torch.linalg.svd(rb @ ra.t(), full_matrices=False)
    result = _from_svd(qb @ u, s, vh @ qa.t(), rank, clamp)
    tail = float(s[rank:].square().sum().sqrt()) if result.rank else 0.0
    norm = float(s.square().sum().sqrt())
    return replace(result, error=tail / norm if norm else 0.0, shift=delta.shift)


def _truncate(dense: Tensor, deltas: Sequence[Delta], rank: int, clamp: float | None) -> Delta:
    """The best `rank` rank rows of a dense (out, in) matrix that was made of `deltas`, and their relative error.
    Overwrites `dense`."""
    norm = _norm(dense)
    if norm == 0:
        return Delta()
    result = _from_svd(*_leading(dense, deltas, rank), rank, clamp)
    assert result.a is not None and result.b is not None
    return replace(result, error=_norm(dense.addmm_(result.b.t(), result.a, alpha=-1)) / norm)


def _norm(dense: Tensor) -> float:
    return float(torch.linalg.vector_norm(torch.linalg.vector_norm(dense, dim=1).double()))


def _leading(dense: Tensor, deltas: Sequence[Delta], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """At least the `rank` leading singular triplets, by block Krylov iteration (Musco & Musco, arXiv 1504.05477), or by
    a whole SVD where that would not be smaller.

    The first block is what the matrix makes of the span of the deltas' own rank rows, near which the leading vectors
    lie; steps end when one has lowered the squared error by less than SETTLED of it.
    """
    wide = dense.shape[0] <= dense.shape[1]
    if not wide:
        dense = dense.t()
    span = [part.float() for d in deltas if (part := d.a if wide else d.b) is not None]
    width = max(rank + 6, sum(len(part) for part in span))
    if 3 * width > dense.shape[0]:
        span, width = [], rank + 6  # of random vectors, then
    if 3 * width > dense.shape[0]:
        u, s, vh = torch.linalg.svd(dense, full_matrices=False)
        return (u, s, vh) if wide else (vh.t(), s, u.t())

    draw = torch.Generator().manual_seed(0)
    span.append(torch.randn(width - sum(len(part) for part in span), dense.shape[1], generator=draw))
    total = _norm(dense) ** 2
    captured = 0.0
    q, image = dense.new_empty(dense.shape[0], 0), dense.new_empty(dense.shape[1], 0)  # dense^T q
    block = torch.cat(span).t()
    while q.shape[1] + width <= dense.shape[0]:
        block = dense @ block
        for _ in range(2 if q.shape[1] else 1):  # once leaves rounding noise of the old vectors
            block = torch.linalg.qr(block - q @ (q.t() @ block)).Q
        q, block = torch.cat([q, block], dim=1), dense.t() @ block
        image = torch.cat([image, block], dim=1)
        values, turn = torch.linalg.eigh(image.t() @ image)
        before, captured = captured, float(values[-rank:].double().sum())
        if captured - before <= SETTLED * max(total - captured, 1e-6 * total):
            break
    turn = turn[:, -rank:]
    side, small = torch.linalg.qr(image @ turn)
    u, s, vh = torch.linalg.svd(small.t())
    u, vh = q @ (turn @ u), vh @ side.t()
    return (u, s, vh) if wide else (vh.t(), s, u.t())


def _from_svd(u: Tensor, s: Tensor, vh: Tensor, rank: int, clamp: float | None) -> Delta:
    """PEFT's factors: B = U S, A = V^T, clamped together to a quantile of their values."""
    rank = min(rank, len(s))
    b, a = (u[:, :rank] * s[:rank]).float(), vh[:rank].float()
    if clamp is not None:
        high = float(torch.quantile(torch.cat([b.flatten(), a.flatten()]), clamp))
        b, a = b.clamp(-high, high), a.clamp(-high, high)
    return Delta(a.contiguous(), b.t().contiguous())
