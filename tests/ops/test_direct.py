"""Calls past the dispatcher: the operators' bits, only what they take, and only where nothing looks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import inputs_for, logits, served
from op_cases import AVX2, FUSED, NATIVE, Case
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mlora
from mlora.ops import direct, dispatch

pytestmark = pytest.mark.skipif(
    not NATIVE or not direct.READY, reason="built without the C++ operators, or a torch that C code cannot ask"
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def raw(plan: Tensor) -> bytes:
    return plan.numpy().tobytes()


def layer(case: Case) -> Any:
    return direct.layer_of(case.arena, case.table, case.width_in, case.width_out, case.dtype)


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    return Case([5, 16, 0], 40, 72, getattr(request, "param", torch.bfloat16), gains=True, shifts=True)


RECIPES = [((0, 1.0),), (), ((0, 0.5), (1, -2.0)), ((1, 1.0),)]


@pytest.mark.parametrize("case", DTYPES, ids=str, indirect=True)
@pytest.mark.parametrize("shape", [(4, 3), (12,), (4, 1), (0,)])
def test_apply_gives_the_operators_bits(case: Case, shape: tuple[int, ...]) -> None:
    plan = case.plan(RECIPES)
    x = torch.randn(*shape, 40, generator=case.generator).to(case.dtype)
    y = torch.randn(*shape, 72, generator=case.generator).to(case.dtype)
    before, want = y.clone(), y.clone()
    dispatch.apply_(want, None, x, case.arena, case.table, plan)
    assert direct.apply(layer(case), raw(plan), y, x)
    assert torch.equal(y, want)
    assert torch.equal(y, before) == (x.numel() == 0)


def test_rows_at_a_distance(case: Case) -> None:
    """Views whose rows lie apart are read and written where they lie, and nothing beside them."""
    plan, wide = case.plan(RECIPES), torch.randn(4, 100, generator=case.generator).to(case.dtype)
    out = torch.randn(4, 90, generator=case.generator).to(case.dtype)
    x, y = wide[:, 3:43], out[:, 5:77]
    want = out.clone()
    dispatch.apply_(want[:, 5:77], None, x, case.arena, case.table, plan)
    assert direct.apply(layer(case), raw(plan), y, x)
    assert torch.equal(out, want)


@pytest.mark.parametrize("case", FUSED, indirect=True)
@pytest.mark.parametrize("biased", [False, True])
def test_linear_gives_the_operators_bits(case: Case, biased: bool) -> None:
    plan = case.plan(RECIPES)
    x = torch.randn(4, 2, 40, generator=case.generator).to(case.dtype)
    weight = torch.randn(72, 40, generator=case.generator).to(case.dtype)
    bias = torch.randn(72, generator=case.generator).to(case.dtype) if biased else None
    y = torch.full((4, 2, 72), torch.nan, dtype=case.dtype)
    assert direct.linear(layer(case), raw(plan), y, x, torch.nn.Parameter(weight), bias, 16)
    assert torch.equal(y, dispatch.linear(x, weight, bias, case.arena, case.table, plan, 16))
    # What it does not take, it leaves to the operator, which refuses it or makes it contiguous.
    for other, added in (
        (weight.t().contiguous().t(), bias), (weight[:71], bias), (weight[:, :38], bias), (weight.double(), bias),
        (torch.cat([weight, weight], 1)[:, :40], bias), (weight, torch.zeros(71, dtype=case.dtype)),
        (weight, torch.zeros(72, dtype=torch.float64)), (weight, torch.zeros(2, 72, dtype=case.dtype)), (None, bias),
    ):  # fmt: skip
        before = y.clone()
        assert not direct.linear(layer(case), raw(plan), y, x, other, added, 16)
        assert torch.equal(y, before)


@pytest.mark.parametrize("case", [torch.bfloat16, torch.float16], ids=str, indirect=True)
@pytest.mark.parametrize("kblock", [0, -1, 15])
def test_linear_refuses_what_the_operator_refuses(case: Case, kblock: int) -> None:
    x, weight = torch.zeros(4, 40, dtype=case.dtype), torch.zeros(72, 40, dtype=case.dtype)
    y, plan = torch.zeros(4, 72, dtype=case.dtype), case.plan(RECIPES)
    blocks = kblock > 0 and case.dtype is torch.float16
    with pytest.raises(RuntimeError, match="float32 or bfloat16" if blocks else "kblock must be positive"):
        direct.linear(layer(case), raw(plan), y, x, weight, None, kblock)


def test_what_apply_does_not_take(case: Case) -> None:
    plan, of = raw(case.plan(RECIPES)), case.dtype
    x, y = torch.zeros(4, 40, dtype=of), torch.zeros(4, 72, dtype=of)
    for a, b in (
        (y, x.float()), (y.float(), x), (y, x.half()), (y[:, :71], x), (y, x[:, :39]), (y[:3], x), (y, x[:2]),
        (y.t().contiguous().t(), x), (y, x.t().contiguous().t()), (y, x.to("meta")), (y, None),
        (y.tolist(), x), (y.view(2, 2, 72).transpose(0, 1), x),
    ):  # fmt: skip
        assert not direct.apply(layer(case), plan, a, b)
    with pytest.raises(RuntimeError, match="its header alone takes 8"):
        direct.apply(layer(case), plan[:12], y, x)
    with pytest.raises(RuntimeError, match="do not divide into the plan's 4 rows"):
        direct.apply(layer(case), plan, torch.zeros(5, 72, dtype=of), torch.zeros(5, 40, dtype=of))
    for wrong in (("layer", plan, y, x), (layer(case), "plan", y, x), (layer(case), plan, y)):
        with pytest.raises((TypeError, ValueError)):
            direct.apply(*wrong)


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fused", [True, False])
def test_whoever_looks_sees_the_operators(
    llama: Any, folders: dict[str, Path], fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mode, a profiler; otherwise no operator runs, and the bits are the same."""
    model = served(llama, {"r3": folders["r3"]}, fused=fused)
    batch, names = inputs_for("llama", 2), ["r3", None]
    want = logits(model, batch, adapter_names=names)
    with Seen() as seen:
        assert torch.equal(logits(model, batch, adapter_names=names), want)
    ours = "mlora.linear.default" if fused and AVX2 else "mlora.apply_.default"
    assert ours in seen.names
    with torch.profiler.profile() as profile:
        assert torch.equal(logits(model, batch, adapter_names=names), want)
    assert ours.replace(".default", "").replace(".", "::") in {event.key for event in profile.key_averages()}

    calls: list[str] = []
    for name in ("linear", "apply_native_"):
        monkeypatch.setattr(dispatch, name, lambda *args, name=name: calls.append(name))
    assert torch.equal(logits(model, batch, adapter_names=names), want)
    assert not calls


