"""Calls of the C++ kernels past torch's dispatcher.

An operator's way through the dispatcher takes 2 us in a loop, and 5 between the products of a real model, which leave
little of its code in the caches: in a decode step as much as the kernels themselves. What goes past it is seen by
nothing that looks there, so layers do so only where nothing does, which `unobserved` tells.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import dispatch
from .library import HAS_CPU

# Of rows and of an arena, as csrc/common.h counts them.
_TYPES = {
    (torch.float32, torch.float32): 0,
    (torch.float16, torch.float16): 1,
    (torch.bfloat16, torch.bfloat16): 2,
    (torch.float16, torch.float32): 3,
    (torch.bfloat16, torch.float32): 4,
}


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is on, which operators without a formula for it drop tangents from."""
    return forward_ad._current_level >= 0


def unobserved() -> bool:
    """Whether nothing looks at the operators that this thread calls: no mode, transform, tracer or profiler, and no
    forward-mode differentiation."""
    c: Any = torch._C
    return (
        not in_forward_mode()
        and not c._len_torch_dispatch_stack()
        and not c._len_torch_function_stack()
        and c._functorch.peek_interpreter_stack() is None
        and c._get_tracing_state() is None
        and not c._autograd._profiler_enabled()
    )


def usable(*tensors: Tensor) -> bool:
    """Whether a call that reads these may go past torch's operators."""
    if torch.compiler.is_compiling() or not unobserved():
        return False
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return not recorded and all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


def layer_of(arena: Tensor, table: Tensor, in_features: int, out_features: int, dtype: torch.dtype) -> Any:
    """What `apply` and `linear` take for a linear of this shape whose x and y are in `dtype`: it has the addresses of
    both tensors, which must live as long. None where the C++ kernels do not serve such tensors, or torch tells C code
    nothing of them."""
    types = _TYPES.get((dtype, arena.dtype))
    if not READY or types is None or dispatch.backend(arena.device, dtype) != "cpu":
        return None
    slots = len(table)
    return _C.layer(arena.data_ptr(), arena.numel(), types, table.data_ptr(), slots, in_features, out_features)


READY = False  # whether torch tells C code what a tensor is
if HAS_CPU:
    from .. import _C

    READY = _C.exchange(getattr(Tensor, "__dlpack_c_exchange_api__", None), Tensor)
    # As they are: a frame of Python's takes a tenth of what is saved. layers/pointwise.py says what the last three are.
    apply, linear = _C.apply, _C.linear
    rms_norm, rotate, gate = _C.rms_norm, _C.rotate, _C.gate
