"""Damaged, foreign and unserved adapters: the message names what is wrong, and nothing changes."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_close, build, inputs_for, logits, make_adapter, peft_alone, refused, rewrite
from safetensors.torch import load_file, save_file
from torch import Tensor

import mlora
from mlora import errors
from mlora.adapters.adapter import Adapter, _vectors, all_finite

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
ROOT = "base_model.model"
Q0 = f"{ROOT}.model.layers.0.self_attn.q_proj"


@pytest.fixture
def good(folders: dict[str, Path]) -> Path:
    return folders["r3"]


def spoil_config(folder: Path, text: bytes) -> None:
    (folder / CONFIG).write_bytes(text)


def spoil_weights(folder: Path, data: bytes) -> None:
    (folder / WEIGHTS).write_bytes(data)


FILES: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    ("no-config", lambda f: (f / CONFIG).unlink(), ("has no adapter_config.json",)),
    ("config-is-empty", lambda f: spoil_config(f, b""), ("not valid JSON", CONFIG)),
    ("config-is-cut", lambda f: spoil_config(f, b'{"peft_type": "LORA"'), ("not valid JSON", CONFIG)),
    ("config-is-no-text", lambda f: spoil_config(f, b"\xff\xfe\x00"), (CONFIG,)),
    ("config-is-deep", lambda f: spoil_config(f, b"[" * 200_000), ("not valid JSON",)),
    ("config-is-a-list", lambda f: spoil_config(f, b"[1]"), ("list", "object")),
    ("config-without-type", lambda f: spoil_config(f, b'{"r": 3}'), ("peft_type",)),
    ("no-weights", lambda f: (f / WEIGHTS).unlink(), ("has no adapter_model.safetensors",)),
    ("weights-are-empty", lambda f: spoil_weights(f, b""), ("damaged", WEIGHTS)),
    ("weights-are-cut", lambda f: spoil_weights(f, (f / WEIGHTS).read_bytes()[:-9]), ("damaged", WEIGHTS)),
    ("header-is-cut", lambda f: spoil_weights(f, (f / WEIGHTS).read_bytes()[:20]), ("damaged", WEIGHTS)),
    ("header-is-huge", lambda f: spoil_weights(f, b"\xff" * 64), ("damaged", WEIGHTS)),
    ("weights-are-text", lambda f: spoil_weights(f, b"version https://git-lfs\n" * 3), ("damaged",)),
    ("weights-are-a-zip", lambda f: torch.save({"x": torch.ones(1)}, f / WEIGHTS), ("damaged", WEIGHTS)),
    ("no-tensors", lambda f: save_file({}, f / WEIGHTS), ("no tensors",)),
)  # fmt: skip


@pytest.mark.parametrize(("spoil", "wanted"), [f[1:] for f in FILES], ids=[f[0] for f in FILES])
def test_damaged_files(patched: Any, good: Path, tmp_path: Path, spoil: Any, wanted: tuple[str, ...]) -> None:
    folder = tmp_path / "spoilt"
    shutil.copytree(good, folder)
    spoil(folder)
    with refused(patched, errors.AdapterError, str(folder), *wanted):
        patched.mlora.load_adapter(folder, "new")


def test_a_flipped_header_byte_is_an_error_or_harmless(patched: Any, good: Path, tmp_path: Path) -> None:
    # safetensors keeps no checksum: a flip may also leave a valid file, but never another exception.
    data = bytearray((good / WEIGHTS).read_bytes())
    folder = tmp_path / "flip"
    shutil.copytree(good, folder)
    failed = 0
    for position in range(0, 400, 7):
        spoilt = bytearray(data)
        spoilt[position] ^= 0x24
        spoil_weights(folder, bytes(spoilt))
        try:
            patched.mlora.load_adapter(folder, "flip")
        except errors.AdapterError:
            failed += 1
            assert "flip" not in patched.mlora.adapters
        else:
            patched.mlora.delete_adapter("flip")
    assert failed > 20


@pytest.mark.parametrize(
    ("path", "wanted"),
    (
        ("no/such/folder/anywhere", ("'no/such/folder/anywhere'", "no folder", "org/name")),
        ("/no/such", ("'/no/such'", "no folder")),
        ("", ("has no adapter_config.json",)),
        ("a b/c", ("'a b/c'",)),
        ("x" * 300, ("xxx", "no folder", "too long")),
        (7, ("path", "hub id", "int")),
        (mlora.Adapter({"peft_type": "LORA"}, {"x": torch.ones(1)}), ("path", "hub id", "Adapter", "add_adapter")),
    ),
    ids=("relative", "absolute", "empty", "blank", "long", "number", "adapter"),
)
def test_a_folder_that_is_not_there(
    patched: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: Any, wanted: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    with refused(patched, errors.AdapterError, *wanted):
        patched.mlora.load_adapter(path, "new")


def test_a_hub_id_that_cannot_be_fetched(patched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*_: Any, **__: Any) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with refused(patched, errors.AdapterError, "'some/adapter'", "no route to host"):
        patched.mlora.load_adapter("some/adapter", "new")


def test_a_hub_id_is_fetched_and_read(patched: Any, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[Any] = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **options: asked.append((name, options)) or str(good),
    )
    info = patched.mlora.load_adapter("some/adapter", revision="v2")
    assert info.name == "adapter" and info.source == "some/adapter"
    assert asked[0][0] == "some/adapter" and asked[0][1]["revision"] == "v2"


def test_a_file_instead_of_a_folder(patched: Any, good: Path) -> None:
    with refused(patched, errors.AdapterError, CONFIG, "is a file"):
        patched.mlora.load_adapter(good / CONFIG, "new")


# Tensors


def edit(**changes: Any) -> Any:
    """Replace tensors of the first q_proj: part -> function of the old tensor, or None to drop it."""

    def apply(state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = dict(state)
        for part, change in changes.items():
            key = f"{Q0}.{part}.weight"
            old = state.pop(key)
            if change is not None:
                state[key] = change(old)
        return state

    return apply


def put(value: float) -> Any:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[-1, -1] = value
        return tensor

    return change


def add(key: str, tensor: Tensor) -> Any:
    return lambda state: {**state, key: tensor}


def rename(old: str, new: str) -> Any:
    return lambda state: {key.replace(old, new): tensor for key, tensor in state.items()}


TENSORS: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    ("nan", edit(lora_A=put(float("nan"))), ("q_proj.lora_A.weight", "1 values", "finite")),
    ("inf", edit(lora_B=put(float("inf"))), ("q_proj.lora_B.weight", "1 values", "finite")),
    ("minus-inf-in-half", edit(lora_B=lambda t: put(float("-inf"))(t.half())), ("lora_B", "finite")),
    ("wide-a", edit(lora_A=lambda t: torch.ones(3, 33)), ("q_proj", "lora_A", "33", "32")),
    ("narrow-b", edit(lora_B=lambda t: torch.ones(31, 3)), ("q_proj", "lora_B", "31", "32")),
    ("ranks-differ", edit(lora_B=lambda t: torch.ones(32, 4)), ("q_proj", "rank 3", "rank 4")),
    ("other-rank", edit(lora_A=lambda t: torch.ones(5, 32), lora_B=lambda t: torch.ones(32, 5)), ("rank 5",)),
    ("rank-zero", edit(lora_A=lambda t: t[:0], lora_B=lambda t: t[:, :0]), ("q_proj", "rank 0", "positive")),
    ("vector-a", edit(lora_A=lambda t: t[0]), ("q_proj", "lora_A", "(32,)", "matrix")),
    ("cube-b", edit(lora_B=lambda t: t[None]), ("q_proj", "lora_B", "(1, 32, 3)", "matrix")),
    ("integers", edit(lora_A=lambda t: t.to(torch.int32)), ("lora_A", "int32", "floating")),
    ("missing-a", edit(lora_A=None), ("layers.0.self_attn.q_proj", "lora_A is missing")),
    ("missing-b", edit(lora_B=None), ("layers.0.self_attn.q_proj", "lora_B is missing")),
    ("left-over-key", add(f"{Q0}.other.weight", torch.ones(2)), ("q_proj.other.weight", "left over")),
    ("embedding", add(f"{ROOT}.model.embed_tokens.lora_embedding_A", torch.ones(3, 67)), ("tokens", "target_modules")),
    ("unasked-bias", add(f"{Q0}.lora_B.bias", torch.ones(32)), ("q_proj", "lora_bias", "bias")),
    ("unasked-magnitude", add(f"{Q0}.lora_magnitude_vector", torch.ones(32)), ("use_dora", "magnitude")),
    ("untargeted", rename("q_proj", "o_proj"), ("o_proj", "target_modules", "q_proj")),
    ("another-model", rename("model.layers", "transformer.h"), ("transformer.h.0.self_attn", "another base")),
    ("more-layers", rename("layers.1", "layers.2"), ("layers.2.self_attn", "another base")),
    ("not-a-linear", rename("self_attn.q_proj", "input_layernorm"), ("input_layernorm", "target_modules")),
    ("twice", add(f"{Q0.removeprefix(ROOT + '.')}.lora_A.weight", torch.ones(3, 32)), ("prefix", ROOT)),
)  # fmt: skip


@pytest.mark.parametrize(("change", "wanted"), [t[1:] for t in TENSORS], ids=[t[0] for t in TENSORS])
def test_tensors_that_do_not_fit(
    patched: Any, good: Path, tmp_path: Path, change: Any, wanted: tuple[str, ...]
) -> None:
    folder = rewrite(good, tmp_path / "spoilt", tensors=change)
    with refused(patched, errors.AdapterError, "spoilt", *wanted):
        patched.mlora.load_adapter(folder, "new")


def test_an_adapter_made_for_a_wider_base_names_it(patched: Any, tmp_path: Path) -> None:
    import transformers

    config = copy.deepcopy(patched.config)
    config.hidden_size, config.head_dim = 40, 10
    wide = transformers.AutoModelForCausalLM.from_config(config)
    folder = make_adapter(tmp_path / "wide", wide, 0, r=2, target_modules=["q_proj"])
    with refused(patched, errors.AdapterError, "q_proj", "40", "32"):
        patched.mlora.load_adapter(folder, "wide")


def test_an_adapter_made_for_another_architecture_names_it(patched: Any, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "gpt2", build("gpt2"), 0, r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    rewritten = rewrite(folder, tmp_path / "named", {"base_model_name_or_path": "openai/gpt-2"})
    with refused(patched, errors.AdapterError, "transformer.h.0.attn.c_attn", "'openai/gpt-2'"):
        patched.mlora.load_adapter(rewritten, "gpt2")


def test_weights_of_a_part_that_this_model_has_not(
    patched: Any, good: Path, batch: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    def grown(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        own = {key: tensor for key, tensor in state.items() if "layers.0.self_attn.q_proj" in key}
        return {
            **state,
            **{key.replace("layers.0.self_attn.q_proj", "other.dense"): t.clone() for key, t in own.items()},
        }

    folder = rewrite(good, tmp_path / "grown", {"target_modules": "all-linear"}, grown)
    with refused(patched, errors.AdapterError, "model.other.dense", "ignore=['model.other.dense.*']"):
        patched.mlora.load_adapter(folder, "new")
    info = patched.mlora.load_adapter(folder, "new", ignore=["model.other.dense.*"])
    assert len(info.ignored) == 2
    assert torch.equal(logits(patched, batch, adapter_names="new"), logits(patched, batch, adapter_names="r3"))


def test_dora_and_bias_without_their_tensors(patched: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    def without(part: str) -> Any:
        return lambda state: {k: t for k, t in state.items() if part not in k}

    folder = rewrite(folders["dora1"], tmp_path / "dora", tensors=without("magnitude"))
    with refused(patched, errors.AdapterError, "use_dora is True", "no magnitude"):
        patched.mlora.load_adapter(folder, "new")
    folder = rewrite(folders["bias8"], tmp_path / "bias", tensors=without("lora_B.bias"))
    with refused(patched, errors.AdapterError, "lora_bias is True", "no bias"):
        patched.mlora.load_adapter(folder, "new")


def test_weights_that_overflow_the_models_dtype(good: Path, tmp_path: Path) -> None:
    model = build("llama", torch.float16)
    mlora.patch(model, memory=1 << 20)
    folder = rewrite(good, tmp_path / "large", tensors=edit(lora_A=put(1e6)))
    with refused(model, errors.AdapterError, "torch.float16", "'large'"):
        model.mlora.load_adapter(folder)


# Config

OPTIONS: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (
    ("another-type", {"peft_type": "LOHA"}, ("init_lora_weights=True",)),
    ("a-type-of-prompts", {"peft_type": "PREFIX_TUNING"}, ("'PREFIX_TUNING'", "virtual tokens")),
    ("unknown-type", {"peft_type": "NONSENSE"}, ("'NONSENSE'", "LORA")),
    ("type-is-a-number", {"peft_type": 3}, ("'3'", "LORA")),
    ("unknown-option", {"use_magic": True}, ("use_magic=True",)),
    ("unknown-number", {"magic_scale": 0.5}, ("magic_scale=0.5",)),
    ("modules-to-save", {"modules_to_save": ["lm_head"]}, ("modules_to_save", "lm_head", "no weights")),
    ("trained-tokens", {"trainable_token_indices": [1, 2]}, ("trainable_token_indices",)),
    ("activated", {"alora_invocation_tokens": [5]}, ("alora_invocation_tokens",)),
    ("replicated", {"layer_replication": [[0, 2], [0, 2]]}, ("layer_replication",)),
    ("parameters", {"target_parameters": ["x"]}, ("target_parameters",)),
    ("arrow", {"arrow_config": {"top_k": 2}}, ("arrow_config",)),
    ("bdlora-of-nothing", {"use_bdlora": {"nblocks": 2}}, ("use_bdlora", "no factor")),
    (
        "bdlora-of-both",
        {"use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["q"], "target_modules_bd_b": ["proj"]}},
        ("use_bdlora", "both factors"),
    ),
    ("bdlora-with-dora", {"use_bdlora": {"nblocks": 2}, "use_dora": True}, ("use_bdlora", "use_dora")),
    ("kasa-without-tensor", {"kasa_config": {"beta": 1}}, ("kasa_config", "diagonal")),
    ("pissa", {"init_lora_weights": "pissa_niter_16"}, ("init_lora_weights='pissa_niter_16'", "conversion")),
    ("pissa-without-scale", {"init_lora_weights": "pissa", "lora_alpha": 0}, ("scaling is 0",)),
    ("pissa-with-kasa", {"init_lora_weights": "pissa", "kasa_config": {"beta": 1}}, ("kasa_config", "'pissa'")),
    ("corda", {"init_lora_weights": "corda"}, ("init_lora_weights='corda'",)),
    ("loftq", {"init_lora_weights": "loftq"}, ("init_lora_weights='loftq'",)),
    ("bias-without-tensor", {"lora_bias": True}, ("lora_bias",)),
    ("dora-without-tensor", {"use_dora": True}, ("use_dora",)),
    ("rank-zero", {"r": 0}, ("r is 0", "positive")),
    ("rank-text", {"r": "3"}, ("r is '3'", "positive")),
    ("rank-bool", {"r": True}, ("r is True", "positive")),
    ("rank-null", {"r": None}, ("r is None", "positive")),
    ("other-rank", {"r": 4}, ("rank 3", "4")),
    ("alpha-nan", {"lora_alpha": float("nan")}, ("alpha is nan", "finite")),
    ("alpha-text", {"lora_alpha": "8"}, ("alpha is '8'", "finite")),
    ("alpha-null", {"lora_alpha": None}, ("alpha is None", "finite")),
    ("rank-pattern-list", {"rank_pattern": [3]}, ("rank_pattern", "object")),
    ("alpha-pattern-text", {"alpha_pattern": "x"}, ("alpha_pattern", "object")),
    ("pattern-for-another-rank", {"rank_pattern": {"q_proj": 9}}, ("rank 3", "9")),
    ("broken-regex", {"rank_pattern": {"(": 3}}, ("valid", "pattern")),
    ("broken-target-regex", {"target_modules": "*"}, ("'*'", "pattern")),
    ("fewer-targets", {"target_modules": ["q_proj"]}, ("v_proj", "do not name")),
    ("excluded", {"exclude_modules": ["v_proj"]}, ("v_proj", "do not name")),
    ("other-layers", {"layers_to_transform": [0]}, ("layers.1", "do not name")),
    ("targets-number", {"target_modules": 3}, ("target_modules is 3",)),
    ("huge-alpha", {"lora_alpha": 1e39}, ("alpha", "finite")),
    ("huge-int-alpha", {"lora_alpha": 10**400}, ("alpha", "finite")),
)  # fmt: skip


@pytest.mark.parametrize(("change", "wanted"), [o[1:] for o in OPTIONS], ids=[o[0] for o in OPTIONS])
def test_options_that_are_not_served(
    patched: Any, good: Path, tmp_path: Path, change: dict[str, Any], wanted: tuple[str, ...]
) -> None:
    folder = rewrite(good, tmp_path / "option", change)
    with refused(patched, errors.AdapterError, *wanted):
        patched.mlora.load_adapter(folder, "new")


NEUTRAL: tuple[tuple[str, dict[str, Any]], ...] = (
    ("dropout", {"lora_dropout": 0.3}),
    ("bookkeeping", {"base_model_name_or_path": "a/b", "revision": "x", "task_type": "CAUSAL_LM"}),
    ("off", {"use_magic": False, "other": None, "third": {}, "fourth": [], "fifth": ""}),
    ("init", {"init_lora_weights": "gaussian"}),
    ("layers", {"layers_to_transform": [0, 1]}),
    ("lower-case-type", {"peft_type": "lora"}),
)


@pytest.mark.parametrize("change", [n[1] for n in NEUTRAL], ids=[n[0] for n in NEUTRAL])
def test_options_that_change_no_result(patched: Any, good: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    patched.mlora.load_adapter(rewrite(good, tmp_path / "neutral", change), "new")
    batch = inputs_for("llama", 2)
    assert torch.equal(logits(patched, batch, adapter_names="new"), logits(patched, batch, adapter_names="r3"))


def test_a_config_with_a_mark_of_its_bytes_order(patched: Any, good: Path, tmp_path: Path) -> None:
    folder = rewrite(good, tmp_path / "marked")
    (folder / CONFIG).write_text((good / CONFIG).read_text(), encoding="utf-8-sig")
    assert patched.mlora.load_adapter(folder, "new").rank == patched.mlora.adapters["r3"].rank


def test_old_configs_without_newer_options_load(patched: Any, good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(good, folder)
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]}
    spoil_config(folder, json.dumps(config).encode())
    patched.mlora.load_adapter(folder, "old")
    batch = inputs_for("llama", 2)
    assert torch.equal(logits(patched, batch, adapter_names="old"), logits(patched, batch, adapter_names="r3"))


TARGETS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("suffix", {"target_modules": ["q_proj"]}),
    ("longer-suffix", {"target_modules": ["self_attn.q_proj", "mlp.up_proj"]}),
    ("full-path", {"target_modules": ["model.layers.1.self_attn.k_proj"]}),
    ("regex", {"target_modules": r"model\.layers\.\d\.mlp\..*_proj"}),
    ("all-linear", {"target_modules": "all-linear"}),
    ("excluded", {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}),
    ("excluded-regex", {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"}),
    ("layers", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    ("one-layer", {"target_modules": ["q_proj"], "layers_to_transform": 0}),
    ("named-layers", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    ("rank-regex", {"target_modules": "all-linear", "rank_pattern": {r"layers\.0.*": 5, "q_proj": 2}}),
    ("alpha-caret", {"target_modules": ["q_proj"], "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 9}}),
)  # fmt: skip


@pytest.mark.parametrize("config", [t[1] for t in TARGETS], ids=[t[0] for t in TARGETS])
def test_every_form_of_targets(llama: Any, patched: Any, tmp_path: Path, config: dict[str, Any]) -> None:
    folder = make_adapter(tmp_path / "t", llama, 3, r=3, lora_alpha=5, **config)
    patched.mlora.load_adapter(folder, "new")
    batch = inputs_for("llama", 2)
    want = logits(peft_alone(llama, folder), batch)
    assert not torch.equal(want, logits(llama, batch))
    assert_close(logits(patched, batch, adapter_names="new"), want)


def test_a_targeted_head_comes_with_a_copy_of_its_weight(llama: Any, patched: Any, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "head", llama, 3, r=3, target_modules=["lm_head", "q_proj"])
    assert any(key.endswith("lm_head.base_layer.weight") for key in load_file(folder / WEIGHTS))
    patched.mlora.load_adapter(folder, "head")
    batch = inputs_for("llama", 2)
    assert_close(logits(patched, batch, adapter_names="head"), logits(peft_alone(llama, folder), batch))

    def other(
        state: dict[str, Tensor],
    ) -> dict[str, Tensor]:  # what training with a changed vocabulary would leave
        return {k: t + 1e-3 if k.endswith("base_layer.weight") else t for k, t in state.items()}

    with refused(patched, errors.AdapterError, "lm_head", "copy of the base weight", "(67, 32)"):
        patched.mlora.load_adapter(rewrite(folder, tmp_path / "other", tensors=other), "other")


# Pickle


class Dangerous:
    """Creates a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.fixture
