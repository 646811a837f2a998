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


def test_an_error_on_the_way_leaves_the_model_unpatched(model: Any, tmp_path: Path) -> None:
    with pytest.raises(errors.AdapterError):
        mlora.from_config({"adapter": {"path": str(tmp_path / "nothing")}}, model=model)
    assert not hasattr(model, "mlora")
