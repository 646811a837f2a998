"""Counts what Triton kernels ask for, by running them in Triton's interpreter. Import with TRITON_INTERPRET=1."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.language import core
from triton.runtime import interpreter

SECTOR = 32  # bytes
_ALLOCATIONS = frozenset(("empty", "new_empty", "empty_like", "empty_strided"))
_SYNCS = frozenset(("_local_scalar_dense", "nonzero", "_unique2"))


@dataclass
class Launch:
    """Of one Triton kernel.

    Args:
        programs: of the grid. useful: those that touch data.
        sectors: distinct 32-byte sectors of each block-wide load and store, summed; a warp's instructions, which are
            parts of these, ask for as many or more. float_atomics: elements.
    """

    programs: int = 0
    useful: int = 0
    sectors: int = 0
    float_atomics: int = 0


@dataclass
class Counts:
    """Of one call.

    Args:
        launches: of Triton kernels, in order. filled: sectors that torch fills.
        torch_ops: torch operators that run a kernel. syncs: reads of a tensor by the host.
    """

    launches: list[Launch] = field(default_factory=list)
    filled: int = 0
    torch_ops: int = 0
    syncs: int = 0


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
                self.counts.filled += -(-args[0].nbytes // SECTOR)
        return func(*args, **(kwargs or {}))


@functools.cache
def _builtins(package: Any) -> list[str]:
    return [name for name, member in inspect.getmembers(package) if core.is_builtin(member)]


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    """Triton's, which looks through the package's members once more for every call of every function: a third of its
    time."""
    for name in _builtins(package):
        member = getattr(package, name)
        if core.is_builtin(member):
            interpreter._patch_attr(package, name, member, builder, scope)


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
    launch = Launch()

    def touch(self: Any, pointers: Any, mask: Any) -> int:
        where = np.broadcast_to(pointers.data, np.broadcast(pointers.data, mask.data).shape)[mask.data.astype(bool)]
        if where.size:
            launch.sectors += np.unique(where // SECTOR).size
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
        launch.float_atomics += count if value.dtype.scalar.is_floating() else 0
        return saved["create_atomic_rmw"](self, operation, pointers, value, mask, *rest)

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal launch
        busy.clear()
        launch = Launch()
        mode.paused = True
        try:
            return execute(self, *args, **kwargs)
        finally:
            mode.paused = False
            launch.programs = math.prod(interpreter.interpreter_builder.grid_dim)
            launch.useful = len(busy)
            counts.launches.append(launch)

    mode = _Torch(counts, host)
    patched = {"create_masked_load": load, "create_masked_store": store, "create_atomic_rmw": atomic}
    for name, function in patched.items():
        setattr(builder, name, function)
    interpreter.GridExecutor.__call__ = run
    interpreter._patch_builtin, saved_patch = _patch_builtin, interpreter._patch_builtin
    try:
        with mode:
            yield counts
    finally:
        for name, function in saved.items():
            setattr(builder, name, function)
        interpreter.GridExecutor.__call__ = execute
        interpreter._patch_builtin = saved_patch
