"""The ops alone: time of one call beside the time that its bytes need, over shapes, ranks and popularities.

Every workload is checked against an fp64 oracle first; on a mismatch nothing is reported. Adapters and
weights rotate through a working set that fits the last-level cache, or through one that does not; the input
and the output are the same in every call, since a model's layers find theirs where they have just been written.
The byte bound is the compulsory traffic (each distinct adapter once, x once, y read and written) at
the streaming read that torch reaches on as many bytes, with the same threads, before or after the workload. Base
products are bound by their multiply-adds too, at the best rate of products of matrices in the caches. `of stream`
compares the bytes of adapters and weights with that reading in one go; `of reads` with torch reading each
call's adapters, call by call (the better of a sum and a dot product), timed in turns with the calls.

    python bench/operators.py --out bench/results/operators.jsonl
    python bench/operators.py --device cuda --out bench/results/gpu_operators.jsonl

On a GPU the workloads are those that bench/gpu_static.py counts, and a sweep through the working set is one CUDA graph,
so that launching costs next to nothing.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch
from common import Log, add_arguments, llc_bytes, machine, multiply_adds, quantiles, seconds, set_up, streaming_read
from rich.console import Console
from rich.progress import track
from rich.table import Table
from workloads import Buffers, gpu_workloads, workloads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one group, e.g. bandwidth")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add_arguments(parser)
    args = parser.parse_args()
    if args.smoke:
        args.repeats = 3
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    offered = gpu_workloads if args.device == "cuda" or args.only == "gpu" else workloads
    loads = [load for load in offered(args.smoke) if args.only in (None, load.group)]
    if not loads:
        parser.error(f"--only {args.only!r}: no such group")

    console = set_up(args)
    log = Log(args.out, bench="operators", **machine(args.device))
    llc = llc_bytes(args.device)
    inside, beyond = (1 << 20, 4 << 20) if args.smoke else (min(llc // 8, 32 << 20), 3 * llc)
    reader = f"{torch.get_num_threads()} threads" if args.device == "cpu" else torch.cuda.get_device_name()
    streamed: dict[int, list[float]] = {inside: [], beyond: []}  # bytes a second

    table = Table(title="One call, bf16 (median, 20-80 % quantiles)")
    columns = (
        "group",
        "in x out",
        "workload",
        "us",
        "20-80 %",
        "bound us",
        "of bound",
        "GB/s",
        "of stream",
        "of reads",
    )
    for column in columns:
        table.add_column(column, justify="left" if column in ("group", "workload") else "right")
    medians: dict[str, float] = {}
    peak = multiply_adds() if any(load.multiply_adds for load in loads) else math.inf
    for load in track(loads, "Kernels", console=Console(stderr=True), transient=True):
        size = beyond if load.beyond else inside
        if load.group == "bandwidth" and not load.beyond and load.bytes > llc:
            console.print(
                f"{load.inputs}x{load.outputs}, {load.label}: {load.bytes >> 20} MiB do not lie inside, left out"
            )
            continue
        buffers = Buffers(load, max(1, min(size // max(load.set_bytes, 1), 4096)), args.device)
        if load.op in ("linear", "along") and not buffers.kblock:
            console.print(f"{load.group} {load.inputs}x{load.outputs}, {load.label}: not offered here, left out")
            continue
        buffers.check()
        sweep = buffers.sweep if args.device == "cpu" else captured(buffers.sweep)
        readers = buffers.readers() if args.device == "cpu" and load.op == "apply" else []
        before = streaming_read(size, device=args.device)
        (median, low, high), *reads = time_sweeps([sweep, *readers], buffers.copies, args.repeats)
        reading = min((read[0] for read in reads), default=math.nan)
        rate = max(before, streaming_read(size, device=args.device))  # on a shared machine it changes within seconds
        streamed[size].append(rate)
        achieved = load.set_bytes / median
        bound = max(load.bytes / rate, load.multiply_adds / peak)
        medians[load.label] = median
        log.write(
            **{k: v for k, v in asdict(load).items() if k not in ("route", "ranks", "dtype")},
            dtype=str(load.dtype).removeprefix("torch."),
            rows=len(load.route),
            distinct=len(load.used),
            ranks=sorted(set(load.ranks)),
            seconds=(median, low, high),
            bound_seconds=bound,
            adapter_bytes=load.adapter_bytes,
            bytes=load.bytes,
            stream_bytes_per_s=rate,
            read_seconds=None if math.isnan(reading) else reading,
            working_set=buffers.copies * load.set_bytes,
        )
        table.add_row(
            load.group,
            f"{load.inputs}x{load.outputs}",
            load.label,
            f"{median * 1e6:.1f}",
            f"{low * 1e6:.1f}-{high * 1e6:.1f}",
            f"{bound * 1e6:.1f}",
            f"{bound / median:.2f}",
            f"{achieved / 1e9:.1f}" if load.set_bytes else "-",
            f"{achieved / rate:.2f}" if load.set_bytes else "-",
            "-" if math.isnan(reading) else f"{reading / median:.2f}",
        )
    console.print(table)
    for size, rates in streamed.items():
        if rates:
            rate, low, high = (value / 1e9 for value in quantiles(rates))
            console.print(f"streaming read of {size >> 20} MiB: {rate:.1f} GB/s ({low:.1f} to {high:.1f}; {reader})")
    if peak < math.inf:
        console.print(f"matrix products in the caches: {peak / 1e9:.0f} G multiply-adds a second ({reader})")
    report_ranks(console, medians)


def captured(sweep: Callable[[], object]) -> Callable[[], None]:
    """`sweep` as one CUDA graph."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        sweep()  # nothing may be compiled during capture
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        sweep()
    return graph.replay


def time_sweeps(sweeps: Sequence[Callable[[], object]], calls: int, repeats: int) -> list[tuple[float, float, float]]:
    """Seconds a call of each, in turns, over sweeps of `calls` calls that are repeated until one timing takes 2 ms or
    more."""
    loops = [max(1, math.ceil(2e-3 / max(seconds(sweep), 1e-6))) for sweep in sweeps]

    def timed(i: int) -> float:
        def run() -> None:
            for _ in range(loops[i]):
                sweeps[i]()

        return seconds(run) / (calls * loops[i])

    times = [[timed(i) for i in range(len(sweeps))] for _ in range(repeats + 1)][1:]
    return [quantiles(of) for of in zip(*times, strict=True)]


def report_ranks(console: Console, medians: dict[str, float]) -> None:
    needed: Sequence[str] = ("r8 alone", "r256 alone", "r8 beside r256")
    if all(label in medians for label in needed):
        small, large, both = (medians[label] * 1e6 for label in needed)
        console.print(
            f"A rank-8 row beside a rank-256 row: {both:.1f} us together, {small:.1f} us and {large:.1f} us alone: "
            f"{both / (small + large):.2f} of the sum"
        )


if __name__ == "__main__":
    main()
