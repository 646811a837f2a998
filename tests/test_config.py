"""`from_config`: Ludwig's schema for several adapters."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import inputs_for, logits

import mlora
from mlora import errors
from mlora.config import parse


def test_a_file(llama: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path / "base")
    (tmp_path / "r3").symlink_to(folders["r3"], target_is_directory=True)
    config = {
        "base_model": str(tmp_path / "base"),
        "adapters": {
            "adapters": {"one": {"path": "r3"}, "two": {"hub_id": str(folders["rs16"])}},
            "merge": {"name": "both", "sources": ["one", "two"], "weights": [3, 1], "combination_type": "linear"},
            "active": "both",
        },
    }
    (tmp_path / "adapters.yaml").write_text(yaml.safe_dump(config))
    runtime = mlora.from_config(tmp_path / "adapters.yaml", fused=False)
    batch = inputs_for("llama", 2)
    got = logits(runtime.model, batch)
    want = logits(runtime.model, batch, adapter_names={"one": 0.75, "two": 0.25})
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    (tmp_path / "adapters.json").write_text(json.dumps(config))
    assert set(mlora.from_config(tmp_path / "adapters.json").adapters) == {"one", "two", "both"}


def test_a_fresh_adapter_changes_nothing_yet(model: Any) -> None:
    batch = inputs_for("llama", 2)
    before = logits(model, batch)
    fresh = {"type": "lora", "r": 4, "alpha": 8, "dropout": 0.1, "target_modules": ["q_proj"]}
    runtime = mlora.from_config({"adapter": fresh}, model=model)
    info = runtime.adapters["default"]
    assert info.rank == 4 and len(info.modules) == 2 and all(name.endswith("q_proj") for name in info.modules)
    assert torch.equal(logits(model, batch), before)
    mlora.unpatch(model)
    tokens = mlora.from_config({"adapter": {**fresh, "target_modules": ["embed_tokens"]}}, model=model)
    assert tokens.adapters["default"].modules == ("model.embed_tokens",)
    assert torch.equal(logits(model, batch), before)
    dora = mlora.from_config({"adapter": {**fresh, "use_dora": True}}, model=copy.deepcopy(mlora.unpatch(model)))
    torch.testing.assert_close(logits(dora.model, batch), before, rtol=1e-4, atol=1e-4)


def test_ludwigs_defaults(model: Any) -> None:
    """r 8, alpha 2 r, dropout 0.05, PEFT's targets for the model's type, density 0.5, the first adapter active."""
    adapters = {"first": {"type": "lora"}, "second": {"type": "lora", "r": 3, "alpha": None, "target_modules": None}}
    merge = {"sources": ["first", "second"], "combination_type": "ties"}
    runtime = mlora.from_config({"adapters": {"adapters": adapters, "merge": merge}}, model=model)
    for name, rank in (("first", 8), ("second", 3)):
        config = runtime._registry[name].adapter.config
        assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (rank, 2 * rank, 0.05)
        assert config["target_modules"] == ["q_proj", "v_proj"]
    assert "density=0.5" in runtime.adapters["merged"].source
    assert list(runtime._shared.default.names) == ["first"]
    mlora.unpatch(model)
    patterns = {"r": 2, "target_modules": ["q_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 5}}
    runtime = mlora.from_config({"adapter": {**patterns, "alpha_pattern": {"q_proj": 1}}}, model=model)
    assert runtime.adapters["default"].ranks == (2, 5) and runtime.adapters["default"].zero


WHOLE = """
model_type: llm
base_model: BASE
input_features: [{name: prompt, type: text}]
output_features: [{name: output, type: text}]
prompt: {template: "{prompt}"}
preprocessing: {sample_ratio: 0.1}
adapters:
  adapters:
    a: &usual
      {type: lora, r: 4, dropout: 0.1, bias_type: all, target_modules: null, loraplus_lr_ratio: 2, postprocessor: {}}
    b: {<<: *usual, init_lora_weights: gaussian}
  merge: {name: both, sources: [a, b], weights: [5e-1, 0.5], combination_type: ties, density: 0.5}
  active: both
