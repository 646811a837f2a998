"""Activated LoRA: from which token on it applies, and the plan of that, whose rows are tokens.

An aLoRA applies to a row's tokens from the last occurrence of its invocation in the prompt on, and to no token of a row
without one (PEFT's `calculate_alora_offsets`). Where a forward has tokens on both sides, each token is a row of a plan
of its own, under the row's recipe with the aLoRAs or without them; where all tokens lie behind, as they do from the
second step of `generate` on, the plan of the batch is that plan already.

Of ids on a device the host waits for a copy, before the call's layers run: once a `generate`, and once a call whose
own tokens tell (outside of `generate`) or which has tokens of the prompt. The layers only read the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from .. import errors
from .call import Call
from .plan import Plan, Recipe, Terms, plan_words, to_device

Starts = Mapping[str, int | None]
"""Of one row: aLoRA -> where its invocation starts; None where it does not occur."""


@dataclass(frozen=True)
class Prompt:
    """What `generate` was given: the ids, (rows, length), and where each row's aLoRAs start in them."""

    plan: Plan
    ids: Tensor
    starts: Sequence[Starts]


@dataclass
class Activation:
    """What the aLoRAs of one forward apply to.

    Args:
        plan: of the batch. `recipes`: of each row of the forward.
        starts: of each row: aLoRA -> its first token, counted from the forward's first, so that it is not positive
            where all of them lie behind; None where none does.
        length: tokens a row.
        terms: of a recipe, as the kernels read it.
    """

    plan: Plan
    recipes: Sequence[Recipe]
    starts: Sequence[Starts]
    length: int
    terms: Callable[[Recipe], Terms]
    _plans: dict[int, Plan] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.everywhere = all(start is not None and start <= 0 for starts in self.starts for start in starts.values())
        if not self.everywhere:
            self._plans[self.length] = self._plan(self.length)  # copied to the device before the layers run

    def plan_of(self, x: Tensor, module: str, loose: bool) -> Plan:
        """The plan for a module's input: (rows, n, in), or flattened to (rows * n, in). Of n tokens fewer than the
        forward's they are the last ones, as a head's are.

        Raises:
            AttributionError: they are not the tokens of the batch's rows, in order.
        """
        if self.everywhere:
            return self.plan
        rows = len(self.starts)
        count = x.shape[1] if x.dim() == 3 and x.shape[0] == rows else 0
        if x.dim() == 2 and x.shape[0] in (rows, rows * self.length):
            count = x.shape[0] // rows
        if loose or not 1 <= count <= self.length:
            raise errors.AttributionError(
                f"{module} got an input of shape {tuple(x.shape)} in a batch of {rows} rows of {self.length} tokens: "
                f"an aLoRA applies to some of them, and it cannot be told to which of these"
            )
        if count not in self._plans:
            self._plans[count] = self._plan(count)
        return self._plans[count]

    def _plan(self, count: int) -> Plan:
        """Of the last `count` tokens of each row."""
        recipes, runs = [], []
        for recipe, starts in zip(self.recipes, self.starts, strict=True):
            first = {name: self._within(start, count) for name, start in starts.items()}
            for begin, end in pairwise(sorted({0, *first.values(), count})):
                recipes.append(self.terms(tuple(term for term in recipe if first.get(term[0], 0) <= begin)))
                runs.append(end - begin)
        words = plan_words(recipes, runs=runs)
        tensors = tuple(to_device(words, tensor.device) for tensor in self.plan.tensors)
        rows = len(self.starts)
        return replace(self.plan, tensors=tensors, rows=rows, row_counts=(rows,), entries=rows)

    def _within(self, start: int | None, count: int) -> int:
        """Where an aLoRA's tokens start among the last `count`; `count` if none of them is one."""
        if start is None:
            return count
        return 0 if start <= 0 else min(max(start - (self.length - count), 0), count)


def occurrences(ids: Tensor, recipes: Sequence[Recipe], invocations: Mapping[str, tuple[int, ...]]) -> list[Starts]:
    """Where the last invocation of each row's aLoRAs starts in ids, (rows, length)."""
    return [
        {name: last_occurrence(row, invocations[name]) for name, _ in recipe if name in invocations}
        for row, recipe in zip(ids.tolist(), recipes, strict=True)
    ]


def last_occurrence(row: list[int], tokens: tuple[int, ...]) -> int | None:
    """Where `tokens` start for the last time; None if they do not occur."""
    wanted = list(tokens)
    for start in range(len(row) - len(wanted), -1, -1):
        if row[start : start + len(wanted)] == wanted:
            return start
    return None


def prompt_of(plan: Plan, call: Call) -> Prompt:
    """Of a call of `generate`. Raises `AttributionError` if it has no token ids."""
    ids = _ids(plan, call)
    return Prompt(plan, ids, occurrences(ids, _recipes(plan, len(ids)), plan.invocations))


def activation_of(plan: Plan, call: Call, prompt: Prompt | None, terms: Callable[[Recipe], Terms]) -> Activation:
    """Of a call of the model; `prompt` is that of the `generate` which makes it.

    Raises:
        AttributionError: the call does not tell its tokens, or where they stand in the row.
    """
    ids, past = _ids(plan, call), call.past
    names = ", ".join(map(repr, plan.invocations))
    if prompt is None:
        recipes = _recipes(plan, len(ids))
        starts = occurrences(ids, recipes, plan.invocations)
        if past != 0 and any(start is None for found in starts for start in found.values()):
            raise errors.AttributionError(
                f"the call goes on behind tokens in a cache, and its own do not hold the invocation of {names} (aLoRA) "
                f"in every row: whether those before do cannot be told. generate serves it"
            )
    else:
        repeats, left = divmod(len(ids), len(prompt.ids))
        if past is None or left:
            seen = "a cache that does not tell how many tokens it holds" if past is None else f"{len(ids)} rows"
            raise errors.AttributionError(
                f"generate calls the model with {seen}: it cannot be told from where on {names} (aLoRA) applies"
            )
        known = prompt.ids[:, past : past + ids.shape[1]].repeat_interleave(repeats, 0)
        if known.numel() and not torch.equal(known.to(ids.device), ids[:, : known.shape[1]]):
            raise errors.AttributionError(
                f"generate calls the model with other tokens than the prompt's: it cannot be told from where on "
                f"{names} (aLoRA) applies"
            )
        starts = [
            {name: None if start is None else start - past for name, start in found.items()}
            for found in prompt.starts
            for _ in range(repeats)
        ]
        recipes = _recipes(plan, len(ids))
    activation = Activation(plan, recipes, starts, ids.shape[1], terms)
    if call.picks and not activation.everywhere:
        raise errors.AttributionError(
            f"logits_to_keep picks tokens: it cannot be told whether {names} (aLoRA) applies to them; give a number"
        )
    return activation


def _ids(plan: Plan, call: Call) -> Tensor:
    ids = call.ids
    if ids is None:
        names = ", ".join(map(repr, plan.invocations))
        raise errors.AttributionError(
            f"{names} (aLoRA) applies from its invocation tokens on, which are looked for in input_ids; the call has "
            f"none"
        )
    return ids


def _recipes(plan: Plan, rows: int) -> list[Recipe]:
    """One for each of `rows` rows, of which the plan's may be repeated in place."""
    repeats, left = divmod(rows, len(plan.recipes))
    if left:
        raise errors.AttributionError(f"the active routing has {len(plan.recipes)} entries; the batch has {rows} rows")
    return [recipe for recipe in plan.recipes for _ in range(repeats)]
