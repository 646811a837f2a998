"""Attention on the CPU: `attend_` in a step of continuous batching, and `attend_step` in one of `generate`, beside
transformers' own and beside reading the caches.

Keys and values lie in transformers' pages of 256 tokens, shuffled, of as many layers as go beyond the last-level cache;
a call reads one layer's. Per workload, in turns:

    ours    `attend_`: reads the caches where they lie, and writes the new keys and values
    stock   what transformers' sdpa does on the CPU: write, copy all caches, one dense mask, the library's attention
    single  the library's attention of each sequence on its own, from copies of keys and values that cost nothing here
    read    torch reading as many bytes as the sequences' keys and values have, in one go

Before any timing ours is checked against the reference in fp64. Then decode steps of `ContinuousBatchingManager` on a
model of SmolLM2-135M's shape, with random weights: of 64 sequences of 512 tokens beside 16 such, and of 16 short ones
beside sdpa. Then calls of `attend_step` beside transformers' "sdpa", in turns, on caches that lie row by row: of rows
of one length, and padded on the left, where transformers hands over a mask.

    python bench/attention.py --out bench/results/attention.jsonl
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from common import Log, add_arguments, llc_bytes, machine, now, quantiles, seconds, set_up, streaming_read
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import (
    ContinuousBatchingConfig,
    ContinuousBatchingManager,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from mlora.ops import attention as reference
from mlora.ops import dispatch
from mlora.serve import attention

PAGE = 256
STOCK = 1 << 28  # most scores that stock is timed with


@dataclass(frozen=True)
class Workload:
    """`sequences` of `past` cached and `new` tokens."""

    sequences: int
    past: int
    new: int = 1
    heads: int = 9
    kv_heads: int = 3
    dim: int = 64
    dtype: torch.dtype = torch.bfloat16

    @property
    def bytes(self) -> int:
        """Of the keys and values that a call reads."""
        return self.sequences * (self.past + self.new) * self.kv_heads * self.dim * 2 * self.dtype.itemsize


class Buffers:
    """Caches of `layers` layers for a workload; a call takes the number of a layer."""

    def __init__(self, load: Workload, layers: int) -> None:
        self.load, self.layers = load, layers
        draw = torch.Generator().manual_seed(0)
        length, pages = load.past + load.new, -(-(load.past + load.new) // PAGE)
        rows = load.sequences * pages * layers * 2 * PAGE
        pool = torch.randn(1_000_003, generator=draw).to(load.dtype)
        size = rows * load.kv_heads * load.dim
        cache = pool.repeat(-(-size // len(pool)))[:size].view(rows, load.kv_heads, load.dim)
        self.caches = [(cache[2 * i * PAGE :], cache[(2 * i + 1) * PAGE :]) for i in range(layers)]
        blocks = torch.randperm(load.sequences * pages, generator=draw).view(load.sequences, pages)
        index = (blocks[:, :, None] * layers * 2 * PAGE + torch.arange(PAGE)).flatten(1)[:, :length]
        self.read, self.write = index.flatten(), index[:, load.past :].reshape(-1).contiguous()
        counts = torch.arange(load.sequences + 1, dtype=torch.int32)
        self.q_starts, self.k_starts = counts * load.new, counts * length
        tokens = load.sequences * load.new
        self.q, self.k, self.v = (
            torch.randn(1, tokens, heads, load.dim, generator=draw).to(load.dtype).transpose(1, 2)
            for heads in (load.heads, load.kv_heads, load.kv_heads)
        )
        self.mask = torch.full((0, 0), 0.0)
        self.apart: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []

    def tensors(self, layer: int) -> tuple[Tensor, ...]:
        return (self.q, self.k, self.v, *self.caches[layer], self.read, self.write, self.q_starts, self.k_starts)

    def ours(self, layer: int) -> Tensor:
        return dispatch.attend_(*self.tensors(layer), self.load.dim**-0.5, 0.0, 0)

    def seen(self) -> Tensor:
        """(new, past + new): whether a sequence's new tokens see its keys."""
        return torch.ones(self.load.new, self.load.past + self.load.new, dtype=torch.bool).tril(self.load.past)

    def prepare_stock(self) -> bool:
        """Makes the mask, as transformers does once a step; False where that is too large to wait for."""
        if len(self.write) * len(self.read) * self.load.heads > STOCK:
            return False
        self.mask = torch.full((len(self.write), len(self.read)), torch.finfo(self.load.dtype).min)
        for part, keys in zip(
            self.mask.split(self.load.new), range(0, len(self.read), self.load.past + self.load.new), strict=True
        ):
            part[:, keys : keys + self.load.past + self.load.new].masked_fill_(self.seen(), 0)
        self.mask = self.mask.to(self.load.dtype)[None, None]
        return True

    def stock(self, layer: int) -> Tensor:
        caches, group = self.caches[layer], self.load.heads // self.load.kv_heads
        for cache, new in zip(caches, (self.k, self.v), strict=True):
            cache.index_copy_(0, self.write, new[0].transpose(0, 1))
        k, v = (repeat_kv(torch.index_select(cache, 0, self.read).transpose(0, 1)[None], group) for cache in caches)
        out = F.scaled_dot_product_attention(self.q, k, v, attn_mask=self.mask, scale=self.load.dim**-0.5)
        return out.transpose(1, 2).contiguous()

    def prepare_single(self) -> None:
        load, group = self.load, self.load.heads // self.load.kv_heads
        mask = None if load.new == 1 else self.seen()
        length = load.past + load.new
        for s in range(load.sequences):
            rows = self.read[s * length : (s + 1) * length]
            k, v = (repeat_kv(cache[rows].transpose(0, 1)[None].contiguous(), group) for cache in self.caches[0])
            self.apart.append((self.q[:, :, s * load.new : (s + 1) * load.new], k, v, mask))

    def single(self, layer: int) -> None:
        for q, k, v, mask in self.apart:
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.load.dim**-0.5)

    def check(self) -> None:
        """Exit unless the error of ours, RMS and worst, is at most twice that of fp32 arithmetic rounded once."""
        copies = [tuple(t.clone() for t in self.tensors(0)) for _ in range(2)]
        exact = reference.attend_(*(t.double() if t.is_floating_point() else t for t in copies[0]), 0.125, 0.0, 0)
        rounded = reference.attend_(*copies[1], 0.125, 0.0, 0)
        got = dispatch.attend_(*self.tensors(0), 0.125, 0.0, 0)
        floor = torch.finfo(self.load.dtype).eps / 2 * exact.abs().max()
        ours, theirs = (got.double() - exact).abs(), (rounded.double() - exact).abs()
        if not (ours.norm() <= 2 * theirs.norm() + floor and ours.max() <= 2 * theirs.max() + floor):
            raise SystemExit(f"{self.load}: error {ours.max():.3g}, fp32 rounded once has {theirs.max():.3g}")


