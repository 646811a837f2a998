"""The Triton kernels of training: in the interpreter against fp64 loops, and what an adapter's gradient depends on."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch
from op_cases import FORMS, MIX, A, B, Case, check_kept, check_rank_gradients, offsets_of, sentinel, width_of_v
from torch import Tensor

from mlora import layout
from mlora.ops import training

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton is not installed, or TRITON_INTERPRET was not set before it was imported",
)
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    import interpreter

    from mlora.kernels import config, launch, operators

    interpreter.install()

BIG, TWICE = [(3, 1.0)], [(1, 0.5), (3, 2.0), (1, -1.0)]
ROUTINGS = {
    "empty": ([[]], 0),
    "all-base": ([[], []], 3),
    "decode": ([A, [], B, MIX, A, BIG, TWICE], 1),
    "uniform": ([A], 130),
    "segments": ([MIX, [], B, A, BIG, A], 65),
}
SHAPES = [
    pytest.param((1, 3, 0, 2), 1, 3, torch.float32, False, id="1x3"),
    *(pytest.param((17, 3, 8, 37), 70, 40, *form.values, id=f"70x40-{form.id}") for form in FORMS),
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `shrink` does not write must not be read."""
    make = launch._workspace
    monkeypatch.setattr(launch, "_workspace", lambda x: (make(x)[0].fill_(torch.nan), make(x)[1]))


def kept_by(case: Case, recipes: list, length: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """y and v of a product with y from zeros; y is that of `apply_`."""
    plan = case.plan(recipes)
    y = torch.zeros(len(x), case.width_out, dtype=case.dtype)
    plain, v = y.clone(), torch.full((width_of_v(case, recipes, length),), torch.nan)
    operators.apply_keep_(y, v, None, x, case.arena, case.table, plan)
    operators.apply_(plain, None, x, case.arena, case.table, plan)
    assert torch.equal(y, plain), "keeping changes the result"
    return y, v


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("ranks", "width_in", "width_out", "dtype", "wide"), SHAPES)
def test_what_is_kept_matches_fp64(
    ranks: Any, width_in: int, width_out: int, dtype: torch.dtype, wide: bool, routing: str
) -> None:
    case = Case(ranks, width_in, width_out, dtype, gains=True, shifts=True, align=8, wide=wide)
    recipes, length = ROUTINGS[routing]
    x, _ = sentinel(len(recipes) * length, width_in, dtype)
    x.copy_(case.randn(*x.shape))
    check_kept(kept_by(case, recipes, length, x)[1], x, case, recipes, length)


@pytest.mark.parametrize("length", [1, 44], ids=["decode", "prefill"])
def test_kept_of_several_slices_and_beyond_the_workspace(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    """The same bits whether the workspace has room for a rank row or not."""
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", interpreter.chain_dot)
    case = Case((16, 3, 20, 40), 300, 8, torch.float16, align=8)
    recipes = [BIG, [], [(3, 0.5), (2, 1.0)]]
    x = case.randn(len(recipes) * length, 300)
    y, v = kept_by(case, recipes, length, x)
    check_kept(v, x, case, recipes, length)
    monkeypatch.setattr(config, "MAX_CAPACITY", 32)
    monkeypatch.setattr(config, "MIN_CAPACITY", 32)
    less, again = kept_by(case, recipes, length, x)
    assert torch.equal(y, less) and torch.equal(v, again)


def test_linear_keeps_what_apply_keeps() -> None:
    case = Case((16, 3, 20), 40, 48, torch.bfloat16, gains=True, shifts=True, align=8)
    recipes = [A, [], B, MIX, A]
    x, weight, bias, plan = case.randn(5, 2, 40), case.randn(48, 40), case.randn(48), case.plan(recipes)
    want = kept_by(case, recipes, 2, x.flatten(0, 1))[1]
    for kblock in (0, 1):
        v = torch.full_like(want, torch.nan)
        y = operators.linear_keep(x, weight, bias, v, case.arena, case.table, plan, kblock)
        assert torch.equal(y, operators.linear(x, weight, bias, case.arena, case.table, plan, kblock))
        assert torch.equal(v, want)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("ranks", "width_in", "width", "dtype", "wide"), SHAPES)
