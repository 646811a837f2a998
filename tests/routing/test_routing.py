"""Entries -> plan words and back: every row gets exactly the recipe that was written for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlora import errors, layout
from mlora.plan.plan import plan_words, to_device
from mlora.routing.entries import BASE, resolve, resolve_entry

SLOTS = {"a": 0, "b": 3, "c": 11, "ü": 2}


def key_of(name: str, slots: Mapping[str, int] = SLOTS) -> str | None:
    return name if name in slots else None


weights = st.floats(-8, 8, width=32)
entries = st.one_of(
    st.none(),
    st.just(BASE),
    st.sampled_from(sorted(SLOTS)),
    st.dictionaries(st.sampled_from(sorted(SLOTS)), weights),
)


def decode(words: np.ndarray) -> list[dict[int, float]]:
    """Per row, slot -> weight: the layout's documentation read backwards."""
    assert words.dtype == np.int32 and words.ndim == 1
    rows, routes, terms, _, listed, *rest = (int(word) for word in words[: layout.PLAN_HEADER])
    assert listed == rows and rest == [0] * (layout.PLAN_HEADER - 5)
    parts = np.split(words[layout.PLAN_HEADER :], np.cumsum([routes + 1, rows, routes + 1, terms, terms]))
    row_start, row_order, term_start, slots, bits, beyond = parts
    assert len(bits) == terms and not len(beyond)
    assert row_start[0] == term_start[0] == 0 and term_start[-1] == terms and row_start[-1] <= rows
    assert sorted(row_order) == list(range(rows)), "every row once"
    recipes: list[dict[int, float]] = [{} for _ in range(rows)]
    values = bits.view(np.float32)
    for route in range(routes):
        assert row_start[route] < row_start[route + 1], "a route has rows"
        span = slice(term_start[route], term_start[route + 1])
        assert span.start < span.stop, "a route has terms"
        for row in row_order[row_start[route] : row_start[route + 1]]:
            recipes[row] = dict(zip(slots[span].tolist(), values[span].tolist(), strict=True))
    return recipes


def words_of(entries: Any, slots: Mapping[str, int] = SLOTS, expansion: int = 1) -> np.ndarray:
    recipes = resolve(entries, lambda name: key_of(name, slots))
    return plan_words([tuple((slots[name], weight) for name, weight in recipe) for recipe in recipes], expansion)


def expected(entry: Any) -> dict[int, float]:
    if entry is None or entry == BASE:
        return {}
    if isinstance(entry, str):
        return {SLOTS[entry]: 1.0}
    return {SLOTS[name]: weight for name, weight in entry.items() if weight != 0}


@given(batch=st.lists(entries, max_size=40), expansion=st.integers(1, 5))
def test_plans_decode_to_what_was_written(batch: list[Any], expansion: int) -> None:
    words = words_of(batch, expansion=expansion)
    assert decode(words) == [expected(entry) for entry in batch]
    assert words[3] == expansion
    distinct = {tuple(sorted(e.items())) for e in map(expected, batch) if e}
    assert words[1] == len(distinct), "equal recipes share a route"
    assert torch.equal(to_device(words, torch.device("cpu")), torch.from_numpy(words))


@given(batch=st.lists(st.tuples(entries, st.integers(1, 4)), max_size=20))
def test_a_recipe_of_several_rows_is_written_once_for_each(batch: list[Any]) -> None:
    recipes = [tuple(sorted(expected(entry).items())) for entry, _ in batch]
    runs = [run for _, run in batch]
    each = [recipe for recipe, run in zip(recipes, runs, strict=True) for _ in range(run)]
    assert np.array_equal(plan_words(recipes, runs=runs), plan_words(each))


@given(batch=st.lists(entries, min_size=1, max_size=12), data=st.data())
def test_a_row_keeps_its_recipe_when_rows_are_shuffled(batch: list[Any], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(batch))))
    straight = decode(words_of(batch))
    shuffled = decode(words_of([batch[i] for i in order]))
    assert shuffled == [straight[i] for i in order]


