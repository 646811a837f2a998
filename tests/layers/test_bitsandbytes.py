"""bitsandbytes' 4 and 8 bits, run on the CPU. PEFT on the same quantized model is the oracle; for DoRA on 4 bits it is
the formula, with the matrix that a forward makes: the first call packs the weight, and PEFT reads it as if not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_close, logits, make_adapter, peft_alone
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

import mlora
from mlora import errors

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def filled(made: nn.Module, linear: nn.Linear) -> nn.Module:
    made.load_state_dict(linear.state_dict())
    made.bias = linear.bias  # in its own dtype
    return made.to("cpu")  # quantizes


def nf4(linear: nn.Linear) -> nn.Module:
    made = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=linear.weight.dtype,
        quant_type="nf4",
    )  # fmt: skip
    return filled(made, linear)


def int8(linear: nn.Linear) -> nn.Module:
    made = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False)
    return filled(made, linear)


Kind = Callable[[nn.Linear], nn.Module]
KINDS = pytest.mark.parametrize("kind", (nf4, int8), ids=("nf4", "int8"))


def quantized(base: Any, kind: Kind) -> Any:
    """A copy of `base` whose linears but the head are of bitsandbytes."""
    model = copy.deepcopy(base)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, kind(module))
    return model.eval()


@pytest.fixture(scope="module")
def base() -> Any:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 96, (4, 5), generator=torch.Generator().manual_seed(1))}


@pytest.fixture(scope="module")
def folders(base: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bitsandbytes")
    return {"lora": make_adapter(root / "lora", base, 1, r=3, lora_alpha=7, target_modules=TARGETS)}


@KINDS
def test_lora_is_that_of_peft_on_the_same_model(
    base: Any, folders: dict[str, Path], batch: dict[str, Tensor], kind: Kind
) -> None:
    bare = logits(quantized(base, kind), batch)
    want = logits(peft_alone(quantized(base, kind), folders["lora"]), batch)
    assert (want - bare).abs().max() > 1e-2
    model = quantized(base, kind)
    runtime = mlora.patch(model)
    assert sum(linear.offset is None for linear in runtime.bases.values()) == 16
    runtime.load_adapter(folders["lora"], "lora")
    got = logits(model, batch, adapter_names=["lora", None, "lora", None])
    assert_close(got[::2], want[::2])
    assert torch.equal(logits(model, batch), bare)
    with pytest.raises(errors.MergeError, match=r"layers.0.self_attn.q_proj.*quantized"):
        runtime.merge_adapter("lora")
    with pytest.raises(errors.ModelMovedError):
        model.to(torch.float64)
    assert torch.equal(logits(mlora.unpatch(model), batch), bare)


@KINDS
def test_dora_takes_the_matrix_that_the_forward_makes(kind: Kind) -> None:
    """Loaded before a call and after one: what bitsandbytes does to the weight at its first call is no matter. Of one
    linear, since 4 bits multiply in bf16, which makes much of the last bit of what came before. 8 bits keep the matrix
    and round what they make of it."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(64, 32)
    bias = linear.bias.detach().clone()
    model, fresh = (nn.Sequential(kind(copy.deepcopy(linear))).eval() for _ in range(2))
    a, b = torch.randn(2, 64, generator=generator) / 8, torch.randn(32, 2, generator=generator)
    m = 0.6 + 0.8 * torch.rand(32, generator=generator)
    x = torch.randn(4, 64, generator=generator)
    with torch.no_grad():
        bare = fresh(x)
        linear.bias.zero_()  # which `matrix` would be rounded with
        own = kind(linear).eval()
        matrix = own(torch.eye(64)).t() if kind is nf4 else own.weight * own.weight.SCB[:, None] / 127
        want = m / (matrix + b @ a).norm(dim=1) * (bare - bias + x @ a.t() @ b.t()) + bias
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["0"], "use_dora": True}
        tensors = {"0.lora_A.weight": a, "0.lora_B.weight": b, "0.lora_magnitude_vector": m}
        runtime = mlora.patch(model)
        runtime.add_adapter("before", mlora.Adapter(config, tensors))
        assert torch.equal(model(x), bare)
        runtime.add_adapter("after", mlora.Adapter(config, tensors))
        got = model(x, adapter_names=["before", None, "after", "before"])
    assert_close(got[[0, 2, 3]], want[[0, 2, 3]])
    assert torch.equal(got[1], bare[1])


@KINDS
def test_activations_in_bf16(base: Any, folders: dict[str, Path], batch: dict[str, Tensor], kind: Kind) -> None:
    model = quantized(copy.deepcopy(base).bfloat16(), kind)
    runtime = mlora.patch(model)
    assert {model.get_submodule(name)._mlora.dtype for name in runtime.bases} == {torch.bfloat16}
    runtime.load_adapter(folders["lora"], "lora")
    want = logits(peft_alone(quantized(base, kind), folders["lora"]), batch)
    got = logits(model, batch, adapter_names="lora").float()
    assert (got - want).norm() < 0.05 * want.norm()
