"""Time to load adapters from disk, as a ratio to reading the same files with safetensors alone.

Each file is opened in turns, from a warm page cache, in three ways:

    mapped   `load_file`, which makes the tensors and reads nothing but the header: their bytes stay in the file
    read     `load_file` and a copy of every tensor, kept: the bytes are in memory of one's own
    loaded   `Runtime.load_adapter`, which checks the tensors, lowers them, packs them in memory of its own, and copies
             them to the arena while there is room

What is read and what is loaded stays alive to the end, so that both need as much fresh memory; how fast that comes is
printed beside them. Before any timing, rows of two adapters are checked against PEFT serving each alone.

    python bench/load.py --out bench/results/load.jsonl
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Log, add_arguments, machine, quantiles, seconds, set_up
from generate import check, load, make_adapter, patched, tiny_llama, twin
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file, save_file

import mlora

WEIGHTS = "adapter_model.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder; default SmolLM2-135M-Instruct")
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--temp", type=Path, help="where to write the adapters, 5 GB by default")
    add_arguments(parser)
    args = parser.parse_args()
    if args.smoke:
        args.adapters = 12
    if args.adapters < 4:
        parser.error(f"--adapters is {args.adapters}; the first are compared with the last, so 4 at least")

    console = set_up(args)
    torch.manual_seed(0)
    bare = tiny_llama() if args.smoke else load(args.model)
    with tempfile.TemporaryDirectory(dir=args.temp) as temp:
        folders = write(bare, Path(temp), args.adapters, args.rank)
        size = (folders[0] / WEIGHTS).stat().st_size
        ids = torch.randint(3, bare.config.vocab_size, (3, 64))
        with console.status("Checking against PEFT, each adapter alone"):
            for line in check(bare, patched(bare, folders[:2], size, True), folders[:2], ids):
                console.print(line)
        measure(console, args, twin(bare), folders, size)


def write(bare: Any, root: Path, count: int, rank: int) -> list[Path]:
    """`count` folders of different adapters: two, and the first with the rows of its A in another order and scale."""
    folders = [make_adapter(bare, root / f"a{seed}", rank, seed) for seed in range(2)]
    first = load_file(folders[0] / WEIGHTS)
    for index in track(range(2, count), "Writing adapters", transient=True):
        folder = root / f"a{index}"
        folder.mkdir()
        shutil.copy(folders[0] / "adapter_config.json", folder)
        tensors = {key: tensor.roll(index, 0) / index if "lora_A" in key else tensor for key, tensor in first.items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        folders.append(folder)
    return folders


def measure(console: Any, args: argparse.Namespace, model: Any, folders: list[Path], size: int) -> None:
    log = Log(args.out, benchmark="load", adapters=len(folders), rank=args.rank, file_bytes=size, **machine())
    runtime = mlora.patch(model)
    kept: list[object] = []
    ways: dict[str, Callable[[Path], object]] = {
        "mapped": lambda folder: load_file(folder / WEIGHTS),
        "read": lambda folder: kept.append({k: t.clone() for k, t in load_file(folder / WEIGHTS).items()}),
        "loaded": lambda folder: runtime.load_adapter(folder),
        "fresh": lambda folder: kept.append(torch.ones(size, dtype=torch.uint8)),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number, folder in enumerate(track(folders, "Loading adapters", transient=True)):
        order = list(ways) if number % 2 else list(ways)[::-1]
        for way in order:
            times[way].append(seconds(lambda call=ways[way], folder=folder: call(folder)))
    modules = len(next(iter(runtime.adapters.values())).modules)
    table = Table(title=f"Rank {args.rank}, {modules} modules, {size / 2**20:.1f} MiB (ms, medians)")
    for column in ("adapters", "mapped", "read", "loaded", "loaded / mapped", "loaded / read", "fresh memory, GB/s"):
        table.add_column(column, justify="right")
    step = max(len(folders) // 10, 2)
    for start in range(0, len(folders), step):
        part = slice(start, start + step)
        found = {way: quantiles(spent[part]) for way, spent in times.items()}
        ratios = {
            way: quantiles([mine / its for mine, its in zip(times["loaded"][part], times[way][part], strict=True)])
            for way in ("mapped", "read")
        }
        log.write(first=start, seconds=found, ratios=ratios, modules=modules)
        table.add_row(
            f"{start + 1}-{min(start + step, len(folders))}",
            *(f"{found[way][0] * 1e3:.2f}" for way in ("mapped", "read", "loaded")),
            *(f"{ratio:.2f} ({low:.2f}-{high:.2f})" for ratio, low, high in ratios.values()),
            f"{size / found['fresh'][0] / 1e9:.2f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
