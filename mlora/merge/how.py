"""`Merge`: which adapters become one, with what weights, and by which strategy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np

from .. import errors
from ..lowering.module import FLOAT32_MAX

STRATEGIES = ("linear", "cat", "ties", "dare_linear", "dare_ties", "magnitude_prune")
COMBINATION_TYPES = (*STRATEGIES, "svd", *(s + "_svd" for s in STRATEGIES[2:]))
SPACES = ("delta", "factor")
SIGNS = ("total", "frequency")

# Other names of the fields: LoRAX's and Ludwig's.
ALIASES = {"ids": "adapters", "sources": "adapters", "merge_strategy": "combination_type"}


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
        if self.prunes and not _is_share(self.density):
            raise errors.MergeError(
                f"density is {self.density!r}; {self.combination_type} needs the share of values to keep, in (0, 1]"
            )
        if not self.prunes and self.density is not None:
            raise errors.MergeError(f"{self.combination_type} takes no density")
        if self.svd_rank is not None and (type(self.svd_rank) is not int or self.svd_rank < 1):
            raise errors.MergeError(f"svd_rank is {self.svd_rank!r}; it must be a positive integer")
        if self.svd_clamp is not None and not _is_share(self.svd_clamp):
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

        Raises:
            MergeError: a key is unknown or comes twice, or a value is none that `Merge` takes.
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
    def shares(self) -> tuple[float, ...]:
        """The weights, divided by their sum with `normalize`."""
        total = sum(self.weights) if self.normalize else 1.0
        return tuple(weight / total for weight in self.weights)

    @property
    def strategy(self) -> str:
        """The type without its cut to a rank: one of `STRATEGIES`."""
        return "linear" if self.combination_type == "svd" else self.combination_type.removesuffix("_svd")

    @property
    def prunes(self) -> bool:
        """Whether it drops values, and so takes a `density`."""
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
    pairs = sorted(zip(how.adapters, how.shares, strict=True))
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


def _is_share(value: Any) -> bool:
    """Whether it is a number in (0, 1]."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1
