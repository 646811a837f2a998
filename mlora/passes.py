"""Rows through the model: sorted by length, cut into calls of so many tokens, and the loss of each group of them."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .data import Example, batch_of
from .plan.call import Call
from .runtime import Runtime
from .training.losses import IGNORED, losses


class Wanted(NamedTuple):
    """A row. `entry`: as `adapter_names` has it. `group`: its rows have one loss together. A row of no group, None, is
    there for the others: so their calls keep their shapes, and with them their bits."""

    entry: Any
    group: Hashable
    example: Example


def calls_of(rows: Sequence[Wanted], max_tokens: int) -> list[list[Wanted]]:
    """Rows of about one length together: `max_tokens` at most with padding, or a single row."""
    ordered = sorted(rows, key=lambda row: -len(row.example.ids))  # a stable sort: ties stay in order
    calls: list[list[Wanted]] = []
    for row in ordered:
        if calls and len(calls[-1][0].example.ids) * (len(calls[-1]) + 1) <= max_tokens:
            calls[-1].append(row)
        else:
            calls.append([row])
    return calls


class Passes:
    """The forward passes of one model.

    Args:
        pad: a token to pad with. `max_tokens`: of a call, with padding. `chunk`: how many tokens' logits are held.
    """

    def __init__(self, runtime: Runtime, pad: int, max_tokens: int, chunk: int = 512) -> None:
        self._runtime = runtime
        self._model: Any = runtime.model
        self._pad, self._max_tokens, self._chunk = pad, max_tokens, chunk
        self._split: bool | None = None

    def losses(self, rows: Sequence[Wanted]) -> Iterator[dict[Hashable, Tensor]]:
        """Of each call the sums of its groups' losses, over the targets of all `rows`: added up they are each group's
        mean. Whoever takes them may run the backward pass of one call before the next one is made."""
        counts: dict[Hashable, int] = {}
        for row in rows:
            counts[row.group] = counts.get(row.group, 0) + row.example.targets
        for call in calls_of(rows, self._max_tokens):
            yield self._losses(call, counts)

    def _losses(self, call: Sequence[Wanted], counts: Mapping[Hashable, int]) -> dict[Hashable, Tensor]:
        groups = [row.group for row in call]
        batch = batch_of([row.example for row in call], self._pad, self._model.device)
        with self._runtime._router.forward([row.entry for row in call], Call((), batch.inputs)):
            if self._splits(batch.inputs):
                hidden = self._decoder()(**batch.inputs, use_cache=False).last_hidden_state
                hidden, labels = _targets_only(hidden, batch.labels)
                head = self._model.get_output_embeddings()
                found = losses(hidden, labels, groups, head=head, chunk=self._chunk, counts=counts)
            else:
                logits = self._model(**batch.inputs, use_cache=False).logits
                found = losses(logits, batch.labels, groups, counts=counts)
        return {group: loss for group, loss in found.items() if group is not None}

    def _decoder(self) -> Any:
        return self._model.base_model

    def _splits(self, inputs: dict[str, Tensor]) -> bool:
        """Whether the model is a decoder and then a head with nothing around it (a scale, a cap), so that the head is
        needed for targets alone. Found out once, by what both ways give."""
        if self._split is None:
            self._split = False
            model, head = self._model, getattr(self._model, "get_output_embeddings", lambda: None)()
            if head is not None and getattr(model, "base_model", model) is not model:
                few = {name: tensor[:, :4] for name, tensor in inputs.items()}
                training = model.training
                model.eval()
                try:
                    with torch.no_grad():
                        whole = model(**few, use_cache=False).logits
                        hidden = getattr(self._decoder()(**few, use_cache=False), "last_hidden_state", None)
                        self._split = hidden is not None and torch.equal(head(hidden), whole)
                finally:
                    model.train(training)
        return self._split


def _targets_only(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row the hidden states that predict a target, in front, and labels that belong to them: what `losses`
    makes of both is what it makes of all.

    Args:
        hidden: (rows, tokens, hidden). `labels`: (rows, tokens).
    """
    wanted = labels[:, 1:] != IGNORED
    most = int(wanted.sum(1).max())
    places = torch.zeros(len(labels), most + 1, dtype=torch.int64, device=labels.device)
    kept = torch.full_like(places, IGNORED)
    for row in range(len(labels)):
        own = wanted[row].nonzero().flatten()
        places[row, : len(own)] = own
        kept[row, 1 : len(own) + 1] = labels[row, own + 1]
    rows = torch.arange(len(labels), device=labels.device)[:, None]
    return hidden[rows, places], kept
