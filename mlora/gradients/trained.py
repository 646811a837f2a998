"""The parameters of an adapter that is being trained.

They are views of one buffer, the master, in fp32 whatever the model's dtype: small steps would vanish in 16 bits. It
has the layout of the adapter's blob, so that one copy brings it to the arena, where the kernels read it. That happens
when the next call asks for the adapter: what changed the parameters shows in their version, or, since fused optimizers
do not count there, was an optimizer's step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .. import layout
from ..arena.pack import Packed, rest_of


class Keys(NamedTuple):
    """What the tensors of one module are called in the adapter's files: A (rank, in), B (out, rank), with `lora_bias`
    B's bias (out,), and of a DoRA the magnitude (out,)."""

    a: str
    b: str
    bias: str | None
    magnitude: str | None


class Part(NamedTuple):
    """The parameters of one module, as `Keys` has them, and LoRA's scaling."""

    a: nn.Parameter
    b: nn.Parameter
    bias: nn.Parameter | None
    magnitude: nn.Parameter | None
    scale: float


class Base(NamedTuple):
    """What the magnitudes of a DoRA are measured by: the base's weight (out, in), and its bias (out,) or None."""

    weight: Callable[[], Tensor]
    bias: Callable[[], Tensor | None]


class Dora(NamedTuple):
    """Of one module: where a DoRA has its parts in the blob, A aside: B (rank, out), gain, rest of the gain, shift; -1
    where it has none."""

    part: Part
    base: Base
    b: int
    gain: int
    rest: int
    shift: int


class Measured(NamedTuple):
    """Of a DoRA's module, as its parameters were when they were last brought to the arena: |W + s B A| by rows, and
    m / |W + s B A|, both (out,); PEFT takes the first as a constant."""

    norm: Tensor
    gain: Tensor


class Trained:
    """Made of a packed adapter whose every part is made of the parameters of a LoRA or a DoRA.

    Args:
        tensors: its parameters' first values, by key. `keys`: of each module, by its number.
        bases: of each module. `packed`: of these tensors. `device`: of the arena.
        fixed: whether the B are not trained, as MiCA's.

    `parameters`: key -> parameter. `parts`: module number -> its parameters. `measured`: of a DoRA's modules.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        keys: Mapping[int, Keys],
        bases: Mapping[int, Base],
        packed: Packed,
        device: torch.device,
        fixed: bool,
    ) -> None:
        dtype = torch.promote_types(packed.blob.dtype, torch.float32)
        self._master = torch.zeros(packed.blob.numel(), dtype=dtype, device=device)
        self._scaled: list[tuple[int, int, float]] = []  # offset, size and factor of what is not in the blob as it is
        self._doras: dict[int, Dora] = {}
        self.measured: dict[int, Measured] = {}
        self._version = -1
        self._stepped = False
        self.parameters: dict[str, nn.Parameter] = {}
        self.parts: dict[int, Part] = {}
        rows = packed.rows[:, 0]
        scales = rows[:, layout.SCALE].astype("uint32").view("float32").tolist()
        for index, own in keys.items():
            a, b, shift, gain = rows[index, [layout.A, layout.B, layout.SHIFT, layout.GAIN]].tolist()
            part = Part(
                self._parameter(own.a, tensors[own.a], a),
                self._parameter(own.b, tensors[own.b].t(), b, turned=True),
                None if own.bias is None else self._parameter(own.bias, tensors[own.bias], shift),
                None if own.magnitude is None else self._parameter(own.magnitude, tensors[own.magnitude], gain),
                scales[index],
            )
            if part.magnitude is not None:
                rest = int(packed.rows[index, 1, layout.GAIN])
                self._doras[index] = Dora(part, bases[index], b, gain, rest, shift)
            if part.bias is not None:
                self._scaled.append((shift, part.bias.numel(), part.scale))
            self.parts[index] = part
        self._fixed = frozenset(id(part.b) for part in self.parts.values()) if fixed else frozenset()
        self.require_grad(True)
        _watch()
        for parameter in self.parameters.values():
            _owners[id(parameter)] = self

    def _parameter(self, key: str, value: Tensor, offset: int, turned: bool = False) -> nn.Parameter:
        place = self._master[offset : offset + value.numel()].view(value.shape)
        place.copy_(value)
        parameter = self.parameters[key] = nn.Parameter(place.t() if turned else place)
        return parameter

    @property
    def changed(self) -> bool:
        """Whether the parameters may have changed since the last `write`."""
        return self._stepped or self._version != self._master._version

    def write(self, to: Tensor) -> None:
        """Copy what the blob would have to `to`, 1-D in the arena's dtype."""
        self._stepped, self._version = False, self._master._version
        with torch.no_grad():
            to.copy_(self._master)
            for offset, size, scale in self._scaled:
                to[offset : offset + size].copy_(self._master[offset : offset + size] * scale)
            for index, dora in self._doras.items():
                self.measured[index] = _write_dora(dora, to)

    def stepped(self) -> None:
        """An optimizer has changed a parameter."""
        self._stepped = True

    def require_grad(self, requires_grad: bool) -> None:
        for parameter in self.parameters.values():
            parameter.requires_grad_(requires_grad and id(parameter) not in self._fixed)

    @property
    def training(self) -> bool:
        """Whether any of its parameters is trained."""
        return any(parameter.requires_grad for parameter in self.parameters.values())

    @property
    def is_zero(self) -> bool:
        """Whether it changes nothing, as a fresh one."""
        with torch.no_grad():
            return not any(
                (part.b.any() and part.a.any()) or (part.bias is not None and part.bias.any())
                for part in self.parts.values()
            )


def _write_dora(dora: Dora, to: Tensor) -> Measured:
    """As `lowering/lora.py` makes them: g B, g - 1 and (1 - g) bias."""
    part, magnitude = dora.part, dora.part.magnitude
    assert magnitude is not None
    weight = dora.base.weight().to(magnitude)
    norm = torch.linalg.vector_norm(torch.addmm(weight, part.b, part.a, alpha=part.scale), dim=1)
    gain = magnitude / norm

    def put(offset: int, values: Tensor) -> None:
        to[offset : offset + values.numel()].view(values.shape).copy_(values)

    put(dora.b, (part.b * gain[:, None]).t())
    put(dora.gain, gain - 1)
    if dora.rest >= 0:
        rest = rest_of(gain - 1, to.dtype)
        put(dora.rest, torch.zeros_like(gain) if rest is None else rest)
    if dora.shift >= 0 and (bias := dora.base.bias()) is not None:
        put(dora.shift, (1 - gain) * bias.to(gain))
    return Measured(norm, gain)


_owners: WeakValueDictionary[int, Trained] = WeakValueDictionary()  # by the id of a parameter


@functools.cache
def _watch() -> None:
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if (owner := _owners.get(id(parameter))) is not None:
                owner.stepped()
