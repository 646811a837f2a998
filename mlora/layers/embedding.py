"""The layer of an embedding of tokens."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from .. import errors
from ..arena.bits import HEAD, TAIL
from ..gradients import embeddings
from ..gradients.recorded import Site
from ..ops import dispatch, reference
from ..ops.checks import check_heads, check_rows
from ..plan.late import Late
from .head import Heads, check_tokens, look_up, within
from .linear import LoraLayer
from .swap import twin_of
from .trained import refuse_beside, refuse_training


class EmbeddingLayer(LoraLayer):
    """Mixed in before an embedding's class: the delta is looked up by token, in rank rows of (rank, vocab)."""

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    scale_grad_by_freq: bool

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        state = self._mlora
        shared = state.shared
        if torch.compiler.is_compiling():
            if not shared.embeddings:
                return self._base(input)
            check_rows(state.words, input.shape[0])
            if shared.training is not None and torch.is_grad_enabled():
                refuse_training(state.name)
            self._check_compiled(input)
            if state.index in shared.heads:
                check_heads(shared.header)
            return self._changed(input, state.words)
        scope = shared.active.get()
        plan = scope.plan or shared.default
        if shared.recorded and torch.is_grad_enabled():
            scope.check_told(state.name)
        if plan is None or not (touches := plan.touches[state.index]):
            return self._base(input)
        if touches & TAIL:
            plan = self._by_token(input, scope)
        self._check_rows(input, plan)
        if shared.training is not None and torch.is_grad_enabled():
            site = shared.training.site(plan, state.index)
            if site is not None and site.trains:
                return self._trained_at(input, site, touches & HEAD or (touches & TAIL and not plan.by_token))
        base = partial(self._changed, words=plan.tensors[state.home])
        if touches & HEAD:
            heads = plan.heads[state.index]
            known = self._known(input, heads)
            found = look_up(known, heads, state.arena, base, self._under, self.embedding_dim)
            return found if known is input else found.masked_fill((known != input)[..., None], math.nan)
        return base(input)

    def _trained_at(self, ids: Tensor, site: Site, beside: int) -> Tensor:
        """Of a call with an adapter that is trained here, as autograd records it; `beside`: whether other rows have
        what is not served there."""
        state = self._mlora
        if beside:
            refuse_beside(state.name)
        if self.scale_grad_by_freq:
            raise errors.UnsupportedAdapterError(
                f"{state.name} scales gradients by how often a token occurs in a call (scale_grad_by_freq), of which "
                f"others have rows too; its tokens are not trained"
            )
        return embeddings.change(self._base(ids), ids, self.num_embeddings, self.padding_idx, site)

    def _known(self, ids: Tensor, heads: Heads) -> Tensor:
        """`ids`, if each row's embedding has them, else TokenError. On a GPU, where asking would be waiting, others in
        place of those that are not had: what is looked up for them is replaced by NaN, and the call raises when it
        ends. Where no call is running, nothing else would raise, so this waits; a capture can only leave the NaN."""
        state = self._mlora
        check = partial(check_tokens, heads=heads, tokens=self.num_embeddings, name=state.name)
        if not ids.is_cuda:
            check(ids.cpu())
            return ids
        if not torch.cuda.is_current_stream_capturing():
            late, asked = Late(ids, check), state.shared.active.get().late
            if asked is None:
                late.settle()
            else:
                asked.append(late)
        return within(ids, heads)

    def _under(self, weight: Tensor, ids: Tensor) -> Tensor:
        """The module's own forward under another weight."""
        twin, cls = twin_of(self)
        twin.__dict__["_parameters"] = {"weight": weight.to(self._mlora.own.weight.dtype)}
        twin.padding_idx = None  # of training only, and it need not lie in this one
        found: Tensor = cls.forward(twin, ids)
        return found

    def _changed(self, input: Tensor, words: Tensor) -> Tensor:
        """The base, then one op."""
        state = self._mlora
        y = self._base(input)
        if y.requires_grad:
            return reference.embed(y, input, state.arena, state.table, words, self.num_embeddings)
        dispatch.embed_(y, input, state.arena, state.table, words, self.num_embeddings)
        return y
