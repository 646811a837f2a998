"""The kinds of parameters that an adapter may have at one module: what the arena holds of each, and what their
gradients are made of.

    kind        parameters                                    what is in the blob
    Lora        A (rank, in), B (out, rank), bias (out,)      A, B^T, s bias; an embedding's too, which has no bias
    Dora        A, B, magnitude m (out,)                      A, g B^T, g - 1, (1 - g) b, with g = m / |W + s B A|
    Saved       W' as the module keeps W, b' (out,)           W' - W beside an identity, b' - b
    Norm        w' (out,), b' (out,)                          g - 1 and b' - g b, with g = (w' + k) / (w + k)
    Tokens      rows of an embedding (tokens, width)          their difference to W's, beside a one-hot matrix
    Gain        l (out, 1), or (1, in) of what it reads       l - 1

Every one writes what `lowering` makes of the saved adapter, to the bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import errors, layout
from ..arena.pack import Packed, rest_of

# What the gradients of parameters are made of, as bits.
FACTOR_A, FACTOR_B, SHIFT, GAIN, IN_GAIN = 1, 2, 4, 8, 16


# Where a DoRA's gains are not below that, what the module gave tells enough of what was multiplied.
_GAIN_OF_OUTPUTS = 0.25


class Keys(NamedTuple):
    """What a module has in an adapter's files: the `kind` of its parameters, in lower case, and their keys by the names
    that the kind's class has for them. `indices`: of trained tokens."""

    kind: str
    names: Mapping[str, str]
    indices: tuple[int, ...] = ()


class Base(NamedTuple):
    """What parameters are measured by, in fp32, or of an fp64 model in that.

    Args:
        weight, bias: return the base's as lowerings have it (`BaseLinear`), the weight as a copy.
        row_norms: of B, A and a scale, returns |W + scale B A| by rows.
        embed_scale: of an embedding, else 1. `padding`: its token whose row takes no gradient, or None.
        offset: of a norm, k. `turned`: whether the weight lies as (in, out), as embeddings' do.
    """

    weight: Callable[[], Tensor]
    bias: Callable[[], Tensor | None]
    row_norms: Callable[[Tensor, Tensor, float], Tensor]
    embed_scale: float = 1.0
    padding: int | None = None
    offset: float = 0.0
    turned: bool = False


class Found(NamedTuple):
    """The gradients of an adapter's parts at a module, with h that of its output y; in fp32, or fp64. Those that a kind
    does not ask for are None.

    Args:
        a, b: (rank, in) and (rank, out), of its rank rows.
        shift: (out,), sum h. `gain`: (out,), sum h base(x); `product`: the same without the base's bias; of a norm, of
            what it gives under a weight of 1 and no bias.
        output: (out,), sum h y, in place of gain and product where a part takes it (`by_output`).
        in_gain: (in,), sum x h', with h' the gradient of what the base reads.
    """

    a: Tensor | None = None
    b: Tensor | None = None
    shift: Tensor | None = None
    gain: Tensor | None = None
    product: Tensor | None = None
    output: Tensor | None = None
    in_gain: Tensor | None = None


class Places:
    """The buffers in which an adapter's parameters lie, one a device, each in the layout of the device's part of the
    blob, and what else that has: identities and one-hot matrices.

    Args:
        packed: the adapter. `devices`: of the arenas. `homes`: of each module, the number of its device.
        tensors: its parameters' first values, by key.

    `parameters`: key -> parameter.
    """

    def __init__(
        self, packed: Packed, devices: Sequence[torch.device], homes: Sequence[int], tensors: Mapping[str, Tensor]
    ) -> None:
        dtype = torch.promote_types(packed.blob.dtype, torch.float32)
        self.masters = [
            packed.blob[packed.start(at) : packed.cuts[at]].to(device, dtype, copy=True)
            for at, device in enumerate(devices)
        ]
        self.parameters: dict[str, nn.Parameter] = {}
        self.homes = homes
        self._rows, self._tensors = packed.rows, tensors
        self._starts = [packed.start(at) for at in range(len(devices))]

    def offset(self, index: int, column: int, rest: bool = False) -> int:
        """Of a part of a module, or of the rest of one, in its device's buffer; -1 where there is none."""
        offset = int(self._rows[index, int(rest), column])
        return offset if offset < 0 else offset - self._starts[self.homes[index]]

    def scale(self, index: int) -> float:
        return float(self._rows[index, 0, layout.SCALE].astype("uint32").view("float32"))

    def parameter(self, key: str, index: int, offset: int, turned: bool = False) -> nn.Parameter:
        """That of a key, at an offset of the buffer of a module's device; `turned`: whether it lies there transposed.
        What several modules have in common is at the first one's place.

        Raises:
            UnsupportedAdapterError: these are not on one device.
        """
        master = self.masters[self.homes[index]]
        if key not in self.parameters:
            value = self._tensors[key].t() if turned else self._tensors[key]
            place = master[offset : offset + value.numel()].view(value.shape)
            place.copy_(value)
            self.parameters[key] = nn.Parameter(place.t() if turned else place)
        if self.parameters[key].device != master.device:
            raise errors.UnsupportedAdapterError(
                f"{key} is of several modules, on {self.parameters[key].device} and on {master.device}; it is trained "
                f"only where they are on one device"
            )
        return self.parameters[key]


