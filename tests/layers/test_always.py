"""`patch(fused="always")`: base products in whatever order of addition is the fastest."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import inputs_for, logits, served
from torch import Tensor, nn

import mlora
from mlora import errors
from mlora.ops import dispatch, fastest

FUSED = [dtype for dtype in (torch.float32, torch.float16, torch.bfloat16) if dispatch.offered(1, dtype)]
needs_native = pytest.mark.skipif(not FUSED, reason="built without the C++ operators")


@pytest.fixture
def along(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The own order is always the fastest; what was asked."""
    asked: list[tuple[Any, ...]] = []

    def probe(*question: Any) -> int:
        asked.append(question)
        return dispatch.ALONG if dispatch.offered(*question[-2:]) else dispatch.LIBRARY

    monkeypatch.setattr(fastest, "probe", probe)
    return asked


@pytest.mark.parametrize("dtype", FUSED, ids=str)
def test_base_rows_are_as_exact_as_the_librarys(dtype: torch.dtype, along: list[Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(577, 320), nn.Tanh(), nn.Linear(320, 64, bias=False)).to(dtype).eval()
    bare, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    mlora.patch(model, memory=1 << 16, fused="always")
    with torch.no_grad():
        for tokens in (1, 2, 7, 16, 60, 200):
            x = torch.randn(tokens, 577).to(dtype)
            errors_of = [(m(x).double() - exact(x.double())).square().mean().sqrt() for m in (model, bare)]
            assert errors_of[0] <= 2 * errors_of[1]
            assert torch.equal(model[0](x)[:1], dispatch.linear(x, *_parts(model[0], x), dispatch.ALONG)[:1])
    assert {question[0] for question in along} == {577, 320}


def _parts(linear: Any, x: Tensor) -> tuple[Any, ...]:
    state = linear._mlora
    return linear.weight, linear.bias, state.arena, state.table, state.shared.blank.tensors[state.home]


@needs_native
def test_rows_do_not_see_each_other(llama: Any, folders: dict[str, Path], along: list[Any]) -> None:
    model = served(llama, {name: folders[name] for name in ("r3", "dora1")}, memory=1 << 20, fused="always")
    batch = inputs_for("llama", 4)
    want = logits(model, batch, adapter_names=["r3", None, "dora1", "r3"])
    other = {"input_ids": batch["input_ids"].clone(), "attention_mask": batch["attention_mask"]}
    other["input_ids"][3] = batch["input_ids"][0]
    got = logits(model, other, adapter_names=["r3", None, "dora1", None])
    assert torch.equal(got[:3], want[:3]) and not torch.equal(got[3], want[3]) and along


@needs_native
def test_the_default_does_not_ask(llama: Any, folders: dict[str, Path], along: list[Any]) -> None:
    model, batch = served(llama, {"r3": folders["r3"]}, memory=1 << 20), inputs_for("llama", 3)
    assert torch.equal(logits(model, batch), logits(llama, batch)) and not along


@needs_native
def test_compiled_code_asks_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(576, 320), nn.Linear(320, 576, bias=False)).to(torch.bfloat16).eval()
    mlora.patch(model, memory=1 << 16, fused="always")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for rows in (2, 5, 60):
            x = torch.randn(rows, 3, 576, dtype=torch.bfloat16)
            assert torch.equal(compiled(x), model(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("fused", ["fastest", None, 2])
def test_other_values_are_refused_by_name(fused: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(errors.PatchError, match=f"fused={fused!r}, wanted True, False or 'always'"):
        mlora.patch(model, memory=1 << 16, fused=fused)
