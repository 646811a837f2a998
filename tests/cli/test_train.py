"""`mlora train`: Ludwig's schema, from one file to adapters, merges and answers; what is refused before a model is
loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from chat_model import save
from conftest import peft_alone
from serving import adapters
from typer.testing import CliRunner

import mlora
import mlora.cli.models
from mlora.cli import app

ROWS = [{"instruction": f"{number} 2", "output": f"{number + 1} 3"} for number in range(3, 15)]


@pytest.fixture(scope="module")
def base(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save(llama, tmp_path_factory.mktemp("base")))


def config(base: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """As Ludwig documents it, with data sets."""
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "b.csv").write_text("question,answer\n" + "".join(f"{n},{n} {n}\n" for n in range(3, 12)))
    adapter = {"type": "lora", "r": 2, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
    whole = {
        "model_type": "llm",
        "base_model": base,
        "dataset": "a.jsonl",
        "prompt": {"template": "{instruction} "},
        "input_features": [{"name": "instruction", "type": "text"}],
        "output_features": [{"name": "output", "type": "text"}],
        "preprocessing": {"split": {"type": "random", "probabilities": [0.75, 0.25, 0.0]}},
        "trainer": {"type": "finetune", "learning_rate": 0.01, "batch_size": 2, "epochs": 2},
        "adapters": {
            "adapters": {
                "a": adapter,
                "b": {
                    **adapter,
                    "r": 3,
                    "dataset": "b.csv",
                    "prompt": {"template": "{question}: "},
                    "output_features": [{"name": "answer", "type": "text"}],
                    "trainer": {"learning_rate": 0.02, "epochs": 1},
                },
            },
            "merge": {"name": "both", "sources": ["a", "b"], "weights": [0.5, 0.5], "combination_type": "linear"},
            "active": "both",
        },
    }
    whole.update(changes)
    return whole


def run(folder: Path, whole: Any, *options: str) -> tuple[int, str]:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(whole, sort_keys=False))
    result = CliRunner().invoke(app, ["train", str(file), *options])
    return result.exit_code, " ".join(result.output.split())


def test_one_file_trains_merges_and_serves(
    base: str, tmp_path: Path, llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = config(base, tmp_path)
    code, output = run(tmp_path, whole)
    assert code == 0, output
    assert "a: 9 rows to train on, 3 to validate with; 10 steps of 2 rows" in output
    results = tmp_path / "results"
    for name, rank in (("a", 2), ("b", 3), ("both", 5)):
        written = json.loads((results / name / "adapter_config.json").read_text())
        assert (written["r"], written["peft_type"]) == (rank, "LORA")
        peft_alone(llama, results / name)
    assert json.loads((results / "b" / "adapter_config.json").read_text())["lora_alpha"] == 6  # Ludwig's 2 r
    with pytest.warns(UserWarning, match="leaves alone"):
        runtime = mlora.from_config(tmp_path / "config.yaml", memory=1 << 22)
    assert runtime.adapters["a"].source == str(results / "a")
    expected = mlora.Adapter.from_pretrained(results / "a").tensors
    got = runtime._registry["a"].adapter.tensors
    assert expected.keys() == got.keys()
    lines, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines.write_text('{"prompt": "3 4", "adapter": "both"}\n{"prompt": "3 4", "adapter": "a"}\n')
    arguments = ["generate", "--config", tmp_path / "config.yaml", "--input", lines, "--output", answers]
    result = CliRunner().invoke(app, [*map(str, arguments), "--max-new-tokens", "3"])
    assert result.exit_code == 0, result.output
    assert len(answers.read_text().splitlines()) == 2
    # again: nothing is left to do; with other settings it is refused, and --restart starts anew
    code, output = run(tmp_path, whole)
    assert code == 0 and "step 1 of" not in output, output
    whole["trainer"]["learning_rate"] = 0.5
    with monkeypatch.context() as patched:
        patched.setattr(mlora.cli.models, "load_model", lambda *_: pytest.fail("a model was loaded"))
        code, output = run(tmp_path, whole)
    assert code == 2 and "learning_rate was 0.01" in output and "--restart" in output, output
    code, output = run(tmp_path, whole, "--restart")
    assert code == 0, output


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("dataset",), "c.jsonl", "cannot read"),
        (("dataset",), None, "adapter 'a' has no dataset"),
        (("dataset",), "", "dataset is ''; it must be a file or a hub id"),
        (("trainer", "learning_rate"), "fast", "trainer.learning_rate is 'fast'; it must be a finite number"),
        (("trainer", "learning_rate"), float("nan"), "trainer.learning_rate is nan"),
        (("trainer", "learning_rat"), 1, "no key 'learning_rat' (did you mean 'learning_rate'?)"),
        (("trainer", "max_steps"), 1, "no key 'max_steps' (did you mean 'train_steps'?)"),
        (("adapters", "adapters", "a", "lora_alpha"), 4, "no key 'lora_alpha' (did you mean 'alpha'?)"),
        (("adapters", "merge", "name"), "a", "the name 'a' twice"),
        (("trainer", "type"), "dpo", "trainer.type is 'dpo'"),
        (("trainer", "batch_size"), "auto", "trainer.batch_size is 'auto'"),
        (("trainer", "effective_batch_size"), 5, "effective_batch_size 5 is not batch_size 2 times"),
        (("trainer", "optimizer"), {"type": "lion"}, "optimizer.type is 'lion'; it must be one of adam, adamw, sgd"),
        (("trainer", "learning_rate_scheduler"), {"decay": "exponential"}, "decay is 'exponential'"),
        (("trainer", "gradient_clipping"), {"clipvalue": 1}, "clipvalue is not served"),
        (("prompt", "template"), "{task}: ", "dataset of adapter 'a' row 1: it has no column 'task'"),
        (("output_features",), [{"name": "answer", "type": "text"}], "row 1: it has no column 'answer'"),
        (("output_features",), [{"name": "answer", "type": "category"}], "it must be a text feature"),
        (
            ("output_features",),
            [{"name": "output", "type": "text", "preprocessing": {"max_sequence_length": 9}}],
            "output_features has no key 'preprocessing'",
        ),
        (("adapters",), {"adapters": {"a/b": {"type": "lora"}}}, "the name of a run is 'a/b'"),
        (("preprocessing", "split"), {"type": "random", "probabilities": [1, 1, 1]}, "three shares that add up to 1"),
        (("preprocessing", "split"), {"type": "fixed"}, "no column 'split'"),
        (("preprocessing", "sample_ratio"), 0, "preprocessing.sample_ratio is 0; it must be a share above 0"),
        (("preprocessing", "split"), {"type": "stratify"}, "it must be 'random' or 'fixed'"),
        (("adapters", "adapters", "a", "trainer"), {"epochs": 0}, "adapter 'a': trainer.epochs is 0"),
        (("adapters", "adapters", "a", "loraplus_lr_ratio"), 4, "loraplus_lr_ratio"),
        (("output_directory",), 3, "output_directory is 3"),
        (("quantization",), {"bits": 4}, "quantization"),
        (("trainer", "seed"), 2**64, "trainer.seed is 18446744073709551616; it must be an integer from 0 to"),
        (("trainer", "train_steps"), -3, "trainer.train_steps is -3; it must be a positive integer"),
        (("hyperopt",), {"goal": "minimize"}, "the config has 'hyperopt', which mlora does not train by"),
        (("prompt", "template"), "Answer:", "the template 'Answer:' names no column"),
        (("prompt", "template"), "{instruction:d}", "has a format for 'instruction'"),
        (
            ("preprocessing", "global_max_sequence_length"),
            1,
            "global_max_sequence_length is 1; it must be an integer of",
        ),
        (
            ("preprocessing", "split"),
            {"type": "fixed", "column": "output"},
            "no row has 0, to be trained on",
        ),
        (("adapters", "adapters", "a", "alpha"), float("nan"), "adapter 'a': alpha is nan; it must be a finite number"),
        (("adapters", "adapters", "a", "target_modules"), [], "adapter 'a': target_modules is []"),
        (("adapters", "adapters", "a", "rank_pattern"), {"q_proj": 0}, "adapter 'a': rank_pattern is {'q_proj': 0}"),
        (("adapters", "adapters", "a", "bias_type"), "all", "adapter 'a' has bias_type: 'all'"),
        (("adapters", "adapters", "a", "init_lora_weights"), "eva", "adapter 'a' has init_lora_weights: 'eva'"),
        (("adapters", "adapters", "a", "layer_replication"), [[0, 1]], "adapter 'a' has layer_replication"),
        (("adapters", "adapters", "__base__"), {"type": "lora"}, "an adapter '__base__'; it must have another name"),
        (("adapters",), {"adapters": {"losses.png": {"type": "lora"}}}, "the name of a run is 'losses.png'"),
        (("adapters",), {"adapters": {"a" * 256: {"type": "lora"}}}, "takes at most 255 bytes"),
        (("adapters", "merge", "sources"), ["a", "z"], "the config names an adapter 'z'"),
        (("adapters", "merge", "sources"), ["a", "both"], "merge 'both' has the source 'both'"),
        (("adapters", "merge", "weights"), [1], "1 weights for 2 adapters"),
        (("output_directory",), "", "output_directory is ''"),
        (("output_directory",), "a.jsonl", "a.jsonl is a file; wanted a folder"),
        (("output_directory",), "/proc/mlora", "output_directory /proc/mlora: nothing can be written there"),
        (("base_model",), "/no/such/model", "there is no such folder"),
    ],
)
def test_what_is_wrong_is_told_before_a_model_is_loaded(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: tuple[str, ...], value: Any, words: str
) -> None:
    monkeypatch.setattr(mlora.cli.models, "load_model", lambda *_: pytest.fail("a model was loaded"))
    whole = config(base, tmp_path)
    section = whole
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    code, output = run(tmp_path, whole)
    assert code == 2 and words in output, output


def test_a_row_without_a_target_and_an_adapter_twice(base: str, tmp_path: Path) -> None:
    whole = config(base, tmp_path)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"instruction": "x", "output": ""}\n')
    code, output = run(tmp_path, whole)
    assert code == 2 and "dataset of adapter 'a' row 13: its column 'output' is empty" in output
    file_ = tmp_path / "config.yaml"
    file_.write_text("base_model: x\nadapters:\n  adapters:\n    a: {r: 2}\n    a: {r: 3}\n")
    result = CliRunner().invoke(app, ["train", str(file_)])
    assert result.exit_code == 2 and "'a'" in result.output


def test_what_no_run_has_trained_is_not_replaced(
    base: str, tmp_path: Path, llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = config(base, tmp_path)
    (folder,) = adapters(tmp_path / "results", llama, ("a",)).values()
    weights = (folder / "adapter_model.safetensors").read_bytes()
    monkeypatch.setattr(mlora.cli.models, "load_model", lambda *_: pytest.fail("a model was loaded"))
    for options in ((), ("--restart",)):
        code, output = run(tmp_path, whole, *options)
        assert code == 2 and f"{folder} has an adapter that no run has trained" in output, output
    assert (folder / "adapter_model.safetensors").read_bytes() == weights


def test_a_merge_does_not_replace_a_run(base: str, tmp_path: Path) -> None:
    whole = config(base, tmp_path)
    del whole["adapters"]["merge"], whole["adapters"]["active"]
    code, output = run(tmp_path, whole)
    assert code == 0, output
    both = {"name": "b", "sources": ["a", "c"]}
    whole["adapters"] = {"adapters": dict.fromkeys("ac", whole["adapters"]["adapters"]["a"]), "merge": both}
    code, output = run(tmp_path, whole)
    assert code == 2 and "results/b has a run's adapter" in output, output


def test_a_chat_needs_a_template_before_a_model_is_loaded(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = config(str(save(llama, tmp_path / "base", template=None)), tmp_path)
    monkeypatch.setattr(mlora.cli.models, "load_model", lambda *_: pytest.fail("a model was loaded"))
    whole["prompt"]["chat"] = True
    code, output = run(tmp_path, whole)
    assert code == 2 and "the tokenizer has no chat template" in output, output


def test_what_the_model_lacks_is_told_with_the_run(base: str, tmp_path: Path) -> None:
    whole = config(base, tmp_path)
    whole["adapters"]["adapters"]["b"]["target_modules"] = ["no_proj"]
    code, output = run(tmp_path, whole)
    assert code == 2 and "run 'b': " in output and "['no_proj'] name no module" in output, output


def test_seeds_may_be_large(base: str, tmp_path: Path) -> None:
    whole = config(base, tmp_path)
    whole["trainer"].update(seed=2**64 - 1, train_steps=1)
    code, output = run(tmp_path, whole)
    assert code == 0, output


def test_ludwigs_defaults_with_dora(base: str, tmp_path: Path, llama: Any) -> None:
    """A dropout of 0.05, which nobody wrote, and the modules that are usual; of a share of the rows."""
    whole = config(base, tmp_path, preprocessing={"sample_ratio": 0.5, "split": {"probabilities": [1, 0, 0]}})
    whole["adapters"] = {"adapters": {"a": {"type": "lora", "r": 2, "use_dora": True}}}
    code, output = run(tmp_path, whole)
    assert code == 0, output
    assert "a: 6 rows to train on; 6 steps of 2 rows" in output
    written = json.loads((tmp_path / "results" / "a" / "adapter_config.json").read_text())
    assert (written["lora_dropout"], written["use_dora"], written["lora_alpha"]) == (0.05, True, 4)
    peft_alone(llama, tmp_path / "results" / "a")
