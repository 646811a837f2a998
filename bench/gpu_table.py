"""mlora's GPU kernels beside other systems', in Markdown, from what was counted without a GPU: no times.

    python bench/gpu_table.py [--all]

Reads bench/results/gpu_static.jsonl (bench/gpu_static.py) and bench/results/peers.jsonl (bench/peers.py). Ratios are
32-byte sectors asked for over the lower bound that both files name (mlora's Triton kernels: bytes, without plan and
table), for 4096 -> 4096 and 4096 -> 14336. `--all` prints one line a workload.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
RANKS = (16, 64, "mixed")
Record = dict[str, Any]


def systems() -> dict[str, list[Record]]:
    """By system: a record a workload."""
    found: dict[str, list[Record]] = {}
    for r in map(json.loads, (RESULTS / "peers.jsonl").read_text().splitlines()):
        found.setdefault(r["system"], []).append(r)
    for r in map(json.loads, (RESULTS / "gpu_static.jsonl").read_text().splitlines()):
        if r["kind"] == "run" and r["in"] == 4096 and r["outs"] in ([4096], [14336]) and r["cluster"] != 1:
            name = {"cuda": "mlora CUDA", "triton": "mlora Triton"}[r["path"]]
            found.setdefault(name, []).append({**r, "out": r["outs"][0], "narrowest": r["useful"]})
        elif r["kind"] == "static" and r["kernel"].split()[1] in ("apply", "shrink", "expand"):
            name = {"cuda": "mlora CUDA", "triton": "mlora Triton"}[r["kernel"].split()[0]]
            code = {what: r[what] for what in ("registers", "occupancy", "spills")}
            found.setdefault(name, []).append({**code, "float_atomics": r["atomics"]})
    return found


def span(values: list[float], form: str = "{:.2f}") -> str:
    """Least and greatest, or one number where these look the same."""
    texts = dict.fromkeys(form.format(f(values)) for f in (min, max)) if values else ()
    return " to ".join(texts)


def of(records: list[Record], name: str, scale: Callable[[Record], float] | None = None, **wanted: Any) -> list[float]:
    """A figure of the records that have it and whose fields are as wanted; a range is wanted of numbers."""
    made = []
    for r in records:
        if name in r and all(r[k] in v if isinstance(v, range) else r[k] == v for k, v in wanted.items()):
            made.append(scale(r) if scale else r[name])
    return made


def ratios(records: list[Record], **wanted: Any) -> str:
    return " / ".join(filter(None, (span(of(records, "ratio", rank=rank, **wanted)) for rank in RANKS)))


ROWS: dict[str, Callable[[list[Record]], str]] = {
    "launches for a linear": lambda r: span(of(r, "launches"), "{}"),
    "torch operators; waits of the host": lambda r: "; ".join(
        filter(None, (span(of(r, name), "{}") for name in ("torch_ops", "syncs")))
    ),
    "atomic adds of floats": lambda r: span(of(r, "float_atomics"), "{}"),
    "programs without work, per cent": lambda r: span(
        of(r, "idle", lambda record: 100 * record["idle"] / record["programs"]), "{:.0f}"
    ),
    "programs with work in the narrowest launch": lambda r: str(min(of(r, "narrowest"))),
    "registers; occupancy, per cent; spilled instructions": lambda r: "; ".join(
        filter(None, (span(of(r, name), "{}") for name in ("registers", "occupancy", "spills")))
    ),
    "16 tokens, 1 adapter": lambda r: ratios(r, tokens=16, adapters=1),
    "64 tokens, 1 adapter": lambda r: ratios(r, tokens=64, adapters=1),
    "16 tokens, 8 and 16 adapters": lambda r: ratios(r, tokens=16, adapters=range(8, 17)),
    "64 tokens, 8 to 64 adapters": lambda r: ratios(r, tokens=64, adapters=range(8, 65)),
    "2048 tokens, 1 adapter": lambda r: ratios(r, tokens=2048, adapters=1),
    "2048 tokens, 8 adapters": lambda r: ratios(r, tokens=2048, adapters=8),
}


def summary(found: dict[str, list[Record]]) -> str:
    lines = [["figure", *found], ["---"] * (len(found) + 1)]
    lines += [[label, *(row(records) for records in found.values())] for label, row in ROWS.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def everything(found: dict[str, list[Record]]) -> str:
    """Ratio, programs with work in the narrowest launch, and the share of programs without."""
    cells: dict[tuple[Any, ...], dict[str, str]] = {}
    for name, records in found.items():
        for r in records:
            if "ratio" in r:
                text = f"{r['ratio']:.2f}, {r['narrowest']}, {100 * r['idle'] / r['programs']:.0f}%"
                cells.setdefault((r["out"], r["rank"], r["tokens"], r["adapters"]), {})[name] = text
    lines = [["out", "rank", "tokens", "adapters", *found], ["---"] * (len(found) + 4)]
    lines += [[*map(str, key), *(texts.get(name, "") for name in found)] for key, texts in cells.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true")
    args = parser.parse_args()
    print((everything if args.all else summary)(systems()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
