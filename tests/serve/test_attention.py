"""Continuous batching with `mlora_paged`: each request's greedy tokens are those that it gets alone, in a batch of
requests of all lengths, with chunks, shared prefixes, ring buffers and pages; and what it cannot serve is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    ContinuousBatchingConfig,
    ContinuousBatchingManager,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from mlora import errors
from mlora.serve import attention

LAYERS_FILL = Version(transformers.__version__) >= Version("5.24")  # the cache themselves; their attention did before
SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LLAMA = (LlamaForCausalLM, LlamaConfig(**SMALL, num_key_value_heads=6))
GQA = (LlamaForCausalLM, LlamaConfig(**SMALL, num_key_value_heads=2, head_dim=20))
SLIDING = (MistralForCausalLM, MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=11))
MIXED = (
    Qwen3ForCausalLM,
    Qwen3Config(
        **SMALL,
        num_key_value_heads=3,
        head_dim=16,
        use_sliding_window=True,
        sliding_window=13,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
)
SOFTCAP = (
    Gemma2ForCausalLM,
    Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=16, sliding_window=9, attn_logit_softcapping=2.0),
)
EXPERTS = (MixtralForCausalLM, MixtralConfig(**SMALL, num_key_value_heads=3, num_local_experts=2))
MODELS = {
    "llama": LLAMA,
    "gqa": GQA,
    "sliding": SLIDING,
    "sliding and full": MIXED,
    "softcap": SOFTCAP,
    "experts": EXPERTS,
}
NEW = 12


class Manager(ContinuousBatchingManager):
    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        pass

    def _create_batch_processor(self) -> Any:
        processor = super()._create_batch_processor()
        attention.read_in_place(processor.cache)
        return processor


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    kind, config = MODELS[name]
    torch.manual_seed(7)
    model = kind(config).to(dtype).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def prompts(*lengths: int, same: int = 0) -> list[list[int]]:
    """Random ones, whose first `same` tokens are alike."""
    draw = torch.Generator().manual_seed(len(lengths))
    start = torch.randint(2, SMALL["vocab_size"], (same,), generator=draw).tolist()
    return [start + torch.randint(2, SMALL["vocab_size"], (n,), generator=draw).tolist() for n in lengths]


def continuous(model: Any, requests: list[list[int]], **settings: Any) -> list[list[int]]:
    config = ContinuousBatchingConfig(
        **{"page_size": 8, "num_blocks": 128, "max_batch_tokens": 24, **settings}, auto_switch_to_flash=False
    )
    manager = Manager(model, GenerationConfig(do_sample=False, eos_token_id=-1), config)
    manager.start()
    try:
        ids = [manager.add_request(request, max_new_tokens=NEW) for request in requests]
        results = dict.fromkeys(ids)
        while None in results.values():
            result = manager.get_result(timeout=60)
            assert result is not None and result.error is None, result and result.error
            if result.is_finished():
                results[result.request_id] = result.generated_tokens
    finally:
        manager.stop(block=True, hard_stop=True)
    return list(results.values())  # type: ignore[arg-type]


@torch.no_grad()
def agree(model: Any, request: list[int], got: list[int]) -> None:
    """Greedy tokens of `generate` alone, or one whose logit is within rounding of the best."""
    model.set_attn_implementation("eager")  # which knows softcaps
    settings = GenerationConfig(do_sample=False, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0)
    alone = model.generate(
        torch.tensor([request]), attention_mask=torch.ones(1, len(request)), generation_config=settings
    )
    wanted = alone[0, len(request) :].tolist()
    if got == wanted:
        return
    at = next(i for i, (a, b) in enumerate(zip(got, wanted, strict=True)) if a != b)
    logits = model(torch.tensor([request + wanted[:at]])).logits[0, -1].float()
    rounding = 8 * torch.finfo(model.dtype).eps * float(logits.abs().max())
    assert float(logits[wanted[at]] - logits[got[at]]) <= rounding, (at, got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_each_request_gets_what_it_gets_alone(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype)
    requests = prompts(3, 40, 1, 17, 9, 64, 30)
    attention.check(model)
    model.set_attn_implementation(attention.register())
    got = continuous(model, requests)
    for request, tokens in zip(requests, got, strict=True):
        agree(model, request, tokens)


def test_a_shared_prefix_is_read_where_it_lies() -> None:
    model = build("gqa")
    requests = prompts(3, 9, 1, 20, same=40)
    model.set_attn_implementation(attention.register())
    for request, tokens in zip(requests, continuous(model, requests[:1] + requests[1:]), strict=True):
        agree(model, request, tokens)


@pytest.mark.parametrize("name", ["gqa", "sliding"])
def test_calls_outside_of_continuous_batching_run_as_sdpa(name: str) -> None:
    model = build(name)
    batch = torch.randint(2, SMALL["vocab_size"], (3, 30))
    mask = torch.ones_like(batch)
    mask[1, :7] = 0
    settings = GenerationConfig(do_sample=False, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0)
    outputs = []
    for implementation in ("sdpa", attention.register()):
        model.set_attn_implementation(implementation)
        logits = model(batch, attention_mask=mask).logits
        outputs.append((logits, model.generate(batch, attention_mask=mask, generation_config=settings)))
    assert all(map(torch.equal, *outputs))


def sinks() -> Any:
    return GptOssForCausalLM(GptOssConfig(**SMALL, num_key_value_heads=2, head_dim=8, num_local_experts=2))


def two_windows() -> Any:
    model = build("sliding")
    model.model.layers[1].self_attn.forward = _other_window(model.model.layers[1].self_attn)
    return model


def _other_window(module: Any) -> Any:
    forward, config = module.forward, module.config

    def run(*args: Any, **kwargs: Any) -> Any:
        config.sliding_window = 5
        try:
            return forward(*args, **kwargs)
        finally:
            config.sliding_window = 11

    return run


def not_causal() -> Any:
    model = build("llama")
    model.model.layers[2].self_attn.is_causal = False
    return model


def no_attention() -> Any:
    model = build("llama")
    model.model.layers[0].self_attn.forward = lambda hidden_states, *args, **kwargs: (hidden_states, None)
    return model


def biased() -> Any:
    model = build("llama")
    module = model.model.layers[1].self_attn
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs, position_bias=torch.zeros(1))
    return model


def shared() -> Any:
    model = build("llama")
    model.model.layers[2].self_attn.layer_idx = 1
    return model


def arguments_lost() -> Any:
    return StableLmForCausalLM(StableLmConfig(**SMALL, num_key_value_heads=2))


def no_such_calls() -> Any:
    return BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=48, n_layer=2, n_head=6))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            arguments_lost,
            r"layer 0 does not hand read_index, write_index, cu_seq_lens_q, cu_seq_lens_k to its cache"
            if LAYERS_FILL
            else r"layers \[0, 1, 2\] do not call the attention",
        ),
        (
            no_such_calls,
            r"BloomForCausalLM does not run as continuous batching runs models"
            if LAYERS_FILL
            else r"layers \[0, 1\] do not call the attention",
        ),
        (sinks, r"layers.0.self_attn hands s_aux to its attention"),
        (two_windows, r"layers.1.self_attn has a sliding window of 5, its cache one of 11"),
        (not_causal, r"layers.2.self_attn is not causal"),
        (no_attention, r"layers \[0\] do not call"),
        (biased, r"layers.1.self_attn hands position_bias to its attention"),
        (shared, r"layer 1 fills the cache more often than once"),
        (lambda: build("llama", torch.float64), r"this is torch.float64"),
    ],
    ids=[
        "arguments lost",
        "no such calls",
        "sinks",
        "window",
        "bidirectional",
        "no attention",
        "bias",
        "shared",
        "float64",
    ],
)
def test_what_it_does_not_know_is_refused_by_name(make: Any, message: str) -> None:
    model = make().train()
    before = model.config._attn_implementation
    with pytest.raises(errors.UnsupportedModelError, match=message):
        attention.check(model)
    assert model.config._attn_implementation == before and model.training


def test_a_cache_that_was_not_made_ready_is_an_error_not_a_wrong_answer() -> None:
    model = build("llama")
    model.set_attn_implementation(attention.register())
    key = torch.zeros(1, 6, 4, 8)
    with pytest.raises(RuntimeError, match="read_in_place"):
        attention._forward(model.model.layers[0].self_attn, key, key, key, None, read_index=[torch.zeros(4)])


class Cache:
    def __init__(self, blocks: int) -> None:
        self.max_blocks_per_request = blocks
        self.layer_to_allocator = {0: object()}


@pytest.mark.parametrize(("cache", "message"), [(Cache(0), "cache has changed"), (Cache(4), "wanted 0")])
def test_a_cache_of_another_kind_is_refused(cache: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        attention.read_in_place(cache)
