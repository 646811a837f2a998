"""`patch(fully_sharded=True)`: each process holds its share of A and B, and rows get what they get in one process."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_close
from safetensors.torch import load_file
from test_tensor_parallel import (
    IDS,
    LORAS,
    NOT_SPLIT,
    ON,
    SEVEN,
    SPECIFIC,
    _case,
    _check,
    _is_error,
    _of_spec,
    _single,
    setting,  # noqa: F401
    start,
)

PATTERNS = {"r": 3, "lora_alpha": 5, "rank_pattern": {"q_proj": 1, "up_proj": 5, "down_proj": 2},
            "target_modules": SEVEN}  # fmt: skip
SINGLE = ("sizes", "saves", "merges", "generated", "together", "others", "alone", "unpatched", "default")


@pytest.fixture(scope="module")
def started(setting: Any) -> Any:  # noqa: F811
    @cache
    def of(world: int) -> Any:
        LORAS["patterns"] = PATTERNS
        cases = [_single(setting, does) for does in SINGLE]
        cases += [_case(setting, kind, name) for kind, names in ON.items() for name in names]
        cases.append(_case(setting, "llama", "patterns"))
        if world == 2:
            cases += [_of_spec(setting, spec) for spec in SPECIFIC]
        cases = [replace(case, sharded=True) for case in cases]
        return world, {case.id: case for case in cases}, start(world, cases)

    return of


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest, started: Any) -> Any:
    return started(request.param)


@pytest.mark.parametrize(
    ("kind", "name"), [*((kind, name) for kind, names in ON.items() for name in names), ("llama", "patterns")]
)
def test_loras(setting: Any, results: Any, kind: str, name: str) -> None:  # noqa: F811
    _check(setting, results, f"{kind} {name}", kind)


@pytest.mark.parametrize("spec", SPECIFIC, ids=[spec.id for spec in SPECIFIC])
def test_every_type(setting: Any, started: Any, spec: Any) -> None:  # noqa: F811
    results = started(2)
    if (words := NOT_SPLIT.get(spec.name)) is not None:
        for each in results[2]:
            kind, name, message = each[f"spec {spec.name}"]
            assert (kind, name) == ("error", "UnsupportedAdapterError") and words in message
        return
    _check(setting, results, f"spec {spec.name}", "llama")


def test_a_process_holds_its_share(results: Any) -> None:
    """All of A and B is split; what is over is the padding of 14 modules' two parts to 64 bytes."""
    world, cases, made = results
    tensors = load_file(Path(cases["sizes"].loads["a"][0]) / "adapter_model.safetensors").values()
    whole = sum(tensor.numel() * 4 for tensor in tensors)
    for each in made:
        assert whole // world <= each["sizes"] <= whole // world + 64 * 2 * 14


def test_layers_that_read_one_input_exchange_together(setting: Any, results: Any) -> None:  # noqa: F811
    """Of each of two layers: q, k and v; o; gate and up; down."""
    _, cases, made = results
    case = cases["together"]
    want = setting.one("llama", case.loads, list(case.entries), case.ids)
    for each in made:
        assert not _is_error(each["together"]), each["together"]
        count, out = each["together"]
        assert count == 2 * 4
        assert_close(out, want, 2e-5)


def test_the_rest(setting: Any, results: Any) -> None:  # noqa: F811
    _, cases, made = results
    model, loads = setting.served("llama"), cases["merges"].loads
    how = {"adapters": ["a", "b"], "weights": [0.7, 0.5], "combination_type": "ties", "density": 0.6}
    want = setting.one("llama", loads, [how, how, None], IDS[:3])
    half = setting.one("llama", cases["default"].loads, [{"a": 0.5, "b": 0.5}] * 2, IDS[:2])
    folder = cases["saves"].loads["a"][0]
    model.mlora.load_adapter(folder, "a")
    texts = model.generate(
        input_ids=IDS[:2], adapter_names=["a", None], max_new_tokens=5, min_new_tokens=5, do_sample=False
    )
    model.mlora.delete_adapter("a")
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    for rank, each in enumerate(made):
        for id in SINGLE:
            assert not _is_error(each[id]) or id in ("others", "alone"), each[id]
        assert_close(each["merges"], want, 2e-5)
        assert_close(each["default"], half, 2e-5)
        assert torch.equal(each["generated"], texts)
        assert each["others"][1] == "RoutingError"
        assert each["alone"][1] == ("UnknownAdapterError" if rank == 1 else "RoutingError")
        assert each["unpatched"][0]
        saved = load_file(Path(each["saves"]) / "adapter_model.safetensors")
        assert saved.keys() == tensors.keys() and all(torch.equal(saved[key], tensors[key]) for key in tensors)
