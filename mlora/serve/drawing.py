"""The next token of one sequence from its scores, by its own rules and random numbers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .sampling import MAX_SEED, Sampling


class Drawing:
    """Chooses a sequence's tokens one after the other. `plain`: each is the likeliest, whatever came before.

    Args:
        seed: of the sequence.
        prompt: its token ids. `ends`: ids of tokens that end it.
    """

    def __init__(self, sampling: Sampling, seed: int, prompt: Sequence[int], ends: Set[int]) -> None:
        self._sampling = sampling
        self._seed = seed % (MAX_SEED + 1)
        self._generator: torch.Generator | None = None
        self._ends = sorted(ends) if sampling.min_tokens else []
        self._counts: Counter[int] = Counter()
        self._seen = dict.fromkeys(prompt) if sampling.repetition_penalty != 1 else None
        self._drawn = 0
        self._none: Any = None  # these look at scores only
        self._warpers = _warpers(sampling)
        self._changes = bool(
            sampling.logit_bias
            or self._seen is not None
            or sampling.frequency_penalty
            or sampling.presence_penalty
            or self._ends
        )
        self.plain = sampling.greedy and not self._changes

    def draw(self, scores: Tensor) -> int:
        """The next token of `scores`, float (vocabulary,), which stay as they are."""
        row = self._changed(scores) if self._changes else scores[None]
        if self._sampling.greedy:
            token = int(row.argmax())
        else:
            if self._generator is None or self._generator.device != row.device:
                self._generator = torch.Generator(row.device).manual_seed(self._seed)
            row = self._warpers(self._none, row)
            token = int(torch.multinomial(row.softmax(-1), 1, generator=self._generator))
        self._drawn += 1
        self._counts[token] += 1
        if self._seen is not None:
            self._seen[token] = None
        return token

    def _changed(self, scores: Tensor) -> Tensor:
        """(1, vocabulary): after all that depends on the tokens so far."""
        sampling, row = self._sampling, scores[None].clone()
        if sampling.logit_bias:
            row[0, list(sampling.logit_bias)] += row.new_tensor(list(sampling.logit_bias.values()))
        if self._seen:
            seen = torch.tensor([list(self._seen)], device=row.device)
            row = RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty))(seen, row)
        if self._counts and (sampling.frequency_penalty or sampling.presence_penalty):
            times = row.new_tensor(list(self._counts.values()))
            row[0, list(self._counts)] -= sampling.frequency_penalty * times + sampling.presence_penalty
        if self._drawn < sampling.min_tokens:
            row[0, self._ends] = -torch.inf
        return row


def _warpers(sampling: Sampling) -> LogitsProcessorList:
    """What `generate` makes of these options, in its order."""
    warpers = LogitsProcessorList()
    if sampling.greedy:
        return warpers
    if sampling.temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(float(sampling.top_p)))
    if sampling.min_p > 0:
        warpers.append(MinPLogitsWarper(float(sampling.min_p)))
    return warpers
