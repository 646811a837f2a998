"""What compiled kernels are made of: registers, spills, shared memory, occupancy, tensor-core instructions, widths of
global accesses (of those that the compiler knows to be global, as csrc/cuda tells it), global atomics on floats. By the
disassembler that Triton's wheel carries; needs no GPU."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100, 120)
THREADS = {"apply": 768, "turn": 128, "merge": 256}  # of the CUDA library's kernels
WARPS = {"sm_80": 64, "sm_90": 64, "sm_100": 64, "sm_120": 48}  # of a multiprocessor
SHARED = {"sm_80": 164, "sm_90": 228, "sm_100": 228, "sm_120": 100}  # KiB of a multiprocessor
TYPES = {"If": "fp32", "3f16": "fp16", "4bf16": "bf16"}
COUNTED = ("spills", "atomics", "mma", "wgmma", *(f"load{w}" for w in (128, 64, 32, 16)))
COUNTED = (*COUNTED, *(f"store{w}" for w in (128, 64, 32, 16)))


def tool(name: str) -> str:
    spec = importlib.util.find_spec("triton")
    own = Path(spec.origin).parent / "backends/nvidia/bin" / name if spec and spec.origin else Path(name)
    return str(own) if own.exists() else name


def occupancy(arch: str, threads: int, registers: int, shared: int) -> int:
    """Per cent of a multiprocessor's warps that registers and shared memory leave room for."""
    warps = threads // 32
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // warps
    by_shared = SHARED[arch] * 1024 // (shared + 1024)
    return round(100 * min(by_registers, by_shared, WARPS[arch] // warps) * warps / WARPS[arch])


def instruction(line: str) -> str | None:
    """The opcode on a line of disassembly."""
    found = re.search(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line)
    return found[1] if found else None


def count(opcodes: Iterable[str]) -> Counter[str]:
    """How many of COUNTED there are. `mma` are a warp's tensor-core instructions, `wgmma` those of a warp group or of
    the tensor memory; spills are accesses to local memory."""
    counts: Counter[str] = Counter()
    for opcode in opcodes:
        name, *parts = opcode.split(".")
        if name in ("LDG", "STG", "LDGSTS"):
            width = next((p for p in parts if p in ("128", "64")), "32")
            width = "16" if {"U16", "S16"} & set(parts) else width
            counts[f"{'store' if name == 'STG' else 'load'}{width}"] += 1
        elif name in ("LDL", "STL"):
            counts["spills"] += 1
        elif name in ("ATOM", "ATOMG", "RED", "REDG") and any(re.fullmatch(r"B?F\d+\S*", part) for part in parts):
            counts["atomics"] += 1
        elif name == "HMMA":
            counts["mma"] += 1
        elif re.fullmatch(r"HGMMA|UTC\w*MMA", name):
            counts["wgmma"] += 1
    return counts


def record(kernel: str, dtype: str, arch: str, threads: int, registers: int, shared: int, code: Iterable[str]) -> Any:
    counts = count(code)
    return {
        "kind": "static", "kernel": kernel, "dtype": dtype, "arch": arch, "threads": threads, "registers": registers,
        "shared": shared, "occupancy": occupancy(arch, threads, registers, shared),
        **{what: counts[what] for what in COUNTED},
    }  # fmt: skip


def cuda(library: Path) -> list[dict[str, Any]]:
    """One record a kernel, dtype and architecture of the CUDA library."""
    usage = subprocess.check_output(
        [tool("cuobjdump"), "-res-usage", str(library)], text=True, stderr=subprocess.STDOUT
    )
    found: dict[tuple[str, str], tuple[int, int]] = {}
    arch = name = ""
    for line in usage.splitlines():
        if match := re.search(r"arch = (sm_\d+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif (match := re.search(r"REG:(\d+) STACK:\d+ SHARED:(\d+)", line)) and "_kernel" in name:
            found[arch, name] = int(match[1]), int(match[2])
    code: dict[tuple[str, str], list[str]] = {}
    for line in subprocess.check_output([tool("cuobjdump"), "-sass", str(library)], text=True).splitlines():
        if match := re.search(r"arch = (sm_\d+)", line):
            arch = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            name = match[1]
        elif opcode := instruction(line):
            code.setdefault((arch, name), []).append(opcode)
    records = []
    for (arch, name), (registers, shared) in found.items():
        kernel = next(k for k in THREADS if f"{k}_kernel" in name)
        dtype = next(v for k, v in TYPES.items() if k in name.split("_kernel")[1])
        opcodes = code[arch, name]
        title = {"turn": "turn_output" if "Lb1" in name else "scale_input"}.get(kernel, kernel)
        by = " by fp32" if re.search(r"(3f16|4bf16)Ef", name) else ""  # of the arena
        records.append(record(f"cuda {title}{by}", dtype, arch, THREADS[kernel], registers, shared, opcodes))
    return records


def triton(smoke: bool) -> list[dict[str, Any]]:
    """One record a Triton kernel, form, dtype and architecture; bfloat16 alone if `smoke`."""
    import torch

    from mlora import layout
    from mlora.kernels import aot, launch
    from mlora.kernels.config import Device

    records = []
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for short, dtype in dtypes.items():
        if smoke and short != "bf16":
            continue
        arena, plan = torch.empty(1024, dtype=dtype), torch.empty(1024, dtype=torch.int32)
        table, weight = torch.empty(64, layout.TABLE_WIDTH, dtype=torch.int64), torch.empty(4096, 4096, dtype=dtype)
        for capability in ARCHITECTURES:
            device = Device(132, capability)
            for form, tokens in (("decode", 16), ("prefill", 2048)):
                x, y = torch.empty(tokens, 4096, dtype=dtype), torch.empty(tokens, 4096, dtype=dtype)
                arrived = torch.empty(tokens, dtype=torch.int32)
                launches = launch.apply_launches(y, None, x, arena, table, plan, arrived, device)
                launches += launch.linear_launches(y, x, weight, None, arena, table, plan, device)
                named = [(f"triton {item.name} {form}", item) for item in launches]
                v, offsets = torch.empty(16 * tokens), torch.empty(64, dtype=torch.int64)
                keep = launch.apply_launches(y, None, x, arena, table, plan, arrived, device, v)[0]
                named.append((f"triton shrink, keeping {form}", keep))
                if form == "prefill":
                    gradients = launch.gradient_launches(v, v, x, offsets, table, plan, device)
                    named += [("triton rank_gradients", gradients[0])]
                    scale = launch.turn_launches(y, x, None, arena, table, plan, device)
                    turn = launch.turn_launches(y, x, y, arena, table, plan, device)
                    named += [("triton scale_input", scale[0]), ("triton turn_output", turn[0])]
                    launches = launch.merge_launches(weight, weight, arena, table, plan)
                    ids = torch.empty(tokens, dtype=torch.int64)
                    launches += launch.embed_launches(y, ids, arena, table, plan, 32000, device)
                    named += [(f"triton {item.name}", item) for item in launches]
                for name, item in named:
                    c = aot.compile_launch(item, capability)
                    opcodes = filter(None, map(instruction, c.sass.splitlines()))
                    arch = f"sm_{capability}"
                    records.append(record(name, short, arch, 32 * c.warps, c.registers, c.shared, opcodes))
    return records
