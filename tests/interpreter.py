"""Triton's interpreter, made to treat bfloat16 as the numbers they are.

It keeps bfloat16 as the integers that hold them, and, as of Triton 3.9, truncates where hardware rounds to nearest
even, gets subnormals wrong, and multiplies the integers in `tl.dot`. The kernels widen the operands of a dot
themselves; conversions are replaced here, by torch's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_convert = InterpreterBuilder.cast_impl


def _cast(self: Any, src: Any, dst_type: Any) -> Any:
    source, target = src.dtype.scalar, dst_type.scalar
    if source == tl.bfloat16 and target == tl.float32:
        return TensorHandle((src.data.astype(np.uint32) << 16).view(np.float32), target)
    if source == tl.float32 and target == tl.bfloat16:
        values = np.ascontiguousarray(src.data, dtype=np.float32)
        bits = torch.from_numpy(values.reshape(-1)).bfloat16().view(torch.int16).numpy()
        return TensorHandle(bits.view(np.uint16).reshape(values.shape), target)
    return _convert(self, src, dst_type)


def chain_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """`tl.dot` as one chain over k for each element: numpy's order of summation changes with the shape, and a tensor
    core's does not. Several times as slow."""
    left, right, total = a.data.astype(np.float32), b.data.astype(np.float32), d.data.astype(np.float32)
    for k in range(left.shape[1]):
        total = total + left[:, k, None] * right[k]
    return TensorHandle(total, d.dtype.scalar)


def install() -> None:
    InterpreterBuilder.cast_impl = _cast
