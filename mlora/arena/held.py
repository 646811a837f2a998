"""An adapter's own tensors where its blob has them, so that they need no memory beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from .. import layout
from ..lowering import Delta
from .pack import Packed

_REST = 8  # what part of a blob may be copied so that the rest need not be there twice


class Span(NamedTuple):
    """Where a tensor lies in a blob; a matrix may lie column by column."""

    shape: Sequence[int]
    strides: Sequence[int]
    offset: int


class Held(Mapping[str, Tensor]):
    """Tensors that lie in a blob, made when they are asked for."""

    def __init__(self, blob: Tensor, spans: Mapping[str, Span]) -> None:
        self._blob, self._spans = blob, spans

    def __getitem__(self, key: str) -> Tensor:
        return self._blob.as_strided(*self._spans[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._spans)

    def __len__(self) -> int:
        return len(self._spans)


def spans_of(packed: Packed, deltas: Mapping[int, Delta], tensors: Mapping[str, Tensor]) -> dict[str, Span]:
    """Those of the tensors that are in the blob, rounded to its dtype and else as they are: the factors of a LoRA.

    Args:
        deltas: what was packed, made of `tensors`.
    """
    offsets = packed.rows[:, 0][:, (layout.A, layout.B)].tolist()
    parts = {
        part.data_ptr(): (part, offset)
        for index, delta in deltas.items()
        for part, offset in zip((delta.a, delta.b), offsets[index], strict=True)
        if part is not None and offset >= 0
    }
    for index, delta in deltas.items():
        if delta.matrix is not None and (tensor := delta.matrix.tensor) is not None:
            a, b = offsets[index]
            lies = packed.rows[index, 0, layout.WHOLE] == 1
            parts[tensor.data_ptr()] = (tensor, a) if lies else (tensor.t(), b)
    spans: dict[str, Span] = {}
    for key, tensor in tensors.items():
        part, offset = parts.get(tensor.data_ptr(), (None, 0))
        if part is None or not (tensor.is_cpu and tensor.is_contiguous()):
            continue
        shape = tensor.shape
        if part is tensor or (part.shape == shape and part.is_contiguous()):
            spans[key] = Span(shape, tensor.stride(), offset)
        elif len(shape) == 2 and part.shape == shape[::-1] and part.stride() == (1, shape[1]):
            spans[key] = Span(shape, (1, shape[0]), offset)
    return spans


def tensors_in(packed: Packed, spans: Mapping[str, Span], tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The same tensors, in no memory beside the blob where nearly all are in it as they are. Else as they were given.

    Args:
        spans: as `spans_of` returns them.
    """
    dtype = packed.blob.dtype
    exact = {key: span for key, span in spans.items() if tensors[key].dtype is dtype}
    held = Held(packed.blob, exact)
    if len(exact) == len(tensors):
        return held
    if sum(tensor.nbytes for key, tensor in tensors.items() if key not in exact) > packed.nbytes / _REST:
        return dict(tensors)
    return {key: held[key] if key in exact else tensor.clone() for key, tensor in tensors.items()}


def beside(packed: Packed, tensors: Mapping[str, Tensor]) -> int:
    """Bytes of an adapter's tensors that lie elsewhere than in its blob."""
    if isinstance(tensors, Held):
        return 0
    blob = packed.blob.untyped_storage().data_ptr()
    return sum(tensor.nbytes for tensor in tensors.values() if tensor.untyped_storage().data_ptr() != blob)
