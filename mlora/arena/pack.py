"""An adapter's deltas -> one contiguous blob on the host, and the rows of the tables that point into it.

Nothing is padded to a maximum rank: a blob holds each part at its true size, aligned to 64 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .. import errors, layout
from ..adapters.adapter import all_finite
from ..lowering import Delta, Turn
from ..lowering.delta import Matrix
from .bits import GAIN, HEAD, INPUT, LORA, SHIFT, TAIL, TURN

ALIGNMENT = 64  # bytes: a cache line, and a multiple of every vector load of the kernels

OFFSETS = (layout.A, layout.B, layout.GAIN, layout.IN_GAIN, layout.SHIFT, layout.TURN, layout.IN_TURN)
"""The columns of a table that hold offsets."""

_TURNED_BYTES = 1 << 18


@dataclass(frozen=True)
class Made:
    """A part of a blob that is as large as a weight: it is made in its turn, and never there beside the blob."""

    shape: tuple[int, int]
    make: Callable[[], Tensor]


class Source(Protocol):
    """Where the numbers of an adapter are that is being trained: it is packed again at each step."""

    @property
    def changed(self) -> bool:
        """Whether they may have changed since the last `write`."""

    def write(self, to: Sequence[Tensor]) -> None:
        """Put them where the parts of the blob would be copied to, one a device, in the arena's dtype."""


@dataclass
class Packed:
    """A registered adapter.

    Args:
        blob: 1-D host tensor in the arena's dtype: what each device holds of it, one part behind another.
        cuts: where the part of each device ends, in elements.
        rows: int64 (modules, 2, TABLE_WIDTH), offsets relative to the blob's start: the adapter's own row of each
            module's table, and that of the rests of its gains and turns.
        touches: one byte a module: LORA | GAIN | INPUT | SHIFT | HEAD | TAIL | TURN.
        heads: module number -> (offset of its weight, of its bias or -1, width) of a head or token embedding of another
            size, relative to the blob's start; the module's row in `rows` is empty.
        trained: the numbers of the modules with a `Delta` that is `trained`.
        rests: whether any of the latter has a part.
        invocation: of an aLoRA, see `Delta`; it is that of every module with TAIL.
        number: the how manieth it was to be registered.
        slot: which it has on every device where it is resident, or -1. `offsets`: where its part starts in each
            device's arena, in elements, or -1.
        pins: how many active routings use it. `retired`: whether it goes with the last of them.
        source: of one that is being trained; its blob has its size only. `version`: how often its numbers changed.
        held: bytes that are counted for it on the host. `memory`: what the blob lies in, see `Host`.
    """

    blob: Tensor
    cuts: tuple[int, ...]
    rows: np.ndarray
    touches: np.ndarray
    heads: Mapping[int, tuple[int, int, int]] = field(default_factory=dict)
    trained: frozenset[int] = frozenset()
    rests: bool = field(default=False)
    invocation: tuple[int, ...] = ()
    number: int = field(default=0)
    slot: int = field(default=-1)
    offsets: list[int] = field(init=False)
    pins: int = field(default=0)
    retired: bool = field(default=False)
    source: Source | None = field(default=None)
    version: int = field(default=0)
    held: int = field(default=0)
    memory: Any = field(default=None)

    def __post_init__(self) -> None:
        self.offsets = [-1] * len(self.cuts)

    @property
    def nbytes(self) -> int:
        return self.blob.numel() * self.blob.element_size()

    def start(self, device: int) -> int:
        """Where the part of a device begins in the blob."""
        return self.cuts[device - 1] if device else 0

    def size(self, device: int) -> int:
        """How many elements a device holds."""
        return self.cuts[device] - self.start(device)

    def shift(self, device: int) -> int:
        """What makes an offset in the blob one in a device's arena, where it is resident."""
        return self.offsets[device] - self.start(device)

    @property
    def resident(self) -> bool:
        return self.slot >= 0


