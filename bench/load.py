"""Time to load adapters from disk, as a ratio to reading the same files with safetensors alone.

Both read each file once, in turns, from a warm page cache: `load_file`, which maps the file and makes its tensors, and
`Runtime.load_adapter`, which also checks and lowers them, packs them and copies them to the arena while there is room.
Before any timing, rows of two adapters are checked against PEFT serving each alone.

    python bench/load.py --out bench/results/load.jsonl
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import Log, add_arguments, machine, quantiles, seconds, set_up
from generate import check, load, make_adapter, patched, tiny_llama, twin
from rich.progress import track
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
    read, loaded = [], []
    for folder in track(folders, "Loading adapters", transient=True):
        read.append(seconds(lambda folder=folder: load_file(folder / WEIGHTS)))
        loaded.append(seconds(lambda folder=folder: runtime.load_adapter(folder)))
    ratio, low, high = quantiles([mine / its for mine, its in zip(loaded, read, strict=True)])
    part = max(len(folders) // 10, 2)
    first, last = statistics.median(loaded[:part]), statistics.median(loaded[-part:])
    modules = len(next(iter(runtime.adapters.values())).modules)
    console.print(
        f"{len(folders)} adapters of rank {args.rank}, {modules} modules and {size / 2**20:.1f} MiB each\n"
        f"load_file {statistics.median(read) * 1e3:.2f} ms, load_adapter {statistics.median(loaded) * 1e3:.2f} ms: "
        f"{ratio:.2f} times as long ({low:.2f}-{high:.2f})\n"
        f"the first {part}: {first * 1e3:.2f} ms each; the last {part}: {last * 1e3:.2f} ms, {last / first:.2f} of that"
    )
    log.write(
        ratio=ratio,
        ratio_q20=low,
        ratio_q80=high,
        read_seconds=quantiles(read),
        seconds=quantiles(loaded),
        total_ratio=sum(loaded) / sum(read),
        modules=modules,
        first_seconds=first,
        last_seconds=last,
        growth=last / first,
    )


if __name__ == "__main__":
    main()
