"""`shrink_` and `expand_` are `apply_` in two phases: to the bit, and against the reference."""

from __future__ import annotations

import pytest
import torch
from op_cases import DTYPES, ROUTINGS, Case, check_kept, sentinel, width_of_v

from mlora.ops import dispatch, phases


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    "ranks, width_in, width_out", [((1, 3, 2), 1, 1), ((16, 3, 20), 20, 855), ((9, 8, 4), 576, 96)]
)
def test_two_phases_are_apply(ranks, width_in, width_out, dtype, routing):
    case = Case(ranks, width_in, width_out, dtype, gains=True, shifts=True)
    recipes, length = ROUTINGS[routing]
    tokens = len(recipes) * length
    x, _ = sentinel(tokens, width_in, dtype)
    x.copy_(case.randn(tokens, width_in))
    y, plan = case.randn(tokens, width_out), case.plan(recipes)
    whole, halves, plain = y.clone(), y.clone(), y.clone()
    v = torch.full((width_of_v(case, recipes, length),), torch.nan)
    dispatch.apply_(whole, None, x, case.arena, case.table, plan)
    assert dispatch.shrink_(v, x, case.arena, case.table, plan) is None
    check_kept(v, x, case, recipes, length)
    assert dispatch.expand_(halves, v, case.arena, case.table, plan) is None
    assert torch.equal(halves, whole)
    other = torch.full_like(v, torch.nan)
    phases.shrink_(other, x, case.arena, case.table, plan)
    phases.expand_(plain, other, case.arena, case.table, plan)
    torch.testing.assert_close(plain, whole, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_columns_of_a_wider_output():
    """In place, and nothing beside them."""
    case = Case((4, 2, 3), 24, 40, torch.float32)
    recipes = [[(0, 1.0)], [(1, 0.5)]]
    plan = case.plan(recipes)
    x, wide = case.randn(2, 5, 24), case.randn(2, 5, 100)
    before, want = wide.clone(), wide[..., 30:70].clone()
    dispatch.apply_(want, None, x, case.arena, case.table, plan)
    v = torch.empty(width_of_v(case, recipes, 5))
    dispatch.shrink_(v, x, case.arena, case.table, plan)
    dispatch.expand_(wide[..., 30:70], v, case.arena, case.table, plan)
    assert torch.equal(wide[..., 30:70], want)
    before[..., 30:70] = want
    assert torch.equal(wide, before)


def test_what_does_not_fit_is_refused():
    case = Case((4, 2, 3), 24, 40, torch.float32)
    plan, x, y = case.plan([[(0, 1.0)]]), case.randn(1, 24), case.randn(1, 40)
    for call in (
        lambda: dispatch.shrink_(torch.empty(5), x, case.arena, case.table, plan),
        lambda: dispatch.expand_(y, torch.empty(5), case.arena, case.table, plan),
        lambda: dispatch.expand_(y, torch.empty(4, dtype=torch.float64), case.arena, case.table, plan),
    ):
        with pytest.raises(RuntimeError, match="v "):
            call()
