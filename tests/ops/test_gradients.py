"""The operators of training against fp64 loops; an adapter's gradient depends on nothing but its own rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from op_cases import (
    DTYPES,
    FUSED,
    MIX,
    ROUTINGS,
    A,
    B,
    Case,
    check_kept,
    check_rank_gradients,
    needs_native,
    offsets_of,
    sentinel,
    width_of_v,
)
from torch import Tensor

from mlora.ops import dispatch, training

SHAPES = [((1, 3, 2), 1, 1), ((16, 3, 20), 20, 855), ((16, 1, 0), 2049, 20), ((9, 8, 4), 576, 576)]
IDS = ["1x1", "20x855", "2049x20", "576x576"]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("ranks, width_in, width_out", SHAPES, ids=IDS)
def test_what_is_kept_matches_fp64(ranks, width_in, width_out, dtype, routing):
    case = Case(ranks, width_in, width_out, dtype, gains=True, shifts=True)
    recipes, length = ROUTINGS[routing]
    rows = len(recipes) * length
    x, _ = sentinel(rows, width_in, dtype)
    x.copy_(case.randn(rows, width_in))
    y, base, plan = case.randn(rows, width_out), case.randn(rows, width_out), case.plan(recipes)
    plain, kept = y.clone(), y.clone()
    v = torch.full((width_of_v(case, recipes, length),), torch.nan)
    dispatch.apply_(plain, base, x, case.arena, case.table, plan)
    assert dispatch.apply_keep_(kept, v, base, x, case.arena, case.table, plan) is None
    assert torch.equal(kept, plain), "keeping changes the result"
    check_kept(v, x, case, recipes, length)


@pytest.mark.parametrize("dtype", FUSED)
def test_linear_keeps_what_apply_keeps(dtype):
    case = Case((16, 3, 20), 64, 96, dtype, gains=True, shifts=True)
    recipes = [A, [], B, MIX, A]
    x, weight, bias, plan = case.randn(5, 7, 64), case.randn(96, 64), case.randn(96), case.plan(recipes)
    size = width_of_v(case, recipes, 7)
    for kblock in (0, 64):
        v, other = torch.full((size,), torch.nan), torch.full((size,), torch.nan)
        y = dispatch.linear_keep(x, weight, bias, v, case.arena, case.table, plan, kblock)
        assert torch.equal(y, dispatch.linear(x, weight, bias, case.arena, case.table, plan, kblock))
        dispatch.apply_keep_(torch.empty_like(y), other, None, x, case.arena, case.table, plan)
        assert torch.equal(v, other)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("ranks, width_in, width", SHAPES, ids=IDS)
def test_rank_gradients_match_fp64(ranks, width_in, width, dtype, routing):
    case = Case(ranks, width_in, width, dtype)
    recipes, length = ROUTINGS[routing]
    tokens = len(recipes) * length
    rows, _ = sentinel(tokens, width, dtype)
    rows.copy_(case.randn(tokens, width))
    plan = case.plan(recipes)
    v = torch.randn(width_of_v(case, recipes, length), generator=case.generator)
    offsets, size = offsets_of(case, width)
    to, ref = torch.full((size,), torch.nan), torch.full((size,), torch.nan)
    assert dispatch.rank_gradients_(to, v, rows, offsets, case.arena, case.table, plan) is None
    training.rank_gradients_(ref, v, rows, offsets, case.arena, case.table, plan)
    check_rank_gradients(to, ref, v, rows, offsets, case, recipes, length)


def gradient(case: Case, recipes: list, rows: Tensor, vs: dict[int, Tensor], slot: int) -> Tensor:
    """A slot's, (rank, width), where row i of the batch has `vs[i]`, (tokens, ranks of its recipe)."""
    order = [i for recipe in dict.fromkeys(map(tuple, recipes)) for i, r in enumerate(recipes) if tuple(r) == recipe]
    v = torch.cat([torch.empty(0), *(vs[i].flatten() for i in order if recipes[i])])
    width, rank = rows.shape[-1], case.adapters[slot]["a"].shape[0]
    offsets = torch.full((len(case.table),), -1)
    offsets[slot] = 0
    to = torch.full((rank * width,), torch.nan)
    dispatch.rank_gradients_(to, v, rows.flatten(0, 1), offsets, case.arena, case.table, case.plan(recipes))
    return to.view(rank, width)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("length", [1, 5, 70, 130])
