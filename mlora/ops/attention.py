"""The references of the operators `attend_`, attention of packed sequences over a paged cache, and `attend_step`, of a
decode step of a batch over its caches as they lie."""

from __future__ import annotations

import torch
from torch import Tensor


def attend_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    read: Tensor,
    write: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> Tensor:
    """Attention of each sequence's new tokens to its past and to each other, and then their keys and values into the
    cache.

    Semantics: sequence s has the tokens t in [q_starts[s], q_starts[s + 1]), n of them, and a past of
    p = k_starts[s + 1] - k_starts[s] - n keys, which are the rows read[k_starts[s] : k_starts[s] + p] of the cache; its
    new keys follow, k of its tokens. Its i-th token sees the keys up to p + i, of which the last `window` if that is
    not 0. out[t] = softmax(f(scale q[t] keys^T)) values, where f(x) = softcap tanh(x / softcap), or x if that is 0.
    Query head h uses kv head h // (heads / kv heads). Everything is computed in fp32 (fp64 for fp64 inputs) and rounded
    once. Then k_cache[write[t]] = k[t] and v_cache[write[t]] = v[t]: what a ring of a sliding window gives up is read
    before.
    Shapes: q (1, heads, tokens, dim), k and v (1, kv heads, tokens, dim), any strides; k_cache and v_cache
    (rows, kv heads, dim), rows contiguous; read (keys,) and write (tokens,) int64, read at least as long as the last
    past reaches; q_starts and k_starts (sequences + 1,) int32. Returns (1, tokens, heads, dim).

    Raises RuntimeError where shapes do not fit, starts do not rise from 0, or an index leads outside of the cache.
    """
    _check(q, k, v, k_cache, v_cache, read, write, q_starts, k_starts)
    heads, tokens, dim = q.shape[1:]
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty((tokens, heads, dim))
    group = heads // k.shape[1]
    starts = zip(q_starts.tolist(), q_starts.tolist()[1:], k_starts.tolist(), k_starts.tolist()[1:], strict=False)
    for s, (first, last, key, key_end) in enumerate(starts):
        n, past = last - first, key_end - key - (last - first)
        if past < 0 or (past and key + past > read.numel()):
            raise RuntimeError(f"mlora: sequence {s} has {n} queries and {past} past keys from {key} of {read.numel()}")
        rows = read[key : key + past]
        new = slice(first, last)
        keys = torch.cat([k_cache[rows].transpose(0, 1), k[0, :, new]], dim=1).to(wide)
        values = torch.cat([v_cache[rows].transpose(0, 1), v[0, :, new]], dim=1).to(wide)
        scores = q[0, :, new].to(wide) @ keys.repeat_interleave(group, 0).transpose(1, 2) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        behind = torch.arange(past, past + n, device=q.device)[:, None] - torch.arange(past + n, device=q.device)
        unseen = (behind < 0) | (behind >= window) if window else behind < 0
        weights = scores.masked_fill(unseen, -torch.inf).softmax(dim=-1)
        out[new] = (weights @ values.repeat_interleave(group, 0)).transpose(0, 1).to(q.dtype)
    k_cache.index_copy_(0, write, k[0].transpose(0, 1))
    v_cache.index_copy_(0, write, v[0].transpose(0, 1))
    return out[None]


def attend_step(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of one query a row.

    Semantics: out[b, 0, h] = softmax(scale q[b, h, 0] keys^T) values over the keys that row b sees, where mask[b] is
    True, or all, and their values. Query head h uses kv head h // (heads / kv heads). A row that sees none gets 0.
    Everything is computed in fp32 (fp64 for fp64 inputs) and rounded once.
    Shapes: q (batch, heads, 1, dim); k and v (batch, kv heads, keys, dim); mask (batch or 1, 1, 1, keys), bool; any
    strides. Returns (batch, 1, heads, dim).

    Raises RuntimeError where shapes or dtypes do not fit.
    """
    batch, heads, tokens, dim = q.shape
    fits = tokens == 1 and k.shape == v.shape and k.dim() == 4 and (k.shape[0], k.shape[3]) == (batch, dim)
    if not fits or k.shape[1] == 0 or heads % k.shape[1] or not q.dtype == k.dtype == v.dtype:
        raise RuntimeError(
            f"mlora: q must be (batch, heads, 1, dim), k and v (batch, kv heads, keys, dim), are {tuple(q.shape)}, "
            f"{tuple(k.shape)} and {tuple(v.shape)}"
        )
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) not in _mask_shapes(k)):
        raise RuntimeError(f"mlora: mask must be of bool and of shape ({batch} or 1, 1, 1, {k.shape[2]})")
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty((batch, 1, heads, dim))
    for row in range(batch):
        seen = slice(None) if mask is None else mask[row % len(mask), 0, 0].nonzero()[:, 0]
        keys, values = (t[row][:, seen].to(wide) for t in (k, v))
        queries = q[row].to(wide).view(len(keys), heads // len(keys), dim)
        weights = (queries @ keys.transpose(1, 2) * scale).softmax(dim=-1)
        out[row, 0] = (weights @ values).view(heads, dim).to(q.dtype)
    return out


def _mask_shapes(k: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple((rows, 1, 1, k.shape[2]) for rows in (k.shape[0], 1))


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    read: Tensor,
    write: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
) -> None:
    if q.dim() != 4 or q.shape[0] != 1 or k.dim() != 4 or k.shape != v.shape or k.shape[2:] != q.shape[2:]:
        raise RuntimeError(
            f"mlora: q must be (1, heads, tokens, dim), k and v alike, are {tuple(q.shape)}, {tuple(k.shape)} and "
            f"{tuple(v.shape)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise RuntimeError(f"mlora: {q.shape[1]} heads are no multiple of {k.shape[1]}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dim() != 3 or cache.shape[1:] != (k.shape[1], k.shape[3]) or cache.dtype != q.dtype:
            raise RuntimeError(f"mlora: {name} must be of q's dtype and of shape (rows, {k.shape[1]}, {k.shape[3]})")
    rows = min(len(k_cache), len(v_cache))
    for name, index in (("read", read), ("write", write)):
        if index.dim() != 1 or index.dtype != torch.int64:
            raise RuntimeError(f"mlora: {name} must be a 1-D int64 tensor")
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < rows:
            raise RuntimeError(f"mlora: {name} leads outside of the cache of {rows} rows")
    if write.numel() != q.shape[2]:
        raise RuntimeError(f"mlora: write has {write.numel()} rows for {q.shape[2]} tokens")
    for name, starts in (("q_starts", q_starts), ("k_starts", k_starts)):
        if starts.dim() != 1 or starts.dtype != torch.int32 or not len(starts) or len(starts) != len(q_starts):
            raise RuntimeError(f"mlora: {name} must be a 1-D int32 tensor, one element more than there are sequences")
        if int(starts[0]) != 0 or bool((starts[1:] < starts[:-1]).any()):
            raise RuntimeError(f"mlora: {name} must rise from 0, is {starts.tolist()}")
    if int(q_starts[-1]) != q.shape[2]:
        raise RuntimeError(f"mlora: q_starts end at {int(q_starts[-1])} of {q.shape[2]} tokens")
