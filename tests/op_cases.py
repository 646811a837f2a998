"""What tests of the operators share: adapters in an arena, plans, the fp64 loop of both, and how close is close."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mlora import layout
from mlora.ops import dispatch

NATIVE = dispatch.backend("cpu", torch.float32) == "cpu"
AVX2 = NATIVE and torch.ops.mlora.isa() >= 1
BF16 = NATIVE and torch.ops.mlora.isa() == 3
needs_native = pytest.mark.skipif(not NATIVE, reason="built without the C++ operators")
needs_avx2 = pytest.mark.skipif(not AVX2, reason="needs AVX2")
# Of rows that `linear` multiplies in blocks.
FUSED = [
    pytest.param(torch.float32, id="float32", marks=needs_avx2),
    pytest.param(torch.bfloat16, id="bfloat16", marks=pytest.mark.skipif(not BF16, reason="needs AVX512_BF16")),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ATTENTION_SHAPES = {  # heads, kv heads, dimensions: of few and of many heads a kv head, and of all tails
    "9/3x64": (9, 3, 64),
    "4/4x17": (4, 4, 17),
    "7/1x80": (7, 1, 80),
    "12/1x3": (12, 1, 3),
    "2/2x130": (2, 2, 130),
}
# Of rows, and whether the arena beside them is of fp32.
FORMS = [pytest.param(dtype, False, id=str(dtype)[6:]) for dtype in DTYPES]
FORMS += [pytest.param(dtype, True, id=f"{str(dtype)[6:]} by float32") for dtype in DTYPES[1:]]
EPS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # half an ulp of 1
PARTS = {"a": layout.A, "b": layout.B, "gain": layout.GAIN, "in_gain": layout.IN_GAIN, "shift": layout.SHIFT,
         "turn": layout.TURN, "in_turn": layout.IN_TURN}  # fmt: skip


def bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))


class Case:
    """Adapters of given ranks in an arena with junk between the parts, which start at multiples of `align`, and plans
    for recipes of (slot, weight). `dtype`: of rows, and of the arena unless `wide`, which then is fp32. `turns`: (size,
    stride) of each adapter's turns of both sides, or None."""

    def __init__(
        self, ranks, width_in, width_out, dtype, gains=False, shifts=False, in_gains=False, seed=0, align=1, turns=(),
        wide=False,
    ):  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        self.width_in, self.width_out, self.dtype, self.generator = width_in, width_out, dtype, g
        dtype = torch.float32 if wide else dtype
        self.table = torch.full((len(ranks), layout.TABLE_WIDTH), -1, dtype=torch.int64)
        self.table[:, layout.RANK] = 0
        self.adapters: list[dict] = []
        chunks: list[Tensor] = []
        at = 0
        for slot, rank in enumerate(ranks):
            adapter = {"scale": 0.5 + 0.25 * slot}
            self.table[slot, layout.SCALE] = bits(adapter["scale"]) & 0xFFFFFFFF
            self.table[slot, layout.RANK] = rank
            parts = {}
            if rank:
                parts["a"] = torch.randn(rank, width_in, generator=g) / width_in**0.5
                parts["b"] = torch.randn(rank, width_out, generator=g) / rank**0.5
            if gains and slot % 2 == 0:
                parts["gain"] = torch.randn(width_out, generator=g) * 0.1
            if shifts and slot % 3 != 1:
                parts["shift"] = torch.randn(width_out, generator=g)
            if in_gains and slot % 2 == 0:
                parts["in_gain"] = torch.randn(width_in, generator=g)
            if turns and turns[slot]:
                size, _ = turns[slot]
                self.table[slot, [layout.TURN_SHAPE, layout.IN_TURN_SHAPE]] = layout.turn_shape(*turns[slot])
                parts["turn"] = torch.randn(size, width_out, generator=g) / size**0.5
                parts["in_turn"] = torch.randn(size, width_in, generator=g) / size**0.5
                adapter["shape"] = turns[slot]
            for name, part in parts.items():
                junk = torch.full((1 + slot % 3 + -(at + 1 + slot % 3) % align,), torch.nan)
                part = part.to(dtype)
                self.table[slot, PARTS[name]] = at + junk.numel()
                chunks += [junk.to(dtype), part.flatten()]
                at += junk.numel() + part.numel()
                adapter[name] = part.double()
            self.adapters.append(adapter)
        self.arena = (
            torch.cat(chunks) if chunks else torch.empty(0, dtype=dtype)
        )  # ends where the last part does, for the sanitizers

    def plan(self, recipes: list[list[tuple[int, float]]], spare: int = 3) -> Tensor:
        order: dict[tuple, list[int]] = {}
        for row, recipe in enumerate(recipes):
            order.setdefault(tuple(recipe), []).append(row)
        base = order.pop((), [])
        starts, rows, term_start, slots, weights = [0], [], [0], [], []
        for recipe, members in order.items():
            rows += members
            starts.append(len(rows))
            slots += [slot for slot, _ in recipe]
            weights += [bits(weight) for _, weight in recipe]
            term_start.append(len(slots))
        header = [len(recipes), len(order), len(slots), 0, 0, 0, 0, 0]
        entries = header + starts + rows + base + term_start + slots + weights + [2**31 - 1] * spare
        return torch.tensor(entries, dtype=torch.int32)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def oracle(self, y: Tensor, base: Tensor | None, x: Tensor, recipes) -> Tensor:
        """The fp64 loop."""
        out, x = y.double().clone(), x.double()
        b = out.clone() if base is None else base.double()
        length = x.shape[0] // len(recipes)
        for row, recipe in enumerate(recipes):
            t = slice(row * length, (row + 1) * length)
            for slot, weight in recipe:
                weight = float(np.float32(weight))
                adapter = self.adapters[slot]
                if "a" in adapter:
                    out[t] += weight * adapter["scale"] * (x[t] @ adapter["a"].T) @ adapter["b"]
                if "gain" in adapter:
                    out[t] += weight * adapter["gain"] * b[t]
                if "shift" in adapter:
                    out[t] += weight * adapter["shift"]
        return out


