"""Whole matrices: a factor that is the identity and not in the arena, in the operators that read factors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_cases import DTYPES, FUSED, MIX, ROUTINGS, A, B, Case, check, sentinel

from mlora import layout
from mlora.ops import dispatch, reference

# Of either factor, with the identity on the smaller side: (which factor it is, in, out).
WIDTHS = [("a", 1, 1), ("b", 1, 1), ("a", 20, 855), ("b", 2049, 20), ("b", 300, 300), ("a", 300, 300)]
IDS = [f"{factor}-{width_in}x{width_out}" for factor, width_in, width_out in WIDTHS]


def whole(factor: str, width_in: int, width_out: int, dtype: torch.dtype, **parts: bool) -> Case:
    """Slots 0 and 2 have no `factor`: it is the identity, of as many rank rows as that side is wide. What lies at its
    old place is junk."""
    rank = width_in if factor == "a" else width_out
    case = Case((rank, 3, rank), width_in, width_out, dtype, **parts)
    column = layout.A if factor == "a" else layout.B
    for slot in (0, 2):
        start = int(case.table[slot, column])
        case.arena[start : start + rank * rank] = torch.nan
        case.table[slot, column] = -1
        case.adapters[slot][factor] = torch.eye(rank, dtype=torch.float64)
        other = "b" if factor == "a" else "a"
        values = torch.randn(case.adapters[slot][other].shape, generator=case.generator) / width_in**0.5
        start = int(case.table[slot, layout.B if factor == "a" else layout.A])
        case.arena[start : start + values.numel()] = values.flatten().to(dtype)
        case.adapters[slot][other] = values.to(dtype).double()
    return case


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("factor", "width_in", "width_out"), WIDTHS, ids=IDS)
@pytest.mark.parametrize("gains", (False, True), ids=("plain", "gains"))
def test_apply_with_identities(factor, width_in, width_out, dtype, routing, gains, in_threads):
    case = whole(factor, width_in, width_out, dtype, gains=gains, shifts=gains)
    recipes, length = ROUTINGS[routing]
    rows = len(recipes) * length
    x, y = sentinel(rows, width_in, dtype)[0], sentinel(rows, width_out, dtype)[0]
    x.copy_(case.randn(rows, width_in))
    before, plan = case.randn(rows, width_out), case.plan(recipes)
    ref = reference.apply(before, None, x, case.arena, case.table, plan)
    got = []
    for threads in (1, 2):
        in_threads(threads)
        y.copy_(before)
        dispatch.apply_(y, None, x, case.arena, case.table, plan)
        got.append(y.clone())
    assert torch.equal(*got)
    if rows:
        check(got[0], case.oracle(before, None, x, recipes), ref)


@pytest.mark.parametrize("dtype", FUSED)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("factor", "width_in", "width_out"), [("a", 20, 855), ("b", 2050, 20), ("b", 300, 300)])
def test_linear_with_identities(factor, width_in, width_out, routing, dtype):
    case = whole(factor, width_in, width_out, dtype, gains=True, shifts=True)
    recipes, length = ROUTINGS[routing]
    rows = len(recipes) * length
    x, plan = case.randn(rows, width_in), case.plan(recipes)
    weight = (case.randn(width_out, width_in).float() / width_in**0.5).to(dtype)
    kblock = 192 if dtype is torch.float32 else 512
    got = dispatch.linear(x, weight, None, case.arena, case.table, plan, kblock)
    ref = reference.linear(x, weight, None, case.arena, case.table, plan, kblock)
    if rows:
        check(got, case.oracle(F.linear(x.double(), weight.double()), None, x, recipes), ref)


@pytest.mark.parametrize("factor", ("a", "b"))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_a_row_with_identities_does_not_see_its_batch(factor, dtype, in_threads):
    case = whole(factor, 300, 300, dtype)
    recipes = [A, B, MIX, A, [], [(2, 1.0)], MIX] * 6
    x, y = case.randn(len(recipes), 300), case.randn(len(recipes), 300)
    for threads in (1, 2):
        in_threads(threads)
        got = y.clone()
        dispatch.apply_(got, None, x, case.arena, case.table, case.plan(recipes))
        for row in (0, 2, 5, 9):
            alone = y[row : row + 1].clone()
            dispatch.apply_(alone, None, x[row : row + 1], case.arena, case.table, case.plan([recipes[row]]))
            assert torch.equal(alone[0], got[row])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("factor", "width_in", "width_out"), WIDTHS, ids=IDS)
def test_merge_with_identities(factor, width_in, width_out, dtype, in_threads):
    case = whole(factor, width_in, width_out, dtype, gains=True, in_gains=True)
    plan, source = case.plan([MIX], spare=0), case.randn(width_out, width_in)
    oracle = source.double()
    for slot, weight in MIX:
        adapter, weight = case.adapters[slot], torch.tensor(weight, dtype=torch.float32).item()
        oracle = oracle + weight * adapter["scale"] * adapter["b"].T @ adapter["a"]
        if "gain" in adapter:
            oracle = oracle + weight * adapter["gain"][:, None] * source.double()
        if "in_gain" in adapter:
            oracle = oracle + weight * adapter["in_gain"] * source.double()
    ref, got = source.clone(), []
    reference.merge_(ref, None, case.arena, case.table, plan)
    for threads in (1, 2):
        in_threads(threads)
        weight = source.clone()
        dispatch.merge_(weight, None, case.arena, case.table, plan)
        got.append(weight)
    assert torch.equal(*got)
    check(got[0], oracle, ref)


@pytest.mark.parametrize("factor", ("a", "b"))
def test_operators_that_read_no_factors(factor):
    """They know one of the widths only."""
    case = whole(factor, 20, 12, torch.float32, in_gains=True)
    x, plan = case.randn(4, 20), case.plan([A, B, [], MIX])
    got = dispatch.scale_input(x, case.arena, case.table, plan)
    torch.testing.assert_close(got, reference.scale_input(x, case.arena, case.table, plan))
    assert not torch.equal(got, x)
    y = case.randn(4, 12)
    assert torch.equal(dispatch.turn_output(y, None, case.arena, case.table, plan), y)


@pytest.mark.parametrize("columns", ([layout.A, layout.B], [layout.B]), ids=("neither factor", "another width"))
def test_no_identity_of_another_width(columns):
    case = Case((3,), 20, 12, torch.float32)
    case.table[0, columns] = -1
    for ops in (dispatch, reference):
        with pytest.raises(RuntimeError, match="slot 0 has rank 3 but no A or B"):
            ops.apply_(case.randn(1, 12), None, case.randn(1, 20), case.arena, case.table, case.plan([A]))
