"""What models compute between their linears: torch's and the models' own bits, in fewer calls."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

import mlora
from mlora.layers import pointwise
from mlora.ops import direct

pytestmark = pytest.mark.skipif(not direct.READY, reason="needs the C++ kernels")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALVES = DTYPES[1:]
CALLS = ("rms_norm", "rotate", "gate")
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "head_dim": 16, "pad_token_id": 0, "max_position_embeddings": 64,
}  # fmt: skip


def model(kind: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SIZES, **options)).to(dtype).eval()
    for name, parameter in made.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    return made


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel did something."""
    counts: Counter[str] = Counter()

    def counted(name: str) -> Any:
        own = getattr(direct, name)

        def call(*args: Any) -> bool:
            done: bool = own(*args)
            counts[name] += done
            return done

        return call

    for name in CALLS:
        monkeypatch.setattr(direct, name, counted(name))
    return counts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 33, 64, 100, 576, 2048, 11008, 20000])
def test_rms_norm_has_torchs_bits(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    norm = LlamaRMSNorm(width).to(dtype)
    norm.weight.data.normal_()
    for shape in ((1, 1, width), (1, 40, width), (3, 7, width)):
        for scale in (1.0, 1e-3, 300.0, 1e-6 if dtype is torch.float16 else 1e-21):
            x = (torch.randn(shape) * scale).to(dtype)
            y = torch.empty_like(x)
            assert direct.rms_norm(y, x, norm.weight.data, norm.variance_epsilon)
            assert torch.equal(y, norm(x))
    spaced = torch.randn(5, 2 * width).to(dtype)[:, :width]
    y = torch.empty(5, width, dtype=dtype)
    assert direct.rms_norm(y, spaced, norm.weight.data, 0.25)
    norm.variance_epsilon = 0.25
    assert torch.equal(y, norm(spaced))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_stays_in_its_row(dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(100).to(dtype)
    x = torch.randn(4, 100).to(dtype)
    x[1, 3], x[2, 99] = torch.nan, torch.inf
    y = torch.empty_like(x)
    assert direct.rms_norm(y, x, norm.weight.data, 1e-6)
    assert torch.equal(y.nan_to_num(7), norm(x).nan_to_num(7)) and not y[[0, 3]].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [2, 6, 16, 64, 80, 128, 130])
def test_rotate_has_torchs_bits(dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(dim)
    for batch, heads, tokens in ((1, 9, 16), (4, 3, 1), (2, 1, 7), (1, 16, 300)):
        x = torch.randn(batch, tokens, heads, dim).to(dtype).transpose(1, 2)
        for places in (batch, 1):
            cos, sin = (torch.randn(places, tokens, dim).to(dtype) for _ in range(2))
            for one in (x, x.contiguous()):
                y = torch.empty_like(one)
                assert direct.rotate(y, one, cos, sin)
                wanted = apply_rotary_pos_emb(one, one, cos, sin)[0]
                assert torch.equal(y, wanted) and torch.equal(y.signbit(), wanted.signbit())


@pytest.mark.parametrize("dtype", HALVES)
def test_gate_has_torchs_bits_for_every_number(dtype: torch.dtype) -> None:
    gate = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    for size in (1 << 16, 1 << 15, 65, 31):
        up = torch.randn(size).to(dtype)
        y = torch.empty_like(up)
        assert direct.gate(y, gate[-size:], up)
        wanted = nn.functional.silu(gate[-size:]) * up
        assert torch.equal(y.nan_to_num(7), wanted.nan_to_num(7)) and torch.equal(y.isnan(), wanted.isnan())


def test_what_a_kernel_does_not_take_is_left_alone() -> None:
    x, weight = torch.randn(3, 64), torch.randn(64)
    y = torch.full_like(x, 5)
    cos = torch.randn(1, 3, 16)
    heads = torch.full((1, 2, 3, 16), 5.0)
    assert not direct.rms_norm(y, x.half(), weight, 1e-6)
    assert not direct.rms_norm(y, x, weight[:-1], 1e-6)
    assert not direct.rms_norm(y, x.t().contiguous().t(), weight, 1e-6)
    assert not direct.rms_norm(y, x[:2], weight, 1e-6)
    assert not direct.rms_norm(y, x.to("meta"), weight, 1e-6)
    assert not direct.gate(y, x, x)  # of 32 bits
    assert not direct.gate(y.half(), x.half(), x.half()[:2])
    assert not direct.rotate(heads, heads, cos[..., :8], cos[..., :8])
    assert not direct.rotate(heads, heads, cos[:, :2], cos[:, :2])
    assert not direct.rotate(heads, heads.half(), cos, cos)
    assert not direct.rotate(heads[..., :15], heads[..., :15], cos[..., :15], cos[..., :15])
    assert (y == 5).all() and (heads == 5).all()


# What of a kind of model runs in kernels: its norms, its rotary embedding, its gate.
KINDS = {
    "llama": CALLS, "qwen2": CALLS, "qwen3": CALLS, "mistral": CALLS, "granite": CALLS,
    "olmo2": ("gate",),  # norms and rotary embedding in fp32
    "gemma": ("rotate",),  # norms of 1 + weight, GELU
    "gemma2": ("rotate",),
    "phi3": ("rms_norm", "rotate"),  # gate and up in one linear
    "cohere": ("gate",),  # another norm, and another order of rotary pairs
    "stablelm": ("rotate", "gate"),
    "glm": ("rms_norm",),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_patched_model_has_the_models_bits(kind: str, calls: Counter[str]) -> None:
    bare = model(kind)
    ids = torch.arange(1, 33).view(2, 16)
    with torch.inference_mode():
        wanted = bare(ids).logits
        answers = bare.generate(ids, max_new_tokens=4, do_sample=False)
    mlora.patch(bare, memory="1MiB")
    with torch.inference_mode():
        assert torch.equal(bare(ids).logits, wanted)
        calls.clear()  # a function is tried when a dtype first comes
        assert torch.equal(bare(ids).logits, wanted)
        used = {name for name in CALLS if calls[name]}
        assert torch.equal(bare.generate(ids, max_new_tokens=4, do_sample=False), answers)
    assert sorted(used) == sorted(KINDS[kind])


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_of_a_llama_runs_in_kernels(dtype: torch.dtype, calls: Counter[str]) -> None:
    bare = model("llama", dtype)
    mlora.patch(bare, memory="1MiB")
    with torch.no_grad():
        bare(torch.arange(1, 9).view(1, 8))
        calls.clear()
        bare(torch.arange(1, 9).view(1, 8))
    assert calls == {"rms_norm": 5, "rotate": 4, "gate": 0 if dtype is torch.float32 else 2}


def test_without_fused_the_model_computes_itself(calls: Counter[str]) -> None:
    bare = model("llama")
    mlora.patch(bare, memory="1MiB", fused=False)
    calls.clear()
    with torch.no_grad():
        bare(torch.arange(1, 9).view(1, 8))
    assert not +calls


def test_autograd_sees_the_models_own_operators(calls: Counter[str]) -> None:
    bare, ids = model("llama", torch.float32), torch.arange(1, 17).view(2, 8)
    bare(ids, labels=ids).loss.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in bare.named_parameters()}
    bare.zero_grad()
    mlora.patch(bare, memory="1MiB")
    calls.clear()
    bare(ids, labels=ids).loss.backward()
    assert not +calls
    assert all(torch.equal(parameter.grad, wanted[name]) for name, parameter in bare.named_parameters())


def test_hooks_still_see_the_activation(calls: Counter[str]) -> None:
    bare, ids = model("llama"), torch.arange(1, 9).view(1, 8)
    mlora.patch(bare, memory="1MiB")
    seen: list[torch.Tensor] = []
    handle = bare.model.layers[1].mlp.act_fn.register_forward_hook(lambda _, given, y: seen.append(y))
    with torch.no_grad():
        hooked = bare(ids).logits
        handle.remove()
        calls.clear()
        assert torch.equal(bare(ids).logits, hooked)
    assert len(seen) == 1 and calls["gate"] == 2


def test_somebodys_rotary_embedding_is_called(monkeypatch: pytest.MonkeyPatch, calls: Counter[str]) -> None:
    bare, ids = model("llama"), torch.arange(1, 9).view(1, 8)
    mlora.patch(bare, memory="1MiB")
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q * 2, k))
    calls.clear()
    with torch.no_grad():
        given = bare(ids).logits
        assert not calls["rotate"]
        mlora.unpatch(bare)
        assert torch.equal(bare(ids).logits, given)