def turned(turn: Tensor, stride: int, x: Tensor) -> Tensor:
    """The fp64 loop of T - I, as a matrix."""
    size, width = turn.shape
    matrix = torch.zeros(width, width, dtype=torch.float64)
    n = torch.arange(width)
    first = n - n % (size * stride) + n % stride  # of each one's block
    for j in range(size):
        matrix[n, first + j * stride] = turn[j].double()
    return x.double() @ matrix.t()


def side_by_side(cases: list[Case]) -> Tensor:
    """One arena for the modules of a group; their tables are moved along."""
    at = 0
    for case in cases:
        parts = list(PARTS.values())
        case.table[:, parts] = torch.where(case.table[:, parts] >= 0, case.table[:, parts] + at, -1)
        at += case.arena.numel()
    return torch.cat([case.arena for case in cases])


def sentinel(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A strided (rows, width) view with NaN sentinels on every side of every row, and the buffer it lies in."""
    buffer = torch.full((rows + 2, width + 7), torch.nan, dtype=dtype)
    return buffer[1:-1, 3 : 3 + width], buffer


def check(got: Tensor, oracle: Tensor, ref: Tensor) -> None:
    """At most twice the error of the fp32 reference, over the whole and at its worst element, give or take what
    one rounding of the largest element may cost."""
    floor = EPS[got.dtype] * oracle.abs().max()
    ours, theirs = (got.double() - oracle).abs(), (ref.double() - oracle).abs()
    assert ours.norm() <= 2 * theirs.norm() + floor
    assert ours.max() <= 2 * theirs.max() + floor


A, B, MIX = [(0, 1.0)], [(1, -0.5)], [(0, 0.7), (2, 0.3), (1, 1.5)]
ROUTINGS = {
    "empty": ([[]], 0),
    "all-base": ([[], [], []], 1),
    "uniform": ([A], 7),
    "decode": ([A, [], B, MIX, A], 1),
    "prefill": ([MIX, [], B, A, B], 9),
    "long": ([A, []], 70),
}


def in_chains(x: Tensor, weight: Tensor, bias: Tensor | None, kblock: int) -> Tensor:
    """The product in fp32, summed over chains of `kblock` elements, whose totals are added in order."""
    total = x.new_zeros(x.shape[0], weight.shape[0])
    for start in range(0, x.shape[1], kblock):
        chain = torch.zeros_like(total)
        for k in range(start, min(start + kblock, x.shape[1])):
            chain += x[:, k, None] * weight[:, k]
        total += chain
    return total if bias is None else total + bias


def terms_of(case: Case, recipes: list, length: int) -> list[tuple[int, float, Tensor]]:
    """(slot, weight, tokens) of each term that has rank rows, route after route."""
    rows: dict[tuple, list[int]] = {}
    for row, recipe in enumerate(recipes):
        rows.setdefault(tuple(recipe), []).append(row)
    return [
        (slot, float(np.float32(weight)), torch.tensor([row * length + t for row in own for t in range(length)]))
        for recipe, own in rows.items()
        for slot, weight in recipe
        if "a" in case.adapters[slot]
    ]


def width_of_v(case: Case, recipes: list, length: int) -> int:
    return sum(len(tokens) * len(case.adapters[slot]["a"]) for slot, _, tokens in terms_of(case, recipes, length))


def parts_of(v: Tensor, case: Case, recipes: list, length: int) -> list[Tensor]:
    """Each term's part of v."""
    parts, at = [], 0
    routes = dict.fromkeys(tuple(recipe) for recipe in recipes)
    for recipe in routes:
        ranks = [len(case.adapters[slot]["a"]) for slot, _ in recipe if "a" in case.adapters[slot]]
        tokens = recipes.count(list(recipe)) * length
        own = v[at : at + tokens * sum(ranks)].view(tokens, sum(ranks))
        parts += own.split(ranks, 1) if ranks else []
        at += own.numel()
    assert at == v.numel()
    return parts


def offsets_of(case: Case, width: int, gap: int = 5) -> tuple[Tensor, int]:
    """Of all slots that have rank rows, the last first."""
    offsets, at = torch.full((len(case.table),), -1), gap
    for slot in reversed(range(len(case.table))):
        if "a" in case.adapters[slot]:
            offsets[slot] = at
            at += case.adapters[slot]["a"].shape[0] * width + gap
    return offsets, at


def check_kept(v: Tensor, x: Tensor, case: Case, recipes: list, length: int) -> None:
    """v against the fp64 loop."""
    terms = terms_of(case, recipes, length)
    for part, (slot, weight, tokens) in zip(parts_of(v, case, recipes, length), terms, strict=True):
        adapter = case.adapters[slot]
        factor, own = abs(weight * adapter["scale"]), x[tokens].double()
        want = weight * adapter["scale"] * own @ adapter["a"].T
        # A sum in fp32 of products, in whatever order: some roundings of the sum of their sizes.
        assert ((part - want).abs() <= 16 * EPS[torch.float32] * factor * own.abs() @ adapter["a"].abs().T).all()


def check_rank_gradients(
    to: Tensor, ref: Tensor, v: Tensor, rows: Tensor, offsets: Tensor, case: Case, recipes: list, length: int
) -> None:
    """What went `to`, and the reference's, against the fp64 loop; what is no gradient is still NaN."""
    want: dict[int, Tensor] = {}
    for part, (slot, _, own) in zip(parts_of(v, case, recipes, length), terms_of(case, recipes, length), strict=True):
        if len(own):
            want[slot] = want.get(slot, 0) + part.double().T @ rows[own].double()
    written = torch.zeros(len(to), dtype=torch.bool)
    for slot, gradient in want.items():
        span = slice(int(offsets[slot]), int(offsets[slot]) + gradient.numel())
        written[span] = True
        check(to[span].view(gradient.shape), gradient, ref[span].view(gradient.shape))
    assert to[~written].isnan().all(), "wrote outside of the gradients"
