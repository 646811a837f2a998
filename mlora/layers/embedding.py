"""The layer of an embedding of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import dispatch, reference
from ..ops.checks import check_rows
from .linear import LoraLayer


class EmbeddingLayer(LoraLayer):
    """Mixed in before an embedding's class: the delta is looked up by token, in rank rows of (rank, vocab)."""

    num_embeddings: int

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        state = self._mlora
        shared = state.shared
        if torch.compiler.is_compiling():
            if not shared.embeddings:
                return self._base(input)
            check_rows(shared.plan, input.shape[0])
            words = shared.plan
        else:
            plan = shared.local.plan or shared.default
            if plan is None or not plan.touches[state.index]:
                return self._base(input)
            self._check_rows(input, plan)
            words = plan.tensor
        y = self._base(input)
        if y.requires_grad:
            return reference.embed(y, input, shared.arena, state.table, words, self.num_embeddings)
        dispatch.embed_(y, input, shared.arena, state.table, words, self.num_embeddings)
        return y
