"""The loads of bench/serve.py. Each yields records: "figure", "ratio", and "want", negative where more is better."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

from common import seconds
from engines import Bench, ratios, turns
from generate import twin

import mlora
from mlora.serve import Engine, Sampling
from mlora.serve.batching import Worker


def concurrent(bench: Bench) -> Iterator[dict[str, Any]]:
    """16 requests at once, each with its own adapter."""
    prompts, seed = bench.prompts(16, bench.args.prompt), iter(range(10_000))
    names = [bench.names[i % len(bench.names)] for i in range(16)]

    def fresh() -> list[list[int]]:  # or prefixes would be shared from turn to turn
        return bench.prompts(16, bench.args.prompt, seed=100 + next(seed))

    stock = bench.stock(16)
    with bench.engine(max_running=16) as engine:
        calls = (
            lambda: bench.run(engine, [(prompt, name) for prompt, name in zip(fresh(), names, strict=True)]),
            lambda: bench.run(engine, [(prompt, None) for prompt in fresh()]),
            lambda: bench.run_stock(stock, fresh()),
            lambda: bench.generate(prompts, names),
        )
        adapters, base, bare, batch = turns(bench.args.repeats, *calls)
    stock.stop(block=True, hard_stop=True)
    tokens = 16 * bench.args.new
    common = {"requests": 16, "tokens_per_s": tokens / statistics.median(adapters)}
    yield {
        "figure": "16 adapters, over stock continuous batching",
        "ratio": ratios(adapters, bare),
        "want": 1.0,
        **common,
    }
    yield {
        "figure": "16 adapters, over generate() of one batch",
        "ratio": ratios(adapters, batch),
        "want": 1.0,
        **common,
    }
    yield {"figure": "16 base requests, over stock", "ratio": ratios(base, bare), "want": None, **common}


def by_adapter(bench: Bench) -> Iterator[dict[str, Any]]:
    """64 requests over 16 adapters that arrive at once, against one adapter after the other."""
    count = 64 if not bench.args.smoke else 8
    order = random.Random(3)
    names = [bench.names[i % len(bench.names)] for i in range(count)]
    order.shuffle(names)
    runtime, seed = bench.served.mlora, iter(range(10_000))

    def mixed() -> None:
        prompts = bench.prompts(count, bench.args.prompt, seed=2000 + next(seed))
        with bench.engine(max_running=64) as engine:
            bench.run(engine, list(zip(prompts, names, strict=True)))

    def grouped() -> None:
        """All requests of an adapter as one batch, then the next adapter's."""
        prompts = bench.prompts(count, bench.args.prompt, seed=1)
        for name in dict.fromkeys(names):
            own = [prompt for prompt, one in zip(prompts, names, strict=True) if one == name]
            runtime.set_adapter(name)
            bench.generate(own, None)
        runtime.set_adapter(None)

    def in_order() -> None:
        """As they came: a batch is as long as no other adapter comes."""
        prompts = bench.prompts(count, bench.args.prompt, seed=1)
        start = 0
        while start < count:
            end = start
            while end < count and names[end] == names[start]:
                end += 1
            runtime.set_adapter(names[start])
            bench.generate(prompts[start:end], None)
            start = end
        runtime.set_adapter(None)

    repeats = max(1, bench.args.repeats // 3)
    ours, groups, order_times = turns(repeats, mixed, grouped, in_order)
    yield {
        "figure": "throughput, over adapter by adapter in order of arrival",
        "ratio": ratios(order_times, ours),
        "want": -6.0,
    }
    yield {"figure": "throughput, over adapter by adapter, sorted", "ratio": ratios(groups, ours), "want": None}


def long_steps(bench: Bench) -> Iterator[dict[str, Any]]:
    """A decode step with 64 sequences of 512 cached tokens, against 16."""
    length, steps = (512, 24) if not bench.args.smoke else (32, 6)
    medians = {}
    for count in (16, 64):
        times: list[float] = []
        step = Worker._generation_step

        def timed(worker: Worker, step: Any = step, times: list[float] = times, count: int = count) -> None:
            batch = worker.batch_processor.inputs_and_outputs.requests_in_batch
            decodes = len(batch) == count and all(one.query_length == 1 for one in batch)
            start = time.perf_counter()
            step(worker)
            if decodes:
                times.append(time.perf_counter() - start)

        Worker._generation_step = timed  # type: ignore[method-assign]
        prompts = bench.prompts(count, length, seed=count)
        names = [bench.names[i % len(bench.names)] for i in range(count)]
        sampling = Sampling(max_new_tokens=steps + 4 * count, ignore_eos=True)  # until the last prompt has been read
        total = count * (length + sampling.max_new_tokens + 16)
        with bench.engine(max_running=count, cache_tokens=total) as engine:
            answers = engine.generate_many(
                [(prompt, name, sampling) for prompt, name in zip(prompts, names, strict=True)]
            )
            for _ in answers:
                if len(times) >= steps:
                    break
        Worker._generation_step = step  # type: ignore[method-assign]
        medians[count] = statistics.median(times[:steps])
    ratio = medians[64] / medians[16]
    ms = {str(count): round(1000 * value, 2) for count, value in medians.items()}
    yield {"figure": f"decode step, 64 over 16 sequences of {length}", "ratio": (ratio,) * 3, "want": 4.4, "ms": ms}


def prefixes(bench: Bench) -> Iterator[dict[str, Any]]:
    """Time to first token of 16 requests of one adapter, whose prompts have 512 tokens in common."""
    length = 512 if not bench.args.smoke else 48
    seed = iter(range(10_000))

    async def ask(engine: Engine) -> float:
        shared = bench.prompts(1, length, seed=5000 + next(seed))[0]
        own = bench.prompts(16, 16, seed=5000 + next(seed))
        return statistics.mean(await first_tokens(engine, [([*shared, *one], bench.names[0]) for one in own]))

    async def run() -> tuple[list[float], list[float]]:
        total = 16 * (length + 48)
        both: tuple[list[float], list[float]] = ([], [])
        with (
            bench.engine(max_running=16, cache_tokens=2 * total) as sharing,
            bench.engine(max_running=16, cache_tokens=total, share_prefixes=False) as alone,
        ):
            for turn in range(bench.args.repeats + 1):
                for times, engine in zip(both, (sharing, alone), strict=True):
                    taken = await ask(engine)
                    if turn:
                        times.append(taken)
        return both

    shared, unshared = asyncio.run(run())
    yield {
        "figure": f"time to first token with {length} shared tokens, over unshared",
        "ratio": ratios(shared, unshared),
        "want": 0.35,
        "ms": {"shared": 1000 * statistics.median(shared), "unshared": 1000 * statistics.median(unshared)},
    }


async def first_tokens(engine: Engine, requests: Sequence[tuple[Any, Any]]) -> list[float]:
    async def one(prompt: Any, name: Any) -> float:
        start = time.perf_counter()
        async for _ in engine.generate(prompt, name, Sampling(max_new_tokens=2, ignore_eos=True)):
            return time.perf_counter() - start
        raise AssertionError

    return await asyncio.gather(*(one(*request) for request in requests))


def many_adapters(bench: Bench) -> Iterator[dict[str, Any]]:
    """2,000 adapters by path, Zipf(1) popularity, 32 on the device, Poisson arrivals at 70% of capacity; against the
    same load on 16 adapters that are resident."""
    args = bench.args
    registered, count, slots = (2000, args.load, 32) if not args.smoke else (40, 24, 8)
    model = twin(bench.bare)
    host = (256 + len(bench.names)) * bench.bytes
    runtime = mlora.patch(model, memory=2 * slots * bench.bytes, max_adapters=slots, host_memory=host)
    for name, folder in zip(bench.names, bench.folders, strict=True):
        runtime.load_adapter(folder, f"resident-{name}")
    weights = [1 / (rank + 1) for rank in range(registered)]
    draw = random.Random(11)
    popular = draw.choices([f"path-{rank}" for rank in range(registered)], weights, k=count)
    few = [f"resident-{bench.names[i % len(bench.names)]}" for i in range(count)]
    prompts = bench.prompts(count, args.prompt, seed=77)
    with bench.engine(model, max_running=16, ahead=16) as engine:
        for rank in range(registered):
            engine.register(f"path-{rank}", bench.folders[rank % len(bench.folders)])
        warm = bench.prompts(32, args.prompt, seed=78)
        bench.run(engine, [(prompt, few[i]) for i, prompt in enumerate(warm[:16])])
        taken = seconds(lambda: bench.run(engine, [(prompt, few[i % 16]) for i, prompt in enumerate(warm)]))
        rate = 0.7 * len(warm) / taken
        gaps = [draw.expovariate(rate) for _ in range(count)]
        # In turns of a quarter of the requests each: what slows the machine slows both.
        results: dict[str, list[Any]] = {"few": [], "many": []}
        for part in range(4):
            rows = range(part * count // 4, (part + 1) * count // 4)
            for kind, names in (("few", few), ("many", popular)):
                chosen = [(prompts[row], names[row], gaps[row]) for row in rows]
                results[kind].append(asyncio.run(poisson(engine, chosen, bench.new)))
        stats = engine.stats()
    both = {}
    for kind, parts in results.items():
        firsts = sorted(first for part in parts for first in part[1])
        both[kind] = (sum(part[0] for part in parts), statistics.median(firsts), firsts[int(0.99 * (len(firsts) - 1))])
    few_s, few_p50, few_p99 = both["few"]
    many_s, many_p50, many_p99 = both["many"]
    common = {
        "requests": count, "rate": rate, "loads": stats.loads, "drops": stats.drops,
        "p50_ms": {"few": 1000 * few_p50, "many": 1000 * many_p50},
        "p99_ms": {"few": 1000 * few_p99, "many": 1000 * many_p99},
    }  # fmt: skip
    yield {"figure": f"{registered} adapters: throughput", "ratio": (few_s / many_s,) * 3, "want": -0.92, **common}
    yield {
        "figure": f"{registered} adapters: p99 to first token",
        "ratio": (many_p99 / few_p99,) * 3,
        "want": 1.5,
        **common,
    }


async def poisson(
    engine: Engine, requests: Sequence[tuple[Any, Any, float]], sampling: Sampling
) -> tuple[float, list[float]]:
    """Seconds until all answers are there, and each one's to its first token."""
    firsts: list[float] = []

    async def one(prompt: Any, name: Any) -> None:
        start, first = time.perf_counter(), None
        async for _ in engine.generate(prompt, name, sampling):
            first = first or time.perf_counter() - start
        firsts.append(first or 0.0)

    start, tasks = time.perf_counter(), []
    for prompt, name, gap in requests:
        await asyncio.sleep(gap)
        tasks.append(asyncio.create_task(one(prompt, name)))
    await asyncio.gather(*tasks)
    return time.perf_counter() - start, firsts
