"""The calls that bench/operators.py times, and what they work on."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mlora import layout
from mlora.ops import direct, dispatch
from mlora.plan.plan import Terms, plan_words

MIXED = (8, 16, 32, 64, 96, 128)  # ranks, in turn
GPU_BATCHES = ((16, 1), (16, 8), (16, 16), (64, 1), (64, 8), (64, 16), (64, 64), (2048, 1), (2048, 8))
POPULARITIES = ("identical", "distinct", "uniform", "zipf-1.5")
SCALE = 0.5


@dataclass(frozen=True)
class Workload:
    """One call: `tokens` tokens of `rows` rows, whose adapters have the given ranks (None is a base row)."""

    group: str
    label: str
    inputs: int
    outputs: int
    tokens: int
    route: tuple[int | None, ...]  # adapter of each row
    ranks: tuple[int, ...]  # rank of each adapter
    beyond: bool = False  # rotate through more than the last-level cache
    op: str = "apply"  # or "linear", "along" (linear in an order of its own), "library"
    dtype: torch.dtype = torch.bfloat16

    @property
    def used(self) -> set[int]:
        return {adapter for adapter in self.route if adapter is not None}

    @property
    def adapter_bytes(self) -> int:
        return sum(self.ranks[i] for i in self.used) * (self.inputs + self.outputs) * self.dtype.itemsize

    @property
    def set_bytes(self) -> int:
        """What differs from call to call: adapters, and the weight where the op reads that."""
        weight = 0 if self.op == "apply" else self.inputs * self.outputs * self.dtype.itemsize
        return self.adapter_bytes + weight

    @property
    def bytes(self) -> int:
        """What the call must move at least."""
        busy = sum(adapter is not None for adapter in self.route) * (self.tokens // len(self.route))
        if self.op != "apply":
            return self.set_bytes + self.tokens * (self.inputs + self.outputs) * self.dtype.itemsize
        return self.set_bytes + busy * (self.inputs + 2 * self.outputs) * self.dtype.itemsize

    @property
    def multiply_adds(self) -> int:
        """Of the base product."""
        return 0 if self.op == "apply" else self.tokens * self.inputs * self.outputs


class Buffers:
    """`copies` independent sets of adapters for one workload, and weights; `call(i)` runs the op with set i."""

    def __init__(self, load: Workload, copies: int, device: str = "cpu") -> None:
        self.load = load
        draw = torch.Generator().manual_seed(0)
        align = 64 // load.dtype.itemsize
        rows = np.full((copies, max(len(load.ranks), 1), layout.TABLE_WIDTH), -1, dtype=np.int64)
        rows[:, :, layout.RANK] = 0
        end = 0
        for copy in range(copies):
            for slot, rank in enumerate(load.ranks):
                row = rows[copy, slot]
                row[layout.RANK] = rank
                row[layout.SCALE] = np.float32(SCALE).view(np.uint32)
                for column, width in ((layout.A, load.inputs), (layout.B, load.outputs)):
                    row[column] = end
                    end += -(-rank * width // align) * align
        self.arena = torch.empty(max(end, 1), dtype=load.dtype)
        # Normal bf16 values drawn once and repeated: drawing hundreds of millions would take minutes.
        pool = (torch.randn(1_000_003, generator=draw) / math.sqrt(load.inputs)).to(load.dtype)
        for start in range(0, end, len(pool)):
            self.arena[start : start + len(pool)].copy_(pool[: min(len(pool), end - start)])
        self.tables = torch.from_numpy(rows)
        self.x = torch.randn(load.tokens, load.inputs, generator=draw).to(load.dtype)
        self.y = torch.randn(load.tokens, load.outputs, generator=draw).to(load.dtype)
        recipes: list[Terms] = [() if adapter is None else ((adapter, 1.0),) for adapter in load.route]
        self.plan = torch.from_numpy(plan_words(recipes))
        self.weight: Tensor | None = None
        self.kblock = 0
        if load.op != "apply":
            self.weight = torch.randn(copies, load.outputs, load.inputs, generator=draw).to(load.dtype)
            self.weight /= math.sqrt(load.inputs)
            if load.op == "linear":
                self.kblock = dispatch.probe_kblock(load.inputs, load.outputs, False, load.tokens, load.dtype)
            elif load.op == "along":
                served = dispatch.offered(load.tokens, load.dtype)
                self.kblock = dispatch.ALONG if served else dispatch.LIBRARY
        self.copies = copies
        if device != "cpu":
            for name in ("arena", "tables", "x", "y", "plan"):
                setattr(self, name, getattr(self, name).to(device))
        # Views made once: making them costs as much as a small call.
        self.rows = list(self.tables)
        self.weights = [] if self.weight is None else list(self.weight)
        # As layers call where nothing looks at operators; None where they call those.
        self.layers = [
            direct.layer_of(self.arena, rows, load.inputs, load.outputs, load.dtype) if device == "cpu" else None
            for rows in self.rows
        ]
        self.raw = self.plan.numpy().tobytes() if device == "cpu" else b""

    def call(self, i: int) -> Tensor:
        x, y, layer = self.x, self.y, self.layers[i]
        if self.weight is None:
            if layer is None:
                dispatch.apply_(y, None, x, self.arena, self.rows[i], self.plan)
            else:
                direct.apply(layer, self.raw, y, x)
            return y
        if self.load.op == "library":
            return torch.nn.functional.linear(x, self.weights[i])
        if layer is None:
            return dispatch.linear(x, self.weights[i], None, self.arena, self.rows[i], self.plan, self.kblock)
        y = x.new_empty(self.load.tokens, self.load.outputs)
        direct.linear(layer, self.raw, y, x, self.weights[i], None, self.kblock)
        return y

    def sweep(self) -> None:
        for i in range(self.copies):
            self.call(i)

    def readers(self) -> list[Callable[[], None]]:
        """Functions that read what `sweep` reads of adapters, call by call; none where it reads no whole words."""
        words = self.arena.numel() * self.arena.itemsize // 4 // self.copies
        if not self.load.used or self.arena.numel() * self.arena.itemsize % (4 * self.copies):
            return []
        parts = list(self.arena.view(torch.float32).view(self.copies, words))

        def sums() -> None:
            for part in parts:
                part.sum()

        def products() -> None:
            for part in parts:
                part.dot(part)

        return [sums, products]

    def expected(self, i: int, dtype: torch.dtype) -> Tensor:
        """What `call(i)` must give, computed in `dtype`."""
        load = self.load
        x = self.x.to(dtype)
        y = self.y.to(dtype) if self.weight is None else x @ self.weight[i].to(dtype).T
        per_row = load.tokens // len(load.route)
        for row, adapter in enumerate(load.route):
            if adapter is not None:
                a_at, b_at = (int(self.tables[i, adapter, column]) for column in (layout.A, layout.B))
                rank = load.ranks[adapter]
                a = self.arena[a_at : a_at + rank * load.inputs].view(rank, -1).to(dtype)
                b = self.arena[b_at : b_at + rank * load.outputs].view(rank, -1).to(dtype)
                part = slice(row * per_row, (row + 1) * per_row)
                y[part] += SCALE * (x[part] @ a.T) @ b
        return y

    def check(self) -> None:
        """Exit unless the error, worst and RMS, is at most twice that of fp32 arithmetic rounded once."""
        exact = self.expected(0, torch.float64)
        rounded = self.expected(0, torch.float32).to(self.load.dtype)
        saved = self.y.clone()
        got = self.call(0).clone()
        self.y.copy_(saved)
        for name, norm in (("worst", lambda e: e.abs().max()), ("RMS", lambda e: e.square().mean().sqrt())):
            error, allowed = float(norm(got - exact)), 2 * float(norm(rounded - exact))
            if not error <= allowed:
                raise SystemExit(
                    f"refused to report: {self.load.group} {self.load.label} {self.load.op}: {name} "
                    f"error {error:.3g} against fp64, allowed {allowed:.3g}"
                )


def routes(popularity: str, rows: int, base_share: float = 0.0) -> tuple[tuple[int | None, ...], int]:
    """Punica's popularities: the adapter of each row, numbered by first use, and how many there are."""
    draw = random.Random(0)
    if popularity == "identical":
        picks = [0] * rows
    elif popularity == "distinct":
        picks = list(range(rows))
    elif popularity == "uniform":
        count = math.isqrt(rows - 1) + 1 if rows > 1 else 1
        picks = [draw.randrange(count) for _ in range(rows)]
    else:  # each adapter is 1.5 times as popular as the next
        picks = draw.choices(range(rows), [1.5**-i for i in range(rows)], k=rows)
    base = set(draw.sample(range(rows), round(base_share * rows)))
    numbers: dict[int, int] = {}
    route = tuple(None if r in base else numbers.setdefault(pick, len(numbers)) for r, pick in enumerate(picks))
    return route, len(numbers)