def pack(
    deltas: Mapping[int, Delta],
    empty: np.ndarray,
    dtype: torch.dtype,
    memory: Callable[[int], Tensor],
    label: str,
    homes: Sequence[int],
    implied: Sequence[bool],
    changing: bool = False,
) -> Packed:
    """Lay the parts of an adapter out in one host blob.

    Args:
        deltas: module number -> delta. `label`: of the adapter, for messages.
        empty: `Packed.rows` of an adapter without parts.
        dtype: the arena's. `memory`: makes an empty blob of so many elements.
        homes: the number of each module's device.
        implied: of each device, whether to leave out the identity beside a whole matrix: all that reads its arena takes
            it so.
        changing: whether the numbers will change, so that the rests of gains need room that have none yet.

    Raises:
        AdapterError: a value is finite in the adapter and not in the arena's dtype.
    """
    rows = empty.copy()
    touches = np.zeros(len(rows), dtype=np.uint8)
    scales = np.zeros(len(rows), dtype=np.float32)
    heads: dict[int, tuple[int, int, int]] = {}
    parts: list[Tensor | Made] = []
    owners: list[int] = []  # the device of each

    def number(part: Tensor | Made) -> int:  # stands for the part's offset until all are known
        parts.append(part)
        owners.append(home)
        return len(parts) - 1

    factors: list[tuple[int, int, int, int, float]] = []  # of all modules, which is most of it; written at once
    for index, delta in deltas.items():
        home = homes[index]
        if delta.invocation:
            touches[index] |= TAIL
        if delta.replaces and delta.a is not None:
            heads[index] = number(delta.a), -1 if delta.shift is None else number(delta.shift), delta.rank
            touches[index] |= HEAD
            continue
        if delta.a is not None and delta.b is not None:
            factors.append((index, number(delta.a), number(delta.b), delta.rank, delta.scale))
            square = delta.b.shape[0] == delta.b.shape[1] and not changing
            if square and torch.equal(delta.b, torch.eye(delta.rank).to(delta.b)):
                rows[index, 0, layout.WHOLE] = 1
        elif delta.matrix is not None:
            matrix, is_a = delta.matrix, _is_a(delta.matrix, implied[home])
            first, second = (-1 if part is None else number(part) for part in _factors(matrix, implied[home]))
            factors.append((index, first, second, matrix.outputs if is_a else matrix.inputs, delta.scale))
            rows[index, 0, layout.WHOLE] = is_a
        for column, bit, part in (
            (layout.GAIN, GAIN, delta.gain),
            (layout.IN_GAIN, INPUT, delta.in_gain),
            (layout.SHIFT, SHIFT, delta.shift),
        ):
            if part is not None:
                rows[index, 0, column] = number(part)
                touches[index] |= bit
                if bit != SHIFT and (rest := _rest(part, dtype, changing)) is not None:
                    rows[index, 1, column] = number(rest)
        for column, bit, turn in ((layout.TURN, TURN, delta.turn), (layout.IN_TURN, INPUT, delta.in_turn)):
            if turn is not None:
                shape = layout.turn_shape(*turn.shape)
                rows[index, 0, column : column + 2] = number(turn.values), shape
                touches[index] |= bit
                if (rest := _turn_rest(turn, dtype)) is not None:
                    rows[index, 1, column : column + 2] = number(rest), shape
    if factors:
        indices, a, b, ranks, values = (list(column) for column in zip(*factors, strict=True))
        rows[indices, 0, layout.A], rows[indices, 0, layout.B], rows[indices, 0, layout.RANK] = a, b, ranks
        scales[indices] = values
        touches[indices] |= LORA
    blob, cuts, offsets = _lay_out(parts, owners, len(implied), dtype, memory)
    for column in OFFSETS:
        rows[..., column] = offsets[rows[..., column]]
    heads = {index: (int(offsets[a]), int(offsets[bias]), width) for index, (a, bias, width) in heads.items()}
    rows[:, 0, layout.SCALE] = scales.view(np.uint32)
    if not all_finite(blob):
        raise errors.AdapterError(
            f"{label}: some weights overflow {dtype}, in which the model runs; patch with "
            "dtype=torch.float32 or torch.bfloat16"
        )
    rests = bool((rows[:, 1, OFFSETS] >= 0).any())
    invocation = next((delta.invocation for delta in deltas.values() if delta.invocation), ())
    trained = frozenset(index for index, delta in deltas.items() if delta.trained)
    return Packed(blob, cuts, rows, touches, heads, trained, rests, invocation)


def _is_a(matrix: Matrix, implied: bool) -> bool:
    """Whether a whole matrix is the A beside an identity for B, so that kernels read its rows in the order of memory;
    or the other way round, where the identity would be larger and is not `implied`, or the matrix is a parameter's."""
    return matrix.outputs <= matrix.inputs or (implied and not matrix.parameter)