def test_a_decorated_forward_keeps_its_decorators() -> None:
    told: list[str] = []

    def decorator(function: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            told.append("called")
            return function(*args, **kwargs)

        wrapper.__wrapped__ = function  # type: ignore[attr-defined]
        return wrapper

    forward = modeling_llama.LlamaAttention.forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    copied = pointwise.with_kernels(decorator(decorator(forward)))
    assert copied is not None and pointwise.with_kernels(lambda self, x: x) is None
    attention = modeling_llama.LlamaAttention(modeling_llama.LlamaConfig(**SIZES), 0)
    cos, sin = torch.randn(1, 3, 16), torch.randn(1, 3, 16)
    x = torch.randn(1, 3, 64)
    with torch.no_grad():
        assert torch.equal(
            copied(attention, x, position_embeddings=(cos, sin), attention_mask=None)[0],
            forward(attention, x, position_embeddings=(cos, sin), attention_mask=None)[0],
        )
    assert told == ["called"] * 2


def test_unpatch_gives_back_the_classes() -> None:
    bare = model("llama")
    before = [type(module) for module in bare.modules()]
    mlora.patch(bare, memory="1MiB")
    mlora.unpatch(bare)
    assert [type(module) for module in bare.modules()] == before
    assert not any("_mlora_shared" in module.__dict__ for module in bare.modules())
