"""Ahead-of-time compilation: a launch's machine code for an architecture that need not be present."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .launch import Launch

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Compiled:
    """What a launch compiles to.

    Args:
        shared: bytes of shared memory a block. `spills`: bytes of spill stores and loads a thread.
        registers: a thread. `ptx`, `sass`: the code.
    """

    name: str
    capability: int
    warps: int
    shared: int
    registers: int
    spills: int
    ptx: str
    sass: str


def source(launch: Launch) -> ASTSource:
    """The launch as Triton's compiler takes it: types, constants, and what is divisible by 16, which the just-in-time
    compiler would find out from the same arguments."""
    fn = launch.kernel
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    constants = dict(launch.constants)
    for index, parameter in enumerate(fn.params):
        name = parameter.name
        if index >= len(launch.args):
            signature[name] = "constexpr"
            continue
        value = launch.args[index]
        divisible = False
        if isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
            divisible = True  # what torch allocates is
        elif value is None:
            signature[name], constants[name] = "constexpr", None
        elif value == 1 and not parameter.do_not_specialize:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32"
            divisible = value % 16 == 0 and not parameter.do_not_specialize
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn, signature, constants, attributes)


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compile for sm_`capability`. Needs no GPU; Triton's wheel carries ptxas and the disassembler."""
    target = GPUTarget("cuda", capability, 32)
    kernel = triton.compile(source(launch), target=target, options=launch.options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", cubin)
        sass = _tool("nvdisasm", "-c", cubin)
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK"))  # type: ignore[union-attr]
    metadata = kernel.metadata
    return Compiled(launch.name, capability, launch.warps, metadata.shared, registers, stack, kernel.asm["ptx"], sass)


def _tool(name: str, *arguments: object) -> str:
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *map(str, arguments)], check=True, capture_output=True, text=True).stdout
