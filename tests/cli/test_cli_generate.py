"""`mlora generate`: a file of prompts under the adapters of a config, and entries of every form."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from chat_model import save, tokenizer
from typer.testing import CliRunner

import mlora
import mlora.cli.models
from mlora.cli import app

MERGE = {"ids": ["one", "two"], "weights": [2, 1], "merge_strategy": "ties", "density": 0.5}


@pytest.fixture(scope="module")
def base(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save(llama, tmp_path_factory.mktemp("base")))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that were loaded."""
    seen: list[Any] = []
    load = mlora.cli.models.load_model

    def recorded(name: str | None, *options: Any) -> Any:
        seen.append(name)
        return load(name, *options)

    monkeypatch.setattr(mlora.cli.models, "load_model", recorded)
    return seen


@pytest.fixture
def config(base: str, folders: dict[str, Path], tmp_path: Path) -> Path:
    (tmp_path / "r3").symlink_to(folders["r3"], target_is_directory=True)
    content = {
        "base_model": base,
        "adapters": {
            "adapters": {"one": {"path": "r3"}, "two": {"path": str(folders["rs16"])}},
            "merge": {"name": "both", "sources": ["one", "two"], "combination_type": "ties", "density": 0.5},
            "active": "two",
        },
    }
    (tmp_path / "adapters.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "adapters.yaml"


def run(*arguments: str, stdin: str | None = None) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["generate", *arguments], input=stdin)
    return result.exit_code, " ".join(result.output.split())


def generate(tmp_path: Path, lines: list[dict[str, Any]], *options: str) -> tuple[int, str, list[dict[str, Any]]]:
    source, sink = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, output = run("--input", str(source), "--output", str(sink), "--max-new-tokens", "8", *options)
    done = [json.loads(line) for line in sink.read_text().splitlines()] if sink.exists() else []
    return code, output, done


def alone(runtime: Any, prompt: str, entry: Any) -> str:
    """The completion, with nothing of the command line but its tokenizer."""
    words = tokenizer()
    text = words.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False)
    ids = torch.tensor([words(text)["input_ids"]])
    out = runtime.model.generate(ids, adapter_names=[entry], max_new_tokens=8, do_sample=False)
    return words.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("options", [(), ("--continuous",)], ids=["batches", "continuous"])
def test_a_config_and_entries_of_every_form(
    llama: Any, base: str, loads: list[Any], config: Path, folders: dict[str, Path], tmp_path: Path, options: Any
) -> None:
    prompt = "5 9 33 2 17"
    entries: list[Any] = ["one", "two", "both", None, {"one": 0.7, "two": -0.3}, MERGE]
    lines = [{"prompt": prompt, "adapter": entry} for entry in entries] + [{"prompt": prompt}]
    code, output, done = generate(tmp_path, lines, "--config", str(config), *options)
    assert code == 0, output
    assert loads == [base]
    assert [{k: v for k, v in line.items() if k != "completion"} for line in done] == lines
    runtime = mlora.patch(copy.deepcopy(llama))
    runtime.load_adapter(folders["r3"], "one")
    runtime.load_adapter(folders["rs16"], "two")
    by_hand: list[Any] = [
        "one", "two", mlora.Merge(["one", "two"], [0.5, 0.5], "ties", density=0.5), None, {"one": 0.7, "two": -0.3},
        mlora.Merge(["one", "two"], [2, 1], "ties", density=0.5), "two",
    ]  # fmt: skip
    want = [alone(runtime, prompt, entry) for entry in by_hand]
    assert [line["completion"] for line in done] == want
    assert len(set(want)) > 3


