"""The processes of a model that tensor parallelism has split: each must do what the others do, at the same time.

A process that routes, loads or merges other than the rest, or alone runs into an error, would leave them waiting in the
middle of a forward. So before anything that takes all processes they tell each other what they are about to do, in 16
bytes each: before a call of the model or a `generate` (not before its steps), and around loading and merging.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch
import torch.distributed as dist

from .. import errors
from ..plan.plan import Plan

_FAILED = -1  # in place of the digest; a digest is never negative


class Ranks:
    """All processes, as those that serve one model. Making one takes all of them.

    Args:
        ranks: theirs, in the default group. What is agreed goes over a group of its own, on the host.

    Not thread-safe: one thread of each process drives the model.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        self._group = cast(dist.ProcessGroup, dist.new_group(list(ranks), backend="gloo"))
        self.rank, self.world = dist.get_rank(self._group), len(ranks)
        self._plan: tuple[Plan | None, int] = None, 0
        self._told: BaseException | None = None  # the last error that all processes know of

    def close(self) -> None:
        """Let go of the group."""
        dist.destroy_process_group(self._group)

    def agree(self, what: str) -> None:
        """Go on together, with `what` each is about to do.

        Raises:
            RoutingError: not all are about to do the same, or one has failed; the error tells which do what.
        """
        self._exchange(_digest(what), what)

    def agree_on(self, plan: Plan | None) -> None:
        """`agree` on what is routed; raises as that does."""
        if self._plan[0] is not plan or plan is None:
            self._plan = plan, _digest(_told(plan))
        self._exchange(self._plan[1], plan)

    def all_of(self, value: Any) -> list[Any]:
        """What each of them gives, in all of them."""
        told: list[Any] = [None] * self.world
        dist.all_gather_object(told, value, group=self._group)
        return told

    def fail(self, error: BaseException) -> None:
        """Tell the others, who are about to agree on something, that this process will not do it; unless they know."""
        if error is not self._told:
            with suppress(errors.RoutingError):  # this process raises its own
                self._exchange(_FAILED, f"{type(error).__name__}: {error}")
            self._told = error

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Run the block in all processes; where one raises, all do, each its own error or a RoutingError."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise
        self.agree(what)

    def _exchange(self, digest: int, what: Plan | str | None) -> None:
        mine = torch.tensor([digest])
        theirs = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(theirs, mine, group=self._group)
        found = [int(one) for one in theirs]
        if digest != _FAILED and all(one == digest for one in found):
            return
        told = self.all_of(what if isinstance(what, str) else _told(what))
        does = [
            f"process {rank} " + (f"failed with {text}" if one == _FAILED else f"is about to {text}")
            for rank, (one, text) in enumerate(zip(found, told, strict=True))
        ]
        self._told = errors.RoutingError(
            f"the {self.world} processes that this model is split over must all do the same: {'; '.join(does)}"
        )
        raise self._told


def _told(plan: Plan | None) -> str:
    if plan is None:
        return "run the base for all rows"
    recipes = [" + ".join(f"{weight:g} {name}" for name, weight in recipe) or "the base" for recipe in plan.recipes]
    each = f" of {plan.row_counts[0]} rows" if plan.rows > 1 or plan.entries > 1 else ""
    packed = f", packed sequences of {list(plan.lengths)} tokens" if plan.lengths else ""
    return f"route {recipes}{each}{packed}"


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")
