"""The library of C++ kernels as Python sees it, beside the operators that it registers; see `mlora.ops.direct`."""

from typing import Any

from torch import Tensor

class Layer: ...  # a capsule

def exchange(api: Any, tensor: type) -> bool:
    """Take torch's way of telling C code what a tensor is, `Tensor.__dlpack_c_exchange_api__`; whether it will do."""

def layer(arena: int, elements: int, types: int, table: int, slots: int, in_features: int, out_features: int) -> Layer:
    """A linear that the adapters of an arena change. `arena`, `table`: addresses of its elements and of the module's
    rows, which must outlive the layer. `types`: of rows and the arena, as csrc/common.h counts them."""

def apply(layer: Layer, plan: bytes, y: Tensor, x: Tensor) -> bool:
    """The operator `apply_` without a base, of a plan's words. False, and nothing is done, where the tensors are not as
    the layer has them: on the CPU, of its rows' type and widths, of as many tokens, in rows at one distance.

    Raises:
        RuntimeError: as the operator does.
    """

def linear(layer: Layer, plan: bytes, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, kblock: int) -> bool:
    """The operator `linear` into y, with a number of inputs for `kblock`. Else as `apply`; weight and bias have to be
    contiguous."""

def rms_norm(y: Tensor, x: Tensor, weight: Tensor, eps: float) -> bool:
    """y = weight * (x / sqrt(mean(x^2) + eps)) over the last dimension, with the bits of torch's operators in fp32 and
    rounded to the dtype of all three after each of the two products. False, and nothing is done, where they are not on
    the CPU, of one dtype and shape, x in rows at one distance and y contiguous."""

def rotate(y: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """y = x * cos + (-second half of x, first half) * sin over the last dimension, with the bits of torch's operators.
    x, y: (batch, heads, tokens, dim); cos, sin: (batch or 1, tokens, dim). False as for `rms_norm`, and where the last
    dimension is odd or not contiguous."""

def gate(y: Tensor, gate: Tensor, up: Tensor) -> bool:
    """y = silu(gate) * up, of 16 bits and contiguous, with the bits of torch's operators. False as for `rms_norm`."""

def release_threads() -> bool:
    """End the threads that OpenMP keeps for the calling thread, which its next parallel work starts anew. False where
    torch's threads are not OpenMP's, or inside such work."""
