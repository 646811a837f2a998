"""New adapters: PEFT's modules and PEFT's very numbers for the same seed."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from conftest import assert_close, build, inputs_for, logits
from peft import EvaConfig, LoraConfig, PeftModel, get_eva_state_dict, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import LoraGAConfig
from torch import Tensor

import mlora
from mlora import errors

ROOM = 1 << 24
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "usual modules": ("qwen2", {}),
    "all linears": ("qwen2", {"target_modules": "all-linear", "r": 5}),
    "a pattern": ("opt", {"target_modules": r".*\.(q_proj|fc1)", "lora_bias": True}),
    "some layers": ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    "all but some": ("llama", {"target_modules": "all-linear", "exclude_modules": ["down_proj"]}),
    "patterns": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "rank_pattern": {"c_fc": 3}, "fan_in_fan_out": True}),
    "gaussian": ("llama", {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": "orthogonal"}),
    "not started at zero": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": False, "lora_bias": True}),
    "mica": ("llama", {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "mica"}),
    "Gaussian": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "Gaussian"}),
    "MiCA": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "MiCA"}),
    "DoRA": ("qwen2", {"target_modules": ["q_proj", "up_proj"], "use_dora": True}),
    "DoRA, not at zero": (
        "gpt2",
        {"target_modules": ["c_fc"], "use_dora": True, "init_lora_weights": False, "fan_in_fan_out": True},
    ),
    "a module used twice": ("mlp", {"target_modules": ["0", "head"], "use_rslora": True}),
}


def peft_of(base: Any, options: dict[str, Any], seed: int | None) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if seed is not None:
            torch.manual_seed(seed)
        model = get_peft_model(copy.deepcopy(base), LoraConfig(**options), adapter_name="sql")
    return {key: parameter for key, parameter in model.named_parameters() if ".lora_" in key}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CONFIGS)
def test_it_starts_as_peft_does(case, dtype):
    kind, options = CONFIGS[case]
    if case.lower() == "mica" and dtype is torch.float64:
        pytest.skip("PEFT has no MiCA in fp64")
    base = build(kind, dtype)
    want = peft_of(base, options, 3)
    runtime = mlora.patch(copy.deepcopy(base), memory=ROOM)
    state = torch.get_rng_state()
    runtime.add_adapter("sql", LoraConfig(**options), seed=3)
    assert torch.equal(torch.get_rng_state(), state), "drew from torch's own generator"
    mine = dict(runtime.named_parameters("sql"))
    assert list(mine) == list(want)
    for key, parameter in want.items():
        assert torch.equal(mine[key], parameter) and mine[key].dtype is parameter.dtype, key
        assert mine[key].requires_grad is parameter.requires_grad, key


def test_without_a_seed_it_draws_as_peft_draws():
    base, options = build("mlp"), {"target_modules": ["0"]}
    torch.manual_seed(11)
    want = peft_of(base, options, None)
    runtime = mlora.patch(copy.deepcopy(base), memory=ROOM)
    torch.manual_seed(11)
    runtime.add_adapter("sql", LoraConfig(**options))
    assert all(torch.equal(parameter, want[key]) for key, parameter in runtime.named_parameters("sql"))


def test_it_is_the_base_until_it_is_trained(tmp_path, capsys):
    base, options = build("mlp"), {"target_modules": ["0", "up"], "r": 2}
    model, batch = copy.deepcopy(base), inputs_for("mlp", 2)
    runtime = mlora.patch(model, memory=ROOM)
    info = runtime.add_adapter("sql", LoraConfig(**options), seed=0)
    assert info.zero and info.rank == 2 and info.source == "config"
    assert torch.equal(logits(model, batch, adapter_names="sql"), logits(model, batch))
    get_peft_model(copy.deepcopy(base), LoraConfig(**options)).print_trainable_parameters()
    want = capsys.readouterr().out
    runtime.print_trainable_parameters()
    assert capsys.readouterr().out == want
    with torch.no_grad():
        for _, parameter in runtime.named_parameters("sql"):
            parameter.fill_(0.25)
    assert not runtime.adapters["sql"].zero
    runtime.save_adapter("sql", tmp_path)
    runtime.load_adapter(tmp_path, "again")
    assert torch.equal(logits(model, batch, adapter_names="again"), logits(model, batch, adapter_names="sql"))


def test_a_mapping_will_do():
    base = build("mlp")
    runtime = mlora.patch(copy.deepcopy(base), memory=ROOM)
    runtime.add_adapter("sql", {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["0"]}, seed=5)
    want = peft_of(base, {"r": 2, "lora_alpha": 4, "target_modules": ["0"]}, 5)
    assert all(torch.equal(parameter, want[key]) for key, parameter in runtime.named_parameters("sql"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("adjusts", [True, False], ids=["scalings adjusted", "scalings kept"])
def test_eva_starts_as_peft_does(dtype, adjusts, tmp_path):
    """Ranks, scalings and A, by PEFT's own function on the patched model; it is saved as PEFT's and goes back."""
    base = build("llama", dtype)
    batches = [inputs_for("llama", 4, seed=seed) for seed in range(3)]
    options = {
        "target_modules": ["q_proj", "o_proj", "up_proj"], "r": 2, "lora_alpha": 3, "rank_pattern": {"o_proj": 4},
        "init_lora_weights": "eva", "eva_config": EvaConfig(tau=0.5, adjust_scaling_factors=adjusts),
    }  # fmt: skip
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(**options), adapter_name="sql")
    initialize_lora_eva_weights(theirs, batches, adapter_name="sql", show_progress_bar=False)
    want = {key: parameter for key, parameter in theirs.named_parameters() if ".lora_" in key}
    ranks = {len(parameter) for key, parameter in want.items() if "lora_A" in key}
    assert len(ranks) > 1, "ranks were not divided anew"
    model = copy.deepcopy(base)
    runtime = mlora.patch(model, memory=ROOM)
    found = get_eva_state_dict(model, batches, LoraConfig(**options), show_progress_bar=False)
    runtime.add_adapter("sql", LoraConfig(**options), seed=0, eva_state_dict=found)
    mine = dict(runtime.named_parameters("sql"))
    assert list(mine) == list(want)
    for key, parameter in want.items():
        assert torch.equal(mine[key], parameter), key
    with torch.no_grad():
        for key, parameter in mine.items():
            if "lora_B" in key:
                want[key].fill_(0.25)
                parameter.fill_(0.25)
    batch = inputs_for("llama", 2)
    ours = logits(model, batch, adapter_names="sql")
    close = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert_close(ours, logits(theirs, batch), close)
    runtime.save_adapter("sql", tmp_path)
    assert_close(ours, logits(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path), batch), close)
    runtime.load_adapter(tmp_path, "again", strict=True)
    assert torch.equal(logits(model, batch, adapter_names="again"), ours)


def test_what_eva_cannot_start_from_is_named():
    runtime = mlora.patch(build("mlp"), memory=ROOM)
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["0", "up"], "init_lora_weights": "eva"}
    fits = {"up": torch.ones(2, 32), "blocks.0": torch.ones(2, 45)}
    for given, message in (
        ({"up": fits["up"]}, "nothing for blocks.0"),
        ({**fits, "head": torch.ones(2, 45)}, "has head, which the config does not target"),
        ({**fits, "up": torch.ones(2, 45)}, r"\(2, 45\) for up, which takes 32 features"),
    ):
        with pytest.raises(errors.AdapterError, match=message):
            runtime.add_adapter("sql", config, eva_state_dict=given)
    with pytest.raises(errors.AdapterError, match="eva_state_dict is of 'eva'"):
        runtime.add_adapter("sql", {**config, "init_lora_weights": True}, eva_state_dict=fits)
    runtime.add_adapter("sql", config, eva_state_dict={**fits, "up": torch.ones(0, 32)})
    assert runtime.adapters["sql"].modules == ("blocks.0",)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "rewrites the base": ("llama", {"init_lora_weights": "pissa"}, "init_lora_weights='pissa' .* rewrites the base"),
    **{
        f"rewrites the base, {init}": ("llama", {"init_lora_weights": init, **more}, f"'{init}' .* rewrites the base")
        for init, more in {
            "pissa_niter_4": {},
            "olora": {},
            "corda": {},
            "lora_ga": {"lora_ga_config": LoraGAConfig()},
            "OLoRA": {},
        }.items()
    },
    "of data": ("llama", {"init_lora_weights": "eva"}, r"starts from data; .*peft.get_eva_state_dict"),
    "unknown": ("llama", {"init_lora_weights": "zeros"}, "'zeros' is not served: PEFT has none of that name"),
    "dropout": ("llama", {"lora_dropout": 1.0}, r"lora_dropout is 1\.0, must be in \[0, 1\)"),
    "convolutions": (
        "conv",
        {"target_modules": ["convolution"]},
        "convolution.*are trained on linears and token embed",
    ),
    "DoRA of embeddings": (
        "llama",
        {"target_modules": ["embed_tokens"], "use_dora": True},
        "use_dora is not trained on",
    ),
    "whole convolutions": (
        "conv",
        {"target_modules": ["classifier.1"], "modules_to_save": ["embedder.convolution"]},
        r"modules_to_save names .*embedder\.convolution .*; trained whole are linears",
    ),
    "tokens beyond": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [67]}, "tokens below 67"),
    "tokens twice": (
        "llama",
        {"target_modules": ["embed_tokens"], "trainable_token_indices": [1]},
        "tokens of model.embed_tokens, which is targeted or saved whole as well",
    ),
    "ties": ("llama", {"target_modules": ["q_proj"], "ensure_weight_tying": True}, "ensure_weight_tying=True is not"),
    "no module": ("llama", {"target_modules": ["nothing"]}, "name no module"),
    "no linear": ("llama", {"target_modules": ["mlp"]}, "layers.0.mlp.*which adapters cannot change"),
    "no usual ones": ("mlp", {}, "target_modules is None"),
    "odd": ("llama", {"init_lora_weights": "orthogonal", "r": 3}, "r is 3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_made_is_named(case):
    kind, options, message = REFUSED[case]
    runtime = mlora.patch(build(kind), memory=ROOM)
    with pytest.raises(errors.AdapterError, match=message):
        runtime.add_adapter("sql", LoraConfig(**options), seed=0)
    assert not runtime.adapters
    with pytest.raises(errors.AdapterError, match=r"takes an mlora\.Adapter, a peft\.LoraConfig"):
        runtime.add_adapter("sql", 3)
