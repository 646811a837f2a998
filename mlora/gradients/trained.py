"""An adapter that is being trained.

Its parameters are views of one buffer a device, the master, in fp32 whatever the model's dtype: small steps would
vanish in 16 bits. It has the layout of the adapter's blob, so that one copy brings most of it to the arena, where the
kernels read it; the rest is written after (`parts.py`). That happens when the next call asks for the adapter: what
changed the parameters shows in their version, or, since fused optimizers do not count there, was an optimizer's step.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..arena.pack import Packed
from .dropout import Dropout
from .parts import KINDS, Base, Keys, Lora, Part, Places


class Trained:
    """Made of a packed adapter all of whose parts are made of parameters.

    Args:
        tensors: its parameters' first values, by key. `keys`: of each module, by its number.
        bases: of each module. `packed`: of these tensors. `devices`, `homes`: of the store.
        fixed: whether the B of LoRAs are not trained, as MiCA's. `dropout`: its, which may have a chance of 0.

    `parameters`: key -> parameter. `parts`: module number -> its parameters.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        keys: Mapping[int, Keys],
        bases: Mapping[int, Base],
        packed: Packed,
        devices: Sequence[torch.device],
        homes: Sequence[int],
        fixed: bool,
        dropout: Dropout,
    ) -> None:
        self.dropout = dropout
        places = Places(packed, devices, homes, tensors)
        self._masters, self._homes = places.masters, homes
        self._version = -1
        self._stepped = False
        self._zero: tuple[int, bool] | None = None  # whether it was, at which version: weights take long to compare
        self.parts: dict[int, Part] = {
            index: KINDS[own.kind](places, index, own, bases[index]) for index, own in keys.items()
        }
        self.parameters: Mapping[str, nn.Parameter] = places.parameters
        self._fixed = frozenset(id(part.b) for part in self.parts.values() if fixed and isinstance(part, Lora))
        self.require_grad(True)
        _watch()
        for parameter in self.parameters.values():
            _owners[id(parameter)] = self

    @property
    def changed(self) -> bool:
        """Whether the parameters may have changed since the last `write`."""
        return self._stepped or self._version != self._written

    @property
    def _written(self) -> int:
        """How often something has written to the parameters."""
        return sum(master._version for master in self._masters)

    def write(self, to: Sequence[Tensor]) -> None:
        """Copy what the blob would have to `to`, 1-D in the arena's dtype, one a device."""
        self._stepped, self._version = False, self._written
        with torch.no_grad():
            for place, master in zip(to, self._masters, strict=True):
                place.copy_(master)
            for index, part in self.parts.items():
                part.write(to[self._homes[index]])

    def refresh(self) -> None:
        """Something has changed a parameter."""
        self._stepped, self._zero = True, None

    def stepped(self) -> None:
        """An optimizer has made a step of its parameters."""
        self.refresh()
        self.dropout.stepped()

    @property
    def drops(self) -> bool:
        """Whether rows of its own are dropped from, in training mode."""
        return self.dropout.p > 0 and self.training

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
        version = self._written
        if self._zero is None or self._zero[0] != version:
            with torch.no_grad():
                self._zero = version, all(part.is_zero() for part in self.parts.values())
        return self._zero[1]


_owners: WeakValueDictionary[int, Trained] = WeakValueDictionary()  # by the id of a parameter


@functools.cache
def _watch() -> None:
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    owners = {id(one): one for parameter in parameters if (one := _owners.get(id(parameter))) is not None}
    for owner in owners.values():
        owner.stepped()