class Part(ABC):
    """The parameters of one adapter at one module.

    `parameters`: in the order in which their gradients are given. `reads`: the bits of what these are made of.
    `shape_a`, `shape_b`: of the gradients of rank rows among that, (rank, in) and (rank, out), or None. `as_they_lie`:
    whether the parameters are A and B, and their gradients these. `by_output`: whether it needs no more of gains than
    `Found.output`, of rows that are its own alone in a module without a bias; each `write` may change that.
    """

    parameters: Sequence[nn.Parameter]
    reads: int
    as_they_lie = by_output = False
    shape_a: tuple[int, ...] | None = None
    shape_b: tuple[int, ...] | None = None

    def write(self, to: Tensor) -> None:  # noqa: B027
        """Put what the parameters are not themselves into a copy of their buffer in the arena's dtype."""

    @abstractmethod
    def gradients(self, found: Found) -> list[Tensor]:
        """Of the parameters; `found` may be written to."""

    @abstractmethod
    def is_zero(self) -> bool:
        """Whether they change nothing; called without gradients."""


class Lora(Part):
    """`a`, `b` and with `lora_bias` `bias`."""

    def __init__(self, places: Places, index: int, keys: Keys, base: Base) -> None:
        a, b = places.offset(index, layout.A), places.offset(index, layout.B)
        self.a = places.parameter(keys.names["a"], index, a)
        self.b = places.parameter(keys.names["b"], index, b, turned=True)
        self.bias, self._shift = None, places.offset(index, layout.SHIFT)
        if "bias" in keys.names:
            self.bias = places.parameter(keys.names["bias"], index, self._shift)
        self.scale = places.scale(index)
        self.parameters = [self.a, self.b, *([] if self.bias is None else [self.bias])]
        self.reads = FACTOR_A | FACTOR_B | (0 if self.bias is None else SHIFT)
        self.as_they_lie = self.bias is None
        self.shape_a, self.shape_b = tuple(self.a.shape), tuple(self.b.shape[::-1])

    def write(self, to: Tensor) -> None:
        if self.bias is not None:
            _put(to, self._shift, self.bias * self.scale)

    def gradients(self, found: Found) -> list[Tensor]:
        assert found.a is not None and found.b is not None
        bias = [] if self.bias is None or found.shift is None else [found.shift * self.scale]
        return [found.a, found.b.t(), *bias]

    def is_zero(self) -> bool:
        factors = self.a.any() and self.b.any()
        return not (factors or (self.bias is not None and self.bias.any()))


