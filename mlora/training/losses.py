"""The loss of each adapter of a mixed batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .. import errors
from ..plan.packing import part_of_tokens
from ..routing.entries import BASE, check_lengths, is_single

IGNORED = -100


def losses(
    logits: Tensor,
    labels: Tensor,
    adapter_names: Any,
    *,
    lengths: Sequence[int] | None = None,
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
        lengths: of a packed call, as `use_adapters` had them: logits and labels have one row then, and
            `adapter_names` an entry a sequence. A sequence's last token predicts nothing.
        head: `model.lm_head`, say; call it inside of the `use_adapters` of the batch where adapters change it. It is
            given some tokens of all rows at a time, and again in the backward pass, so that logits of no more than
            `chunk` tokens are held, or of one of each row. Of a packed call it is the model's own head.
        counts: how many targets an entry's losses are divided by, where that is not those of this batch: those of all
            micro-batches of an optimizer's step.

    Returns:
        Entry -> fp32 scalar, in the order of the rows: a name, None for base rows, and of a mapping its items, sorted,
        as a tuple. 0 where an entry has no targets.

    Raises:
        EntryError: there are not as many entries as rows, or `lengths` are none. ValueError: the shapes do not fit.
    """
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}; wanted (rows, tokens, size) "
            f"and (rows, tokens)"
        )
    if lengths is not None:
        check_lengths(lengths, None)
        if labels.shape != (1, sum(lengths)):
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}; packed sequences of {sum(lengths)} tokens have (1, "
                f"{sum(lengths)})"
            )
    rows = _rows(adapter_names, len(labels) if lengths is None else len(lengths), lengths is not None)
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).to(logits.device)
    if lengths is not None:
        starts = [0, *accumulate(lengths)]
        targets[0, [end - 1 for end in starts[1:]]] = IGNORED
    each = _each(logits, targets) if head is None else _by_chunks(logits, targets, head, chunk)
    if lengths is not None:  # from here on a row is a token
        each, targets = each[0], targets[0]
        rows = {key: [t for one in own for t in range(starts[one], starts[one + 1])] for key, own in rows.items()}
    found: dict[Any, Tensor] = {}
    for entry, own in rows.items():
        index = torch.tensor(own, device=logits.device)
        divisor = counts[entry] if counts is not None else (targets[index] != IGNORED).sum()
        total = each[index].sum()
        found[entry] = total / (divisor.clamp(min=1) if isinstance(divisor, Tensor) else max(1, divisor))
    return found


def _by_chunks(hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], chunk: int) -> Tensor:
    """`_each` of what the head makes of some tokens of all rows at a time, and makes again in the backward pass."""
    step = max(1, chunk // max(1, len(targets)))

    def given(hidden: Tensor, targets: Tensor, part: range) -> Tensor:
        with part_of_tokens(part):
            logits = head(hidden)
        return _each(logits, targets)

    total, each = targets.shape[1], []
    for part in (range(start, min(start + step, total)) for start in range(0, total, step)):
        own = slice(part.start, part.stop)
        some = hidden[:, own].contiguous()  # or the library would multiply row by row, and read the head as often
        each.append(checkpoint(given, some, targets[:, own], part, use_reentrant=False))
    return torch.cat(each, dim=1)


def _each(logits: Tensor, targets: Tensor) -> Tensor:
    """Of each token, (rows, tokens), in fp32; fp64 of fp64."""
    each: Tensor = _CrossEntropy.apply(logits.flatten(0, 1), targets.flatten())
    return each.view(targets.shape)


class _CrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[target] of each token, 0 where there is no target. No copy of the logits in fp32 is held,
    forward or backward, but of as many tokens as stay in the caches, in one piece of memory."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        asked = targets != IGNORED
        index = targets.where(asked, 0)[:, None]
        norms, picked = [], []
        for part, wide in _parts(logits):
            picked.append(wide.gather(1, index[part])[:, 0])
            most = wide.amax(1)
            norms.append(wide.sub_(most[:, None]).exp_().sum(1).log_().add_(most))
        norm = torch.cat(norms)
        ctx.save_for_backward(logits, norm, index, asked)
        return (norm - torch.cat(picked)).where(asked, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, norm, index, asked = ctx.saved_tensors
        found = torch.empty_like(logits)
        for part, wide in _parts(logits):
            own = gradient[part, None]
            wide.sub_(norm[part, None]).exp_().mul_(own)
            wide.scatter_add_(1, index[part], -own).masked_fill_(~asked[part, None], 0)
            found[part] = wide
        return found, None


def _parts(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some tokens after the others, with a copy of their logits in fp32 (fp64 of fp64), which may be written to and
    whose memory is the next one's."""
    step = max(1, (1 << 19) // logits.shape[1])
    wide = logits.new_empty((step, logits.shape[1]), dtype=torch.promote_types(logits.dtype, torch.float32))
    for start in range(0, len(logits), step):
        own = logits[start : start + step]
        yield slice(start, start + step), wide[: len(own)].copy_(own)


def _rows(entries: Any, count: int, packed: bool) -> dict[Any, list[int]]:
    """Entry -> its rows, or packed sequences."""
    listed: Sequence[Any] = [entries] * count if is_single(entries) else list(entries)
    if len(listed) != count:
        raise errors.EntryError(
            f"adapter_names has {len(listed)} entries for "
            + (f"{count} packed sequences" if packed else f"labels of {count} rows; lengths= is of packed ones")
        )
    rows: dict[Any, list[int]] = {}
    for row, entry in enumerate(listed):
        key = tuple(sorted(entry.items())) if isinstance(entry, Mapping) else None if entry == BASE else entry
        rows.setdefault(key, []).append(row)
    return rows
