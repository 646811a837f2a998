"""What can be said of the CUDA kernels without a GPU: no times.

    python bench/gpu_static.py [--smoke] [--out FILE] [--against FILE]

From the built library, by cuobjdump: registers, spills, shared memory, occupancy, widths of global accesses, atomics.
From running the same sources under csrc/emulation in the shape of a 132-multiprocessor device: launches, programs and
those that touch no data, and the 32-byte sectors that warps ask for over the lower bound
T * in + sum over distinct adapters of r * (in + out) + 2 * T * out elements (a group counts x once). Sectors are those
of each memory instruction, of plans and tables too. `--against` fails if a kernel spills more or a figure is worse.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

MULTIPROCESSORS = {16: 132, 1: 108}  # by cluster size: an H100's, an A100's
THREADS = {"apply": 768, "scale_input": 256, "merge": 256}
WARPS = {"sm_80": 64, "sm_90": 64, "sm_100": 64, "sm_120": 48}  # of a multiprocessor
SHARED = {"sm_80": 164, "sm_90": 228, "sm_100": 228, "sm_120": 100}  # KiB of a multiprocessor
TYPES = {"IfE": "fp32", "3f16": "fp16", "4bf16": "bf16"}


def tool(name: str) -> str:
    import importlib.util

    spec = importlib.util.find_spec("triton")
    own = Path(spec.origin).parent / "backends/nvidia/bin" / name if spec and spec.origin else Path(name)
    return str(own) if own.exists() else name


def occupancy(arch: str, threads: int, registers: int, shared: int) -> int:
    """Per cent of a multiprocessor's warps that registers and shared memory leave room for."""
    warps = threads // 32
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // warps
    by_shared = SHARED[arch] * 1024 // (shared + 1024)
    return 100 * min(by_registers, by_shared, WARPS[arch] // warps) * warps // WARPS[arch]


def static(library: Path) -> list[dict[str, Any]]:
    """One record a kernel, dtype and architecture."""
    usage = subprocess.check_output(
        [tool("cuobjdump"), "-res-usage", str(library)], text=True, stderr=subprocess.STDOUT
    )
    records, arch, name = {}, "", ""
    for line in usage.splitlines():
        if found := re.search(r"arch = (sm_\d+)", line):
            arch = found[1]
        elif found := re.search(r"Function (\S+):", line):
            name = found[1]
        elif (found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line)) and "_kernel" in name:
            kernel = next(k for k in THREADS if f"{k}_kernel" in name)
            dtype = next(v for k, v in TYPES.items() if k in name.split("_kernel")[1])
            registers, stack, shared = map(int, found.groups())
            records[arch, name] = {
                "kind": "static", "kernel": kernel, "dtype": dtype, "arch": arch, "registers": registers,
                "stack": stack, "shared": shared, "occupancy": occupancy(arch, THREADS[kernel], registers, shared),
            }  # fmt: skip
    sass = subprocess.check_output([tool("cuobjdump"), "-sass", str(library)], text=True)
    counts: dict[tuple[str, str], Counter[str]] = {}
    for line in sass.splitlines():
        if found := re.search(r"arch = (sm_\d+)", line):
            arch = found[1]
        elif found := re.search(r"Function : (\S+)", line):
            name = found[1]
        elif found := re.search(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)", line):
            parts = found[1].split(".")
            count = counts.setdefault((arch, name), Counter())
            if parts[0] in ("LDG", "STG", "LD", "ST"):
                width = next((p for p in parts if p in ("128", "64")), "32")
                width = "16" if "U16" in parts or "S16" in parts else width
                count[f"{'load' if parts[0][0] == 'L' else 'store'}{width}"] += parts[0] in ("LDG", "STG")
            elif parts[0] in ("LDL", "STL"):
                count["spills"] += 1
            elif parts[0] in ("ATOM", "ATOMG", "RED", "ATOMS"):
                count["atomics"] += 1
    for key, record in records.items():
        for what in ("spills", "atomics", "load128", "load64", "load32", "load16", "store128", "store32", "store16"):
            record[what] = counts.get(key, Counter())[what]
    return list(records.values())


def workloads(smoke: bool) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    cases = ((16, 1), (16, 8), (16, 16), (64, 1), (64, 8), (64, 16), (64, 64))
    for outs, ranks in (((4096,), (16, 64, "mixed")), ((14336,), (16, "mixed"))):
        for rank in ranks:
            for tokens, adapters in cases:
                made.append({"in": 4096, "outs": outs, "rank": rank, "tokens": tokens, "adapters": adapters})
    for outs in ((4096, 1024, 1024), (14336, 14336)):
        for adapters in (1, 8, 64):
            made.append({"in": 4096, "outs": outs, "rank": 16, "tokens": 64, "adapters": adapters})
    made = [{**w, "cluster": 16} for w in made]
    for adapters in (1, 8, 64):
        made.append({"in": 4096, "outs": (4096,), "rank": 16, "tokens": 64, "adapters": adapters, "cluster": 1})
    if smoke:
        made = [w for w in made if w["outs"] == (4096,) and w["rank"] == 16 and w["adapters"] == 8]
    return made