trainer: {type: finetune, epochs: 3}
model_parameters: {neftune_noise_alpha: 5, rope_scaling: {rope_type: null, factor: null}}
quantization: null
trust_remote_code: false
backend: {type: local}
"""


def test_a_whole_file_of_ludwigs(model: Any, tmp_path: Path) -> None:
    batch = inputs_for("llama", 2)
    bare = logits(model, batch)
    (tmp_path / "model.yaml").write_text(WHOLE)
    with pytest.warns(UserWarning, match="leaves alone") as seen:
        runtime = mlora.from_config(tmp_path / "model.yaml", model=model)
    assert len(seen) == 1
    for part in ("input_features", "trainer", "dropout, bias_type, loraplus_lr_ratio, postprocessor of adapter 'a'"):
        assert part in str(seen[0].message)
    assert runtime.adapters["a"].rank == runtime.adapters["b"].rank == 4 and runtime.adapters["both"].zero
    assert torch.equal(logits(model, batch), bare)


@pytest.mark.parametrize(
    "more, wanted",
    [
        ("quantization: {bits: 4}", "quantization: {'bits': 4}"),
        ("trust_remote_code: true", "trust_remote_code: True"),
        ("model_parameters: {rope_scaling: {rope_type: linear, factor: 2.0}}", "rope_scaling"),
    ],
)
def test_what_changes_how_the_model_is_loaded_needs_a_model(tmp_path: Path, more: str, wanted: str) -> None:
    (tmp_path / "model.yaml").write_text(f"base_model: x\nadapter: lora\n{more}\n")
    with pytest.raises(errors.ConfigError, match=r"model=") as caught:
        mlora.from_config(tmp_path / "model.yaml")
    assert wanted in str(caught.value)


def test_several_merges(model: Any, folders: dict[str, Path]) -> None:
    merges = [
        {"sources": ["a", "b"], "combination_type": "ties", "density": 0.5},
        {"name": "more", "sources": ["a", "merged"], "weights": [1, 2]},
    ]
    adapters = {"a": {"path": str(folders["r3"])}, "b": {"path": str(folders["rs16"])}}
    runtime = mlora.from_config({"adapters": {"adapters": adapters, "merge": merges}}, model=model)
    assert list(runtime.adapters) == ["a", "b", "merged", "more"]


A = {"target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    "config, wanted",
    [
        ({"adapter": A, "adapters": {}}, "both 'adapter' and 'adapters'"),
        ({"adapterz": {}}, "no key 'adapterz' .did you mean 'adapter'"),
        ({"adapters": {"activ": "a"}}, "did you mean 'active'"),
        ({"adapters": {"adapters": {"a": {**A, "rank": 3}}}}, "adapter 'a' has no key 'rank'"),
        ({"adapters": {"adapters": {"a": {**A, "target_module": 3}}}}, "did you mean 'target_modules'"),
        ({"adapters": {"adapters": {"sql": A}, "active": "sqll"}}, "'sqll' .did you mean 'sql'"),
        ({"adapters": {"adapters": {"a": A}, "merge": {"sources": ["a", "b"]}}}, "names an adapter 'b'"),
        ({"adapters": {"adapters": {"a": A}, "merge": {"source": ["a"]}}}, "did you mean 'sources'"),
        ({"adapters": {"adapters": {"a": {"path": "x", "hub_id": "y/z"}}}}, "path and hub_id"),
        ({"adapters": {"adapters": {"a": {"r": 4}}}}, "neither weights"),
        ({"adapters": {"adapters": {"a": {**A, "revision": "main"}}}}, "'revision' and no weights"),
        ({"adapters": {"adapters": {"a": {**A, "type": "ia3"}}}}, "of type 'lora' only"),
        ({"adapters": {"adapters": {"a": {**A, "r": 0}}}}, "r is 0"),
        ({"adapters": {"adapters": ["a"]}}, "must be a mapping"),
        ({"adapter": {"target_modules": ["nothing"]}}, "name no linear"),
        ({"adapter": {**A, "init_lora_weights": "pissa"}}, "'pissa', which rewrites"),
        ({"adapter": {**A, "use_dora": "no"}}, "use_dora is 'no'; it must be true or false"),
        ({"adapter": {**A, "alpha": "16"}}, "alpha is '16'; it must be a finite number"),
        ({"adapter": {**A, "r": "8"}}, "r is '8'"),
        ({"adapter": {"target_modules": [0]}}, "target_modules is .0.; .*in quotes"),
        ({"adapter": {**A, "rank_pattern": {0: 4}}}, "rank_pattern is .0: 4.; .*in quotes"),
        ({"adapter": {"path": 2024}}, "path is 2024; .*in quotes"),
        ({"adapter": {"hub_id": "a/b", "revision": 1234567}}, "revision is 1234567; .*in quotes"),
        ({"model_type": "ecd", "adapter": A}, "model_type is 'ecd'"),
        ({"trainr": {}}, "did you mean 'trainer'"),
    ],
)
def test_bad_configs(model: Any, config: dict[str, Any], wanted: str) -> None:
    with pytest.raises(errors.ConfigError, match=wanted):
        mlora.from_config(config, model=model)
    assert not hasattr(model, "mlora")


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match=r"none\.yaml cannot be read: No such file"):
        mlora.from_config(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_text("a: [")
    with pytest.raises(errors.ConfigError, match="cannot be read as YAML"):
        mlora.from_config(tmp_path / "a.yaml")
    with pytest.raises(errors.ConfigError, match="base_model is None"):
        mlora.from_config({"adapter": A})


def parsed(tmp_path: Path, text: str) -> Any:
    (tmp_path / "a.yaml").write_text(text)
    return parse(tmp_path / "a.yaml")


@pytest.mark.parametrize("name", ["1", "2024", "1.5", "1e5", "0x1", "12:30", "2024-01-01", "yes", "off", "null", "~"])
def test_names_that_yaml_reads_as_no_strings(tmp_path: Path, name: str) -> None:
    texts = [
        "adapters:\n  adapters:\n    {}: {{path: a}}\n",
        "adapters:\n  adapters:\n    a: {{path: a}}\n  merge: {{sources: [a, {}]}}\n",
    ]
    if name not in ("null", "~"):  # which are as good as missing there
        texts.append("adapters:\n  adapters:\n    a: {{path: a}}\n  active: {}\n")
        texts.append("adapters:\n  adapters:\n    a: {{path: a}}\n  merge: {{name: {}, sources: [a]}}\n")
    for text in texts:
        with pytest.raises(errors.ConfigError, match="quote the name"):
            parsed(tmp_path, text.format(name))
        quoted = text.format(f"'{name}'")
        if "sources: [a, '" not in quoted and "active" not in quoted:
            assert name in parsed(tmp_path, quoted).names


@pytest.mark.parametrize("name", ["my adapter", "a.b", "org/name", "01x", "no way", "é"])
def test_names_that_are_strings(tmp_path: Path, name: str) -> None:
    text = f"adapters:\n  adapters:\n    {name}: {{path: a}}\n  active: {name}\n  merge: {{sources: [{name}]}}\n"
    config = parsed(tmp_path, text)
    assert config.names == [name, "merged"] and config.active == name and config.merges[0][1].adapters == (name,)


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("adapters: {adapters: {a: {path: x}, a: {path: y}}}", "the key 'a' comes twice"),
        ('{"base_model": "x", "base_model": "y"}', "the key 'base_model' comes twice"),
        ("adapters: {adapters: {? [a, b] : {path: x}}}", "cannot be read as YAML"),
        ("adapters: {adapters: {a: {path: x}}, merge: {sources: !!python/tuple [a]}}", "cannot be read as YAML"),
        ("adapters: {adapters: {a: {path: x}}, merge: {sources: [a], weights: ['1']}}", "a weight is '1'"),
        ("adapters: {adapters: {a: {path: x}}, merge: {sources: [a], weights: [yes]}}", "a weight is True"),
        ("adapters: {adapters: {a: {path: x}}, merge: {sources: [a], weights: [2024-01-01]}}", "a weight is datetime"),
        ("adapters: {adapters: {a: {path: x}}, merge: {sources: [a], 1: 2}}", "no key 1"),
        ("adapters: {adapters: {a: {path: x, 1: 2}}}", "no key 1"),
        ("adapters: {adapters: {a: {path: x}, 2024-13-01: {path: x}}}", "cannot be read as YAML"),
        ("adapters: {merge: false}", "adapters.merge is False"),
        ("1: 2", "no key 1"),
        ("", "is None; it must be a mapping"),
    ],
)
def test_what_yaml_makes_of_files(tmp_path: Path, text: str, wanted: str) -> None:
    with pytest.raises((errors.ConfigError, errors.MergeError), match=wanted):
        parsed(tmp_path, text)


def test_anchors_merge_keys_and_short_exponents(tmp_path: Path) -> None:
    text = """
adapters:
  adapters:
    a: &a {type: lora, r: 4}
    b: {<<: *a, r: 2}
    c: *a
  merge: {sources: &names [a, b], weights: [1e-1, 2.5E+1]}
"""
    config = parsed(tmp_path, text)
    assert [config.adapters[name]["r"] for name in "abc"] == [4, 2, 4]
    assert config.merges[0][1].weights == (0.1, 25.0)


def test_an_error_on_the_way_leaves_the_model_unpatched(model: Any, tmp_path: Path) -> None:
    with pytest.raises(errors.AdapterError):
        mlora.from_config({"adapter": {"path": str(tmp_path / "nothing")}}, model=model)
    assert not hasattr(model, "mlora")
