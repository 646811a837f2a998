"""Decode steps' attention of `patch(fused="always")`: as exact as torch's, on the same calls, and nowhere else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCAB, build, served
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import StaticCache

import mlora
from mlora import errors
from mlora.layers import attention
from mlora.ops import dispatch, fastest

pytestmark = pytest.mark.skipif(not dispatch.attends(torch.float32), reason="without AVX2 attention is torch's")
KINDS = ["llama", "qwen2", "gemma", "gpt2", "opt"]
IDS = torch.randint(3, VOCAB, (4, 9), generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linears with the library's bits, so that what differs is attention."""
    monkeypatch.setattr(fastest, "probe", lambda *question: dispatch.LIBRARY)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What `attend_step` was called with."""
    seen: list[tuple[Any, ...]] = []
    operator = dispatch.attend_step

    def attend_step(*given: Any) -> Tensor:
        seen.append(given)
        return operator(*given)

    monkeypatch.setattr(dispatch, "attend_step", attend_step)
    return seen


def patched(base: Any, fused: Any = "always") -> Any:
    model = copy.deepcopy(base)
    mlora.patch(model, memory=1 << 20, fused=fused)
    return model


def decoded(model: Any, mask: Tensor, new: int = 3, **options: Any) -> Tensor:
    """The logits of `new` steps after a prompt, (rows, new, vocabulary)."""
    found = []
    with torch.no_grad():
        out = model(input_ids=IDS, attention_mask=mask, use_cache=True, **options)
        for step in range(new):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            token = IDS[:, step : step + 1]
            out = model(input_ids=token, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits[:, 0])
    return torch.stack(found, 1)


def padding() -> Tensor:
    """Of four rows, on the left."""
    return (torch.arange(9) >= torch.tensor([[0], [4], [7], [2]])).long()


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_as_exact_as_torchs(kind: str, dtype: torch.dtype, padded: bool, steps: list[Any]) -> None:
    base = build(kind, dtype)
    mask = padding() if padded else torch.ones_like(IDS)
    exact = decoded(copy.deepcopy(base).double(), mask)
    usual, got = (decoded(model, mask).double() for model in (base, patched(base)))
    layers = base.config.num_hidden_layers
    assert len(steps) == 3 * layers and all((given[3] is not None) == padded for given in steps)
    errors = [(out - exact).square().mean().sqrt() for out in (got, usual)]
    assert errors[0] <= 1.5 * errors[1] and errors[0] < (1e-5 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generate_chooses_the_same_tokens(kind: str, steps: list[Any]) -> None:
    """Greedy, with beams, and into a cache of a fixed length, whose end the mask hides."""
    base = build(kind)
    model, mask = patched(base), padding()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    for more in ({}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}):
        before = len(steps)
        assert torch.equal(model.generate(IDS, **options, **more), base.generate(IDS, **options, **more))
        assert len(steps) > before


def test_a_row_is_that_of_its_tokens_alone(steps: list[Any]) -> None:
    """To the bit, whatever stands beside it, in front of it, or behind it in a cache of a fixed length."""
    draw = torch.Generator().manual_seed(0)
    layer = patched(build("llama")).model.layers[0].self_attn
    q = torch.randn(3, 4, 1, 8, generator=draw)
    k, v = (torch.randn(3, 2, 9, 8, generator=draw) for _ in range(2))
    mask = torch.ones(3, 1, 1, 9, dtype=torch.bool)
    mask[1, ..., :4] = mask[..., 7:] = False
    with torch.no_grad():
        together, _ = attention._attend(layer, q, k, v, mask)
        alone, _ = attention._attend(layer, q[1:2], k[1:2, :, 4:7], v[1:2, :, 4:7], None)
    assert torch.equal(alone, together[1:2]) and len(steps) == 2


def test_static_caches(steps: list[Any]) -> None:
    base = build("qwen2")
    found = []
    for model in (base, patched(base)):
        cache = StaticCache(config=base.config, max_cache_len=20)
        with torch.no_grad():
            model(input_ids=IDS, past_key_values=cache, use_cache=True)
            found.append(model(input_ids=IDS[:, :1], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    assert steps


def test_sliding_windows(steps: list[Any]) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        sliding_window=5,
        initializer_range=0.3,
    )
    base = MistralForCausalLM(config).eval()
    for mask in (torch.ones_like(IDS), padding()):
        torch.testing.assert_close(decoded(patched(base), mask), decoded(base, mask), rtol=1e-4, atol=1e-4)
    assert len(steps) == 12


def _eager(model: Any) -> None:
    model.set_attn_implementation("eager")


def _training(model: Any) -> None:
    torch.set_grad_enabled(True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)


@pytest.mark.parametrize(
    ("fused", "change"),
    [(True, None), (False, None), ("always", _eager), ("always", _training)],
    ids=["by default", "not fused", "eager", "recorded"],
)
def test_other_calls_are_left_alone(fused: Any, change: Callable[[Any], None] | None, steps: list[Any]) -> None:
    """To the bit: what is chosen otherwise, and what autograd records."""
    base = build("llama")
    model = patched(base, fused)
    before = torch.is_grad_enabled()
    try:
        torch.set_grad_enabled(False)
        for each in (base, model):
            if change is not None:
                change(each)
        outs = [m(input_ids=IDS[:, :1], use_cache=False).logits for m in (base, model)]
    finally:
        torch.set_grad_enabled(before)
    assert torch.equal(outs[0], outs[1]) and not steps


@pytest.mark.parametrize(
    "change",
    [
        lambda given: given.update(dropout=0.1),
        lambda given: given.update(position_bias=torch.zeros(3, 4, 1, 9)),
        lambda given: given.update(attention_mask=torch.zeros(3, 1, 1, 9)),
        lambda given: given.update(attention_mask=torch.ones(3, 4, 1, 9, dtype=torch.bool)),
        lambda given: given.update(scaling=1),
        lambda given: given.update(value=given["value"][..., :6]),
        lambda given: given.update({name: given[name].double() for name in ("query", "key", "value")}),
        lambda given: given.update(query=torch.randn(3, 4, 2, 8)),
    ],
    ids=["dropout", "biases", "added mask", "mask of heads", "whole scale", "other values", "float64", "two queries"],
)
def test_what_it_does_not_compute_goes_to_torch(change: Any, steps: list[Any]) -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layer = patched(build("llama")).model.layers[0].self_attn
    given = {
        "query": torch.randn(3, 4, 1, 8),
        "key": torch.randn(3, 2, 9, 8),
        "value": torch.randn(3, 2, 9, 8),
        "attention_mask": None,
    }
    change(given)
    found = []
    for function in (attention._attend, sdpa_attention_forward):
        torch.manual_seed(0)
        with torch.no_grad():
            found.append(function(layer, **given)[0])
    assert torch.equal(*found) and not steps


def test_where_kernels_are_scalar_it_is_torchs(monkeypatch: pytest.MonkeyPatch, steps: list[Any]) -> None:
    base = build("llama")
    model = patched(base)
    monkeypatch.setattr(dispatch, "attends", lambda dtype: False)
    assert torch.equal(decoded(model, padding()), decoded(base, padding())) and not steps


def test_unpatched_models_have_torchs_again(steps: list[Any]) -> None:
    base = build("llama")
    model = patched(base)
    mlora.unpatch(model)
    assert torch.equal(decoded(model, padding()), decoded(base, padding())) and not steps


def test_adapters_of_rows(folders: dict[str, Path], llama: Any, steps: list[Any]) -> None:
    """`generate` of a mixed batch chooses the tokens of each row alone."""
    model = served(llama, {name: folders[name] for name in ("r3", "dora1")}, memory=1 << 20, fused="always")
    names = ["r3", None, "dora1", "r3"]
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    mask = padding()
    got = model.generate(IDS, attention_mask=mask, adapter_names=names, **options)
    for row, name in enumerate(names):
        own = IDS[row : row + 1, mask[row] == 1]
        alone = model.generate(own, attention_mask=torch.ones_like(own), adapter_names=[name], **options)
        assert torch.equal(alone[0, own.shape[1] :], got[row, 9:])
    assert steps


@pytest.mark.parametrize("fused", [True, "always"])
def test_what_replaces_a_models_function_later_is_called(fused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As code does that looks into models: an attention calls what its module has when it runs."""
    from transformers.models.llama import modeling_llama

    calls = []
    own = modeling_llama.eager_attention_forward

    def looking(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    model = patched(build("llama"), fused)
    _eager(model)
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", looking)
    with torch.no_grad():
        model(input_ids=IDS)
    assert len(calls) == model.config.num_hidden_layers


@pytest.mark.parametrize("fused", [True, "always"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_forward_mode_is_torchs(kind: str, fused: Any, monkeypatch: pytest.MonkeyPatch, steps: list[Any]) -> None:
    """Without adapters tangents are the bare model's, also where the fused op would be called."""
    monkeypatch.setattr(fastest, "probe", lambda *question: dispatch.ALONG)
    base = build(kind)
    x, tangent = torch.randn(2, 1, 32), torch.randn(2, 1, 32)
    found = []
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        for model in (base, patched(base, fused)):
            out = model(inputs_embeds=forward_ad.make_dual(x, tangent), use_cache=False).logits
            found.append(forward_ad.unpack_dual(out).tangent)
    assert torch.equal(*found) and found[0].any() and not steps


def test_forward_mode_with_adapters_is_refused(folders: dict[str, Path], llama: Any) -> None:
    model = served(llama, {"r3": folders["r3"]}, memory=1 << 20)
    with forward_ad.dual_level(), pytest.raises(errors.EntryError, match="forward_ad"):
        model(input_ids=IDS, adapter_names="r3")
    assert model(input_ids=IDS, adapter_names="r3").logits.isfinite().all()