def pickled(good: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "pickled"
    shutil.copytree(good, folder)
    torch.save(load_file(folder / WEIGHTS), folder / PICKLE)
    (folder / WEIGHTS).unlink()
    return folder


def test_a_pickle_is_refused_unless_asked_for(patched: Any, pickled: Path) -> None:
    with refused(patched, errors.AdapterError, PICKLE, "pickle", WEIGHTS, "allow_pickle"):
        patched.mlora.load_adapter(pickled, "new")
    patched.mlora.load_adapter(pickled, "new", allow_pickle=True)
    batch = inputs_for("llama", 2)
    assert torch.equal(logits(patched, batch, adapter_names="new"), logits(patched, batch, adapter_names="r3"))


def test_safetensors_win_over_a_pickle_beside_them(patched: Any, good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "both"
    shutil.copytree(good, folder)
    (folder / PICKLE).write_bytes(b"not even a pickle")
    patched.mlora.load_adapter(folder, "new", allow_pickle=True)


def test_a_pickle_cannot_run_code(patched: Any, pickled: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    (pickled / PICKLE).write_bytes(pickle.dumps({"x": Dangerous(str(trap))}))
    with refused(patched, errors.AdapterError, PICKLE, "cannot be read"):
        patched.mlora.load_adapter(pickled, "new", allow_pickle=True)
    torch.save({"x": Dangerous(str(trap))}, pickled / PICKLE)
    with refused(patched, errors.AdapterError, PICKLE, "cannot be read"):
        patched.mlora.load_adapter(pickled, "new", allow_pickle=True)
    assert not trap.exists()


@pytest.mark.parametrize("content", ([torch.ones(1)], {"x": 3}, torch.ones(2)), ids=("list", "number", "tensor"))
def test_a_pickle_of_something_else(patched: Any, pickled: Path, content: Any) -> None:
    torch.save(content, pickled / PICKLE)
    with refused(patched, errors.AdapterError, PICKLE, "dictionary of tensors"):
        patched.mlora.load_adapter(pickled, "new", allow_pickle=True)


# In memory, and back to files


def test_save_adapter_writes_what_was_loaded(
    llama: Any, patched: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    batch = inputs_for("llama", 2)
    for name, folder in folders.items():
        target = tmp_path / name
        patched.mlora.save_adapter(name, target)
        want, got = load_file(folder / WEIGHTS), load_file(target / WEIGHTS)
        assert want.keys() == got.keys() and all(torch.equal(want[k], got[k]) for k in want)
        assert json.loads((target / CONFIG).read_text()) == json.loads((folder / CONFIG).read_text())
        assert_close(logits(peft_alone(llama, target), batch), logits(patched, batch, adapter_names=name), 1e-5)
    with refused(patched, errors.UnknownAdapterError, "'none'", "'r3'"):
        patched.mlora.save_adapter("none", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_an_adapter_from_pefts_own_objects(llama: Any, patched: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    from peft import get_peft_model_state_dict

    wrapped = peft_alone(llama, folders["r3"])
    config = wrapped.peft_config["oracle-0"].to_dict()  # holds a set and an enum
    adapter = mlora.Adapter(config, get_peft_model_state_dict(wrapped, adapter_name="oracle-0"))
    info = patched.mlora.add_adapter("memory", adapter)
    assert info.source == "memory" and info.peft_type == "LORA"
    batch = inputs_for("llama", 2)
    assert torch.equal(logits(patched, batch, adapter_names="memory"), logits(patched, batch, adapter_names="r3"))
    patched.mlora.save_adapter("memory", tmp_path / "saved")
    patched.mlora.load_adapter(tmp_path / "saved", "again")
    assert torch.equal(logits(patched, batch, adapter_names="again"), logits(patched, batch, adapter_names="r3"))


def test_a_file_that_is_overwritten_after_it_was_read(patched: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    """What was read is in memory: it is served, merged and saved, whatever is in the file by then."""
    folder = shutil.copytree(folders["r3"], tmp_path / "new")
    batch = inputs_for("llama", 2)
    patched.mlora.load_adapter(folder, "new")
    early = Adapter.from_pretrained(folder)
    want = logits(patched, batch, adapter_names="new")
    for content in ((folder / WEIGHTS).read_bytes()[:-4] + b"\0\0\0\0", b""):
        (folder / WEIGHTS).write_bytes(content)
        patched.mlora.save_adapter("new", tmp_path / "saved")
        assert (tmp_path / "saved" / WEIGHTS).read_bytes() == (folders["r3"] / WEIGHTS).read_bytes()
    patched.mlora.add_weighted_adapter(["new"], [1.0], "sum")
    patched.mlora.add_adapter("early", early)
    for name in ("new", "early"):
        assert torch.equal(logits(patched, batch, adapter_names=name), want)
    assert_close(logits(patched, batch, adapter_names="sum"), want)


@pytest.mark.parametrize(("dtype", "there"), ((torch.float32, False), (torch.bfloat16, True)))
def test_an_adapter_in_the_arenas_dtype_is_in_memory_once(
    folders: dict[str, Path], tmp_path: Path, dtype: torch.dtype, there: bool
) -> None:
    """Its tensors are views of the blob, to the bit; those of another dtype have memory of their own."""
    model = build("llama", torch.bfloat16)
    runtime = mlora.patch(model, memory=1 << 20)
    folder = rewrite(folders["rs16"], tmp_path / "a", tensors=lambda state: {k: t.to(dtype) for k, t in state.items()})
    runtime.load_adapter(folder, "a")
    blob = runtime._store["a"].blob.untyped_storage().data_ptr()
    tensors = runtime._registry["a"].adapter.tensors
    assert all((tensor.untyped_storage().data_ptr() == blob) == there for tensor in tensors.values())
    for key, tensor in load_file(folder / WEIGHTS).items():
        mine = tensors[key.removeprefix(f"{ROOT}.")]
        assert mine.dtype == tensor.dtype and torch.equal(mine, tensor), key
    runtime.save_adapter("a", tmp_path / "saved")
    got, want = load_file(tmp_path / "saved" / WEIGHTS), load_file(folder / WEIGHTS)
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)


@torch.no_grad()
def test_tensors_that_are_being_trained(patched: Any, folders: dict[str, Path], batch: dict[str, torch.Tensor]) -> None:
    read = Adapter.from_pretrained(folders["r3"])
    tensors = {key: torch.nn.Parameter(tensor.clone()) for key, tensor in read.tensors.items()}
    with torch.enable_grad():
        tensors = {key: tensor * 1 if "lora_B" in key else tensor for key, tensor in tensors.items()}
        patched.mlora.add_adapter("new", Adapter(read.config, tensors))
    assert torch.equal(logits(patched, batch, adapter_names="new"), logits(patched, batch, adapter_names="r3"))
    assert all(tensor.requires_grad for tensor in tensors.values()) and patched.mlora.adapters["new"].rank == 3


def test_a_file_that_another_takes_the_place_of(patched: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["r3"], tmp_path / "new")
    patched.mlora.load_adapter(folder, "new")
    shutil.copy(folders["rs16"] / WEIGHTS, folder / "half")
    (folder / "half").rename(folder / WEIGHTS)
    patched.mlora.save_adapter("new", tmp_path / "saved")
    (folder / WEIGHTS).unlink()
    patched.mlora.save_adapter("new", tmp_path / "again")
    for name in ("saved", "again"):
        assert (tmp_path / name / WEIGHTS).read_bytes() == (folders["r3"] / WEIGHTS).read_bytes()


@pytest.mark.parametrize("adapter", ("a/folder", None), ids=("path", "none"))
def test_what_is_no_adapter(patched: Any, adapter: Any) -> None:
    with refused(patched, errors.AdapterError, "mlora.Adapter", repr(adapter), "load_adapter"):
        patched.mlora.add_adapter("new", adapter)


@pytest.mark.parametrize(
    ("config", "tensors", "wanted"),
    (
        (None, {}, "its config must be a mapping, not None"),
        ({"peft_type": "LORA"}, [torch.ones(1)], "its tensors must be a mapping, not [tensor([1.])]"),
        ({"peft_type": "LORA"}, {"x.lora_A.weight": [1.0]}, "x.lora_A.weight is a list; it must be a torch.Tensor"),
        ({"r": 3}, {"x": torch.ones(1)}, "no 'peft_type'"),
        ({"peft_type": "LORA"}, {}, "no tensors"),
    ),
    ids=("config", "tensors", "tensor", "type", "empty"),
)
def test_what_makes_no_adapter(config: Any, tensors: Any, wanted: str) -> None:
    with pytest.raises(errors.AdapterError) as caught:
        mlora.Adapter(config, tensors)
    assert wanted in str(caught.value)


def test_from_pretrained_is_what_load_adapter_reads(patched: Any, good: Path) -> None:
    adapter = mlora.Adapter.from_pretrained(good)
    assert adapter.peft_type == "LORA" and adapter.source == str(good)
    info = patched.mlora.add_adapter("again", adapter)
    known = patched.mlora.adapters["r3"]
    assert (info.rank, info.modules, info.bytes) == (known.rank, known.modules, known.bytes)


def test_adapters_tell_what_is_loaded(patched: Any) -> None:
    infos = patched.mlora.adapters
    assert list(infos) == ["r3", "rs16", "dora1", "bias8"]
    assert [i.variant for i in infos.values()] == ["", "rsLoRA", "DoRA", ""]
    assert [i.rank for i in infos.values()] == [3, 16, 1, 8] and infos["bias8"].ranks == (2, 5, 8)
    assert len(infos["r3"].modules) == 4 and "model.layers.1.self_attn.v_proj" in infos["r3"].modules
    # r3: A is 3x32 four times, B is 32x3 twice and 16x3 twice, 4 bytes each: whole cache lines, no padding
    assert infos["r3"].bytes == 4 * (4 * 96 + 2 * 96 + 2 * 48)
    status = patched.mlora.status()
    for part in ("r3", "rsLoRA", "DoRA", "2-8", f"{infos['r3'].bytes:,}", "device", "float32"):
        assert part in status


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite(dtype: torch.dtype, bad: float) -> None:
    large = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)  # whose sum overflows
    assert all_finite(large) and all_finite(large.neg()) and all_finite(large[:0])
    large[500] = bad
    assert not all_finite(large)
    large[600] = -bad
    assert not all_finite(large)


def test_tensors_side_by_side_are_checked_as_one_vector() -> None:
    """What lies side by side is one vector; what does not is by itself, and nothing is left out or read twice."""
    data = torch.arange(1.0, 61.0)
    tensors = [data[:6].view(2, 3), data[6:10], data[10:16].view(2, 3).t(), data[16:20], data[24:30], data[30:30]]
    tensors += [data[30:40].bfloat16(), torch.arange(100.0, 104.0), data[40:60].view(4, 5)]
    vectors = list(_vectors(tensors))
    assert [len(vector.flatten()) for vector in vectors] == [10, 6, 4, 6, 0, 10, 4, 20]
    want = torch.cat([tensor.flatten().float() for tensor in tensors])
    assert torch.cat([vector.flatten().float() for vector in vectors]).equal(want)


@pytest.mark.parametrize("number", range(4))
def test_a_tensor_that_is_not_finite_is_named(number: int) -> None:
    data = torch.zeros(40)
    tensors = {f"layers.{i}": data[10 * i : 10 * i + 10].view(2, 5) for i in range(4)}
    tensors[f"layers.{number}"][1, 2] = float("nan")
    with pytest.raises(errors.AdapterError, match=rf"layers\.{number} has 1 values that are NaN .* of 10"):
        Adapter({"peft_type": "LORA"}, tensors)
