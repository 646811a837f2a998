"""The best rank rows of what a merge stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..lowering.delta import Delta
from .sums import without_cancelled

# A step of the low-rank factorisation that lowers its squared error by less than this share ends it.
SETTLED = 1e-3


def truncate_sum(delta: Delta, rank: int, clamp: float | None) -> Delta:
    """The best `rank` rank rows of a low-rank delta, from the QR of its stacked factors: B^T A is never formed."""
    delta = without_cancelled(delta)
    if delta.a is None or delta.b is None:
        return delta
    qa, ra = torch.linalg.qr(delta.a.t().double())
    qb, rb = torch.linalg.qr(delta.b.t().double())
    u, s, vh = torch.linalg.svd(rb @ ra.t(), full_matrices=False)
    result = _from_svd(qb @ u, s, vh @ qa.t(), rank, clamp)
    tail = float(s[rank:].square().sum().sqrt()) if result.rank else 0.0
    norm = float(s.square().sum().sqrt())
    return replace(result, error=tail / norm if norm else 0.0, shift=delta.shift)


def truncate(dense: Tensor, deltas: Sequence[Delta], rank: int, clamp: float | None) -> Delta:
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