def run(w: dict[str, Any]) -> dict[str, Any]:
    """Count what one launch does."""
    import torch

    from mlora.ops import layout

    width, outs, tokens = w["in"], w["outs"], w["tokens"]
    ranks = [(8, 16, 32, 64, 96, 128)[i % 6] if w["rank"] == "mixed" else w["rank"] for i in range(w["adapters"])]
    tables = [torch.full((64, layout.TABLE_WIDTH), -1, dtype=torch.int64) for _ in outs]
    at = 0
    for table, out in zip(tables, outs, strict=True):
        table[:, layout.RANK] = 0
        for slot, rank in enumerate(ranks):
            table[slot, [layout.A, layout.B, layout.RANK]] = torch.tensor([at, at + rank * width, rank])
            at += rank * (width + out)
    arena = torch.zeros(at, dtype=torch.bfloat16)
    x = torch.zeros(tokens, width, dtype=torch.bfloat16)
    ys = [torch.zeros(tokens, out, dtype=torch.bfloat16) for out in outs]
    each, n = tokens // w["adapters"], w["adapters"]
    words = [tokens, n, n, 0, 0, 0, 0, 0, *range(0, tokens + 1, each), *range(tokens), *range(n + 1), *range(n)]
    plan = torch.tensor([*words, *[0x3F800000] * n], dtype=torch.int32)

    os.environ["MLORA_EMULATION_MULTIPROCESSORS"] = str(MULTIPROCESSORS[w["cluster"]])
    os.environ["MLORA_EMULATION_CLUSTER"] = str(w["cluster"])
    native = ctypes.CDLL(os.environ["MLORA_EMULATION_LIBRARY"])
    counts = (ctypes.c_int64 * 7)()
    native.mlora_counts(counts)
    for tensor, data in ((x, 1), (arena, 1), (plan, 0), *((y, 1) for y in ys), *((t, 0) for t in tables)):
        native.mlora_watch(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_int64(tensor.nbytes), data)
    torch.ops.mlora.apply_group_(ys, x, arena, tables, plan)
    native.mlora_counts(counts)
    launches, programs, idle, read, written, metadata, narrow = counts
    bound = x.nbytes + arena.nbytes + 2 * sum(y.nbytes for y in ys)
    return {
        "kind": "run", **w, "launches": launches, "programs": programs, "idle": idle, "narrow": narrow,
        "metadata": round(32 * metadata / bound, 4), "ratio": round(32 * (read + written + metadata) / bound, 4),
    }  # fmt: skip


def key(record: dict[str, Any]) -> tuple[Any, ...]:
    names = ("kind", "kernel", "dtype", "arch", "in", "outs", "rank", "tokens", "adapters", "cluster")
    return tuple(str(list(v) if isinstance(v := record.get(n), tuple) else v) for n in names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="two workloads")
    parser.add_argument("--against", type=Path, help="a file of --out that nothing may be worse than")
    args = parser.parse_args()

    import emulation

    os.environ["MLORA_BACKEND"] = "emulation"
    os.environ["MLORA_EMULATION_LIBRARY"] = str(emulation.library())
    libraries = sorted((ROOT / "mlora").glob("_C_cuda*.so"))
    records = static(libraries[0]) if libraries else []
    if records:
        print("kernel       dtype  arch    regs  stack  spills  shared  occup.  atomics  ld128/64/32/16   st128/32/16")
    for r in records:
        loads = "/".join(str(r[f"load{width}"]) for width in (128, 64, 32, 16))
        stores = "/".join(str(r[f"store{width}"]) for width in (128, 32, 16))
        print(
            f"{r['kernel']:12} {r['dtype']:6} {r['arch']:6} {r['registers']:5} {r['stack']:6} {r['spills']:7}"
            f" {r['shared']:7} {r['occupancy']:6}% {r['atomics']:8}  {loads:15}  {stores}"
        )
    print("\n  in -> out                rank  tokens adapters cluster launches programs  idle  narrow  metadata  ratio")
    for w in workloads(args.smoke):
        r = run(w)
        records.append(r)
        name = f"{r['in']} -> {'+'.join(map(str, r['outs']))}"
        print(
            f"  {name:24} {r['rank']!s:>6} {r['tokens']:6} {r['adapters']:8} {r['cluster']:7} {r['launches']:8}"
            f" {r['programs']:8} {r['idle']:5} {r['narrow']:7} {r['metadata']:9.3f} {r['ratio']:6.3f}",
            flush=True,
        )
        if args.out:
            args.out.write_text("".join(json.dumps(r) + "\n" for r in records))
    if not args.against:
        return 0
    before = {key(r): r for r in map(json.loads, args.against.read_text().splitlines())}
    worse = 0
    for r in records:
        old = before.get(key(r), {})
        for what in ("spills", "registers", "launches", "idle", "narrow", "ratio"):
            if what in old and r[what] > old[what] * (1 if what == "spills" else 1.02):
                print(f"worse: {key(r)}: {what} was {old[what]}, is {r[what]}")
                worse = 1
    return worse


if __name__ == "__main__":
    sys.exit(main())