@given(mix=st.dictionaries(st.sampled_from(sorted(SLOTS)), weights, min_size=2))
def test_a_mapping_is_the_same_recipe_in_any_order(mix: dict[str, float]) -> None:
    backwards = dict(reversed(mix.items()))
    assert resolve_entry(mix, key_of) == resolve_entry(backwards, key_of)


def test_the_example_of_the_layout() -> None:
    slots = {"sql": 0, "chat": 3}
    batch = ["sql", None, "sql", {"sql": 0.5, "chat": 0.5}]
    words = words_of(batch, slots).tolist()
    half, one = (int(np.float32(w).view(np.int32)) for w in (0.5, 1))
    body = words[layout.PLAN_HEADER :]
    assert words[:4] == [4, 2, 3, 1]
    assert body[:3] == [0, 2, 3] and body[3:7] == [0, 2, 3, 1] and body[7:10] == [0, 1, 3]
    # terms come sorted by name, so chat's slot 3 stands before sql's slot 0
    assert body[10:13] == [0, 3, 0] and body[13:] == [one, half, half]


@pytest.mark.parametrize(
    ("entry", "rows"),
    [("a", [{0: 1.0}]), (None, [{}]), (BASE, [{}]), ({"a": 2, "b": 0}, [{0: 2.0}]), ({}, [{}])],
    ids=["name", "none", "base", "mapping", "empty-mapping"],
)
def test_one_entry_for_all_rows_is_one_recipe(entry: Any, rows: list[dict[int, float]]) -> None:
    assert decode(words_of(entry)) == rows


@pytest.mark.parametrize("weight", [1, 0.5, np.float32(0.5), np.int64(2), -3.0], ids=repr)
def test_python_and_numpy_numbers_are_weights(weight: Any) -> None:
    assert resolve_entry({"a": weight}, key_of) == (("a", float(weight)),)


@pytest.mark.parametrize(
    "weight",
    [math.nan, math.inf, -math.inf, 1e39, 10**400, True, None, "1", [1], 1j, np.complex64(1), np.bool_(True)],
    ids=[
        "nan",
        "inf",
        "-inf",
        "over-fp32",
        "huge-int",
        "bool",
        "none",
        "text",
        "list",
        "complex",
        "np-complex",
        "np-bool",
    ],
)
def test_a_weight_that_is_no_finite_number(weight: Any) -> None:
    with pytest.raises(errors.EntryError, match="finite number") as caught:
        resolve_entry({"b": weight}, key_of)
    assert "'b'" in str(caught.value), "the message names the adapter"


@pytest.mark.parametrize(
    "entry",
    [3, 1.5, True, ("a", 1.0), ["a"], {"a"}, b"a"],
    ids=["int", "float", "bool", "tuple", "list", "set", "bytes"],
)
def test_an_entry_of_another_type(entry: Any) -> None:
    with pytest.raises(errors.EntryError, match=r"adapter.s name") as caught:
        resolve(["a", entry], key_of)
    assert repr(entry) in str(caught.value)


@pytest.mark.parametrize("entry", ["zz", "", {"zz": 1.0}, {"a": 1.0, "zz": 0.0}, {None: 1.0}, {5: 1.0}], ids=repr)
def test_an_unknown_name(entry: Any) -> None:
    with pytest.raises(errors.UnknownAdapterError):
        resolve([entry], key_of)


@pytest.mark.parametrize("value", [5, {"a"}, iter(["a"]), np.array(["a"]), object()], ids=lambda v: type(v).__name__)
def test_adapter_names_of_another_type(value: Any) -> None:
    with pytest.raises(errors.EntryError, match=type(value).__name__):
        resolve(value, key_of)


class Names(Mapping):
    """A mapping that is not a dict."""

    def __getitem__(self, key: str) -> float:
        return {"a": 0.25, "c": 4.0}[key]

    def __iter__(self) -> Any:
        return iter(["c", "a"])

    def __len__(self) -> int:
        return 2


def test_any_mapping_and_any_sequence_will_do() -> None:
    recipes = resolve((Names(), "b"), key_of)
    assert recipes == [(("a", 0.25), ("c", 4.0)), (("b", 1.0),)]
