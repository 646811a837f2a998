"""The form that every adapter type is lowered to, and what a lowering may ask of the base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Delta:
    """What one adapter does to one module:

        y = g * base(u * x) + scale * B^T (A x) + c

    Absent parts are `None`. All tensors are on the CPU, in the dtype of the adapter or fp32.

    Args:
        a: (rank, in). `b`: (rank, out): rank row j adds `b[j] * (a[j] . x)`.
        scale: the LoRA scaling. It is kept apart from `b` and applied to `A x` in fp32, so that
            storing `b` in 16 bits never rounds a scaled value.
        gain: (out,), g - 1. Stored as the difference to 1, where 16 bits are as exact as `b`'s.
        in_gain: (in,), u - 1.
        shift: (out,), c.
    """

    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    gain: Tensor | None = None
    in_gain: Tensor | None = None
    shift: Tensor | None = None

    @property
    def rank(self) -> int:
        return 0 if self.a is None else self.a.shape[0]


@dataclass(frozen=True)
class BaseLinear:
    """A linear of the base model, as lowerings see it.

    Args:
        name: its dotted path in the model.
        in_features, out_features: its widths.
        weight: returns the dense (out, in) weight in fp32 on the CPU; raises
            `UnsupportedAdapterError` where there is none (a quantized or offloaded base).
        bias: returns the (out,) bias in fp32 on the CPU, or None.
    """

    name: str
    in_features: int
    out_features: int
    weight: Callable[[], Tensor]
    bias: Callable[[], Tensor | None]
