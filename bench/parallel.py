"""Adapters on a model that is split over processes (tensor parallel), over the bare model in the same processes.

A random Llama of SmolLM2-135M's size, with heads that two processes can divide, in bf16; 16 random rank-16 adapters on
all seven linears, one a row. The processes exchange over gloo on this machine. Bare and patched models take turns in
the same processes, and so they do in one process with as many threads as each of them has; figures are medians of the
ratios within a turn, as process 0 sees them. Several processes do it twice: adapters as they lie by default, and with
`fully_sharded`. Before anything is timed, base rows must equal the bare model's bit for
bit, and adapters' rows be no further from those of one process than twice what the bare model's rows are.

    decode step    one call of the model with a cache of 64 tokens and 16 names, each of which the processes agree on
    generate       16 new tokens, which they agree on once
    bytes          of an adapter that a process holds, over those of the whole
    exchanges      what processes exchange in a decode step of the bare model, once more and alone: no adapter can make
                   that faster. "Bound" is the ratio of one process on all else of the bare model's step, and these

    python bench/parallel.py --out bench/results/parallel.jsonl    # 2 minutes
    python bench/parallel.py --smoke                               # a tiny model, whether it runs
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from common import Log, add_arguments, machine, quantiles, seconds, set_up
from generate import Case, alternate, decoder, generation, make_adapter, rms
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

import mlora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--adapters", type=int, default=16, help="distinct ones, one a row")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=24, help="pairs of decode steps; a sixth of generates")
    add_arguments(parser)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of one of the processes
    parser.add_argument("--fully-sharded", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.smoke:
        args.adapters, args.rank, args.prompt, args.new, args.repeats = 4, 4, 8, 4, 6
    if args.folder is not None:
        run(args)
        return
    console = set_up(args)
    threads = torch.get_num_threads()
    each = max(threads // args.processes, 1)
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        model = random_llama(args.smoke)
        model.save_pretrained(folder / "model")
        for number in range(args.adapters):
            make_adapter(model, folder / f"a{number}", args.rank, seed=number)
        with console.status("one process"):
            started(args, folder, 1, each)
        with console.status(f"{args.processes} processes"):
            started(args, folder, args.processes, each)
            started(args, folder, args.processes, each, "--fully-sharded")
        names = [file_name(1, False), *(file_name(args.processes, sharded) for sharded in (False, True))]
        found = [json.loads((folder / name).read_text()) for name in names]
        one = found[0]
    log = Log(args.out, bench="parallel", processes=args.processes, adapters=args.adapters, rank=args.rank,
              prompt=args.prompt, new=args.new, model="tiny random Llama" if args.smoke else "random Llama, 135M",
              **machine())  # fmt: skip
    table = Table(
        title=f"{args.adapters} adapters over the bare model in the same processes (median, 20-80 % quantiles)"
    )
    several = f"{args.processes} processes"
    for column in ("", "one process", several, f"{several}, fully sharded", "asked"):
        table.add_column(column)
    for phase in ("decode step", "generate"):
        cells = []
        for their in found:
            ratio, low, high = their[phase]["ratio"]
            cells.append(f"{ratio:.3f} ({low:.3f}-{high:.3f}), bare {their[phase]['bare_seconds'] * 1e3:.1f} ms")
            log.write(phase=phase, in_processes=their["processes"], fully_sharded=their["fully_sharded"],
                      threads_each=each, **their[phase])  # fmt: skip
        table.add_row(phase, *cells, f"≤ {one[phase]['ratio'][0] + 0.05:.3f}" if phase == "decode step" else "")
    cells = ["0 ms"]
    for their in found[1:]:
        bare, rest = their["decode step"]["bare_seconds"], their["exchange_seconds"]
        bound = (one["decode step"]["ratio"][0] * (bare - rest) + rest) / bare
        cells.append(f"{rest * 1e3:.1f} ms, bound {bound:.3f}")
        log.write(phase="exchanges", in_processes=their["processes"], fully_sharded=their["fully_sharded"],
                  seconds=rest, bound=bound)  # fmt: skip
    table.add_row("exchanges of a decode step", *cells, "")
    held = [their["bytes"] / one["bytes"] for their in found]
    for their, ratio in zip(found, held, strict=True):
        log.write(phase="bytes", fully_sharded=their["fully_sharded"], held=their["bytes"], whole=one["bytes"],
                  ratio=ratio)  # fmt: skip
    cells = [f"{their['bytes']:,}: {ratio:.3f}" for their, ratio in zip(found, held, strict=True)]
    table.add_row("bytes of an adapter", *cells, "≤ 0.55")
    console.print(table)


def random_llama(small: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = (
        {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 128, "head_dim": 16}
        if small
        else {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "vocab_size": 49152,
            "head_dim": 64,
        }
    )
    config = LlamaConfig(num_attention_heads=8, num_key_value_heads=4, pad_token_id=0, eos_token_id=None, **sizes)
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def file_name(processes: int, sharded: bool) -> str:
    """Of what a run found."""
    return f"{processes}{' sharded' * sharded}.json"


def started(args: argparse.Namespace, folder: Path, processes: int, threads: int, *more: str) -> None:
    """Run `run` in so many processes of so many threads, as torchrun does. `more`: options of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options = [*sys.argv[1:], "--folder", str(folder), "--threads", str(threads), *more]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    running = [
        subprocess.Popen(
            [sys.executable, __file__, *options],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit(f"one of {processes} processes failed; what it said is above")


def run(args: argparse.Namespace) -> None:
    """One process: load, check, time. Process 0 writes what it found."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(args.threads)
    rank, world, folder = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), args.folder
    split: dict[str, Any] = {"distributed_config": DistributedConfig(tp_size=world)} if world > 1 else {}
    bare, served = (
        AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16, **split).eval() for _ in range(2)
    )
    size = sum(file.stat().st_size for file in (folder / "a0").glob("*.safetensors"))
    runtime = mlora.patch(served, memory=2 * size * args.adapters, fully_sharded=args.fully_sharded)
    for number in range(args.adapters):
        runtime.load_adapter(folder / f"a{number}", f"a{number}")
    ids = torch.randint(
        3, bare.config.vocab_size, (args.adapters, args.prompt), generator=torch.Generator().manual_seed(0)
    )
    names = [f"a{number}" for number in range(args.adapters)]
    found: dict[str, Any] = {
        "processes": world, "fully_sharded": args.fully_sharded, "bytes": runtime.adapters["a0"].bytes
    }  # fmt: skip
    with torch.inference_mode():
        check(bare, served, ids, names, folder, world)
        found["exchange_seconds"] = exchanges(bare, ids, args.repeats)
        cases = Case("bare", bare), Case("mlora", served, {"adapter_names": names})
        for phase, make, repeats in (
            ("decode step", lambda case: decoder(case, ids), args.repeats),
            ("generate", lambda case: generation(case, ids, args.new), max(args.repeats // 6, 2)),
        ):
            bare_times, times = alternate(*map(make, cases), repeats)
            ratios = [mine / its for mine, its in zip(times, bare_times, strict=True)]
            found[phase] = {"ratio": quantiles(ratios), "seconds": quantiles(times)[0],
                            "bare_seconds": quantiles(bare_times)[0], "repeats": repeats}  # fmt: skip
    if rank == 0:
        (folder / file_name(world, args.fully_sharded)).write_text(json.dumps(found))
    if world > 1:
        torch.distributed.destroy_process_group()


WAIT = torch.ops._c10d_functional.wait_tensor.default


class Collectives(TorchDispatchMode):
    """Keeps the calls by which processes exchange."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and func is not WAIT:
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def exchanges(model: Any, ids: torch.Tensor, repeats: int) -> float:
    """Seconds of the exchanges of a decode step, by themselves."""
    step = decoder(Case("bare", model), ids)
    step()
    with Collectives() as kept:
        step()

    def again() -> None:
        for func, args, kwargs in kept.calls:
            out = func(*args, **kwargs)
            if func.namespace == "c10d":
                out[-1].wait()
            else:
                WAIT(out)

    again()
    return quantiles([seconds(again) for _ in range(repeats)])[0]


def check(bare: Any, served: Any, ids: torch.Tensor, names: list[Any], folder: Path, world: int) -> None:
    """Exit where rows are not what they should be; the process that is alone leaves its own for the others."""
    plain = bare(ids).logits
    mixed = served(ids, adapter_names=[*names[:-1], None]).logits
    if not torch.equal(mixed[-1], plain[-1]) or not torch.equal(served(ids).logits, plain):
        raise SystemExit("refused to report: a base row differs from the bare model's")
    if world == 1:
        torch.save((plain, mixed), folder / "rows.pt")
        return
    alone, want = torch.load(folder / "rows.pt")
    off, usual = rms(mixed[:-1] - want[:-1]), rms(plain - alone)
    if not off <= 2 * usual or not rms(want[:-1] - alone[:-1]) > 4 * usual:
        raise SystemExit(
            f"refused to report: rows with adapters are {off:.3g} from those of one process (RMS of the logits), base "
            f"rows {usual:.3g}"
        )


if __name__ == "__main__":
    main()
