"""The layer of an embedding of tokens."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..ops import dispatch, reference
from ..ops.checks import check_heads, check_rows
from ..store import HEAD
from .head import look_up
from .linear import LoraLayer
from .swap import twin_of


class EmbeddingLayer(LoraLayer):
    """Mixed in before an embedding's class: the delta is looked up by token, in rank rows of (rank, vocab)."""

    num_embeddings: int
    embedding_dim: int

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        state = self._mlora
        shared = state.shared
        if torch.compiler.is_compiling():
            if not shared.embeddings:
                return self._base(input)
            check_rows(shared.plan, input.shape[0])
            if state.index in shared.heads:
                check_heads(shared.plan)
            return self._changed(input, shared.plan)
        plan = shared.local.plan or shared.default
        if plan is None or not (touches := plan.touches[state.index]):
            return self._base(input)
        self._check_rows(input, plan)
        base = partial(self._changed, words=plan.tensor)
        if touches & HEAD:
            sizes = self.num_embeddings, self.embedding_dim
            return look_up(input, plan.heads[state.index], shared.arena, base, self._under, *sizes, state.name)
        return base(input)

    def _under(self, weight: Tensor, ids: Tensor) -> Tensor:
        """The module's own forward under another weight."""
        twin, cls = twin_of(self)
        twin.__dict__["_parameters"] = {"weight": weight.to(self.weight.dtype)}
        twin.padding_idx = None  # of training only, and it need not lie in this one
        found: Tensor = cls.forward(twin, ids)
        return found

    def _changed(self, input: Tensor, words: Tensor) -> Tensor:
        """The base, then one op."""
        state, shared = self._mlora, self._mlora.shared
        y = self._base(input)
        if y.requires_grad:
            return reference.embed(y, input, shared.arena, state.table, words, self.num_embeddings)
        dispatch.embed_(y, input, shared.arena, state.table, words, self.num_embeddings)
        return y
