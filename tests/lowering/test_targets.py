"""Which modules an adapter changes: PEFT's rules of targets, held against PEFT itself."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import (
    assert_close,
    build,
    inputs_for,
    logits,
    make_adapter,
    peft_alone,
    refused,
    rewrite,
    row_of,
    served,
)
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists

import mlora
from mlora import errors
from mlora.lowering.targets import targets_of

WHOLE = ["q_proj", "v_proj"]


def check(base: Any, folder: Path, kind: str = "llama", **options: Any) -> mlora.AdapterInfo:
    """Rows of a batch with the adapter are those of PEFT with it alone, the others the base's."""
    model = copy.deepcopy(base)
    info = mlora.patch(model).load_adapter(folder, "a", **options)
    batch = inputs_for(kind, 3)
    got = logits(model, batch, adapter_names=["a", None, "a"])
    alone = peft_alone(base, folder)
    for row, owner in enumerate((alone, base, alone)):
        assert_close(got[row : row + 1], logits(owner, row_of(batch, row)))
    changed = logits(alone, row_of(batch, 0)) - logits(base, row_of(batch, 0))
    assert changed.abs().max() > 1e-2
    return info


RULES: tuple[dict[str, Any], ...] = (
    {"target_modules": ["q_proj", "self_attn.v_proj", "model.layers.1.mlp.up_proj"]},
    {"target_modules": ["proj", "o_proj"]},
    {"target_modules": ["nothing"]},
    {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    {"target_modules": r".*\.(q|up)_proj", "exclude_modules": r".*layers\.0.*"},
    {"target_modules": r"q_proj"},
    {"target_modules": r"^model\.layers\.\d+\.mlp\.(down|up)_proj$"},
    {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 7], "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0], "layers_pattern": ["h"]},
    {"target_modules": ["model.layers.1.self_attn.q_proj"], "layers_to_transform": [0]},
    {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["mlp"]},
    {"target_modules": r".*_proj", "modules_to_save": ["layers.0", "lm_head"]},
    {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["attn"]},
    {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["mlp|self_attn.k_proj"]},
    {"target_modules": "all-linear"},
    {"target_modules": "All-Linear", "exclude_modules": ["q_proj"], "modules_to_save": ["layers.1"]},
)  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=[str(n) for n in range(len(RULES))])
def test_targets_are_those_of_peft(llama: Any, rule: dict[str, Any]) -> None:
    model = copy.deepcopy(llama)
    bases = mlora.patch(model).bases
    config = peft.LoraConfig(**copy.deepcopy(rule))
    _maybe_include_all_linear_layers(config, llama)
    assert targets_of(rule, bases) == {name for name in bases if check_target_module_exists(config, name)}


