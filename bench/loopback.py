"""What HTTP costs: the server through the loopback, its client in a process of its own, against the engine called
directly. 16 streams under 16 adapters at once, in turns; and a lone short request's time to its first token.

    python bench/loopback.py --out bench/results/loopback.jsonl
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from common import Log, add_arguments, machine, quantiles, set_up
from engines import Bench
from rich.table import Table
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from mlora.cli.models import load_tokenizer
from mlora.serve import Engine, Sampling
from mlora.serve.http import create_app

# As plain as can be, so that it takes little of the two cores: a connection a stream, until its last line.
CLIENT = """
import asyncio, json, sys, time
host, port = sys.argv[1], int(sys.argv[2])
async def ask(body):
    began, first = time.perf_counter(), None
    reader, writer = await asyncio.open_connection(host, port)
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\\r\\nhost: x\\r\\ncontent-type: application/json\\r\\n"
    writer.write(head.encode() + f"content-length: {len(data)}\\r\\n\\r\\n".encode() + data)
    while not (line := await reader.readline()).startswith(b"data: [DONE]"):
        assert line, "the stream broke off"
        if first is None and line.startswith(b"data: "):
            first = time.perf_counter() - began
    writer.close()
    return first
async def main(bodies):
    began = time.perf_counter()
    firsts = await asyncio.gather(*map(ask, bodies))
    return time.perf_counter() - began, firsts[0]
for line in sys.stdin:
    print(json.dumps(asyncio.run(main(json.loads(line)))), flush=True)
"""


def words(vocabulary: int) -> Any:
    """A tokenizer for a model of random weights."""
    core = Tokenizer(WordLevel({f"w{index}": index for index in range(vocabulary)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=core)


@contextmanager
def running(app: Any) -> Iterator[int]:
    """The port of a server in a thread of its own."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


async def direct(engine: Engine, asked: Sequence[tuple[list[int], str | None]], new: int) -> tuple[float, float]:
    """Seconds of all, and to the first token of the first."""
    began = time.perf_counter()

    async def one(prompt: list[int], name: str | None) -> float:
        first = None
        async for _ in engine.generate(prompt, name, Sampling(max_new_tokens=new, ignore_eos=True)):
            first = first or time.perf_counter() - began
        return first or 0.0

    firsts = await asyncio.gather(*(one(*each) for each in asked))
    return time.perf_counter() - began, firsts[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder; default SmolLM2-135M-Instruct")
    parser.add_argument("--repeats", type=int, default=7)
    add_arguments(parser)
    args = parser.parse_args()
    args.fused = "bit-equal"
    args.prompt, args.new, args.rank, args.adapters = (12, 6, 4, 4) if args.smoke else (64, 64, 16, 16)
    args.repeats = 2 if args.smoke else args.repeats
    console = set_up(args)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        tokenizer = words(bench.vocabulary) if args.smoke else load_tokenizer(args.model)
        engine = Engine(bench.served.mlora, tokenizer, cache_tokens=64 * (args.prompt + args.new + 16))
        batch = list(zip(bench.prompts(args.adapters, args.prompt), bench.names, strict=True))
        lone: list[tuple[list[int], str | None]] = [(bench.prompts(1, 4)[0], None)]
        times: dict[str, list[float]] = {"batch": [], "over": [], "direct": [], "http": []}
        with running(create_app(engine, "base")) as port:
            command = [sys.executable, "-c", CLIENT, "127.0.0.1", str(port)]
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
                assert client.stdin is not None and client.stdout is not None

                def http(asked: Sequence[tuple[list[int], str | None]], new: int) -> tuple[float, float]:
                    common = {"max_tokens": new, "temperature": 0, "ignore_eos": True, "stream": True}
                    bodies = [{"model": name or "base", "prompt": prompt, **common} for prompt, name in asked]
                    print(json.dumps(bodies), file=client.stdin, flush=True)
                    whole, first = json.loads(client.stdout.readline())
                    return whole, first

                for turn in range(args.repeats + 1):
                    plain, served = asyncio.run(direct(engine, batch, args.new))[0], http(batch, args.new)[0]
                    firsts = [(asyncio.run(direct(engine, lone, 2))[1], http(lone, 2)[1]) for _ in range(5)]
                    if turn:  # the first warms up
                        times["batch"].append(served / plain)
                        times["over"] += [(own - least) * 1e3 for least, own in firsts]
                        times["direct"] += [least * 1e3 for least, _ in firsts]
                        times["http"] += [own * 1e3 for _, own in firsts]
        log = Log(
            args.out, bench="loopback", **machine(), model=args.model or "SmolLM2-135M-Instruct", smoke=args.smoke
        )
        ratio, over = quantiles(times["batch"]), quantiles(times["over"])
        table = Table("figure", "median (20 to 80%)", "to reach")
        table.add_row(
            f"{len(batch)} streams, over the engine", "{:.3f} ({:.3f} to {:.3f})".format(*ratio), "at most 1.08"
        )
        table.add_row("first token of a lone request, ms more", "{:.1f} ({:.1f} to {:.1f})".format(*over), "at most 5")
        console.print(table)
        alone = {key: statistics.median(times[key]) for key in ("direct", "http")}
        log.write(figure="streams", ratio=ratio, prompt=args.prompt, new=args.new, rank=args.rank)
        log.write(figure="first token", more_ms=over, **{f"{key}_ms": value for key, value in alone.items()})


if __name__ == "__main__":
    main()