def test_continuous_answers_are_in_order_and_draw_as_generate_does(
    llama: Any, config: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Lines of other lengths, two at once; the seed of a line is the first one's and its number."""
    lines = [{"prompt": "5 9 33 2 17"[: 1 + 2 * (at % 5)], "adapter": "one"} for at in range(7)]
    draw = ("--continuous", "--batch-size", "2", "--do-sample", "--seed", "11")
    code, output, done = generate(tmp_path, lines, "--config", str(config), *draw)
    assert code == 0, output
    runtime, words, want = mlora.patch(copy.deepcopy(llama)), tokenizer(), []
    runtime.load_adapter(folders["r3"], "one")
    for at, line in enumerate(lines):
        text = words.apply_chat_template([{"role": "user", "content": line["prompt"]}], tokenize=False)
        ids = torch.tensor([words(text)["input_ids"]])
        torch.manual_seed(11 + at)
        out = runtime.model.generate(ids, adapter_names=["one"], max_new_tokens=8, do_sample=True)
        want.append({**line, "completion": words.decode(out[0, ids.shape[1] :], skip_special_tokens=True)})
    assert done == want


def test_continuous_says_what_fails(config: Path, tmp_path: Path) -> None:
    lines = [{"prompt": "5 9"}, {"prompt": "7 " * 70}]
    code, output, done = generate(tmp_path, lines, "--config", str(config), "--continuous")
    assert code == 1 and "at most 64 are served" in output and not done


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--model", "x"], "excludes --model"),
        (["--adapter", "a=b"], "excludes --adapter"),
    ],
)
def test_a_config_excludes(loads: list[Any], config: Path, tmp_path: Path, options: list[str], wanted: str) -> None:
    code, output, _ = generate(tmp_path, [{"prompt": "1"}], "--config", str(config), *options)
    assert code == 2 and wanted in output and not loads


@pytest.mark.parametrize("source", ("config", "adapters"))
@pytest.mark.parametrize(
    ("option", "wanted"),
    [
        (["--memory", "12KiB"], "the arena has 12,288 (patch(memory=...), or --memory of the commands)"),
        (["--memory", "12000"], "the arena has 11,968 ("),
        (["--max-adapters", "1"], ""),
        (["--memory", "0.25 mib", "--max-adapters", "2"], ""),
        (["--memory", "1MB"], ""),
    ],
)
def test_room(
    base: str, config: Path, folders: dict[str, Path], tmp_path: Path, source: str, option: list[str], wanted: str
) -> None:  # fmt: skip
    given = ["--config", str(config)]
    if source == "adapters":
        given = ["--model", base, "--adapter", f"one={folders['r3']}", "--adapter", f"two={folders['rs16']}"]
    lines = [{"prompt": "1 2", "adapter": name} for name in ("one", "two")]
    code, output, done = generate(tmp_path, lines, *given, *option)
    if wanted:
        assert code == 1 and wanted in output, output
    else:
        assert code == 0 and len(done) == 2, output


@pytest.mark.parametrize("size", ["2XB", "-1", "", "0", "1e9", "GiB", "0.1"])
def test_bad_sizes(loads: list[Any], config: Path, tmp_path: Path, size: str) -> None:
    code, output, _ = generate(tmp_path, [{"prompt": "1"}], "--config", str(config), "--memory", size)
    assert code == 2 and f"--memory {size!r}: wanted" in output and not loads, output


