"""mlora's kernels beside vLLM's, SGLang's and PolyLoRA's own, timed on a GPU: the LoRA of one linear.

    python bench/gpu_peers.py --out bench/results/gpu_peers.jsonl

A system is taken from build/peers, where bench/peers.py puts it, or from where it is installed, and left out with a
reason where it is in neither. Its launchers run as that script calls them, by their default configuration and with 64
slots. All calls of a workload are one CUDA graph, each with adapters of its own (64 in all), and run in turns with
mlora's. Before it is timed a system must agree with an fp64 loop to 5% of the delta (PolyLoRA is 2.5% away), and mlora
as in bench/operators.py.
`--smoke` is one tiny workload on the CPU: mlora's C++ beside the others in Triton's interpreter.
"""

from __future__ import annotations

import os
import sys

SMOKE = "--smoke" in sys.argv  # Triton reads it as it is imported
os.environ["TRITON_INTERPRET"] = "1" if SMOKE else "0"

import argparse  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from importlib.util import find_spec  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import peers  # noqa: E402
import torch  # noqa: E402
from common import Log, gpu_arguments, machine, set_up  # noqa: E402
from operators import captured, time_sweeps  # noqa: E402
from workloads import SCALE, Buffers, Workload  # noqa: E402

from mlora import layout  # noqa: E402

BATCHES = ((64, 1), (64, 8), (64, 64), (2048, 1), (2048, 8))  # tokens, adapters


def main() -> None:
    args, device = gpu_arguments(__doc__, 9, table)
    console = set_up(args)
    if args.smoke:
        args.repeats = 1
    log = Log(args.out, bench="gpu_peers", smoke=args.smoke, **machine(device))
    systems: dict[str, peers.Prepare] = {}
    for name in peers.SYSTEMS:
        folder = where(name)
        if folder is None:
            reason = f"{name} is not installed, and build/peers/{name}-{peers.VERSIONS[name]} is not there"
        else:
            try:
                systems[name] = peers.SYSTEMS[name](folder)
                continue
            except Exception as error:  # of whatever it imports
                reason = f"{type(error).__name__}: {error}"[:300]
        log.write(system=name, skipped=reason)
        console.print(f"{name} left out: {reason}")
    for load in workloads(args.smoke) if systems else ():
        for record in run(load, systems, device, args):
            log.write(**record)
            said = f"{record['ratio']:.2f}" if "ratio" in record else record["skipped"]
            console.print(f"{load.inputs} -> {load.outputs}, {load.label}: mlora over {record['system']}: {said}")


def where(name: str) -> Path | None:
    """The folder that has the system's package."""
    own = peers.ROOT / "build/peers" / f"{name}-{peers.VERSIONS[name]}"
    if own.exists():
        return own
    spec = find_spec(name)
    return Path(spec.origin).parents[1] if spec and spec.origin else None


def workloads(smoke: bool) -> Iterator[Workload]:
    for outputs in (128,) if smoke else peers.OUTS:
        for rank in (16,) if smoke else (16, 64):
            for tokens, adapters in ((4, 2),) if smoke else BATCHES:
                route = tuple(t * adapters // tokens for t in range(tokens))
                yield Workload(
                    "peers", f"{tokens} tokens, {adapters} adapters, r {rank}", 128 if smoke else peers.WIDTH, outputs,
                    tokens, route, (rank,) * adapters, dtype=torch.float16,
                )  # fmt: skip


def run(
    load: Workload, systems: dict[str, peers.Prepare], device: str, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A record a system: mlora's time over its, or why there is none."""
    rank, adapters = load.ranks[0], len(load.ranks)
    slots = adapters if args.smoke else peers.SLOTS  # vLLM has programs for each, which the interpreter runs in turn
    copies = slots // adapters
    mine = Buffers(load, copies, device)
    mine.check()
    what = {"in": load.inputs, "out": load.outputs, "rank": rank, "tokens": load.tokens, "adapters": adapters}
    for name, prepare in systems.items():
        try:
            its = [ready(prepare, mine, i, slots, device) for i in range(copies)]
            check(mine, *its[0])
            calls = [one.call for one, _ in its]
            sweeps = [mine.sweep, lambda calls=calls: [call() for call in calls]]  # type: ignore[misc]
            if device == "cuda":
                sweeps = [captured(sweep) for sweep in sweeps]
            times = time_sweeps(sweeps, copies, args.repeats)
        except Exception as error:  # of whatever the system does; the next may do better
            yield {**what, "system": name, "skipped": f"{type(error).__name__}: {error}"[:300]}
            continue
        yield {
            **what, "system": name, "ratio": times[0][0] / times[1][0], "seconds": times[0], "its_seconds": times[1],
        }  # fmt: skip


def ready(prepare: peers.Prepare, mine: Buffers, i: int, slots: int, device: str) -> tuple[peers.Ready, peers.Batch]:
    """The system on the input, output and adapters of `mine.call(i)`."""
    load = mine.load
    rank = load.ranks[0]
    batch = peers.Batch(load.inputs, load.outputs, rank, load.tokens, len(load.ranks), slots, device)
    batch.x.copy_(mine.x)
    batch.y.copy_(mine.y)
    made = prepare(batch)
    for slot, (a, b) in enumerate(mine.tables[i, :, [layout.A, layout.B]].tolist()):
        made.a[slot] = mine.arena[a : a + rank * load.inputs].view(rank, -1)
        made.b[slot] = SCALE * mine.arena[b : b + rank * load.outputs].view(rank, -1).T
    return made, batch


def check(mine: Buffers, its: peers.Ready, batch: peers.Batch) -> None:
    """Raise unless the system computes what mlora does."""
    exact, before = mine.expected(0, torch.float64), batch.y.double()
    its.call()
    error, delta = ((one - exact).square().mean().sqrt() for one in (batch.y.double(), before))
    if not error <= 0.05 * delta:
        raise ValueError(f"refused to time: RMS error {error:.3g} against fp64, where the delta has {delta:.3g}")


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a line a workload, of each system mlora's time over its; below, why a system is left out."""
    names = list(dict.fromkeys(r["system"] for r in records if "tokens" in r))
    lines = [["mlora's time over that of", *names], ["---"] * (len(names) + 1)] if names else []
    rows: dict[str, dict[str, str]] = {}
    for r in records:
        if "tokens" in r:
            first = f"{r['in']} -> {r['out']}, {r['tokens']} tokens, {r['adapters']} of rank {r['rank']}"
            rows.setdefault(first, {})[r["system"]] = f"{r['ratio']:.2f}" if "ratio" in r else "not run"
    lines += [[first, *(cells.get(name, "") for name in names)] for first, cells in rows.items()]
    reasons = [f"{r['system']}: {r['skipped']}" for r in records if "tokens" not in r]
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + reasons)


if __name__ == "__main__":
    main()
