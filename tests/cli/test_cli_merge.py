"""`mlora merge`: adapters merged from their files, with and without the base model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import assert_close, build, inputs_for, logits, make_adapter, peft_alone
from typer.testing import CliRunner

import mlora
from mlora.cli import app
from mlora.lowering import BaseLinear, to_adapter
from mlora.lowering.delta import Delta


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch, llama: Any) -> Any:
    """What `--model` loads; without that option nothing may load a model."""
    import mlora.cli.models

    def load(name: str, device: str | None = None) -> Any:
        assert name == "BASE"
        return copy.deepcopy(llama)

    monkeypatch.setattr(mlora.cli.models, "load_model", load)
    return llama


def merge(out: Path, adapters: list[str], *options: str) -> tuple[int, str]:
    flags = [part for adapter in adapters for part in ("--adapter", adapter)]
    result = CliRunner().invoke(app, ["merge", str(out), *flags, *options])
    return result.exit_code, " ".join(result.output.split())


TIES = {"combination_type": "ties", "density": 0.5, "svd_rank": 5}
CASES = (
    ("linear", {"r3": 0.7, "rs16": -0.4}, [], {}),
    ("linear with a bias", {"r3": 1.0, "bias8": 1.5}, [], {}),
    ("linear, normalized", {"r3": 3.0, "rs16": 1.0}, ["--normalize"], {"normalize": True}),
    ("ties", {"r3": 0.7, "rs16": 0.3}, ["--type", "ties", "--density", "0.5", "--rank", "5"], TIES),
    (
        "ties by frequency", {"r3": 0.7, "rs16": 0.3},
        ["--type", "ties", "--density", "0.5", "--rank", "5", "--sign", "frequency"],
        {**TIES, "majority_sign_method": "frequency"},
    ),
    (
        "dare with a seed", {"r3": 0.7, "rs16": 0.3},
        ["--type", "dare_linear", "--density", "0.5", "--seed", "3"],
        {"combination_type": "dare_linear", "density": 0.5, "seed": 3},
    ),
    ("factor space", {"r3": 0.7, "r3b": 0.3}, ["--space", "factor"], {"space": "factor"}),
)  # fmt: skip


@pytest.mark.parametrize(("weights", "flags", "options"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_is_what_a_runtime_makes(
    base: Any, folders: dict[str, Path], tmp_path: Path, weights: dict[str, float], flags: list[str], options: Any
) -> None:
    make_adapter(tmp_path / "r3b", base, 77, r=3, target_modules=["q_proj", "v_proj"])
    if "r3b" in weights:
        make_adapter(tmp_path / "r3", base, 78, r=3, target_modules=["q_proj", "v_proj"])
    found = {name: tmp_path / name if "r3b" in weights else folders[name] for name in weights}
    code, output = merge(tmp_path / "out", [f"{found[name]}@{w}" for name, w in weights.items()], *flags)
    assert code == 0, output
    runtime = mlora.patch(copy.deepcopy(base))
    for name, folder in found.items():
        runtime.load_adapter(folder, name)
    info = runtime.add_weighted_adapter(list(weights), list(weights.values()), "new", **options)
    runtime.load_adapter(tmp_path / "out", "merged")
    batch = inputs_for("llama", 2)
    got, want = (logits(runtime.model, batch, adapter_names=name) for name in ("merged", "new"))
    assert torch.equal(got, want) and not torch.equal(got, logits(runtime.model, batch))
    # PEFT reads it, and computes the same
    assert_close(got, logits(peft_alone(base, tmp_path / "out"), batch))
    for wanted in (*weights, "LORA", "none is defined" if "factor" in options.values() else "error"):
        assert wanted in output
    if info.error:
        assert f"worst {info.error:.1e}" in output and f"mean {sum(info.errors.values()) / len(info.modules):.1e}"
    elif "factor" not in options.values():
        assert "error 0: exact" in output


def test_the_base_model_is_asked_for_where_it_is_needed(base: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    adapters = [str(folders["dora1"]), f"{folders['r3']}@0.5"]
    code, output = merge(tmp_path / "out", adapters)
    assert code == 1 and "'dora1'" in output and "_proj" in output and "pass --model BASE" in output
    assert not (tmp_path / "out").exists()
    code, output = merge(tmp_path / "out", adapters, "--model", "BASE")
    assert code == 0 and "DELTA" in output and "PEFT does not" in output, output
    runtime = mlora.patch(copy.deepcopy(base))
    for name, folder in {"d": folders["dora1"], "r": folders["r3"], "new": tmp_path / "out"}.items():
        runtime.load_adapter(folder, name)
    batch = inputs_for("llama", 2)
    want = logits(runtime.model, batch, adapter_names={"d": 1.0, "r": 0.5})
    assert_close(logits(runtime.model, batch, adapter_names="new"), want)
    # a DELTA tells its widths: a sum of gains needs no base, and other strategies do
    again = [str(tmp_path / "out"), str(folders["r3"])]
    assert merge(tmp_path / "sum", again)[0] == 0
    code, output = merge(tmp_path / "ties", again, "--type", "ties", "--density", "0.5")
    assert code == 1 and "needs the base model's weight" in output and "pass --model BASE" in output


def test_types_whose_files_do_not_tell_the_widths(base: Any, tmp_path: Path) -> None:
    import peft

    config = peft.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"])
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path / "ia3")
    code, output = merge(tmp_path / "out", [str(tmp_path / "ia3")])
    assert code == 1 and "'ia3'" in output and "IA3" in output and "pass --model BASE" in output, output


def test_what_the_files_do_not_hold(base: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    """The widths are told by another adapter, and are not enough."""
    targets = {"target_modules": ["q_proj", "v_proj"]}
    kinds = {
        "pissa": (peft.LoraConfig(r=3, init_lora_weights="pissa", **targets), "part of the base"),
        "tiny": (peft.TinyLoraConfig(u=3, init_weights="uniform", **targets), "order of the model's modules"),
    }
    for name, (config, why) in kinds.items():
        model = peft.get_peft_model(copy.deepcopy(base), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / name)
        sources = [f"{folders['r3']}@0.7", f"{tmp_path / name}@-0.5"]
        code, output = merge(tmp_path / f"{name} merged", sources)
        assert code == 1 and why in output and "base model is needed" in output
        code, output = merge(tmp_path / f"{name} merged", sources, "--model", "BASE")
        assert code == 0, output
        patched = copy.deepcopy(base)
        runtime = mlora.patch(patched)
        for folder, label in ((folders["r3"], "r3"), (tmp_path / name, name), (tmp_path / f"{name} merged", "merged")):
            runtime.load_adapter(folder, label)
        batch = inputs_for("llama", 2)
        want = logits(patched, batch, adapter_names={"r3": 0.7, name: -0.5})
        assert_close(logits(patched, batch, adapter_names="merged"), want)


def test_adapters_of_different_bases(base: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    a, b = torch.zeros(2, 24), torch.ones(2, 32)
    name = "model.layers.0.self_attn.q_proj"
    bases = {name: BaseLinear(name, 24, 32, lambda: a, lambda: None)}
    to_adapter({name: Delta(a, b)}, "test", bases).save_pretrained(tmp_path / "other")
    code, output = merge(tmp_path / "out", [str(folders["r3"]), str(tmp_path / "other")])
    assert code == 1 and not (tmp_path / "out").exists()
    for wanted in ("'other'", "'r3'", name, "24 inputs", "32", "different bases"):
        assert wanted in output, output
    code, output = merge(tmp_path / "out", [str(tmp_path / "other")], "--model", "BASE")
    assert code == 1 and "24" in output and "32" in output, output


@pytest.mark.parametrize(
    ("adapters", "options", "wanted"),
    [
        (["r3@x"], [], "the weight is 'x'"),
        (["r3@nan"], [], "a finite number"),
        (["r3@inf"], [], "a finite number"),
        (["r3", "r3@2"], [], "given twice"),
        (["@2"], [], "[NAME=]PATH[@WEIGHT]"),
        (["r3"], ["--type", "tise"], "'tise'"),
        (["r3"], ["--type", "ties"], "density is None"),
        (["r3"], ["--type", "ties", "--density", "1.5"], "density is 1.5"),
        (["r3"], ["--rank", "0"], "svd_rank is 0"),
        (["r3"], ["--space", "weights"], "'weights'"),
        (["r3@1", "rs16@-1"], ["--normalize"], "sum to 0"),
    ],
)
def test_bad_options(
    base: Any, folders: dict[str, Path], tmp_path: Path, adapters: list[str], options: list[str], wanted: str
) -> None:
    given = [
        str(folders[name]) + at + weight if name else option
        for option in adapters
        for name, at, weight in [option.partition("@")]
    ]
    code, output = merge(tmp_path / "out", given, *options)
    assert code == 2 and wanted in output, output
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_there(base: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    full, file, empty = tmp_path / "full", tmp_path / "file", tmp_path / "empty"
    full.mkdir()
    empty.mkdir()
    (full / "notes").write_text("mine")
    file.write_text("mine")
    for out, wanted in ((full, "not an empty folder"), (file, "is a file")):
        code, output = merge(out, [str(folders["r3"])])
        assert code == 2 and wanted in output
    assert [p.name for p in full.iterdir()] == ["notes"] and file.read_text() == "mine"
    assert merge(empty, [str(folders["r3"])])[0] == 0
    assert sorted(p.name for p in empty.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "full"]


def test_a_failure_on_the_way_writes_nothing(
    base: Any, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, folder: Path) -> None:
        Path(folder).mkdir()
        (Path(folder) / "adapter_model.safetensors").write_text("half of it")
        raise OSError("no space left")

    monkeypatch.setattr(mlora.Adapter, "save_pretrained", full)
    code, output = merge(tmp_path / "out", [str(folders["r3"])])
    assert code == 1 and "no space left" in output and not list(tmp_path.iterdir())


def test_what_the_sources_agree_on_is_kept(base: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    for name, path in (("a", "org/base"), ("b", "org/base"), ("c", "org/other")):
        make_adapter(tmp_path / name, build("llama"), 5, r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        file = tmp_path / name / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": path}))
    assert merge(tmp_path / "ab", [str(tmp_path / "a"), str(tmp_path / "b")])[0] == 0
    config = json.loads((tmp_path / "ab" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == ("org/base", "CAUSAL_LM")
    code, output = merge(tmp_path / "ac", [str(tmp_path / "a"), str(tmp_path / "c")])
    assert code == 0 and "different bases: org/base, org/other" in output
    assert "base_model_name_or_path" not in json.loads((tmp_path / "ac" / "adapter_config.json").read_text())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_of_the_adapters_is_kept(base: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    for seed, name in enumerate("ab"):
        make_adapter(tmp_path / name, base, seed, dtype=dtype, r=2, target_modules=["q_proj"])
    make_adapter(tmp_path / "c", base, 3, r=2, target_modules=["q_proj"])
    kept, name = [str(tmp_path / "a@0.5"), str(tmp_path / "b")], str(dtype).removeprefix("torch.")

    def dtypes(out: str) -> set[torch.dtype]:
        return {tensor.dtype for tensor in mlora.Adapter.from_pretrained(tmp_path / out).tensors.values()}

    code, output = merge(tmp_path / "kept", kept)
    assert code == 0 and dtypes("kept") == {dtype} and f"exact, but for rounding to {name}" in output, output
    code, output = merge(tmp_path / "asked", kept, "--dtype", "float32")
    assert code == 0 and dtypes("asked") == {torch.float32} and "rounding" not in output, output
    assert merge(tmp_path / "mixed", [*kept, str(tmp_path / "c")])[0] == 0 and dtypes("mixed") == {torch.float32}
    exact, rounded = (mlora.Adapter.from_pretrained(tmp_path / out).tensors for out in ("asked", "kept"))
    assert all(torch.equal(rounded[key], exact[key].to(dtype)) for key in exact)


def test_what_16_bits_do_not_hold(base: Any, tmp_path: Path) -> None:
    make_adapter(tmp_path / "a", base, 1, dtype=torch.float16, r=2, target_modules=["q_proj"])
    code, output = merge(tmp_path / "out", [str(tmp_path / "a@1e6")])
    assert code == 1 and "beyond what torch.float16 holds; wanted --dtype float32" in output, output
    assert not (tmp_path / "out").exists()


def test_force_replaces_the_adapter_and_keeps_the_rest(base: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    assert merge(tmp_path / "out", [str(folders["r3"])])[0] == 0
    (tmp_path / "out" / "notes").write_text("mine")
    before = mlora.Adapter.from_pretrained(tmp_path / "out").tensors
    code, output = merge(tmp_path / "out", [str(folders["rs16"])])
    assert code == 2 and "--force" in output
    assert merge(tmp_path / "out", [str(folders["rs16"])], "--force")[0] == 0
    assert mlora.Adapter.from_pretrained(tmp_path / "out").tensors.keys() != before.keys()
    assert (tmp_path / "out" / "notes").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_the_old_form_of_weights_and_names(base: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    code, output = merge(tmp_path / "out", [f"{folders['r3']}=0.7"])
    assert code == 2 and f"as in {folders['r3']}@0.7" in output
    code, output = merge(tmp_path / "out", [f"x={folders['r3']}@0.7"])
    assert code == 0 and "linear(0.7*x)" in output