def test_rank_gradients_match_fp64(
    ranks: Any, width_in: int, width: int, dtype: torch.dtype, wide: bool, routing: str
) -> None:
    case = Case(ranks, width_in, width, dtype, wide=wide)
    recipes, length = ROUTINGS[routing]
    rows, _ = sentinel(len(recipes) * length, width, dtype)
    rows.copy_(case.randn(*rows.shape))
    plan = case.plan(recipes)
    v = torch.randn(width_of_v(case, recipes, length), generator=case.generator)
    offsets, size = offsets_of(case, width)
    to, ref = torch.full((size,), torch.nan), torch.full((size,), torch.nan)
    operators.rank_gradients_(to, v, rows, offsets, case.arena, case.table, plan)
    training.rank_gradients_(ref, v, rows, offsets, case.arena, case.table, plan)
    check_rank_gradients(to, ref, v, rows, offsets, case, recipes, length)


def test_more_routes_and_slots_than_are_read_at_once() -> None:
    case = Case([1 + i % 3 for i in range(34)], 5, 9, torch.float32, align=8)
    recipes = [[(i, 1.0), (33 - i, 0.5)] if i % 3 else [(i, 1.0)] for i in range(34)] + [[]]
    x, rows = case.randn(len(recipes), 5), case.randn(len(recipes), 9)
    check_kept(kept_by(case, recipes, 1, x)[1], x, case, recipes, 1)
    v = torch.randn(width_of_v(case, recipes, 1), generator=case.generator)
    offsets, size = offsets_of(case, 9)
    to, ref = torch.full((size,), torch.nan), torch.full((size,), torch.nan)
    for run, where in ((operators.rank_gradients_, to), (training.rank_gradients_, ref)):
        run(where, v, rows, offsets, case.arena, case.table, case.plan(recipes))
    check_rank_gradients(to, ref, v, rows, offsets, case, recipes, 1)


def test_what_a_backward_pass_launches() -> None:
    """Of a linear: four launches, no atomics on floats, and the host waits for nothing."""
    import interpreted

    case = Case((16, 3, 20), 40, 48, torch.bfloat16, align=8)
    recipes = [A, B, MIX]
    h, x, dx = case.randn(12, 48), case.randn(12, 40), torch.zeros(12, 40, dtype=torch.bfloat16)
    exchanged = torch.full_like(case.table, -1)
    for column, source in layout.EXCHANGED.items():
        exchanged[:, column] = case.table[:, source]
    size = width_of_v(case, recipes, 4)
    v, big, plan = torch.randn(size), torch.full((size,), torch.nan), case.plan(recipes)
    (a, size_a), (b, size_b) = offsets_of(case, 40), offsets_of(case, 48)
    to, other = torch.empty(size_a), torch.empty(size_b)
    with interpreted.counting([h, x, dx, to, other]) as counts:
        operators.apply_keep_(dx, big, None, h, case.arena, exchanged, plan)
        operators.rank_gradients_(to, big, x, a, case.arena, exchanged, plan)
        operators.rank_gradients_(other, v, h, b, case.arena, case.table, plan)
    assert len(counts.launches) <= 4 and counts.syncs == 0
    assert not any(one.float_atomics for one in counts.launches)