def workloads(smoke: bool) -> Iterator[Workload]:
    yield from popularity_workloads(
        [(96, 80), (85, 33)] if smoke else [(576, 576), (576, 1536), (2048, 2048), (855, 2049)], smoke
    )
    yield from prefill_workloads(smoke)
    yield from bandwidth_workloads(smoke)
    yield from rank_workloads(smoke)
    yield from fused_workloads(smoke)
    yield from product_workloads(smoke)


def popularity_workloads(widths: list[tuple[int, int]], smoke: bool) -> Iterator[Workload]:
    for inputs, outputs in widths:
        for rows in (4,) if smoke else (1, 16, 64):
            for popularity in POPULARITIES:
                for rank in (16, 3) if (inputs, outputs) == widths[0] else (16,):
                    route, count = routes(popularity, rows)
                    label = f"{popularity}, {rows} rows, r{rank}"
                    yield Workload("popularity", label, inputs, outputs, rows, route, (rank,) * count)
        for share in (0.5, 1.0):
            route, count = routes("distinct", 16, share)
            label = f"distinct, 16 rows, {share:.0%} base"
            yield Workload("base rows", label, inputs, outputs, 16, route, (16,) * count)


def prefill_workloads(smoke: bool) -> Iterator[Workload]:
    inputs, outputs = (96, 80) if smoke else (576, 1536)
    for tokens in (32,) if smoke else (32, 128, 512, 2048):
        for popularity in ("identical", "distinct"):
            route, count = routes(popularity, 16)
            yield Workload("tokens", f"{popularity}, {tokens} tokens", inputs, outputs, tokens, route, (16,) * count)
    for rank in (20,) if smoke else (1, 3, 8, 20, 64, 256):
        route, count = routes("distinct", 16)
        yield Workload("ranks", f"distinct, 16 rows, r{rank}", inputs, outputs, 16, route, (rank,) * count)


