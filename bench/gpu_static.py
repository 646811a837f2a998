"""What can be said of the CUDA and Triton kernels without a GPU: no times.

    python bench/gpu_static.py [--smoke] [--out FILE] [--against FILE]

From machine code, for every architecture: see machine_code.py. From running the CUDA sources under csrc/emulation in
the shape of a device of 132 multiprocessors: launches, programs and those that touch no data, and the 32-byte sectors
that warps ask for over the lower bound T * in + sum over distinct adapters of r * (in + out) + 2 * T * out elements (a
group counts x once). Sectors are those of each memory instruction, of plans and tables too. Of the Triton kernels the
walk of bench/count.py, which tests compare with the interpreter; plans and tables are left out.
bench/gpu_table.py puts these beside other systems' (bench/peers.py). `--against` fails if a kernel spills more or a
figure is worse.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tests"), str(ROOT)]

import machine_code  # noqa: E402

GPCS = {16: "16,16,16,16,16,16,18,18", 1: "108"}  # multiprocessors of each, by cluster size: an H100's, an A100's
SLOTS = 64
RANKS = (8, 16, 32, 64, 96, 128)  # of a mixed batch, in turn
DECODE = ((16, 1), (16, 8), (16, 16), (64, 1), (64, 8), (64, 16), (64, 64))  # tokens, adapters
PREFILL = ((2048, 1), (2048, 8))
# Of which less is better. Loads of 32 and 64 bits are words of plans and tables too.
FIGURES = ("spills", "registers", "atomics", "load16", "store64", "store32", "store16")
FIGURES = (*FIGURES, "launches", "idle", "narrow", "ratio")
# Of a decoder layer: `in` and the outputs of siblings.
LAYER = ((4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,)))


def workloads(smoke: bool) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for out in (4096, 14336):
        for rank in (16, 64, "mixed"):
            for tokens, adapters in (*DECODE, *PREFILL):
                w = {"in": 4096, "outs": [out], "rank": rank, "tokens": tokens, "adapters": adapters}
                if tokens < 2048:
                    made.append({"path": "cuda", "cluster": 16, **w})
                made.append({"path": "triton", "cluster": 0, **w})
    for width, outs in LAYER:
        for adapters in (1, 8, 64):
            w = {"in": width, "outs": list(outs), "rank": 16, "tokens": 64, "adapters": adapters}
            if w not in [{k: m[k] for k in w} for m in made]:
                made.append({"path": "cuda", "cluster": 16, **w})
    for adapters in (1, 8, 64):
        w = {"in": 4096, "outs": [4096], "rank": 16, "tokens": 64, "adapters": adapters}
        made.append({"path": "cuda", "cluster": 1, **w})
    if smoke:
        made = [w for w in made if w["path"] == "triton" or (w["outs"], w["rank"], w["adapters"]) == ([4096], 16, 8)]
    return made


def batch(w: dict[str, Any]) -> tuple[Any, Any, int]:
    """Plan, one table for each output, elements of the arena."""
    import torch

    from mlora import layout

    n, tokens = w["adapters"], w["tokens"]
    tables = [torch.full((SLOTS, layout.TABLE_WIDTH), -1, dtype=torch.int64) for _ in w["outs"]]
    at = 0
    for table, out in zip(tables, w["outs"], strict=True):
        table[:, layout.RANK] = 0
        for slot in range(n):
            rank = RANKS[slot % len(RANKS)] if w["rank"] == "mixed" else w["rank"]
            table[slot, [layout.A, layout.B, layout.RANK]] = torch.tensor([at, at + rank * w["in"], rank])
            at += rank * (w["in"] + out)
    words = [tokens, n, n, 0, 0, 0, 0, 0, *range(0, tokens + 1, tokens // n), *range(tokens), *range(n + 1), *range(n)]
    return torch.tensor([*words, *[0x3F800000] * n], dtype=torch.int32), tables, at


def run_cuda(w: dict[str, Any]) -> dict[str, Any]:
    """Count what one launch does, under emulation."""
    import torch

    plan, tables, elements = batch(w)
    arena = torch.zeros(elements, dtype=torch.bfloat16)
    x = torch.zeros(w["tokens"], w["in"], dtype=torch.bfloat16)
    ys = [torch.zeros(w["tokens"], out, dtype=torch.bfloat16) for out in w["outs"]]
    os.environ["MLORA_EMULATION_MULTIPROCESSORS"] = GPCS[w["cluster"]]
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
        "kind": "run", **w, "launches": launches, "programs": programs, "idle": idle, "useful": programs - idle,
        "narrow": narrow, "ratio": round(32 * (read + written + metadata) / bound, 4),
    }  # fmt: skip


def run_triton(w: dict[str, Any]) -> dict[str, Any]:
    import count

    from mlora.kernels.config import Device

    plan, tables, _ = batch(w)
    shape = (plan, tables[0], w["tokens"], w["in"], w["outs"][0], 2)
    launches = count.count_apply(*shape, Device(132, 90))
    moved = sum(sum((*c.loads.values(), *c.stores.values())) for c in launches)
    return {
        "kind": "run", **w, "launches": len(launches), "programs": sum(c.grid for c in launches),
        "idle": sum(c.idle for c in launches), "useful": min(c.grid - c.idle for c in launches), "narrow": 0,
        "ratio": round(moved / count.lower_bound(*shape), 4),
    }  # fmt: skip


def key(record: dict[str, Any]) -> tuple[Any, ...]:
    names = ("kind", "kernel", "dtype", "arch", "path", "cluster", "in", "outs", "rank", "tokens", "adapters")
    return tuple(str(record.get(n)) for n in names)


def worse(records: list[dict[str, Any]], path: Path) -> bool:
    """Whether a figure is worse than in an earlier file; names those that are."""
    before = {key(r): r for r in map(json.loads, path.read_text().splitlines())}
    found = False
    for r in records:
        old = before.get(key(r), {})
        for what in FIGURES:
            if what in old and r[what] > old[what] * (1.02 if what in ("registers", "ratio") else 1):
                print(f"worse: {' '.join(filter('None'.__ne__, key(r)))}: {what} was {old[what]}, is {r[what]}")
                found = True
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="few workloads, Triton's machine code for bfloat16 only")
    parser.add_argument("--against", type=Path, help="a file of --out that nothing may be worse than")
    args = parser.parse_args()

    import emulation

    os.environ["MLORA_BACKEND"] = "emulation"
    os.environ["MLORA_EMULATION_LIBRARY"] = str(emulation.library())
    libraries = sorted((ROOT / "mlora").glob("_C_cuda*.so"))
    records = [*(machine_code.cuda(libraries[0]) if libraries else []), *machine_code.triton(args.smoke)]
    print(
        "kernel                 dtype arch   threads  regs  spills  shared  occup.  mma  wgmma  atomics"
        "  ld128/64/32/16  st128/64/32/16"
    )
    for r in records:
        loads, stores = ("/".join(str(r[f"{k}{width}"]) for width in (128, 64, 32, 16)) for k in ("load", "store"))
        print(
            f"{r['kernel']:22} {r['dtype']:5} {r['arch']:6} {r['threads']:7} {r['registers']:5} {r['spills']:7}"
            f" {r['shared']:7} {r['occupancy']:6}% {r['mma']:4} {r['wgmma']:6} {r['atomics']:8}  {loads:14}  {stores}"
        )
    print(
        "\n  in -> out                    rank tokens adapters path      launches programs  idle useful narrow  ratio"
    )
    for w in workloads(args.smoke):
        r = run_cuda(w) if w["path"] == "cuda" else run_triton(w)
        records.append(r)
        name = f"{r['in']} -> {'+'.join(map(str, r['outs']))}"
        path = f"{r['path']} {r['cluster'] or ''}"
        print(
            f"  {name:26} {r['rank']!s:>6} {r['tokens']:6} {r['adapters']:8} {path:9} {r['launches']:8}"
            f" {r['programs']:8} {r['idle']:5} {r['useful']:6} {r['narrow']:6} {r['ratio']:6.3f}",
            flush=True,
        )
        if args.out:
            args.out.write_text("".join(json.dumps(r) + "\n" for r in records))
    return int(bool(args.against) and worse(records, args.against))


if __name__ == "__main__":
    sys.exit(main())