def gradient(case: Case, recipes: list, rows: Tensor, vs: dict[int, Tensor], slot: int) -> Tensor:
    """A slot's, (rank, width), where row i of the batch has `vs[i]`, (tokens, ranks of its recipe)."""
    order = [i for recipe in dict.fromkeys(map(tuple, recipes)) for i, r in enumerate(recipes) if tuple(r) == recipe]
    v = torch.cat([torch.empty(0), *(vs[i].flatten() for i in order if recipes[i])])
    width, rank = rows.shape[-1], case.adapters[slot]["a"].shape[0]
    offsets = torch.full((len(case.table),), -1)
    offsets[slot] = 0
    to = torch.full((rank * width,), torch.nan)
    operators.rank_gradients_(to, v, rows.flatten(0, 1), offsets, case.arena, case.table, case.plan(recipes))
    return to.view(rank, width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("length", [1, 70])
def test_a_gradient_does_not_see_its_batch(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, length: int) -> None:
    """Beside NaN and infinity of others, and on any number of processors: the bits of the adapter alone."""
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", interpreter.chain_dot)
    case = Case((16, 3, 11), 40, 70, dtype)
    ranks = [16, 3, 11]
    both = [(0, 0.5), (1, 2.0)]
    alone = [A, A, both]
    rows = case.randn(3, length, 70)
    vs = {
        i: torch.randn(length, sum(ranks[slot] for slot, _ in recipe), generator=case.generator)
        for i, recipe in enumerate(alone)
    }
    want = gradient(case, alone, rows, vs, 0)
    assert want.isfinite().all()
    mixed = [B, A, [], A, [(2, 1.0)], both, [(1, 1.0), (2, 0.5)]]
    mine = {1: 0, 3: 1, 5: 2}
    bad = torch.full((length, 70), torch.nan, dtype=dtype)
    more = torch.stack([rows[mine[i]] if i in mine else bad for i in range(len(mixed))])
    all_vs = {
        i: vs[mine[i]] if i in mine else torch.full((length, sum(ranks[slot] for slot, _ in recipe)), torch.inf)
        for i, recipe in enumerate(mixed)
    }
    for processors in (1, 4, 50):
        monkeypatch.setattr(launch, "INTERPRETED", config.Device(processors, 90))
        assert torch.equal(gradient(case, mixed, more, all_vs, 0), want), processors


def test_what_is_kept_does_not_see_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", interpreter.chain_dot)
    case = Case((16, 3, 20), 300, 8, torch.bfloat16, align=8)
    x = case.randn(27, 300)
    alone = kept_by(case, [A], 27, x)[1]
    others = torch.full((2 * 27, 300), torch.nan, dtype=torch.bfloat16)
    for processors in (1, 7):
        monkeypatch.setattr(launch, "INTERPRETED", config.Device(processors, 90))
        batch = torch.cat([others[:27], x, others[27:]])
        v = torch.full((27 * (3 + 16 + 20),), torch.nan)
        operators.apply_keep_(
            torch.zeros(81, 8, dtype=torch.bfloat16), v, None, batch, case.arena, case.table,
            case.plan([B, A, [(2, 1.0)]]),
        )  # fmt: skip
        assert torch.equal(v[27 * 3 : 27 * 19], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_opcheck(dtype: torch.dtype) -> None:
    case = Case((5, 3, 2), 8, 12, dtype, align=8)
    recipes = [A, MIX, []]
    plan, x = case.plan(recipes), case.randn(6, 8)
    v = torch.zeros(width_of_v(case, recipes, 2))
    where = (case.arena, case.table, plan)
    offsets, size = offsets_of(case, 12)
    ops = torch.ops.mlora
    torch.library.opcheck(ops.triton_apply_keep_.default, (case.randn(6, 12), v.clone(), None, x, *where))
    torch.library.opcheck(ops.triton_linear_keep.default, (x, case.randn(12, 8), None, v.clone(), *where, 0))
    torch.library.opcheck(
        ops.triton_rank_gradients_.default, (torch.zeros(size), v.clone(), case.randn(6, 12), offsets, *where)
    )


REFUSED = {
    "v of another dtype": (lambda a: a.update(v=a["v"].double()), "v must"),
    "to of another dtype": (lambda a: a.update(to=a["to"].half()), "to must"),
    "offsets of other slots": (lambda a: a.update(offsets=a["offsets"][1:]), "offsets must"),
    "rows of another dtype": (lambda a: a.update(rows=a["rows"].double()), "one dtype"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_wrong_memory_is_refused(how: str) -> None:
    case = Case((5, 3, 2), 8, 12, torch.float32)
    offsets, size = offsets_of(case, 12)
    spoil, message = REFUSED[how]
    arguments = {
        "to": torch.zeros(size), "v": torch.zeros(width_of_v(case, [A, MIX], 3)), "rows": case.randn(6, 12),
        "offsets": offsets, "arena": case.arena, "table": case.table, "plan": case.plan([A, MIX]),
    }  # fmt: skip
    spoil(arguments)
    with pytest.raises(RuntimeError, match=message):
        operators.rank_gradients_(*arguments.values())
