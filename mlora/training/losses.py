"""The loss of each adapter of a mixed batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import errors
from ..routing.entries import BASE, is_single

IGNORED = -100


def losses(
    logits: Tensor,
    labels: Tensor,
    adapter_names: Any,
    *,
    head: Callable[[Tensor], Tensor] | None = None,
    chunk: int = 256,
    counts: Mapping[Hashable, int] | None = None,
) -> dict[Any, Tensor]:
    """The cross-entropy of each entry of a batch: the mean over the targets of its own rows.

    `sum(losses.values()).backward()` gives each adapter the gradient that it would have alone: a loss that is NaN stays
    its own. Rows are not weighted by how many targets they have, but an entry's targets are all weighted alike, as
    transformers' models do it.

    Args:
        logits: (rows, tokens, vocabulary). With `head`: what that reads, (rows, tokens, hidden).
        labels: (rows, tokens), as transformers takes them: the ids themselves, of which each token predicts the next
            one, with -100 where there is no target.
        adapter_names: as the call had it: an entry a row, or one for all.
        head: `model.lm_head`, say; call it inside of the `use_adapters` of the batch where adapters change it. It is
            given some tokens of all rows at a time, and again in the backward pass, so that logits of no more than
            `chunk` tokens are held, or of one of each row.
        counts: how many targets an entry's losses are divided by, where that is not those of this batch: those of all
            micro-batches of an optimizer's step.

    Returns:
        Entry -> fp32 scalar, in the order of the rows: a name, None for base rows, and of a mapping its items, sorted,
        as a tuple. 0 where an entry has no targets.

    Raises:
        EntryError: there are not as many entries as rows. ValueError: the shapes do not fit.
    """
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}; wanted (rows, tokens, size) "
            f"and (rows, tokens)"
        )
    rows = _rows(adapter_names, len(labels))
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).to(logits.device)
    if head is None:
        each = _each(logits, targets)
    else:
        step = max(1, chunk // max(1, len(labels)))
        parts = zip(logits.split(step, 1), targets.split(step, 1), strict=True)
        each = torch.cat(
            [checkpoint(lambda x, t: _each(head(x), t), x, t, use_reentrant=False) for x, t in parts], dim=1
        )
    found: dict[Any, Tensor] = {}
    for entry, own in rows.items():
        index = torch.tensor(own, device=logits.device)
        divisor = counts[entry] if counts is not None else (targets[index] != IGNORED).sum()
        total = each[index].sum()
        found[entry] = total / (divisor.clamp(min=1) if isinstance(divisor, Tensor) else max(1, divisor))
    return found


def _each(logits: Tensor, targets: Tensor) -> Tensor:
    """Of each token, (rows, tokens), in fp32; fp64 of fp64."""
    flat = logits.flatten(0, 1)
    wide = flat.to(torch.promote_types(flat.dtype, torch.float32))
    return F.cross_entropy(wide, targets.flatten(), ignore_index=IGNORED, reduction="none").view(targets.shape)


def _rows(entries: Any, count: int) -> dict[Any, list[int]]:
    """Entry -> its rows."""
    listed: Sequence[Any] = [entries] * count if is_single(entries) else list(entries)
    if len(listed) != count:
        raise errors.EntryError(f"adapter_names has {len(listed)} entries for labels of {count} rows")
    rows: dict[Any, list[int]] = {}
    for row, entry in enumerate(listed):
        key = tuple(sorted(entry.items())) if isinstance(entry, Mapping) else None if entry == BASE else entry
        rows.setdefault(key, []).append(row)
    return rows
