"""A client for any server with OpenAI's completions: latency against load, with adapters of one's choice.

Requests come by a Poisson process at each of `--rates`, each under an adapter of `--adapters`:

    uniform   each as likely as another
    zipf      the i-th as likely as 1 / i
    distinct  one after the other, so that requests that run together have different ones

    python bench/client.py --base-url http://127.0.0.1:8000 --adapters sql json pirate --rates 1 2 4 --out load.jsonl
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from common import Log, quantiles
from rich.console import Console
from rich.table import Table

WORDS = ("the", "road", "to", "old", "town", "went", "along", "a", "river", "where", "boats", "lay", "and", "waited")
POPULARITIES = ("uniform", "zipf", "distinct")


@dataclass(frozen=True)
class Seen:
    """One request, in seconds: to its first token, between two of its tokens (the mean), and to its end."""

    first: float
    between: float
    whole: float
    tokens: int


def chosen(adapters: Sequence[str], popularity: str, draw: random.Random) -> Iterator[str]:
    """The adapters of requests, without end."""
    if popularity == "distinct":
        yield from itertools.cycle(adapters)
    weights = [1 / (rank + 1) if popularity == "zipf" else 1.0 for rank in range(len(adapters))]
    while True:
        yield draw.choices(adapters, weights)[0]


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> Seen:
    """Raises httpx.HTTPError, and RuntimeError for an answer that is none."""
    start = time.perf_counter()
    first, last, tokens = None, start, 0
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            await answer.aread()
            raise RuntimeError(f"{answer.status_code}: {answer.text[:200]}")
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(str(chunk["error"]))
            if chunk["choices"]:
                last = time.perf_counter()
                first = first or last
            if chunk.get("usage"):
                tokens = chunk["usage"]["completion_tokens"]
    if first is None:
        raise RuntimeError("the stream had no token")
    return Seen(first - start, (last - first) / max(1, tokens - 1), last - start, tokens)


async def load(args: argparse.Namespace, rate: float, draw: random.Random) -> tuple[float, list[Seen], list[str]]:
    """Seconds that it took, what was served, and why others were not."""
    names = chosen(args.adapters or [args.model], args.popularity, draw)
    seen: list[Seen] = []
    failed: list[str] = []
    headers = {"authorization": f"Bearer {key}"} if (key := args.api_key or os.environ.get("MLORA_API_KEY")) else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)

    async def one(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        try:
            seen.append(await ask(client, body))
        except (httpx.HTTPError, RuntimeError) as error:
            failed.append(str(error) or type(error).__name__)

    async with httpx.AsyncClient(base_url=args.base_url, headers=headers, limits=limits, timeout=600) as client:
        start, tasks = time.perf_counter(), []
        for _ in range(args.requests):
            body = {
                "model": next(names),
                "prompt": " ".join(draw.choices(WORDS, k=args.prompt)),
                "max_tokens": args.new,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            tasks.append(asyncio.create_task(one(client, body)))
            await asyncio.sleep(draw.expovariate(rate))
        await asyncio.gather(*tasks)
        return time.perf_counter() - start, seen, failed


def summary(rate: float, took: float, seen: Sequence[Seen], failed: Sequence[str]) -> dict[str, Any]:
    """A record of the log: milliseconds as median, 20% and 80% quantile; `p99` beside them."""
    record: dict[str, Any] = {"rate": rate, "served": len(seen), "failed": len(failed), "why": sorted(set(failed))[:3]}
    if seen:
        record["requests_per_s"] = len(seen) / took
        record["tokens_per_s"] = sum(one.tokens for one in seen) / took
        for name in ("first", "between", "whole"):
            values = sorted(1000 * getattr(one, name) for one in seen)
            record[f"{name}_ms"] = quantiles(values)
            record[f"{name}_p99_ms"] = values[int(0.99 * (len(values) - 1))]
    return record


def plot(records: Sequence[dict[str, Any]], file: Path) -> None:
    """Time to the first token, and between two, against the load."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    records = [record for record in records if record["served"]]
    rates = [record["rate"] for record in records]
    for axis, name, title in zip(
        axes, ("first", "between"), ("time to first token", "time between tokens"), strict=True
    ):
        middle, low, high = zip(*(record[f"{name}_ms"] for record in records), strict=True)
        axis.fill_between(rates, low, high, alpha=0.25)
        axis.plot(rates, middle, marker="o", label="median, 20 to 80%")
        axis.plot(rates, [record[f"{name}_p99_ms"] for record in records], marker=".", linestyle="--", label="99%")
        axis.set(xlabel="requests a second", ylabel="ms", title=title, ylim=(0, None))
        axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", required=True, help="of the server, without /v1")
    parser.add_argument("--model", default="", help="what requests ask for where there are no --adapters")
    parser.add_argument("--adapters", nargs="*", help="names of adapters, the most popular first")
    parser.add_argument("--popularity", choices=POPULARITIES, default="uniform")
    parser.add_argument("--rates", nargs="+", type=float, default=[0.5, 1, 2, 4], help="requests a second")
    parser.add_argument("--requests", type=int, default=100, help="at each rate")
    parser.add_argument("--prompt", type=int, default=64, help="words of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--api-key", help="default: MLORA_API_KEY")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for JSON lines")
    parser.add_argument("--plot", type=Path, help="file for a picture")
    args = parser.parse_args()
    console = Console(highlight=False)
    log = Log(args.out, bench="client", popularity=args.popularity, adapters=len(args.adapters or ()))
    table = Table("requests/s", "served", "failed", "tokens/s", "first token ms (99%)", "between ms (99%)", "whole ms")
    records = []
    for rate in args.rates:
        record = summary(rate, *asyncio.run(load(args, rate, random.Random(args.seed))))
        records.append(record)
        log.write(**record, prompt=args.prompt, new=args.new, requests=args.requests)
        cells = ["", "", "", ""]
        if record["served"]:
            cells = [f"{record['tokens_per_s']:.1f}"]
            cells += [
                f"{record[f'{name}_ms'][0]:.0f} ({record[f'{name}_p99_ms']:.0f})" for name in ("first", "between")
            ]
            cells.append(f"{record['whole_ms'][0]:.0f}")
        table.add_row(f"{rate:g}", str(record["served"]), str(record["failed"]), *cells)
        for why in record["why"]:
            console.print(f"not served: {why}", markup=False)
    console.print(table)
    if args.plot is not None:
        plot(records, args.plot)


if __name__ == "__main__":
    main()
