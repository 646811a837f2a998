"""The form that every adapter type is lowered to, and what a lowering may ask of the base."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..ops import dispatch
from .cut import Cut
from .turn import Turn


@dataclass(frozen=True, eq=False)
class Matrix:
    """A whole (out, in) matrix D. It is as large as the weight that it changes, so it is computed each time that it is
    read and kept by nobody: those of an adapter are read one after another, each into its place in the blob.

    Args:
        outputs, inputs: its shape. `read`: returns it, on the CPU, in the dtype of the adapter, fp32 or fp64.
        tensor: itself, where it is a tensor of the adapter's.
        parameter: whether there are adapters that have it as a parameter, beside which its products are the same to the
            bit.
    """

    outputs: int
    inputs: int
    read: Callable[[], Tensor]
    tensor: Tensor | None = None
    parameter: bool = False

    @classmethod
    def of(cls, tensor: Tensor) -> Matrix:
        """One that is there."""
        outputs, inputs = tensor.shape
        return cls(outputs, inputs, lambda: tensor, tensor)

    @property
    def numel(self) -> int:
        return self.outputs * self.inputs

    def map(self, change: Callable[[Tensor], Tensor]) -> Matrix:
        """What `change` makes of it, of the same shape."""
        return replace(self, read=lambda: change(self.read()), tensor=None)


@dataclass(frozen=True)
class Delta:
    """What one adapter does to one module:

        y = G base(U x) + scale * B^T (A x) + c     or     y = G base(U x) + scale * D x + c

    where G is the sum of a gain g and of T - I for an output turn T, and U that of an input gain u and of an input
    turn's. Absent parts are `None`. All tensors are on the CPU, in the dtype of the adapter or fp32.

    Args:
        a: (rank, in). `b`: (rank, out): rank row j adds `b[j] * (a[j] . x)`.
        scale: the LoRA scaling. It is kept apart from `b` and applied to `A x` in fp32, so that
            storing `b` in 16 bits never rounds a scaled value.
        matrix: D, in place of `a` and `b`: of a delta that would have more rank rows than D has rows or columns.
        gain: (out,), g - 1. Stored as the difference to 1, where 16 bits are as exact as `b`'s.
        in_gain: (in,), u - 1.
        turn, in_turn: T - I of a block-diagonal T of outputs, or of inputs.
        shift: (out,), c.
        error: |D - B^T A| / |D| (Frobenius) where B^T A approximates a dense D; 0 where it is exact.
        replaces: of a head or a token embedding of another size, in place of all of the above: y = A x + c of width
            `rank`, or y = A[ids], for `rank` tokens, before an embedding's own scale; `b` is absent.
        trained: whether it stands for a weight or tokens that were trained themselves, so that PEFT shows those to
            whoever reads the module's weight.
        invocation: of an activated LoRA: the delta applies to a row's tokens from the last place on where it has these,
            and to none where it has not; empty: to all of them.
        sharded: whether A and B are both this process's part of what is split over several, so that A x is of some of
            the inputs, and a sum over all processes.
    """

    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    matrix: Matrix | None = None
    gain: Tensor | None = None
    in_gain: Tensor | None = None
    turn: Turn | None = None
    in_turn: Turn | None = None
    shift: Tensor | None = None
    error: float = 0.0
    replaces: bool = False
    trained: bool = False
    invocation: tuple[int, ...] = ()
    sharded: bool = False

    @property
    def rank(self) -> int:
        """How many rank rows; of a matrix, the most that its rank can be."""
        if self.matrix is not None:
            return min(self.matrix.outputs, self.matrix.inputs)
        return 0 if self.a is None else self.a.shape[0]

    @property
    def changes_outputs(self) -> bool:
        """Whether it has a gain or a turn of what the base gives."""
        return self.gain is not None or self.turn is not None

    @property
    def changes_inputs(self) -> bool:
        """Whether it has a gain or a turn of what the base reads."""
        return self.in_gain is not None or self.in_turn is not None

    @property
    def is_empty(self) -> bool:
        """Whether it has no parts, and so changes nothing."""
        return not (self.rank or self.changes_outputs or self.changes_inputs) and self.shift is None

    @property
    def is_zero(self) -> bool:
        """Whether it changes nothing: each of its numbers is zero, or meets only zeros."""
        turns = [turn.values for turn in (self.turn, self.in_turn) if turn is not None]
        if self.replaces or any(
            part is not None and part.any() for part in (self.gain, self.in_gain, self.shift, *turns)
        ):
            return False
        if self.matrix is not None:
            return self.scale == 0 or not bool(self.matrix.read().any())
        if self.a is None or self.b is None or self.scale == 0:
            return True
        a, b = self.a.float(), self.b.float()  # not every dtype of files can be compared
        return not bool((a.any(dim=1) & b.any(dim=1)).any())

    def equals(self, other: Delta) -> bool:
        """Whether both have the same numbers."""
        return self is other or all(
            _equal(getattr(self, part.name), getattr(other, part.name)) for part in fields(self)
        )

    def apart(self) -> tuple[Delta, Delta]:
        """The rank rows, and the rest."""
        rows = Delta(self.a, self.b, self.scale, invocation=self.invocation, sharded=self.sharded)
        return rows, replace(self, a=None, b=None, scale=1.0, sharded=False)

    def shifted(self, by: Tensor) -> Delta:
        """The same with `by`, (out,), added to the shift."""
        return replace(self, shift=by if self.shift is None else self.shift + by)

    def product(self) -> Tensor | None:
        """(out, in), fp32: scale B^T A, or scale D; None where it has neither."""
        if self.matrix is not None:
            return self.matrix.read().float() * self.scale
        return None if self.a is None or self.b is None else self.b.float().t() @ (self.a.float() * self.scale)


def _equal(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, Matrix) and isinstance(theirs, Matrix):
        return mine is theirs or torch.equal(mine.read(), theirs.read())
    if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
        return torch.equal(mine, theirs)
    return mine is theirs or (not isinstance(mine, Tensor) and bool(mine == theirs))


@dataclass(frozen=True)
class Dense:
    """What the lowering of a type returns for a change of one weight matrix that has full rank in any form:
    y = g * base(x) + D x + c. `lower` makes a delta of it, by the user's choice: the matrix itself (`dense=True`, see
    `exactly`), the nearest delta of a rank (`approximate=RANK`, see `approximate`), or neither, which refuses it.

    What has a smaller form at other ranks returns `whole` where it has none, which is served without being asked for.

    Args:
        weight: returns D, (out, in), in fp32 or fp64. It is called when D is needed, more than once if need be, and is
            where all work with as many numbers as D has belongs; what it holds on to stays until the blob is packed.
        why: why its rank is full, for the refusal.
        gain, shift: as in `Delta`.
    """

    weight: Callable[[], Tensor]
    why: str
    gain: Tensor | None = None
    shift: Tensor | None = None


@dataclass(frozen=True)
class Conv:
    """What a convolution is beside a linear of the patches under its kernel.

    Args:
        kernel: its size in each spatial dimension.
        groups: into which its channels are cut.
        dilated: whether its kernel has holes.
        zero_padded: whether what it reads beyond the input, if anything, are zeros.
        even: whether kernel, stride and padding are the same numbers in all dimensions.
    """

    kernel: tuple[int, ...]
    groups: int = 1
    dilated: bool = False
    zero_padded: bool = True
    even: bool = True


_CPU = torch.device("cpu")


@dataclass(frozen=True)
class BaseLinear:
    """A linear of the base model, as lowerings see it. An embedding is one too: of one-hot inputs, W being its
    (vocab, out) weight transposed and then multiplied by `embed_scale`. So is a convolution: of patches, W being its
    flattened (out, channels * kernel) weight, with zeros for the channels of other groups.

    Args:
        name: its dotted path in the model.
        in_features, out_features: its widths.
        weight: returns the dense (out, in) weight in fp32 on the CPU; raises
            `UnsupportedAdapterError` where there is none (a quantized or offloaded base).
        bias: returns the (out,) bias in fp32 on the CPU, or None.
        held: returns the (out, in) weight in the model's own dtype and memory, not to be written to, of a linear where
            it is a plain tensor; None elsewhere. For training: lowerings, during which something may be folded in,
            read the copy.
        embed_scale: the factor of an embedding that scales what it looks up, 1 of others; None of a linear.
        dtype: of the weight in the model, to which a file's copy of it is rounded before they are compared.
        device: where it is, and where what depends on the library that decomposes it is computed.
        offset: of a norm, n * (weight + offset) + bias of a normalised n: 0, or Gemma's 1; None of a linear. Its
            `weight` returns (out,).
        aliases: the other paths of the same module. `tied`: those of other modules that hold its very weight.
        head: whether it gives the model's answer, so that another size is no matter to any other module.
        answers: whether it is what the model names as its `get_output_embeddings`.
        conv: what it is if it is a convolution.
        experts: of a parameter that holds the matrices of that many experts, of the widths above each, or one matrix; 0
            of what is no parameter. Its delta has as many rank rows for each of them, those of the first expert first.
        transposed: of such a parameter, whether it lies as (experts, in, out); others lie as (experts, out, in).
        owner: the class of the module that holds it, if that computes with its weight and never calls it; "" of others.
        turned: of a module whose `weight` is a plain parameter which it does nothing with but to multiply or look up:
            whether that lies as (in, out), as GPT-2's `Conv1D`'s and embeddings' do. None of others.
        cut: how tensor parallelism has split it over processes; None where this one has all of it. The widths are those
            of the whole, and so is what `weight` and `bias` read, with all processes.
    """

    name: str
    in_features: int
    out_features: int
    weight: Callable[[], Tensor]
    bias: Callable[[], Tensor | None]
    embed_scale: float | None = None
    dtype: torch.dtype = torch.float32
    offset: float | None = None
    device: torch.device = _CPU
    aliases: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    head: bool = False
    answers: bool = False
    conv: Conv | None = None
    experts: int = 0
    transposed: bool = False
    owner: str = ""
    turned: bool | None = None
    cut: Cut | None = None
    held: Callable[[], Tensor | None] = lambda: None

    def row_norms(self, b: Tensor, a: Tensor, scale: float) -> Tensor:
        """|W + scale B A| by rows, (out,), of B (out, rank) and A (rank, in) in fp32."""
        held = self.held()
        return dispatch.row_norms(self.weight() if held is None else held, b, a, scale)

    @property
    def linear(self) -> bool:
        """Whether it is a linear, and none of the other things that are seen as one."""
        return self.embed_scale is None and self.offset is None and self.conv is None and not self.experts

    @property
    def own_experts(self) -> int:
        """Of how many experts this process has the parameter."""
        return self.cut.width if self.cut is not None and self.cut.axis == "experts" else self.experts

    @property
    def kernel(self) -> tuple[int, ...]:
        """The sizes that follow (out, channels) in the weight's shape: none but a convolution's."""
        return () if self.conv is None else self.conv.kernel

    @property
    def groups(self) -> int:
        return 1 if self.conv is None else self.conv.groups

    @property
    def channels(self) -> int:
        """Input channels, of all groups: a linear's inputs."""
        return self.in_features // math.prod(self.kernel)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the weight as it is kept, other than embeddings'."""
        if self.linear and self.turned:
            return (self.in_features, self.out_features)
        return (self.out_features, self.channels // self.groups, *self.kernel)


def kernel_major(delta: Delta, base: BaseLinear) -> Delta:
    """The delta with its inputs in the order in which the layer of a convolution has them: (*kernel, channels), where
    weights and files have (channels, *kernel)."""
    taps = math.prod(base.kernel)
    if taps == 1:
        return delta

    def turned(part: Tensor | None) -> Tensor | None:
        return None if part is None else _channels_last(part, taps)

    matrix = None if delta.matrix is None else delta.matrix.map(lambda dense: _channels_last(dense, taps))
    return replace(delta, a=turned(delta.a), in_gain=turned(delta.in_gain), matrix=matrix)


def _channels_last(part: Tensor, taps: int) -> Tensor:
    return part.unflatten(-1, (-1, taps)).transpose(-1, -2).flatten(-2)


def spread(weight: Tensor, groups: int) -> Tensor:
    """What a grouped convolution's matrix, (out, in / groups), is for all channels: (out, in), zeros between groups."""
    return weight if groups == 1 else torch.block_diag(*weight.chunk(groups))


def minus(a: Tensor, b: Tensor, a0: Tensor, b0: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of B^T A - B0^T A0 in twice as many rank rows, those of (B - B0)^T A + B0^T (A - A0).

    They are known up to the sign of each row of A0 and B0, and are taken with that which is nearer to A and B. So where
    training moved A and B little from there, each product has a small factor, and 16 bits round little.
    """
    sign = torch.where((a * a0).sum(1) + (b * b0).sum(1) < 0, -1.0, 1.0)[:, None]
    a0, b0 = a0 * sign, b0 * sign
    return torch.cat([a, a - a0]), torch.cat([b - b0, b0])


def laid_out(weight: Tensor, base: BaseLinear) -> Tensor:
    """A weight as the module keeps it, other than an embedding's, as the (out, in) matrix that `base.weight` gives."""
    return weight.t() if base.linear and base.turned else spread(weight.flatten(1), base.groups)


def compact(a: Tensor, b: Tensor, scale: float = 1.0) -> Delta:
    """The same B^T A in at most min(in, out) rank rows: where there are more, the product itself. Exact up to one
    rounding of the product to fp32."""
    (rank, inputs), outputs = a.shape, b.shape[1]
    if rank <= min(inputs, outputs):
        return Delta(a, b, scale)
    return whole(lambda: b.double().t() @ a.double(), outputs, inputs, scale)


def whole(
    weight: Callable[[], Tensor], outputs: int, inputs: int, scale: float = 1.0, parameter: bool = False
) -> Delta:
    """A dense (out, in) delta as it is, at the price of a copy of the weight. `weight`: as in `Dense`; `parameter`: as
    in `Matrix`."""
    return Delta(matrix=Matrix(outputs, inputs, weight, parameter=parameter), scale=scale)


def exactly(dense: Dense, base: BaseLinear) -> Delta:
    """The delta itself, on `base`, at the price of a copy of the weight."""
    delta = whole(dense.weight, base.out_features, base.in_features)
    return replace(delta, gain=dense.gain, shift=dense.shift)


def approximate(dense: Dense, base: BaseLinear, rank: int) -> Delta:
    """The nearest delta of at most `rank` rank rows (Eckart-Young: the leading singular triplets), and how far
    it is. From rank min(in, out) on it is exact."""
    if rank >= min(base.in_features, base.out_features):
        return exactly(dense, base)
    u, s, vh = torch.linalg.svd(dense.weight().float(), full_matrices=False)
    rank = max(1, min(rank, int((s > s[0] * torch.finfo(s.dtype).eps * max(len(u), vh.shape[1])).sum())))
    root = s[:rank].sqrt()
    norm = torch.linalg.vector_norm(s.double())
    error = float(torch.linalg.vector_norm(s[rank:].double()) / norm) if norm > 0 else 0.0
    return Delta(vh[:rank] * root[:, None], (u[:, :rank] * root).t(), gain=dense.gain, shift=dense.shift, error=error)
