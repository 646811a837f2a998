"""Quantized linears: served without touching their weights, dequantized once by what needs them, never folded into.

torchao's int8 and grouped int4 run for real where it is installed; bitsandbytes has a file of its own. GPTQ, AWQ, HQQ
and FP8 are stand-ins of the same interface, since those need their own kernels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_close, build, inputs_for, logits, make_adapter, peft_alone, row_of
from torch import Tensor, nn

import mlora
from mlora import errors
from mlora.layers import base_linear, find_layers


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values of the shape of (out, in) `weight`, and a scale for each row."""
    scales = weight.abs().amax(1) / 127
    return (weight / scales[:, None]).round().to(torch.int8), scales


class Packed(nn.Module):
    """Like GPTQ's and AWQ's: no `weight`, values stored (in, out), scales, bias as a buffer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        values, scales = quantized(linear.weight.detach())
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", values.t().contiguous())
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        y = x @ (self.qweight.to(x.dtype) * self.scales.to(x.dtype))
        return y if self.bias is None else y + self.bias.to(x.dtype)


class OwnWeight(nn.Linear):
    """Like FP8: an `nn.Linear` whose `weight` is not what it multiplies by."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.bias = linear.bias


class Fp8(OwnWeight):
    """A scaled float8 weight, whose `is_floating_point()` is true."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        values, scales = quantized(linear.weight.detach())
        self.weight = nn.Parameter(values.to(torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale_inv = nn.Parameter(scales, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        dense = self.weight.to(input.dtype) * self.weight_scale_inv[:, None].to(input.dtype)
        return nn.functional.linear(input, dense, self.bias)


STAND_INS = (Packed, Fp8)


def replaced(model: Any, make: Callable[[nn.Linear], nn.Module]) -> Any:
    """A copy of `model` with every linear but the head replaced."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, make(module))
    return model


def dense(linear: nn.Linear, make: Callable[[nn.Linear], nn.Module]) -> nn.Linear:
    """The plain linear that a stand-in is equal to."""
    values, scales = quantized(linear.weight.detach())
    if make is Fp8:
        values = values.to(torch.float8_e4m3fn)
    result = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
    result.weight = nn.Parameter(values.float() * scales[:, None])
    result.bias = linear.bias
    return result


def torchao(bits: int) -> Callable[[Any], Any]:
    def make(model: Any) -> Any:
        quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        from torchao.quantization.granularity import PerGroup

        config = (
            quantization.Int8WeightOnlyConfig(version=2)
            if bits == 8
            else quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16))
        )
        model = copy.deepcopy(model)
        quantization.quantize_(model, config, lambda m, name: isinstance(m, nn.Linear) and name != "lm_head")
        return model

    return make


def both(kind: Any, model: Any) -> tuple[Any, Any]:
    """The quantized model, and a dense one of the same values."""
    if isinstance(kind, int):
        model = torchao(kind)(model)
        plain = copy.deepcopy(model)
        for module in plain.modules():
            if isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter:
                module.weight = nn.Parameter(module.weight.dequantize().detach())
        return model, plain
    return replaced(model, kind), replaced(model, lambda linear: dense(linear, kind))


KINDS = (8, 4, *STAND_INS)
IDS = ("torchao-int8", "torchao-int4", *(kind.__name__.lower() for kind in STAND_INS))


@pytest.fixture(scope="module")
def base() -> Any:
    return build("qwen2")  # some of its linears have a bias


