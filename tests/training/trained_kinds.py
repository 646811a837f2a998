"""Adapters of every kind that is trained: a model for each, and what PEFT makes of it."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from conftest import BUILDERS, HIDDEN, VOCAB, build, inputs_for, peft_alone, row_of
from gradients import loss_of, out_of
from torch import Tensor


class Case(NamedTuple):
    """A model and the options of an adapter on it: PEFT's `LoraConfig`, or `IA3Config` where `ia3`."""

    model: str
    options: dict[str, Any]
    ia3: bool = False


CASES = {
    "head": Case("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "head with a bias": Case("mlp", {"target_modules": ["up"], "modules_to_save": ["head"]}),
    "whole linears": Case("mlp", {"target_modules": ["head"], "modules_to_save": ["up", "blocks.0"]}),
    "classifier": Case("bert", {"target_modules": ["query"], "modules_to_save": ["classifier", "pooler"]}),
    "Conv1D": Case("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["h.0.attn.c_proj", "h.1.mlp.c_proj"]}),
    "tied head": Case("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]}),
    "layer norms": Case("opt", {"target_modules": ["fc1"], "modules_to_save": ["self_attn_layer_norm"]}),
    "RMS norms": Case("llama", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm", "model.norm"]}),
    "norms of heads": Case("qwen3", {"target_modules": ["q_proj"], "modules_to_save": ["q_norm", "k_norm"]}),
    "norms of one more": Case("gemma", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}),
    "whole embedding": Case("opt", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "whole embedding, scaled": Case("biogpt", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "tokens": Case("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 3, 60, 0]}),
    "tokens, tied": Case("gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [5, 3, 60, 0]}}),
    "tokens, tied and scaled": Case("biogpt", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 3, 60, 0]}),
    "embedding": Case("opt", {"target_modules": ["q_proj", "embed_tokens"]}),
    "embedding, scaled": Case("biogpt", {"target_modules": ["fc1", "embed_tokens"], "use_rslora": True}),
    "embedding, Gemma's": Case("gemma", {"target_modules": ["q_proj", "embed_tokens"]}),
    "IA3": Case("mlp", {"target_modules": ["up", "0", "2"], "feedforward_modules": ["0"]}, ia3=True),
    "IA3, Conv1D": Case(
        "gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}, True
    ),
    "IA3 with a head": Case(
        "bert",
        {"target_modules": ["key", "value"], "feedforward_modules": ["value"], "modules_to_save": ["classifier"]},
        ia3=True,
    ),
}
WIDE = ("mlp", "gpt2", "opt", "bert", "biogpt")  # models that compute in fp64 throughout


def config_of(case: Case) -> Any:
    from peft import IA3Config, LoraConfig

    own = {} if case.ia3 else {"r": 4, "lora_alpha": 8}
    return (IA3Config if case.ia3 else LoraConfig)(**{**own, **case.options})


def folder_of(tmp_path: Path, base: Any, case: Case, name: str, seed: int) -> Path:
    """A PEFT folder in which every number that is trained is random, and near what it starts from."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(copy.deepcopy(base).float(), config_of(case))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=draw) * parameter.shape[-1] ** -0.5
                gain = "ia3_l" in key or parameter.dim() == 1
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw) if gain else noise)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(tmp_path / name)
    return tmp_path / name


def peft_gradients(
    base: Any, batch: dict[str, Tensor], row: int, folder: Path, weight: float = 1.0
) -> dict[str, Tensor]:
    """Of one row alone, by PEFT's names with the adapter's as N; at `weight` of its change, as a mix has it."""
    model = peft_alone(base, folder, weights=[weight])
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("oracle-0" in key)
    own = {key: p for key, p in model.named_parameters() if p.requires_grad}
    linear = {key for key in own if "lora_" not in key}  # of which the change is that of the number itself
    with torch.no_grad():
        for key in linear if weight != 1 else ():
            own[key].copy_(torch.lerp(_start(model, key), own[key], weight))
    loss_of(out_of(model, row_of(batch, row)), row).backward()
    return {key.replace(".oracle-0", ".N"): p.grad * (weight if key in linear else 1) for key, p in own.items()}


def _start(model: Any, key: str) -> Tensor:
    """What a parameter is where its adapter changes nothing."""
    parameter = model.get_parameter(key)
    if "ia3_l" in key:
        return torch.ones_like(parameter)
    if "trainable_tokens_delta" in key:
        layer = model.get_submodule(key.split(".trainable_tokens_delta")[0])
        return layer.base_layer.weight[layer.token_indices["oracle-0"]]
    path, _, part = key.partition(".modules_to_save.oracle-0.")
    return model.get_parameter(f"{path}.original_module.{part}")


def gradients_of(runtime: Any, name: str) -> dict[str, Tensor]:
    return {re.sub(rf"\.{name}(?=\.|$)", ".N", key): p.grad for key, p in runtime.named_parameters(name)}


def _biogpt() -> Any:
    """Whose embedding is scaled by 8: a factor that the arena keeps in fp32."""
    from transformers import BioGptConfig, BioGptForCausalLM

    return BioGptForCausalLM(
        BioGptConfig(
            vocab_size=VOCAB, hidden_size=2 * HIDDEN, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, scale_embedding=True, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        )
    )  # fmt: skip


def base_of(case: Case, dtype: torch.dtype = torch.float32) -> Any:
    with mock.patch.dict(BUILDERS, biogpt=_biogpt):
        return build(case.model, dtype)


def batch_of(case: Case, rows: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> dict[str, Tensor]:
    return inputs_for(case.model, rows, seed=seed, dtype=dtype)