@pytest.mark.parametrize(
    ("entry", "wanted"),
    [
        ("three", "unknown adapter 'three' (there are: both, one, two)"),
        ({"ids": ["one", "three"]}, "unknown adapter 'three'"),
        ({**MERGE, "density": 2}, "density is 2"),
        ({**MERGE, "densty": 1}, "'densty'"),
        ({**MERGE, "weights": [1]}, "1 weights for 2"),
        ({"one": "x"}, "the weight of 'one' is 'x'"),
        ({"one": True}, "the weight of 'one' is True"),
        ({"one": float("nan")}, "the weight of 'one' is nan, wanted a finite number"),
        ({"one": 1, "two": float("-inf")}, "the weight of 'two' is -inf"),
        ({"one": 1e39}, "the weight of 'one' is 1e+39"),  # beyond fp32
        (3, "'adapter' is 3".replace("'", '"')),
    ],
)
def test_bad_entries_are_found_before_a_model_is_loaded(
    loads: list[Any], config: Path, tmp_path: Path, entry: Any, wanted: str
) -> None:
    lines = [{"prompt": "1"}, {"prompt": "1", "adapter": entry}]
    code, output, done = generate(tmp_path, lines, "--config", str(config))
    assert code == 2 and "line 2" in output and wanted in output, output
    assert not loads and not done


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "marked"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n \n"], ids=["unix", "dos", "blank"])
def test_what_ends_a_line(loads: list[Any], config: Path, tmp_path: Path, mark: str, end: str) -> None:
    notes = ["a\u2028b\u2029c", "a\x85b", "\U0001f600"]  # line ends to Python, letters to JSON
    lines = [{"prompt": "5 9", "note": note} for note in notes]
    source, sink = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes((mark + "".join(json.dumps(line, ensure_ascii=False) + end for line in lines)).encode())
    for file, number in ((source, 0), (sink, 1)):  # what it wrote, it reads
        target = tmp_path / f"{number}.jsonl"
        result = CliRunner().invoke(
            app, ["generate", "--config", str(config), "--input", str(file), "--output", str(target)]
        )
        assert result.exit_code == 0, result.output
        target.replace(sink)
        done = [json.loads(line) for line in sink.read_text(encoding="utf-8").split("\n") if line]
        assert [line["note"] for line in done] == notes


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("", "has no prompts"),
        ("\n \n", "has no prompts"),
        ('{"prompt": "1"}\n[1]', 'line 2: wanted an object with a string "prompt"'),
        ('{"prompt": "1"}\n{"adapter": "one"}', 'line 2: wanted an object with a string "prompt"'),
        ('{"prompt": "1", "prompt": "2"}', "line 1: 'prompt' is there twice"),
        ('{"text": "1"}', 'line 1: wanted an object with a string "prompt"'),
        ('{"promt": "1"}', 'a string "prompt", not "promt"'),
        ('{"prompt": "1", "messages": []}', 'both "prompt" and "messages"'),
        ('{"messages": []}', "with at least one"),
        ('{"messages": [{"role": "user"}]}', "a message is {'role': 'user'}"),
        ('{"messages": "1"}', '"messages" is a list'),
        ("hello", "line 1: Expecting value at column 1; wanted one JSON object a line"),
        ('{"prompt": 3}', 'line 1: wanted an object with a string "prompt"'),
        ('{"prompt": "1"}\n\n{"prompt": ', "line 3: "),
        ('{"prompt": "a \\ud83d b"}', "line 1: 'utf-8' codec can't encode character '\\ud83d'"),
        ('{"prompt": "1", "note": "\\udc00"}', "line 1: 'utf-8' codec can't encode character '\\udc00'"),
    ],
)
def test_bad_files(loads: list[Any], config: Path, tmp_path: Path, content: str, wanted: str) -> None:
    source, sink = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(content, encoding="utf-8")
    result = CliRunner().invoke(
        app, ["generate", "--config", str(config), "--input", str(source), "--output", str(sink)]
    )
    output = " ".join(result.output.split())
    assert result.exit_code == 2 and wanted in output, output
    assert not loads and not sink.exists()


@pytest.mark.parametrize("prompts", [[""], ["", " "], ["1 2", ""]])
def test_raw_prompts_without_a_token(loads: list[Any], config: Path, tmp_path: Path, prompts: list[str]) -> None:
    lines = [{"prompt": prompt} for prompt in prompts]
    code, output, done = generate(tmp_path, lines, "--config", str(config), "--raw")
    assert code == 2 and f"prompt {prompts.index('') + 1}: '' gives no token, so that there is nothing" in output, (
        output
    )
    assert not loads and not done
    code, output, done = generate(tmp_path, [{"prompt": "1"}], "--config", str(config), "--raw")
    assert code == 0 and len(done) == 1, output


@pytest.mark.parametrize("target", [".", "no/out.jsonl", "in.jsonl"])
def test_bad_outputs(loads: list[Any], config: Path, tmp_path: Path, target: str) -> None:
    source, content = tmp_path / "in.jsonl", '{"prompt": "1"}\n'
    source.write_text(content)
    result = CliRunner().invoke(
        app, ["generate", "--config", str(config), "--input", str(source), "--output", str(tmp_path / target)]
    )
    assert result.exit_code == 2 and "--output" in result.output and "wanted" in result.output, result.output
    assert not loads and source.read_text() == content


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ({"adapters": {}}, "base_model is None"),
        ({"base_model": "x", "adapterz": {}}, "did you mean 'adapter'"),
        ({"base_model": "x", "adapters": {"active": "sql"}}, "'sql'"),
    ],
)
def test_bad_configs(loads: list[Any], tmp_path: Path, content: Any, wanted: str) -> None:
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(content))
    code, output, _ = generate(tmp_path, [{"prompt": "1"}], "--config", str(tmp_path / "bad.yaml"))
    assert code == 2 and wanted in output and not loads, output