def test_a_head_is_no_target_of_all_linear(llama: Any, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", llama, 1, r=2, target_modules=["q_proj", "lm_head"])
    folder = rewrite(folder, tmp_path / "b", {"target_modules": "all-linear"})
    model = copy.deepcopy(llama)
    mlora.patch(model)
    with refused(model, errors.AdapterError, "lm_head", "all-linear"):
        model.mlora.load_adapter(folder, "a")


class Head(torch.nn.Module):
    """A classifier with a linear inside, as RoBERTa's is."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.out_proj = torch.nn.Linear(32, 32), torch.nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out_proj(torch.tanh(self.dense(x)))


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=3, target_modules=["query", "dense"], task_type="SEQ_CLS"),
        peft.LoraConfig(r=3, target_modules="all-linear", task_type="SEQ_CLS"),
        peft.LoraConfig(r=3, target_modules=".*(key|dense)", task_type="SEQ_CLS"),
        peft.IA3Config(target_modules=["key", "dense"], feedforward_modules=["dense"], task_type="SEQ_CLS"),
    ],
    ids=["list", "all-linear", "regex", "ia3"],
)
def test_what_lies_inside_a_saved_module_is_no_target(tmp_path: Path, config: Any) -> None:
    base = build("bert")
    torch.manual_seed(1)
    base.classifier = Head()
    wrapped = peft.get_peft_model(copy.deepcopy(base), config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    wrapped.save_pretrained(tmp_path)
    info = check(base, tmp_path, "bert")
    assert not info.missing and {"classifier.dense", "classifier.out_proj"} <= set(info.modules)


# Targets that the files have nothing for


def test_a_target_without_weights_is_the_base(llama: Any, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", llama, 1, r=3, target_modules=WHOLE)
    folder = rewrite(folder, tmp_path / "b", {"target_modules": [*WHOLE, "o_proj"]})
    with pytest.warns(UserWarning, match=r"layers\.0\.self_attn\.o_proj, .*no weights.*as in PEFT") as caught:
        info = check(llama, folder)
    assert info.missing == tuple(f"model.layers.{layer}.self_attn.o_proj" for layer in (0, 1))
    assert caught[0].filename == __file__, "the warning points at the caller"
    model = copy.deepcopy(llama)
    runtime = mlora.patch(model)
    with refused(model, errors.AdapterError, "o_proj", "no weights", "strict=True"):
        runtime.load_adapter(folder, "a", strict=True)
    with refused(model, errors.AdapterError, "strict=True"):
        runtime.add_adapter("a", mlora.Adapter.from_pretrained(folder), strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = make_adapter(tmp_path / "c", llama, 1, r=3, target_modules=WHOLE)
        assert not runtime.load_adapter(whole, "whole", strict=True).missing


def test_a_parameter_without_weights_is_the_base(tmp_path: Path) -> None:
    base = build("mixtral")
    folder = make_adapter(tmp_path / "a", base, 1, r=2, target_parameters=["experts.down_proj"], target_modules=[])
    folder = rewrite(
        folder,
        tmp_path / "b",
        {"target_parameters": ["experts.down_proj", "gate.weight"]},
    )
    with pytest.warns(UserWarning, match=r"gate\.weight.*no weights"):
        info = check(base, folder, "mixtral")
    assert info.missing == ("model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight")


def test_where_new_weights_would_act_they_are_asked_for(llama: Any, tmp_path: Path) -> None:
    """PEFT puts random logits into VB-LoRA's layers, and cuts singular triplets off the weights under KaSA."""
    config = peft.VBLoRAConfig(r=2, num_vectors=4, vector_length=16, target_modules=WHOLE)
    peft.get_peft_model(copy.deepcopy(llama), config).save_pretrained(tmp_path / "a")
    folder = rewrite(tmp_path / "a", tmp_path / "b", {"target_modules": [*WHOLE, "o_proj"]})
    model = copy.deepcopy(llama)
    mlora.patch(model)
    with refused(model, errors.AdapterError, "o_proj", "no weights"):
        model.mlora.load_adapter(folder, "a")
    folder = make_adapter(tmp_path / "k", llama, 1, r=2, target_modules=WHOLE, kasa_config=peft.KasaConfig())
    folder = rewrite(folder, tmp_path / "l", {"target_modules": [*WHOLE, "o_proj"]})
    with refused(model, errors.AdapterError, "o_proj", "no weights"):
        model.mlora.load_adapter(folder, "a")


# Tied weights


@pytest.fixture(scope="module")
def tied() -> Any:
    from conftest import _causal

    torch.manual_seed(3)
    model = _causal("Qwen2Config", tie_word_embeddings=True).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


TIED: tuple[Any, ...] = (["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"], ".*(q_proj|lm_head)")


@pytest.mark.parametrize("targets", TIED, ids=str)
def test_tied_targets_follow_one_another(tied: Any, tmp_path: Path, targets: Any) -> None:
    targets = targets if isinstance(targets, str) else ["q_proj", *targets]
    folder = make_adapter(tmp_path / "a", tied, 1, r=4, target_modules=targets, ensure_weight_tying=True)
    info = check(tied, folder, "qwen2")
    assert {"lm_head", "model.embed_tokens"} <= set(info.modules) and not info.missing


@pytest.mark.parametrize("kept", ["lora_embedding_", "lm_head"])
def test_one_of_two_tied_targets_tells_the_other(tied: Any, tmp_path: Path, kept: str) -> None:
    options = {"r": 4, "target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}
    folder = make_adapter(tmp_path / "a", tied, 1, **options)
    dropped = {"lora_embedding_": "lm_head", "lm_head": "lora_embedding_"}[kept]
    half = rewrite(folder, tmp_path / "b", tensors=lambda t: {k: v for k, v in t.items() if dropped not in k})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = served(tied, {"whole": folder, "half": half})
    batch = inputs_for("qwen2", 2)
    assert torch.equal(logits(model, batch, adapter_names="whole"), logits(model, batch, adapter_names="half"))


def test_tied_targets_that_differ_are_refused(tied: Any, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", tied, 1, r=4, target_modules=["lm_head"], ensure_weight_tying=True)
    other = rewrite(
        folder, tmp_path / "b", tensors=lambda t: {k: 2 * v if "lm_head.lora_A" in k else v for k, v in t.items()}
    )
    model = copy.deepcopy(tied)
    mlora.patch(model)
    with refused(model, errors.AdapterError, "ensure_weight_tying", "lm_head", "embed_tokens"):
        model.mlora.load_adapter(other, "a")
