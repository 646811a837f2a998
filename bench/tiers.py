"""Adapters between files, host memory and device: what they take there, and what it costs to bring them.

    bytes        many registered, host memory for a few, batches of 16 drawn among all of them: bytes that are counted,
                 and what the process grows by, at every moment
    prefetched   a batch of 16 adapters that were prefetched during the batch before, over the same batch with adapters
                 that are there already; also while the next 16 are being prefetched, batch after batch
    cold         bringing one adapter to the device as a call does, over reading its file with safetensors into memory
    registering  a folder of links to one file: seconds and bytes each

Before any timing, rows of adapters that are dropped and loaded again are checked against PEFT serving each alone.

    python bench/tiers.py --out bench/results/tiers.jsonl
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import shutil
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import Log, add_arguments, machine, quantiles, seconds, set_up
from generate import check, tiny_llama, twin
from generate import load as load_model
from load import WEIGHTS, write
from rich.progress import track
from safetensors.torch import load_file

import mlora

ROWS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder; default SmolLM2-135M-Instruct")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--registered", type=int, default=10_000)
    parser.add_argument("--host", type=int, default=200, help="adapters that host memory has room for")
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--links", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--temp", type=Path, help="where to write some hundred MB of adapters")
    add_arguments(parser)
    args = parser.parse_args()
    if args.smoke:
        args.registered, args.host, args.batches, args.links, args.repeats = 200, 40, 6, 500, 2
        args.prompt, args.new = 8, 3

    console = set_up(args)
    torch.manual_seed(0)
    bare = tiny_llama() if args.smoke else load_model(args.model)
    log = Log(args.out, benchmark="tiers", rank=args.rank, **machine())
    with tempfile.TemporaryDirectory(dir=args.temp) as temp:
        root = Path(temp)
        (root / "adapters").mkdir()
        folders = write(bare, root / "adapters", 6 * ROWS, args.rank)
        held = bytes_of_one(bare, folders[0])
        ids = torch.randint(3, bare.config.vocab_size, (3, 64))
        with console.status("Checking against PEFT, each adapter alone"):
            for line in check(bare, reloading(bare, folders, held), folders[:2], ids):
                console.print(line)
        for figure in (
            *resident(args, bare, folders, held, root / "many"),
            *prefetched(args, bare, folders, held),
            *cold(args, bare, folders, held),
            *registering(args, bare, folders[0], root / "links"),
        ):
            log.write(**figure)
            console.print(", ".join(f"{key} {_text(value)}" for key, value in figure.items()))


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{value[0]:.3f} ({value[1]:.3f}-{value[2]:.3f})"
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def bytes_of_one(bare: Any, folder: Path) -> int:
    """What an adapter counts on the host."""
    runtime = mlora.patch(twin(bare), memory=1 << 28)
    runtime.load_adapter(folder)
    return runtime.host.used


def tiered(bare: Any, held: int, host: int, device: int) -> mlora.Runtime:
    """Host memory for `host` adapters, and a device for `device` of them."""
    return mlora.patch(twin(bare), memory=device * held, max_adapters=device, host_memory=host * held)


def reloading(bare: Any, folders: list[Path], held: int) -> Any:
    """A model whose first two adapters were dropped once."""
    runtime = tiered(bare, held, 4, 4)
    for folder in folders[:8]:
        runtime.register_adapter(folder, folder.name)
    for folder in folders[:8]:
        runtime.prefetch(folder.name).result()
    if runtime.adapter(folders[0].name).location != "files":
        raise SystemExit("refused to report: nothing was dropped")
    return runtime.model


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def watched(runtime: mlora.Runtime) -> Iterator[dict[str, int]]:
    """The most bytes that were counted inside, and that the process had, looked at every millisecond."""
    most, stop = {"used": 0, "rss": rss()}, threading.Event()

    def watch() -> None:
        while not stop.wait(0.001):
            most["used"] = max(most["used"], runtime._store.host.used)
            most["rss"] = max(most["rss"], rss())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        stop.set()
        thread.join()


def resident(
    args: argparse.Namespace, bare: Any, folders: list[Path], held: int, many: Path
) -> Iterator[dict[str, Any]]:
    many.mkdir()
    for number in range(args.registered):
        (many / f"{number:06}").symlink_to(folders[number % len(folders)])
    runtime = tiered(bare, held, args.host, 2 * ROWS)
    draw, names = random.Random(5), runtime.register_adapters(many)
    ids = torch.randint(3, bare.config.vocab_size, (ROWS, 8))
    with torch.inference_mode():
        runtime.load_adapter(folders[0], "first")  # what is made once: code, buffers, plans
        runtime.model(ids, adapter_names=["first", None] * (ROWS // 2))
        runtime.delete_adapter("first")
        gc.collect()
        before = rss()
        with watched(runtime) as most:
            for _ in track(range(args.batches), "Drawing among many", transient=True):
                batch = draw.choices(names, k=ROWS)
                runtime.prefetch(draw.choices(names, k=ROWS))
                runtime.model(ids, adapter_names=batch)
    use, arena = runtime.host, sum(space.capacity for space in runtime._store.spaces)
    runtime._prefetch.close()
    yield {
        "figure": "bytes on the host over the bound", "ratio": most["used"] / use.most, "want": 1.0,
        "used": most["used"], "bound": use.most, "registered": use.registered, "loads": use.loads, "drops": use.drops,
    }  # fmt: skip
    yield {
        "figure": "growth of the process over bound and arena", "ratio": (most["rss"] - before) / (use.most + arena),
        "want": 1.0, "grown": most["rss"] - before, "bound": use.most, "arena": arena, "file_bytes": held,
    }  # fmt: skip


def prefetched(args: argparse.Namespace, bare: Any, folders: list[Path], held: int) -> Iterator[dict[str, Any]]:
    runtime = tiered(bare, held, 4 * ROWS, 3 * ROWS + 2)
    for folder in folders:
        runtime.register_adapter(folder, folder.name)
    names = [folder.name for folder in folders]
    groups = [names[start : start + ROWS] for start in range(0, len(names), ROWS)]
    always, turns = groups[0], groups[1:]
    ids = torch.randint(3, bare.config.vocab_size, (ROWS, args.prompt))
    options = {"max_new_tokens": args.new, "min_new_tokens": args.new, "do_sample": False, "pad_token_id": 0}

    def batch(group: list[str]) -> float:
        mask = torch.ones_like(ids)
        return seconds(
            lambda: runtime.model.generate(input_ids=ids, attention_mask=mask, adapter_names=group, **options)
        )

    there, after, during, chained = [], [], [], []
    pins = [runtime.pin(name) for name in always]
    batch(always)
    for turn in track(range(args.repeats), "Batches", transient=True):
        group = turns[turn % len(turns)]
        there.append(batch(always))
        _absent(runtime, group)
        coming = runtime.prefetch(group)
        during.append(batch(always))
        coming.result()
        loads = runtime.host.loads
        after.append(batch(group))
        if runtime.host.loads != loads:
            raise SystemExit("refused to report: what was prefetched was dropped before it was used")
    runtime.prefetch(turns[0]).result()
    for turn in track(range(args.repeats), "Batches in a row", transient=True):
        runtime.prefetch(turns[(turn + 1) % len(turns)])
        chained.append(batch(turns[turn % len(turns)]))
    for pin in pins:
        pin.release()
    runtime._prefetch.close()
    middle = quantiles(there)[0]
    for figure, times, want in (
        ("16 prefetched over 16 that are there", after, 1.05),
        ("a batch beside which 16 are prefetched", during, None),
        ("batches in a row, each prefetching the next", chained, None),
    ):
        ratios = [mine / its for mine, its in zip(times, there, strict=True)]
        yield {"figure": figure, "ratio": quantiles(ratios), "want": want, "seconds": quantiles(times)[0],
               "there": middle}  # fmt: skip


def _absent(runtime: mlora.Runtime, group: list[str]) -> None:
    if any(runtime.adapter(name).location != "files" for name in group):
        raise SystemExit("refused to report: an adapter that should come from its files was there")


def cold(args: argparse.Namespace, bare: Any, folders: list[Path], held: int) -> Iterator[dict[str, Any]]:
    runtime = tiered(bare, held, ROWS, ROWS)
    for folder in folders:
        runtime.register_adapter(folder, folder.name)

    def bring(folder: Path) -> None:
        runtime.pin(folder.name).release()

    def read(folder: Path) -> dict[str, torch.Tensor]:
        return {key: tensor.clone() for key, tensor in load_file(folder / WEIGHTS).items()}

    ways = {"first": bring, "read": read, "again": bring}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for folder in folders[: 2 * ROWS]:  # from here on each one makes room for itself
        bring(folder)
        read(folder)
    rest = folders[2 * ROWS :]
    for number, folder in enumerate(track(rest, "Bringing one at a time", transient=True)):
        for way in ("first", "read") if number % 2 else ("read", "first"):
            times[way].append(seconds(lambda call=ways[way], folder=folder: call(folder)))
    reads = list(times["read"])
    for number, folder in enumerate(track(rest, "And again", transient=True)):
        _absent(runtime, [folder.name])
        for way in ("again", "read") if number % 2 else ("read", "again"):
            times[way].append(seconds(lambda call=ways[way], folder=folder: call(folder)))
    for way, its in (("first", reads), ("again", times["read"][len(reads) :])):
        ratios = [mine / one for mine, one in zip(times[way], its, strict=True)]
        yield {"figure": f"bringing one {'again' if way == 'again' else 'for the first time'} over reading its file",
               "ratio": quantiles(ratios), "want": 1.3, "ms": 1e3 * quantiles(times[way])[0],
               "read_ms": 1e3 * quantiles(its)[0]}  # fmt: skip


def registering(args: argparse.Namespace, bare: Any, folder: Path, links: Path) -> Iterator[dict[str, Any]]:
    links.mkdir()
    for name in ("adapter_config.json", WEIGHTS):
        shutil.copy(folder / name, links / {WEIGHTS: "one"}.get(name, name))
    for number in range(args.links):
        (links / f"adapter-{number:06}.safetensors").symlink_to("one")
    found = []
    for traced in (False, True):
        runtime = mlora.patch(twin(bare), memory=1 << 26)
        gc.collect()
        if traced:
            tracemalloc.start()
        start = time.perf_counter()
        names = runtime.register_adapters(links)
        found.append(time.perf_counter() - start)
        if len(names) != args.links or runtime.host.loaded:
            raise SystemExit("refused to report: not all were registered, or one was loaded")
        if traced:
            del names
            gc.collect()
            bytes_each = tracemalloc.get_traced_memory()[0] / args.links
            tracemalloc.stop()
        else:
            runtime.prefetch(names[-1]).result()  # the last one serves
            if runtime.adapter(names[-1]).location != "device":
                raise SystemExit("refused to report: a link does not serve")
    yield {"figure": "registering one of a folder, us", "ratio": 1e6 * found[0] / args.links, "want": 20.0,
           "adapters": args.links}  # fmt: skip
    yield {"figure": "bytes of one that is registered", "ratio": bytes_each, "want": 500.0, "adapters": args.links}


if __name__ == "__main__":
    main()