def bandwidth_workloads(smoke: bool) -> Iterator[Workload]:
    widths = ((96, 80),) if smoke else ((576, 576), (2048, 2048), (4096, 4096), (4096, 14336))
    for (inputs, outputs), rank, beyond in itertools.product(widths, (16, 64), (False, True)):
        if not (smoke and beyond):
            route, count = routes("distinct", 16)
            label = f"r{rank}, {'beyond' if beyond else 'inside'} the LLC"
            yield Workload("bandwidth", label, inputs, outputs, 16, route, (rank,) * count, beyond)


def rank_workloads(smoke: bool) -> Iterator[Workload]:
    inputs, outputs = (96, 80) if smoke else (2048, 2048)
    mixes: tuple[tuple[str, tuple[int | None, ...]], ...] = (
        ("r8 alone", (0, None)),
        ("r256 alone", (None, 1)),
        ("r8 beside r256", (0, 1)),
    )
    for label, route in mixes:
        yield Workload("mixed ranks", label, inputs, outputs, 2, route, (8, 256))


def fused_workloads(smoke: bool) -> Iterator[Workload]:
    """The base product and the LoRA in one op, beside the library's product alone."""
    for inputs, outputs in ((96, 96),) if smoke else ((576, 576), (576, 1536), (1536, 576), (2048, 2048)):
        for label, (route, count) in {
            "base rows": ((None,) * 16, 0),
            "1 adapter": routes("identical", 16),
            "16 adapters": routes("distinct", 16),
        }.items():
            yield Workload("fused", label, inputs, outputs, 16, route, (16,) * count, op="linear")
        yield Workload("fused", "library, no LoRA", inputs, outputs, 16, (None,) * 16, (), op="library")


def product_workloads(smoke: bool) -> Iterator[Workload]:
    """The base product alone, by whom it is computed."""
    for inputs, outputs in ((96, 96),) if smoke else ((2048, 8192), (8192, 2048)):
        for tokens in (1, 9) if smoke else (1, 2, 4, 8, 16, 32, 64, 256):
            for op, name in (("library", "library"), ("linear", "its bits"), ("along", "own order")):
                route = (None,) * tokens
                yield Workload("product", f"{name}, {tokens} tokens", inputs, outputs, tokens, route, (), not smoke, op)


def gpu_workloads(smoke: bool) -> Iterator[Workload]:
    for outputs in (128,) if smoke else (4096, 14336):
        for rank in (16, 64, "mixed"):
            for tokens, adapters in GPU_BATCHES:
                ranks = tuple(MIXED[i % len(MIXED)] if rank == "mixed" else rank for i in range(adapters))
                route = tuple(t * adapters // tokens for t in range(tokens))
                label = f"{tokens} tokens, {adapters} adapters, r {rank}"
                yield Workload("gpu", label, 128 if smoke else 4096, outputs, tokens, route, ranks, beyond=True)