@pytest.fixture(scope="module")
def adapters(base: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("quantized")
    targets = {"target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}
    return {
        "lora": make_adapter(root / "lora", base, 1, r=3, lora_alpha=7, **targets),
        "dora": make_adapter(root / "dora", base, 2, r=2, use_dora=True, **targets),
    }


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_rows_are_those_of_the_dense_model(base: Any, adapters: dict[str, Path], kind: Any) -> None:
    """Against PEFT on the dequantized weights. DoRA's norm needs W, once before a call and once after."""
    model, plain = both(kind, base)
    before = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    batch = inputs_for("qwen2", 4)
    bare = logits(model, batch)
    runtime = mlora.patch(model)
    assert sum(base.offset is None for base in runtime.bases.values()) == 16 and torch.equal(logits(model, batch), bare)
    for name, folder in adapters.items():
        runtime.load_adapter(folder, name)
    runtime.set_adapter("lora")  # which must not get into W
    runtime.load_adapter(adapters["dora"], "later")
    runtime.set_adapter(None)
    got = logits(model, batch, adapter_names=["dora", None, "lora", "later"])
    for row, name in enumerate(("dora", None, "lora", "dora")):
        oracle = plain if name is None else peft_alone(plain, adapters[name])
        assert_close(got[row : row + 1], logits(oracle, row_of(batch, row)))
    assert mlora.unpatch(model) is model and torch.equal(logits(model, batch), bare)
    assert [id(tensor) for tensor in (*model.parameters(), *model.buffers())] == before


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_nothing_is_folded_into_quantized_weights(base: Any, adapters: dict[str, Path], kind: Any) -> None:
    model, _ = both(kind, base)
    runtime = mlora.patch(model)
    runtime.load_adapter(adapters["lora"], "lora")
    bare = logits(model, inputs_for("qwen2", 2))
    with pytest.raises(errors.MergeError, match=r"layers.0.self_attn.q_proj.*quantized"):
        runtime.merge_adapter("lora")
    assert not runtime.merged and torch.equal(logits(model, inputs_for("qwen2", 2)), bare)


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_bf16_activations_and_weight(base: Any, adapters: dict[str, Path], kind: Any) -> None:
    """The dtype of the activations is known although the weight has another, and the bias does not round W."""
    model, plain = both(kind, copy.deepcopy(base).bfloat16())
    runtime = mlora.patch(model)
    assert {model.get_submodule(name)._mlora.dtype for name in runtime.bases} == {torch.bfloat16}
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"):
        want = plain.get_submodule(name).weight.float()
        error = (runtime.bases[name].weight() - want).abs()
        assert (error <= want.abs() * 2**-7).all()  # two roundings to bf16
    runtime.load_adapter(adapters["lora"], "lora")
    assert logits(model, inputs_for("qwen2", 2), adapter_names="lora").isfinite().all()


def test_a_dense_linear_keeps_its_own_dtype_beside_quantized_ones(base: Any) -> None:
    model = replaced(copy.deepcopy(base).bfloat16(), Packed)
    model.lm_head.float()
    mlora.patch(model)
    assert model.lm_head._mlora.dtype == torch.float32


@pytest.mark.parametrize("bits", (8, 4))
def test_peft_on_the_same_torchao_model(base: Any, adapters: dict[str, Path], bits: int) -> None:
    model = torchao(bits)(base)
    batch = inputs_for("qwen2", 3)
    want = logits(peft_alone(model, adapters["lora"]), batch)
    mlora.patch(model).load_adapter(adapters["lora"], "lora")
    assert_close(logits(model, batch, adapter_names="lora"), want)


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_gradients_reach_the_input(base: Any, adapters: dict[str, Path], kind: Any) -> None:
    model, plain = both(kind, base)
    mlora.patch(model).load_adapter(adapters["lora"], "lora")
    x = torch.randn(2, 3, 32)
    grads = []
    for served, names in ((model, {"adapter_names": "lora"}), (peft_alone(plain, adapters["lora"]), {})):
        leaf = x.clone().requires_grad_()
        served(inputs_embeds=leaf, **names).logits.square().sum().backward()
        grads.append(leaf.grad)
    assert_close(grads[0], grads[1])


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_a_move_is_refused(base: Any, kind: Any) -> None:
    model, _ = both(kind, base)
    mlora.patch(model)
    with pytest.raises(errors.ModelMovedError):
        model.to(torch.float64)
    assert model.to("cpu") is model


class Stub(nn.Module):
    """Has what `find_layers` asks for, but for what a test takes away."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 4, 6
        self.register_buffer("packed", torch.zeros(6, 4, dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.packed.to(x.dtype).t()


class Gathered(Stub):
    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        return x


def wrapper() -> Stub:
    stub = Stub()
    stub.base_layer = nn.Identity()
    return stub


def without_tensors() -> Stub:
    stub = Stub()
    del stub.packed
    return stub


def with_dense_weight() -> Stub:
    stub = Stub()
    stub.weight = nn.Parameter(torch.zeros(6, 4))
    return stub


NOT_LINEAR = (
    Gathered, wrapper, without_tensors, with_dense_weight,
    lambda: nn.Embedding(5, 4), lambda: nn.LayerNorm(4), lambda: nn.Bilinear(4, 4, 6), lambda: nn.LSTM(4, 6),
)  # fmt: skip


def test_only_what_is_linear_is_found() -> None:
    assert list(find_layers(nn.Sequential(Stub()))) == ["0"]
    for make in NOT_LINEAR:
        found = find_layers(nn.Sequential(make()))
        assert all(isinstance(module, nn.LayerNorm) for module in found.values()), make


def test_what_cannot_be_dequantized_is_refused_by_name() -> None:
    with pytest.raises(errors.UnsupportedAdapterError, match=r"module deep.down.*dequantized.*Stub"):
        base_linear("deep.down", Stub()).weight()
    offloaded = nn.Linear(4, 6, device="meta")
    with pytest.raises(errors.UnsupportedAdapterError, match=r"module deep.down.*offloaded"):
        base_linear("deep.down", offloaded).weight()