def test_traces_have_the_operators(llama: Any, folders: dict[str, Path]) -> None:
    model = served(llama, {"r3": folders["r3"]}, fused=False)  # no trace takes the question which product to use

    class Routed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(input_ids=ids, adapter_names="r3", use_cache=False).logits

    with torch.no_grad():
        traced = torch.jit.trace(Routed(), (inputs_for("llama", 2)["input_ids"],), check_trace=False)
    assert "mlora::apply_" in str(traced.inlined_graph)


def test_a_weight_of_another_shape(llama: Any, folders: dict[str, Path]) -> None:
    """Somebody replaces a weight of a patched model: what the base makes of it, or an error; nothing beyond is read."""
    model = served(llama, {"r3": folders["r3"]})
    linear = model.model.layers[0].self_attn.q_proj
    weight = linear.weight.data
    x = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0))

    def call(adapter: str | None) -> Tensor:
        with torch.no_grad(), model.mlora.use_adapters(adapter):
            model.mlora._shared.local.unobserved = True
            return linear(x)

    want = call(None)
    linear.weight.data = weight[:8].contiguous()
    assert torch.equal(call(None), torch.nn.functional.linear(x, weight[:8]))
    with pytest.raises(mlora.errors.ModelMovedError, match=r"q_proj has a weight of shape \(8, 32\).*\(32, 32\)"):
        call("r3")
    linear.weight.data = weight.t().contiguous().t()
    torch.testing.assert_close(call(None), want)
    linear.weight.data = weight
    assert torch.equal(call(None), want)