def test_a_gradient_does_not_see_its_batch(dtype, length, in_threads):
    case = Case((16, 3, 11), 40, 200, dtype)
    ranks = [16, 3, 11]
    both = [(0, 0.5), (1, 2.0)]
    alone = [A, A, both]
    rows = case.randn(3, length, 200)
    vs = {
        i: torch.randn(length, sum(ranks[slot] for slot, _ in recipe), generator=case.generator)
        for i, recipe in enumerate(alone)
    }
    in_threads(1)
    want = gradient(case, alone, rows, vs, 0)
    others = [B, [], [(2, 1.0)], [(1, 1.0), (2, 0.5)]]
    bad = torch.full((len(others), length, 200), torch.nan, dtype=dtype)
    mixed = [others[0], A, others[1], A, others[2], both, others[3]]
    mine = {1: 0, 3: 1, 5: 2}
    more = torch.stack([rows[mine[i]] if i in mine else bad[0] for i in range(7)])
    all_vs = {
        i: vs[mine[i]] if i in mine else torch.full((length, sum(ranks[slot] for slot, _ in recipe)), torch.inf)
        for i, recipe in enumerate(mixed)
    }
    for threads in (1, 2):
        in_threads(threads)
        assert torch.equal(gradient(case, mixed, more, all_vs, 0), want)


def test_gradients_of_strided_rows_and_of_no_tokens():
    case = Case((5, 3, 2), 8, 12, torch.float32)
    plan, recipes = case.plan([A, MIX]), [A, MIX]
    padded = case.randn(2, 3, 20)
    v = torch.randn(width_of_v(case, recipes, 3), generator=case.generator)
    offsets, size = offsets_of(case, 12)
    results = []
    for rows in (padded[..., 4:16], padded[..., 4:16].contiguous(), padded[..., 4:16].transpose(0, 1).contiguous()):
        rows = rows if rows.shape[0] == 2 else rows.transpose(0, 1)
        to = torch.zeros(size)
        dispatch.rank_gradients_(to, v, rows, offsets, case.arena, case.table, plan)
        results.append(to)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    to = torch.full((size,), 7.0)
    dispatch.rank_gradients_(to, v[:0], padded[:, :0, :12], offsets, case.arena, case.table, plan)
    assert (to == 7).all()


REFUSED = {
    "v too short": (lambda a: a.update(v=a["v"][1:]), "v has"),
    "to too short": (lambda a: a.update(to=a["to"][:-6]), "outside of"),
    "an offset beyond": (lambda a: a["offsets"].fill_(2**62), "outside of"),
    "offsets of other slots": (lambda a: a.update(offsets=a["offsets"][1:]), "offsets must"),
}


@pytest.mark.parametrize("how", REFUSED)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_wrong_memory_is_refused(how, backend):
    case = Case((5, 3, 2), 8, 12, torch.float32)
    offsets, size = offsets_of(case, 12)
    spoil, message = REFUSED[how]
    arguments = {
        "to": torch.zeros(size), "v": torch.zeros(width_of_v(case, [A, MIX], 3)), "rows": case.randn(6, 12),
        "offsets": offsets, "arena": case.arena, "table": case.table, "plan": case.plan([A, MIX]),
    }  # fmt: skip
    spoil(arguments)
    run = dispatch.rank_gradients_ if backend == "native" else training.rank_gradients_
    with pytest.raises(RuntimeError, match=message):
        run(*arguments.values())
    if "v" in how:
        with pytest.raises(RuntimeError, match=message):
            keep = dispatch.apply_keep_ if backend == "native" else training.apply_keep_
            keep(case.randn(6, 12), arguments["v"], None, case.randn(6, 8), case.arena, case.table, arguments["plan"])


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_opcheck(dtype):
    case = Case((5, 3, 2), 8, 12, dtype)
    recipes = [A, MIX, []]
    plan, x = case.plan(recipes), case.randn(6, 8)
    v = torch.zeros(width_of_v(case, recipes, 2))
    where = (case.arena, case.table, plan)
    offsets, size = offsets_of(case, 12)
    ops = torch.ops.mlora
    for prefix in ("", "reference_"):
        keep, linear, gradients = (
            getattr(ops, prefix + name).default for name in ("apply_keep_", "linear_keep", "rank_gradients_")
        )
        torch.library.opcheck(keep, (case.randn(6, 12), v.clone(), None, x, *where))
        torch.library.opcheck(linear, (x, case.randn(12, 8), None, v.clone(), *where, 0))
        torch.library.opcheck(gradients, (torch.zeros(size), v.clone(), case.randn(6, 12), offsets, *where))


def test_fp64_is_served_by_the_reference():
    case = Case((5, 3, 2), 8, 12, torch.float64)
    recipes = [A, MIX, []]
    x, h, plan = case.randn(6, 8), case.randn(6, 12), case.plan(recipes)
    v = torch.full((width_of_v(case, recipes, 2),), torch.nan, dtype=torch.float64)
    dispatch.apply_keep_(case.randn(6, 12), v, None, x, case.arena, case.table, plan)
    offsets, size = offsets_of(case, 12)
    to = torch.zeros(size, dtype=torch.float64)
    dispatch.rank_gradients_(to, v, h, offsets, case.arena, case.table, plan)
    adapter = case.adapters[0]
    want = adapter["scale"] * (adapter["a"] @ x[:2].T) @ h[:2]
    weight = float(np.float32(0.7))
    want = want + weight * adapter["scale"] * (adapter["a"] @ x[2:4].T) @ h[2:4]
    got = to[int(offsets[0]) :][: want.numel()].view(want.shape)
    assert (got - want).abs().max() < 1e-13 * want.abs().max()
