"""What the benchmarks share: timing, quantiles, the machine's streaming read, and JSON lines."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mlora import layout
from mlora.ops import dispatch

_clock = time.perf_counter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that all benchmarks take."""
    parser.add_argument("--out", type=Path, help="file for JSON lines")
    parser.add_argument("--smoke", action="store_true", help="small shapes, seconds")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, CPU time: for a machine that is not idle")


def gpu_arguments(
    description: str | None, repeats: int, table: Callable[[list[dict[str, Any]]], str]
) -> tuple[argparse.Namespace, str]:
    """The options of a benchmark of GPUs, and the device that it takes; with `--table` it prints that and ends."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--table", type=Path, help="only print what this file has, in Markdown")
    add_arguments(parser)
    args = parser.parse_args()
    if args.table:
        print(table([json.loads(line) for line in args.table.read_text().splitlines()]))
        parser.exit()
    if not args.smoke and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --smoke tries it on the CPU")
    return args, "cpu" if args.smoke else "cuda"


def set_up(args: argparse.Namespace) -> Console:
    """Apply the options of `add_arguments`; returns where to print."""
    global _clock
    warnings.filterwarnings("ignore", category=FutureWarning)
    if args.cpu_time:
        args.threads, _clock = 1, time.process_time
    if args.threads:
        torch.set_num_threads(args.threads)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    load = os.getloadavg()[0]
    if load > 0.5 and not args.cpu_time:
        console.print(
            f"[yellow]The load average is {load:.1f}: something else runs here, expect noise (see --cpu-time)"
        )
    return console


def clock_name() -> str:
    return "wall" if _clock is time.perf_counter else "cpu"


def now() -> float:
    """Seconds on the clock that `seconds` reads."""
    return _clock()


def seconds(call: Callable[[], object]) -> float:
    """Time of one call, until the GPU has done it where there is one."""
    start = _clock()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return _clock() - start


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), cuts[0], cuts[3]


def llc_bytes(device: str = "cpu") -> int:
    """Size of the GPU's second-level cache, or of the last-level cache of CPU 0, from sysfs; 32 MiB where that does not
    say."""
    if device == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = []
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        text = (index / "size").read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[text[-1]])
    return max(sizes, default=32 * 2**20)


def streaming_read(size: int, repeats: int = 9, device: str = "cpu") -> float:
    """Bytes per second at which torch's threads, or a GPU, read `size` bytes over and over.

    The best time of two readers: a matrix-vector product and a sum, which write next to nothing.
    """
    data = torch.ones(max(size // 4096, 1), 1024, device=device)
    vector = torch.ones(1024, device=device)
    best = 0.0
    for read in (lambda: torch.mv(data, vector), lambda: data.sum()):
        read()
        best = max(best, data.nbytes / min(seconds(read) for _ in range(repeats)))
    return best


def multiply_adds(repeats: int = 9, dtype: torch.dtype = torch.bfloat16) -> float:
    """Multiply-adds of a dtype with fp32 sums that torch's threads do in a second: the best of products whose operands
    stay in the caches, the library's in that dtype and in fp32, and mlora's own."""
    best = 0.0
    none, table = (
        torch.zeros(layout.PLAN_HEADER, dtype=torch.int32),
        torch.empty(0, layout.TABLE_WIDTH, dtype=torch.int64),
    )
    for size in (256, 384, 512, 768):
        left, right = (torch.ones(size, size, dtype=dtype) for _ in range(2))
        arena, wide = torch.empty(0, dtype=dtype), torch.ones(size, size)
        calls = [partial(torch.nn.functional.linear, left, right), partial(torch.nn.functional.linear, wide, wide)]
        if dispatch.offered(size, dtype):
            calls.append(partial(dispatch.linear, left, right, None, arena, table, none, dispatch.ALONG))
        for call in calls:
            call()
            best = max(best, size**3 / min(seconds(call) for _ in range(repeats)))
    return best


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a figure was measured on."""
    if device == "cuda":
        return {"gpu": torch.cuda.get_device_name(), "llc_bytes": llc_bytes(device), "torch": torch.__version__}
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else "unknown",
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "clock": clock_name(),
        "llc_bytes": llc_bytes(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 2),
    }


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.is_file() else []


class Log:
    """JSON lines, written as they come; `out=None` writes none."""

    def __init__(self, out: Path | None, **common: Any) -> None:
        self.common = common
        self.file = None
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            self.file = out.open("w", encoding="utf-8")

    def write(self, **record: Any) -> None:
        if self.file is not None:
            self.file.write(json.dumps({**self.common, **record}) + "\n")
            self.file.flush()
