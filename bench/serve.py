"""The serving engine's figures, as ratios in one run: SmolLM2-135M in bf16, requests of 64 prompt and 64 new tokens.

Stock continuous batching is transformers' own of the bare model, with the same attention. Bare and patched model share
their weights, and what is compared takes turns. Before any timing the engine's greedy tokens are checked against
`generate` of each request alone; where they part, the two tokens must be within rounding of each other there.

    python bench/serve.py --out bench/results/serve.jsonl
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import Log, add_arguments, machine, quantiles, seconds, set_up
from generate import load, make_adapter, patched, tiny_llama, twin
from rich.table import Table
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager

from mlora.serve import Engine, Sampling, attention
from mlora.serve.batching import Worker

ROUNDING = 2**-8 * 4  # of bf16 logits, which several sums of the base's products leave


class Stock(ContinuousBatchingManager):
    """transformers' own, with the attention that the engine has."""

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        self._original_attn_impl = model.config._attn_implementation
        model.set_attn_implementation(attention.register())

    def _create_batch_processor(self) -> Any:
        processor = super()._create_batch_processor()
        attention.read_in_place(processor.cache)
        return processor


class Bench:
    """The models, the requests, and what a figure is measured with."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args = args
        self.bare = tiny_llama() if args.smoke else load(args.model)
        self.vocabulary = self.bare.config.vocab_size
        self.folders = [make_adapter(self.bare, folder / f"a{i}", args.rank, seed=i) for i in range(args.adapters)]
        self.bytes = sum(file.stat().st_size for file in self.folders[0].glob("*.safetensors"))
        self.served = patched(self.bare, self.folders, self.bytes, True)
        self.names = [folder.name for folder in self.folders]
        self.new = Sampling(max_new_tokens=args.new, ignore_eos=True)

    def prompts(self, count: int, length: int, seed: int = 0) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, self.vocabulary, (count, length), generator=generator).tolist()

    def engine(self, model: Any = None, **options: Any) -> Engine:
        tokens = options.pop("cache_tokens", 64 * (self.args.prompt + self.args.new + 16))
        return Engine((model or self.served).mlora, cache_tokens=tokens, **options)

    def stock(self, running: int) -> Stock:
        tokens = running * (self.args.prompt + self.args.new + 16)
        config = ContinuousBatchingConfig(
            num_blocks=-(-tokens // 16), page_size=16, max_batch_tokens=512, auto_switch_to_flash=False,
            use_cuda_graph=False, use_async_batching=False,
        )  # fmt: skip
        stock = Stock(self.bare, GenerationConfig(do_sample=False, eos_token_id=-1), config)
        stock.start()
        return stock

    def generate(self, prompts: Sequence[Sequence[int]], names: Any, model: Any = None) -> torch.Tensor:
        """All rows in one batch."""
        ids = torch.tensor(prompts)
        fixed = {"max_new_tokens": self.args.new, "min_new_tokens": self.args.new, "do_sample": False}
        with torch.inference_mode():
            out = (model or self.served).generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names, pad_token_id=0, **fixed
            )
        return out[:, ids.shape[1] :]

    def run(self, engine: Engine, requests: Sequence[tuple[Any, ...]]) -> list[list[int]]:
        answers = {one.request: [token.id for token in one.tokens] for one in engine.generate_many(requests, self.new)}
        return [answers[number] for number in range(len(requests))]

    def run_stock(self, stock: Stock, prompts: Sequence[Sequence[int]]) -> None:
        for number, prompt in enumerate(prompts):
            stock.add_request(list(prompt), request_id=f"{time.perf_counter()}-{number}", max_new_tokens=self.args.new)
        done = 0
        while done < len(prompts):
            output = stock.get_result(timeout=1)
            done += output is not None and output.is_finished()

    def check(self) -> str:
        """The engine against `generate` of each request alone."""
        prompts = self.prompts(16, self.args.prompt, seed=9)
        names = [self.names[i % len(self.names)] for i in range(16)]
        with self.engine(max_running=16) as engine:
            got = self.run(engine, list(zip(prompts, names, strict=True)))
        equal, some = 0, slice(None, None, 4)
        for prompt, name, one in zip(prompts[some], names[some], got[some], strict=True):
            alone = self.generate([prompt], [name])[0].tolist()
            at = next((at for at in range(len(one)) if one[at] != alone[at]), None)
            equal += at is None
            if at is not None:
                with torch.inference_mode():
                    ids = torch.tensor([[*prompt, *one[:at]]])
                    scores = self.served(ids, adapter_names=[name]).logits[0, -1].float()
                gap = float(scores[alone[at]] - scores[one[at]])
                if gap > ROUNDING * float(scores.abs().max()):
                    raise SystemExit(
                        f"{name}: token {at} is {one[at]}, alone {alone[at]}; their scores differ by {gap}"
                    )
        return f"{equal} of 4 answers are those of generate alone to the last token, others up to rounding"


def turns(repeats: int, *calls: Callable[[], object]) -> list[list[float]]:
    """Seconds of each call, in turns; the first turn warms up."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + 1):
        for own, call in zip(times, calls, strict=True):
            taken = seconds(call)
            if turn:
                own.append(taken)
    return times


def ratios(one: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    return quantiles([a / b for a, b in zip(one, other, strict=True)])


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
    import mlora

    runtime = mlora.patch(model, memory=2 * slots * bench.bytes, max_adapters=slots)
    for name, folder in zip(bench.names, bench.folders, strict=True):
        runtime.load_adapter(folder, f"resident-{name}")
    weights = [1 / (rank + 1) for rank in range(registered)]
    draw = random.Random(11)
    popular = draw.choices([f"path-{rank}" for rank in range(registered)], weights, k=count)
    few = [f"resident-{bench.names[i % len(bench.names)]}" for i in range(count)]
    prompts = bench.prompts(count, args.prompt, seed=77)
    with bench.engine(model, max_running=16, ahead=16, host_memory=256 * bench.bytes) as engine:
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


FIGURES = {
    "concurrent": concurrent,
    "by_adapter": by_adapter,
    "long_steps": long_steps,
    "prefixes": prefixes,
    "many_adapters": many_adapters,
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
    parser.add_argument("--figures", nargs="*", default=list(FIGURES), choices=list(FIGURES))
    add_arguments(parser)
    args = parser.parse_args()
    if args.smoke:
        args.prompt, args.new, args.rank, args.adapters, args.repeats = 12, 6, 4, 4, 1
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    console = set_up(args)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        console.print(bench.check())
        log = Log(args.out, bench="serve", **machine(), model=args.model or "SmolLM2-135M-Instruct", smoke=args.smoke)
        table = Table("figure", "ratio (20 to 80%)", "to reach")
        for name in args.figures:
            with console.status(name):
                for record in FIGURES[name](bench):
                    middle, low, high = record["ratio"]
                    want = record.pop("want")
                    target = "" if want is None else f"at least {-want:g}" if want < 0 else f"at most {want:g}"
                    table.add_row(record["figure"], f"{middle:.2f} ({low:.2f} to {high:.2f})", target)
                    log.write(**record, prompt=args.prompt, new=args.new, rank=args.rank)
        console.print(table)


if __name__ == "__main__":
    main()