class Dora(Lora):
    """`a`, `b`, `magnitude`. Its norm, |W + s B A| by rows, is a constant to the gradients, as in PEFT."""

    def __init__(self, places: Places, index: int, keys: Keys, base: Base) -> None:
        super().__init__(places, index, keys, base)
        self._base, self._b, self._gain = base, places.offset(index, layout.B), places.offset(index, layout.GAIN)
        self._rest = places.offset(index, layout.GAIN, rest=True)
        self.magnitude = places.parameter(keys.names["magnitude"], index, self._gain)
        self.parameters = [self.a, self.b, self.magnitude]
        self.reads, self.as_they_lie = FACTOR_A | FACTOR_B | GAIN, False
        self.norm = self.gain = self.magnitude.detach()  # as the parameters were when they were last written

    def _measured(self) -> tuple[Tensor, Tensor]:
        """|W + s B A| by rows, and the gain."""
        norm = self._base.row_norms(self.b.detach(), self.a.detach(), self.scale)
        return norm, self.magnitude / norm

    def write(self, to: Tensor) -> None:
        """As `lowering/lora.py` makes them."""
        self.norm, self.gain = self._measured()
        self.by_output = bool((self.gain >= _GAIN_OF_OUTPUTS).all())
        _put(to, self._b, (self.b * self.gain[:, None]).t())
        _put_gain(to, self._gain, self._rest, self.gain - 1)
        if self._shift >= 0 and (bias := self._base.bias()) is not None:
            _put(to, self._shift, (1 - self.gain) * bias.to(self.gain))

    def gradients(self, found: Found) -> list[Tensor]:
        assert found.a is not None and found.b is not None
        if found.output is not None:
            magnitude = found.output / self.magnitude.detach()  # y is m (W x + s B A x) / n
        else:
            assert found.product is not None
            magnitude = (found.product + (found.b * self.b.detach().t()).sum(0)) / self.norm  # found.b is of g B
        found.b.mul_(self.gain)
        return [found.a, found.b.t(), magnitude]

    def is_zero(self) -> bool:
        return super().is_zero() and bool((self._measured()[1] == 1).all())


class Saved(Part):
    """`weight` and `bias` of a linear or an embedding that `modules_to_save` names."""

    def __init__(self, places: Places, index: int, keys: Keys, base: Base) -> None:
        value = places.offset(index, layout.A), places.offset(index, layout.B)
        shape = tuple(base.weight().shape)
        self._wide = shape[0] <= shape[1]  # what has the difference: A, (out, in), or else B, (in, out)
        self._place, self._flipped = value[not self._wide], base.turned == self._wide
        self.weight = places.parameter(keys.names["weight"], index, self._place, self._flipped)
        self._shift = places.offset(index, layout.SHIFT)
        self.bias = places.parameter(keys.names["bias"], index, self._shift) if "bias" in keys.names else None
        self._base = base
        self.parameters = [self.weight, *([] if self.bias is None else [self.bias])]
        self.reads = (FACTOR_A if self._wide else FACTOR_B) | (0 if self.bias is None else SHIFT)
        if self._wide:
            self.shape_a = shape
        else:
            self.shape_b = shape[::-1]

    def _lying(self, weight: Tensor) -> Tensor:
        """As it lies in the blob, or back."""
        return weight.t() if self._flipped else weight

    def _difference(self) -> Tensor:
        """As it lies in the blob."""
        weight = self._base.weight().to(self.weight.device)
        weight = weight if self._wide else weight.t()
        mine = self._lying(self.weight)
        if self._base.embed_scale == 1:
            return mine - weight.to(mine)
        return (mine.double() * self._base.embed_scale - weight.double()).to(mine.dtype)

    def write(self, to: Tensor) -> None:
        _put(to, self._place, self._difference())
        if self.bias is not None:
            _put(to, self._shift, self.bias - _of(self._base.bias(), self.bias))

    def gradients(self, found: Found) -> list[Tensor]:
        weight = found.a if self._wide else found.b
        assert weight is not None
        if self._base.embed_scale != 1:
            weight.mul_(self._base.embed_scale)
        bias = [] if self.bias is None or found.shift is None else [found.shift]
        return [self._lying(weight), *bias]

    def is_zero(self) -> bool:
        moved = self.bias is not None and not torch.equal(self.bias, _of(self._base.bias(), self.bias))
        return not (moved or self._difference().any())


