"""Adapters whose files differ in their numbers alone have blobs that differ in these numbers alone.

So of one of them it is remembered where its blob has each tensor of its file, and the next one's is copied from the
bytes of its file, by as many copies as there are shapes. That is done where nothing but the place of a number depends
on the file: each tensor is in the blob once, as it is but for its dtype and the order of rows and columns, and there is
nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import layout
from ..adapters.adapter import all_finite
from ..adapters.header import DTYPES, Place
from .bits import LORA, TAIL
from .held import Span
from .pack import ALIGNMENT, Packed, copy_alike


class Run(NamedTuple):
    """Tensors of one shape that lie side by side in a blob from `start` on: their numbers in the file. `turned`: that
    shape, of those whose columns lie one behind another."""

    numbers: list[int]
    turned: Sequence[int] | None
    start: int


class Factors(NamedTuple):
    """The numbers in the file of a module's A and B, and its rank."""

    a: int
    b: int
    rank: int


@dataclass(frozen=True)
class Form:
    """How adapters with one header are laid out.

    Args:
        dtype: of the file. `spans`: where its tensors lie in the blob, in the order of their bytes, by the adapter's
            keys.
        runs: the same. `factors`: of all modules that it changes.
        packed: all of one that is the same for all, with a blob of no bytes. `numel`: of a blob.
    """

    dtype: torch.dtype
    spans: Mapping[str, Span]
    runs: Sequence[Run]
    factors: Sequence[Factors]
    packed: Packed
    numel: int

    def pack(self, data: Tensor, dtype: torch.dtype, memory: Callable[[int], Tensor]) -> Packed:
        """What `pack.pack` makes of a file, to the bit. `data`: the bytes behind its header; the others as there.

        Raises:
            ValueError: a value is not finite in the file, or in the blob.
        """
        blob = memory(self.numel)
        parts = self._parts(data, dtype)
        for numbers, turned, start in self.runs:
            copy_alike([parts[number] for number in numbers], turned, blob[start:], ALIGNMENT // dtype.itemsize)
        if not all_finite(blob):
            raise ValueError("some values are not finite")
        one = self.packed
        return Packed(blob, one.cuts, one.rows, one.touches, invocation=one.invocation)

    def is_zero(self, data: Tensor) -> bool:
        """Whether no module of such an adapter changes anything, see `Delta.is_zero`."""
        parts, spans = self._parts(data, self.dtype), list(self.spans.values())

        def used(number: int, rank: int) -> Tensor:  # which rank rows are not zero
            matrix = parts[number].view(*spans[number].shape)
            return (matrix if len(matrix) == rank else matrix.t()).any(dim=1)

        return not any((used(a, rank) & used(b, rank)).any() for a, b, rank in self.factors)

    def _parts(self, data: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
        """The tensors, as vectors."""
        numbers = data.view(self.dtype).to(dtype)
        return numbers.split_with_sizes([math.prod(span.shape) for span in self.spans.values()])


def form_of(packed: Packed, spans: Mapping[str, Span], places: Sequence[Place]) -> Form | None:
    """The form of an adapter that was packed, `spans` being those of its tensors and `places` those of its file, in one
    order; None where more than the numbers may be another's."""
    step = ALIGNMENT // packed.blob.itemsize
    dtypes = {place.dtype for place in places}
    taken = sum(math.prod(span.shape) + -math.prod(span.shape) % step for span in spans.values())
    touched = np.flatnonzero(packed.touches)
    rows = packed.rows[touched, 0]
    at = {span.offset: number for number, span in enumerate(spans.values())}
    if (
        len(spans) != len(places)  # something else was made of a tensor
        or len(dtypes) != 1
        or any(place.at < 0 for place in places)
        or any(tuple(span.shape) != place.shape for span, place in zip(spans.values(), places, strict=True))
        or len(at) != len(spans)
        or taken != packed.blob.numel()
        or packed.heads
        or packed.trained
        or packed.rests
        or packed.source is not None
        or (packed.touches & ~np.uint8(LORA | TAIL)).any()
        or any(len(span.shape) != 2 or span.shape[0] == span.shape[1] for span in spans.values())  # B may be identity
        or not (rows[:, layout.SCALE] != 0).all()
        or not all(offset in at for offset in rows[:, (layout.A, layout.B)].reshape(-1).tolist())
    ):
        return None
    factors = [Factors(at[a], at[b], rank) for a, b, rank in rows[:, (layout.A, layout.B, layout.RANK)].tolist()]
    shared = Packed(packed.blob.new_empty(0), packed.cuts, packed.rows, packed.touches, invocation=packed.invocation)
    dtype = DTYPES[places[0].dtype]
    return Form(dtype, dict(spans), _runs(list(spans.values()), step), factors, shared, packed.blob.numel())


def _runs(spans: Sequence[Span], step: int) -> list[Run]:
    runs: list[Run] = []
    last: tuple[Sequence[int], Sequence[int], int] | None = None
    for number in sorted(range(len(spans)), key=lambda number: spans[number].offset):
        shape, strides, offset = spans[number]
        if last == (shape, strides, offset):
            runs[-1].numbers.append(number)
        else:
            turned = None if strides[1] == 1 else shape
            runs.append(Run([number], turned, offset))
        size = math.prod(shape)
        last = shape, strides, offset + size + -size % step
    return runs
