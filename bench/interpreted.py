"""Counts what Triton kernels ask for, by running them in Triton's interpreter. Import with TRITON_INTERPRET=1."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

SECTOR = 32  # bytes
_ALLOCATIONS = frozenset(("empty", "new_empty", "empty_like", "empty_strided"))
_SYNCS = frozenset(("_local_scalar_dense", "nonzero", "_unique2"))


@dataclass
class Counts:
    """Of one call.

    Args:
        launches: grid sizes of the Triton kernels. useful: programs of each that touch data.
        sectors: distinct 32-byte sectors of each block-wide load and store, summed; a warp's instructions, which are
            parts of these, ask for as many or more.
        float_atomics: elements. torch_ops: torch operators that run a kernel. syncs: reads of a tensor by the host.
    """

    launches: list[int] = field(default_factory=list)
    useful: list[int] = field(default_factory=list)
    sectors: int = 0
    float_atomics: int = 0
    torch_ops: int = 0
    syncs: int = 0

    @property
    def programs(self) -> int:
        return sum(self.launches)

    @property
    def idle(self) -> int:
        return self.programs - sum(self.useful)


class _Torch(TorchDispatchMode):
    """Operators on tensors that are not on the host; fills count as written sectors."""

    def __init__(self, counts: Counts, host: list[Tensor]) -> None:
        super().__init__()
        self.counts, self.host, self.paused = counts, {t.data_ptr() for t in host}, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        tensors = [a for a in args if isinstance(a, Tensor)]
        if not self.paused and not (tensors and tensors[0].data_ptr() in self.host):
            if name in _SYNCS:
                self.counts.syncs += 1
            elif not func.is_view and name not in _ALLOCATIONS:
                self.counts.torch_ops += 1
            if name in ("zero_", "fill_"):
                self.counts.sectors += -(-args[0].nbytes // SECTOR)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counting(data: list[Tensor], host: list[Tensor] = []) -> Iterator[Counts]:  # noqa: B006
    """Count what happens inside. `data`: what a program must touch to be useful, buffers that the call allocates
    aside. `host`: tensors that are in host memory where the call is meant to run."""
    counts = Counts()
    builder = interpreter.InterpreterBuilder
    saved = {n: getattr(builder, n) for n in ("create_masked_load", "create_masked_store", "create_atomic_rmw")}
    execute = interpreter.GridExecutor.__call__
    spans = [(t.data_ptr(), t.data_ptr() + t.untyped_storage().nbytes()) for t in data]
    busy: set[Any] = set()

    def touch(self: Any, pointers: Any, mask: Any) -> int:
        where = np.broadcast_to(pointers.data, np.broadcast(pointers.data, mask.data).shape)[mask.data.astype(bool)]
        if where.size:
            counts.sectors += np.unique(where // SECTOR).size
            if self.grid_idx not in busy and any(low <= int(where.flat[0]) < high for low, high in spans):
                busy.add(self.grid_idx)
        return int(where.size)

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        touch(self, pointers, mask)
        return saved["create_masked_load"](self, pointers, mask, *rest)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        touch(self, pointers, mask)
        return saved["create_masked_store"](self, pointers, value, mask, *rest)

    def atomic(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count = touch(self, pointers, mask)
        counts.float_atomics += count if value.dtype.scalar.is_floating() else 0
        return saved["create_atomic_rmw"](self, operation, pointers, value, mask, *rest)

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        busy.clear()
        mode.paused = True
        try:
            return execute(self, *args, **kwargs)
        finally:
            mode.paused = False
            counts.launches.append(math.prod(interpreter.interpreter_builder.grid_dim))
            counts.useful.append(len(busy))

    mode = _Torch(counts, host)
    patched = {"create_masked_load": load, "create_masked_store": store, "create_atomic_rmw": atomic}
    for name, function in patched.items():
        setattr(builder, name, function)
    interpreter.GridExecutor.__call__ = run
    try:
        with mode:
            yield counts
    finally:
        for name, function in saved.items():
            setattr(builder, name, function)
        interpreter.GridExecutor.__call__ = execute