class Norm(Part):
    """`weight` and `bias` of a norm that `modules_to_save` names."""

    def __init__(self, places: Places, index: int, keys: Keys, base: Base) -> None:
        self._gain, self._shift = places.offset(index, layout.GAIN), places.offset(index, layout.SHIFT)
        self._rest = places.offset(index, layout.GAIN, rest=True)
        self.weight = places.parameter(keys.names["weight"], index, self._gain)
        self.bias = places.parameter(keys.names["bias"], index, self._shift) if "bias" in keys.names else None
        self.offset = base.offset
        self._before = base.weight().double().to(self.weight.device) + base.offset
        self._old = None if self.bias is None else _of(base.bias(), self._before)
        self.parameters = [self.weight, *([] if self.bias is None else [self.bias])]
        self.reads = GAIN | SHIFT

    def write(self, to: Tensor) -> None:
        """As `lowering/saved.py` makes them."""
        gain = (self.weight.double() + self.offset - self._before) / self._before
        _put_gain(to, self._gain, self._rest, gain.to(self.weight.dtype))
        if self.bias is not None and self._old is not None:
            _put(to, self._shift, (self.bias.double() - (1 + gain) * self._old).to(self.bias.dtype))

    def gradients(self, found: Found) -> list[Tensor]:
        assert found.product is not None and found.shift is not None
        return [found.product, *([] if self.bias is None else [found.shift])]

    def is_zero(self) -> bool:
        same = torch.equal(self.weight.double() + self.offset, self._before)
        return same and (self.bias is None or torch.equal(self.bias.double(), _of(self._old, self._before)))


class Tokens(Part):
    """`tokens`: of an embedding, or of a head that holds its weight, which have them in common."""

    def __init__(self, places: Places, index: int, keys: Keys, base: Base) -> None:
        self._embeds = base.turned
        self._place = places.offset(index, layout.B if self._embeds else layout.A)
        self.tokens = places.parameter(keys.names["tokens"], index, self._place)
        at = torch.tensor(keys.indices)
        weight = base.weight()
        self._before = (weight[:, at].t() if self._embeds else weight[at]).double().to(self.tokens.device)
        self._scale = base.embed_scale
        self._padding = [j for j, token in enumerate(keys.indices) if self._embeds and token == base.padding]
        self.parameters = [self.tokens]
        self.reads = FACTOR_B if self._embeds else FACTOR_A
        if self._embeds:
            self.shape_b = tuple(self.tokens.shape)
        else:
            self.shape_a = tuple(self.tokens.shape)

    def _difference(self) -> Tensor:
        return (self.tokens.double() * self._scale - self._before).to(self.tokens.dtype)

    def write(self, to: Tensor) -> None:
        """As `lowering/tokens.py` makes them."""
        _put(to, self._place, self._difference())

    def gradients(self, found: Found) -> list[Tensor]:
        tokens = found.b if self._embeds else found.a
        assert tokens is not None
        if self._padding:
            tokens[self._padding] = 0
        return [tokens if self._scale == 1 else tokens.mul_(self._scale)]

    def is_zero(self) -> bool:
        return not self._difference().any()


class Gain(Part):
    """`gain`: IA3's, of a linear's outputs, or of its inputs where it is one of the feed-forward modules."""

    def __init__(self, places: Places, index: int, keys: Keys, base: Base) -> None:
        column = layout.GAIN if places.offset(index, layout.GAIN) >= 0 else layout.IN_GAIN
        self._place, self._rest = places.offset(index, column), places.offset(index, column, rest=True)
        self.gain = places.parameter(keys.names["gain"], index, self._place)
        self.parameters = [self.gain]
        self.reads = GAIN if column == layout.GAIN else IN_GAIN

    def write(self, to: Tensor) -> None:
        _put_gain(to, self._place, self._rest, self.gain.flatten() - 1)

    def gradients(self, found: Found) -> list[Tensor]:
        gain = found.gain if self.reads == GAIN else found.in_gain
        assert gain is not None
        return [gain.view(self.gain.shape)]

    def is_zero(self) -> bool:
        return bool((self.gain == 1).all())


KINDS: Mapping[str, Callable[[Places, int, Keys, Base], Part]] = {
    kind.__name__.lower(): kind for kind in (Lora, Dora, Saved, Norm, Tokens, Gain)
}


def _of(tensor: Tensor | None, like: Tensor) -> Tensor:
    assert tensor is not None
    return tensor.to(like)


def _put(to: Tensor, offset: int, values: Tensor) -> None:
    to[offset : offset + values.numel()].view(values.shape).copy_(values)


def _put_gain(to: Tensor, offset: int, rest: int, change: Tensor) -> None:
    """g - 1, and what rounding takes off it where there is room for that."""
    _put(to, offset, change)
    if rest >= 0:
        lost = rest_of(change, to.dtype)
        _put(to, rest, torch.zeros_like(change) if lost is None else lost)