def _factors(matrix: Matrix, implied: bool) -> tuple[Made | None, Made | None]:
    """A and B of a whole matrix: itself and an identity, which is None where it is `implied`."""
    out, width = matrix.outputs, matrix.inputs
    if _is_a(matrix, implied):
        return Made((out, width), matrix.read), None if implied else Made((out, out), lambda: torch.eye(out))
    return Made((width, width), lambda: torch.eye(width)), Made((width, out), lambda: matrix.read().t())


def numel_of(matrix: Matrix, implied: bool) -> int:
    """How many numbers a blob holds of it."""
    return sum(math.prod(part.shape) for part in _factors(matrix, implied) if part)


def _lay_out(
    parts: Sequence[Tensor | Made],
    owners: Sequence[int],
    devices: int,
    dtype: torch.dtype,
    memory: Callable[[int], Tensor],
) -> tuple[Tensor, tuple[int, ...], np.ndarray]:
    """A blob of all parts, device by device; of each device those of one shape and layout side by side, which takes a
    few copies in place of one a part. Beside it where each device's part ends, and the offset of each part, with a last
    one, -1, for what is absent."""
    align = ALIGNMENT // dtype.itemsize
    alike: dict[tuple[Any, ...], list[int]] = {}
    for number, (part, owner) in enumerate(zip(parts, owners, strict=True)):
        kind = (part.shape,) if isinstance(part, Made) else (part.shape, part.stride(), part.dtype)
        alike.setdefault((owner, *kind), []).append(number)
    offsets = np.full(len(parts) + 1, -1, dtype=np.int64)
    end = 0
    cuts: list[int] = []
    for (owner, shape, *_), numbers in sorted(alike.items(), key=lambda item: item[0][0]):  # stable
        cuts += [end] * (owner - len(cuts))
        size = math.prod(shape)
        step = size + -size % align
        offsets[numbers] = np.arange(end, end + step * len(numbers), step)
        end += step * len(numbers)
    cuts += [end] * (devices - len(cuts))
    blob = memory(end)
    for numbers in alike.values():
        group = [parts[number] for number in numbers]
        ready = [part for part in group if isinstance(part, Tensor)]
        if ready:
            turned = not ready[0].is_contiguous() and ready[0].t().is_contiguous()
            lying = [part.t() for part in ready] if turned else ready
            copy_alike(lying, lying[0].shape if turned else None, blob[offsets[numbers[0]] :], align)
            continue
        for number, part in zip(numbers, group, strict=True):
            assert isinstance(part, Made)
            start, size = offsets[number], math.prod(part.shape)
            blob[start : start + size].view(part.shape).copy_(part.make())
            blob[start + size : start + size + -size % align] = 0
    return blob, tuple(cuts), offsets


def _rest(part: Tensor, dtype: torch.dtype, always: bool) -> Tensor | None:
    rest = rest_of(part, dtype)
    return torch.zeros_like(part) if rest is None and always and dtype.itemsize == 2 else rest


def rest_of(part: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What rounding to `dtype` takes off g - 1, where that is more than rounding g itself would; else None. It never
    is unless some g is below a half."""
    rest = part - part.to(dtype).to(part.dtype)
    beyond = rest.abs() > torch.finfo(dtype).eps / 2 * (1 + part).abs()
    return rest if beyond.any() else None


def _turn_rest(turn: Turn, dtype: torch.dtype) -> Tensor | None:
    """The same of a turn's values, off the diagonal of which it never is."""
    return None if rest_of(turn.diagonal, dtype) is None else turn.values - turn.values.to(dtype).to(turn.values.dtype)


def copy_alike(parts: Sequence[Tensor], turned: Sequence[int] | None, to: Tensor, align: int) -> None:
    """Copy parts of as many elements each to the start of `to`, each padded with zeros to a multiple of `align`.

    LoRA's B, (out, rank) in files, are `turned`, of that shape: their columns come to lie one behind another. They are
    copied as they lie first, so many at a time that they stay in the cache, and turned together: a quarter of the time
    of one by one."""
    first = parts[0]
    size = first.numel()
    padded = to[: (size + -size % align) * len(parts)].view(len(parts), -1)
    padded[:, size:] = 0
    if turned is None:
        torch.stack(list(parts), out=padded[:, :size].view(len(parts), *first.shape))
        return
    places = padded[:, :size].view(len(parts), turned[1], turned[0])
    some = max(1, _TURNED_BYTES // first.nbytes)
    for start in range(0, len(parts), some):
        lying = torch.stack(list(parts[start : start + some])).view(-1, *turned)
        places[start : start + some] = lying.transpose(1, 2)