def workloads(smoke: bool) -> list[Workload]:
    if smoke:
        return [Workload(4, 40), Workload(2, 20, 30)]
    decode = [Workload(16, 96), Workload(16, 512), Workload(64, 512), Workload(1, 512), Workload(1, 4096)]
    return [*decode, Workload(16, 0, 64), Workload(1, 0, 512), Workload(4, 1024, 128), Workload(1, 4096, 256)]


def measure(console: Any, args: argparse.Namespace, log: Log) -> None:
    table = Table(title="A call (ms, medians; ratios are medians of turns)")
    columns = ("sequences", "past", "new", "ours", "stock / ours", "single / ours", "GB/s", "of read", "to 16")
    for column in columns:
        table.add_column(column, justify="right")
    decode16: dict[int, float] = {}
    for load in track(workloads(args.smoke), "Attention", transient=True):
        layers = min(30, max(2, -(-2 * llc_bytes() // load.bytes)))
        buffers = Buffers(load, layers)
        buffers.check()
        ways: dict[str, Callable[[int], object]] = {"ours": buffers.ours}
        if buffers.prepare_stock():
            ways["stock"] = buffers.stock
        buffers.prepare_single()
        ways["single"] = buffers.single
        times: dict[str, list[float]] = {way: [] for way in ways}
        speeds = []
        for turn in range(args.repeats):
            order = list(ways) if turn % 2 else list(ways)[::-1]
            for way in order:
                call = ways[way]
                few = range(layers if way == "ours" else 2)  # the others take long, and each layer as long
                times[way].append(seconds(lambda call=call, few=few: [call(i) for i in few]) / len(few))
            speeds.append(streaming_read(max(load.bytes * layers, 4 * llc_bytes()), 1))
        found = {way: quantiles(spent) for way, spent in times.items()}
        ratios = {
            way: quantiles([its / mine for mine, its in zip(times["ours"], times[way], strict=True)])
            for way in ways
            if way != "ours"
        }
        ours, speed = found["ours"][0], quantiles(speeds)[0]
        of_read = load.bytes / speed / ours
        if load.new == 1 and load.sequences == 16:
            decode16[load.past] = ours
        against = ours / decode16[load.past] if load.new == 1 and load.past in decode16 else None
        shape = {**asdict(load), "dtype": str(load.dtype)[6:], "layers": layers, "bytes": load.bytes}
        log.write(what="call", **shape, seconds=found, ratios=ratios, read_bytes_per_s=speed, of_read=of_read)
        table.add_row(
            *map(str, (load.sequences, load.past, load.new)),
            f"{ours * 1e3:.3f}",
            *(f"{ratios[way][0]:.2f}" if way in ratios else "" for way in ("stock", "single")),
            f"{load.bytes / ours / 1e9:.1f}",
            f"{of_read:.2f}" if load.new == 1 else "",
            f"{against:.2f}" if against else "",
        )
    console.print(table)


class Manager(ContinuousBatchingManager):
    """Keeps the time at which each step begins, and how many tokens it has."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.steps: list[tuple[float, int, int]] = []

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        pass

    def _create_batch_processor(self) -> Any:
        processor = super()._create_batch_processor()
        if self.model.config._attn_implementation == attention.NAME:
            attention.read_in_place(processor.cache)
        return processor

    def _generation_step(self) -> None:
        batch = self.batch_processor.inputs_and_outputs.requests_in_batch  # type: ignore[union-attr]
        self.steps.append((now(), len(batch), sum(request.query_length for request in batch)))
        super()._generation_step()


def step_seconds(model: Any, sequences: int, past: int, new: int) -> list[float]:
    """From the beginning of each step, in which all sequences decode, to that of the next."""
    config = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=sequences * -(-(past + new) // PAGE) + 8,
        max_batch_tokens=sequences * past,  # all prompts in the first step
        allow_block_sharing=False,
        auto_switch_to_flash=False,
    )
    manager = Manager(model, GenerationConfig(do_sample=False, eos_token_id=-1), config)
    draw = torch.Generator().manual_seed(0)
    for _ in range(sequences):
        manager.add_request(torch.randint(3, 1000, (past,), generator=draw).tolist(), max_new_tokens=new)
    with torch.inference_mode():
        manager.start()
    done = 0
    while done < sequences:
        result = manager.get_result(timeout=600)
        if result is None or result.error is not None:
            raise SystemExit(f"continuous batching failed: {result and result.error}")
        done += result.is_finished()
    manager.stop(block=True)
    steps = zip(manager.steps, manager.steps[1:], strict=False)
    return [after - at for (at, count, tokens), (after, _, _) in steps if count == tokens == sequences]


def measure_steps(console: Any, args: argparse.Namespace, log: Log) -> None:
    size = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": args.layers, "vocab_size": 49152}
    if args.smoke:
        size = {"hidden_size": 72, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 1024}
    config = LlamaConfig(
        **size, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=8192
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    new = 8 if args.smoke else 24
    ways = [(attention.register(), 16, 512), (attention.NAME, 64, 512), (attention.NAME, 16, 64), ("sdpa", 16, 64)]
    if args.smoke:
        ways = [(name, sequences // 8, past // 8) for name, sequences, past in ways]
    attention.check(model)
    times: dict[tuple[str, int, int], list[float]] = {way: [] for way in ways}
    for _ in track(range(1 if args.smoke else args.rounds), "Steps", transient=True):
        for name, sequences, past in ways:
            model.set_attn_implementation(name)
            times[name, sequences, past].extend(step_seconds(model, sequences, past, new))
    table = Table(title="A decode step (ms, medians)")
    for column in ("attention", "sequences", "of tokens", "step", "to 16 of as many, ours"):
        table.add_column(column, justify="right")
    for (name, sequences, past), spent in times.items():
        found = quantiles(spent)
        base = quantiles(times[attention.NAME, ways[0][1], past])[0]
        log.write(what="step", attention=name, sequences=sequences, past=past, seconds=found, ratio=found[0] / base)
        table.add_row(name, str(sequences), str(past), f"{found[0] * 1e3:.1f}", f"{found[0] / base:.2f}")
    console.print(table)


def a_layer(call: Callable[..., object], caches: list[list[Tensor]]) -> float:
    """Seconds of a call, of one for each layer's cache."""
    return seconds(lambda: [call(*cache) for cache in caches]) / len(caches)


def measure_rows(console: Any, args: argparse.Namespace, log: Log) -> None:
    """Of SmolLM2-135M's heads, and of a model of width 2048."""
    table = Table(title="A call for one token a row (us, medians; ratios are medians of turns)")
    for column in ("heads", "rows", "keys", "ours", "sdpa / ours", "GB/s", "padded", "sdpa / ours"):
        table.add_column(column, justify="right")
    dim, scale = 64, 64**-0.5
    sizes = [(4, 40)] if args.smoke else [(1, 80), (4, 80), (16, 80), (64, 80), (16, 512), (1, 4096)]
    for heads, kv_heads in ((9, 3), (32, 8)):
        layer = torch.nn.Module()
        layer.num_key_value_groups = heads // kv_heads
        for rows, keys in sizes:
            size = rows * kv_heads * keys * dim * 4
            layers = min(30, max(2, -(-2 * llc_bytes() // size)))
            draw = torch.Generator().manual_seed(0)
            q = torch.randn(rows, heads, 1, dim, generator=draw).bfloat16()
            caches = [
                [torch.randn(rows, kv_heads, keys, dim, generator=draw).bfloat16() for _ in range(2)]
                for _ in range(layers)
            ]
            starts = torch.arange(rows) * keys // (2 * rows)
            padded = (torch.arange(keys) >= starts[:, None])[:, None, None]
            found: dict[str, Any] = {}
            for what, mask in (("whole", None), ("padded", padded)):
                ours = functools.partial(dispatch.attend_step, q, mask=mask, scale=scale)
                theirs = functools.partial(sdpa_attention_forward, layer, q, attention_mask=mask, scaling=scale)
                exact = reference.attend_step(*(t.double() for t in (q, *caches[0])), mask, scale)
                outs = ours(*caches[0]), theirs(*caches[0])[0]
                error, usual = (float((out.double() - exact).norm()) for out in outs)
                if not error <= 1.5 * usual:
                    raise SystemExit(f"{rows} rows of {keys} keys: error {error:.3g}, sdpa has {usual:.3g}")
                times = [[a_layer(call, caches) for call in (ours, theirs)] for _ in range(args.repeats)]
                found[what] = {
                    "seconds": quantiles([mine for mine, _ in times]),
                    "sdpa_ratio": quantiles([its / mine for mine, its in times]),
                }
            shape = {"heads": heads, "kv_heads": kv_heads, "rows": rows, "keys": keys, "bytes": size}
            log.write(what="rows", **shape, **found)
            whole, with_mask = (found[what] for what in ("whole", "padded"))
            table.add_row(
                *map(str, (heads, rows, keys)),
                f"{whole['seconds'][0] * 1e6:.0f}",
                f"{whole['sdpa_ratio'][0]:.1f}",
                f"{size / whole['seconds'][0] / 1e9:.1f}",
                f"{with_mask['seconds'][0] * 1e6:.0f}",
                f"{with_mask['sdpa_ratio'][0]:.1f}",
            )
    console.print(table)


PARTS = {"pages": measure, "steps": measure_steps, "rows": measure_rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--layers", type=int, default=30, help="of the model")
    parser.add_argument("--rounds", type=int, default=2, help="of continuous batching, each of one run a case")
    parser.add_argument("--only", nargs="+", choices=PARTS)
    add_arguments(parser)
    args = parser.parse_args()
    if args.smoke:
        args.repeats = 2
    console = set_up(args)
    log = Log(args.out, benchmark="attention", **machine())
    for name in args.only or PARTS:
        PARTS[name](console, args, log)


if __name__ == "__main__":
    main()
