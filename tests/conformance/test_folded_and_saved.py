"""Types that read the base's weight, or whose files leave something out: folded, saved and loaded again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from cases import DENSE, REFUSED, SPECS, Spec, make
from conftest import assert_close, build, inputs_for, logits, peft_alone, refused, rewrite, state_hash
from torch import Tensor

import mlora
from mlora import errors
from mlora.lowering.frod import _role

KINDS = (
    "AdamssConfig", "BeftConfig", "DeftConfig", "FrodConfig", "GloraConfig", "OSFConfig", "PeanutConfig", "PsoftConfig",
    "PveraConfig", "SupertuningConfig", "TinyLoraConfig", "UniLoraConfig",
)  # fmt: skip
SERVED = [spec for spec in SPECS if spec.kind in KINDS and spec.verdict != REFUSED]
BY_NAME = {spec.name: spec for spec in SPECS}


@pytest.mark.parametrize("spec", SERVED, ids=[spec.id for spec in SERVED])
def test_folded_saved_and_loaded_again(
    spec: Spec, llama: Any, model: Any, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    folder = make(tmp_path / "made", spec, "llama", 1)
    want = logits(peft_alone(llama, folder), batch)
    dense = spec.verdict == DENSE
    runtime = mlora.patch(model, memory=4 << 20)
    runtime.load_adapter(folder, "a", dense=dense)
    served = logits(model, batch, adapter_names="a")
    assert_close(served, want)
    runtime.save_adapter("a", tmp_path / "saved")
    assert_close(logits(peft_alone(llama, tmp_path / "saved"), batch), want)
    runtime.load_adapter(tmp_path / "saved", "again", dense=dense)
    assert torch.equal(logits(model, batch, adapter_names="again"), served)
    if spec.kind == "BeftConfig":  # as PEFT
        with refused(model, errors.MergeError, "bias"):
            runtime.merge_adapter("a")
        return
    runtime.merge_adapter("a")
    assert_close(logits(model, batch), want)
    runtime.unmerge_adapter()
    assert state_hash(model) == state_hash(llama)


@pytest.fixture
def runtime(model: Any) -> Any:
    return mlora.patch(model, memory=4 << 20)


def test_places_that_are_found_anew(
    llama: Any, model: Any, runtime: Any, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    """Where magnitudes are equal, which of their places is which depends on the machine."""
    spec = Spec("", "SupertuningConfig", {"sparsity": 0.9, "save_precomputed_indices": False, "select_top": False})
    folder = make(tmp_path / "made", spec, "llama", 1)
    runtime.load_adapter(folder, "a", dense=True)
    assert_close(logits(model, batch, adapter_names="a"), logits(peft_alone(llama, folder), batch))
    halves = copy.deepcopy(llama).to(torch.bfloat16)
    mlora.patch(halves, memory=4 << 20)
    with refused(halves, errors.UnsupportedAdapterError, "save_precomputed_indices=False", "magnitudes", "equal"):
        halves.mlora.load_adapter(folder, "a", dense=True)


def test_groups_of_another_base(llama: Any, tmp_path: Path) -> None:
    folder = make(tmp_path, BY_NAME["AdaMSS"], "llama", 1)
    other = build("llama", seed=5)
    mlora.patch(other, memory=1 << 20)
    with refused(other, errors.AdapterError, "another base", "outputs"):
        other.mlora.load_adapter(folder)


@pytest.mark.parametrize(
    ("name", "config", "change", "words"),
    (
        ("TinyLoRA", {"weight_tying": 1.0}, {}, ("8 trained vectors", "1 groups")),
        ("TinyLoRA", {"target_modules": ["q_proj"]}, {}, ("target_modules", "do not name")),
        ("UniLoRA with places", {}, {"indices_A": lambda t: t + 40}, ("unilora_indices_A", "outside")),
        ("GLoRA, vectors", {}, {"glora_A.X": lambda t: t[:5]}, ("A.X", "(5, 1)")),
        ("DEFT", {"decomposition_method": "svd"}, {}, ("decomposition_method is 'svd'",)),
        ("DEFT", {"para": True}, {}, ("para", "deft_R")),
        ("PSOFT", {"psoft_svd": "fast"}, {}, ("psoft_svd is 'fast'",)),
        ("PSOFT", {"psoft_mag_a": False}, {}, ("psoft_mag_a", "vector_a")),
        ("PSOFT", {"r": 99}, {}, ("r is 99",)),
        ("PEANuT", {"act_fn": "none"}, {}, ("act_fn is 'none'",)),
        ("PEANuT", {"depth": 1}, {}, ("peanut_encoders.0", "missing")),
        ("FRoD", {}, {"lambda_s_values": lambda t: t[:-1]}, ("frod_s_indices",)),
        ("Super-Tuning", {}, {"indices": lambda t: t + 4096}, ("supertuning_indices", "outside")),
        ("OSF", {"target_svd_config": "x"}, {}, ("target_svd_config",)),
        ("BEFT", {}, {"beft_bias": lambda t: t[:, :-1]}, ("beft_bias",)),
    ),
)  # fmt: skip
def test_what_does_not_fit(
    model: Any, runtime: Any, tmp_path: Path, name: str, config: dict[str, Any], change: Any, words: tuple[str, ...]
) -> None:
    def changed(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: next((f(t) for end, f in change.items() if end in key), t) for key, t in state.items()}

    spec = BY_NAME[name]
    folder = rewrite(make(tmp_path / "made", spec, "llama", 1), tmp_path / "changed", config, changed)
    with refused(model, errors.AdapterError, *words):
        runtime.load_adapter(folder, dense=spec.verdict == DENSE)


def test_modules_that_keep_all_their_singular_values(
    llama: Any, model: Any, runtime: Any, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    folder = make(tmp_path, Spec("", "OSFConfig", {"effective_rank": 28}), "llama", 1)
    runtime.load_adapter(folder, "a")
    assert_close(logits(model, batch, adapter_names="a"), logits(peft_alone(llama, folder), batch))


def test_zeros_that_are_none(tmp_path: Path) -> None:
    """PEFT would read them."""
    spec = Spec("", "GloraConfig", {"config_A_B": "vector", "config_C": "none"})
    base = build("qwen2")
    made = make(tmp_path / "made", spec, "qwen2", 1)
    folder = rewrite(made, tmp_path / "a", None, lambda s: {k: t + k.endswith("glora_C.zeros") for k, t in s.items()})
    mlora.patch(base, memory=1 << 20)
    with refused(base, errors.AdapterError, "glora_C.zeros"):
        base.mlora.load_adapter(folder)


def test_one_of_fewer_layers_counts_all_that_its_config_targets(llama: Any, tmp_path: Path) -> None:
    """The place of a module among the targets decides which vector and which random matrices are its own."""
    options = {"r": 2, "u": 3, "weight_tying": 0.5, "save_projection": False, "layers_to_transform": [1]}
    base, batch = build("llama"), inputs_for("llama", 2)
    folder = make(tmp_path, Spec("", "TinyLoraConfig", options), "llama", 2)
    mlora.patch(base, memory=1 << 20).load_adapter(folder, "a")
    assert_close(logits(base, batch, adapter_names="a"), logits(peft_alone(llama, folder), batch))


@pytest.mark.parametrize(
    "name",
    ("dense", "model.layers.3.self_attn.q_proj", "encoder.layer.0.attention.output.dense", "blocks.0", "h.1.mlp.c_fc",
     "encoder.layer.0.output.dense", "output.dense"),
)  # fmt: skip
def test_roles_are_pefts(name: str) -> None:
    assert _role(name) == peft.tuners.frod.model._category_from_key(name)
