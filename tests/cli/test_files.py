"""What the commands read and write: options before models, outputs that stay until there are others, pipes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from chat_model import save
from conftest import rewrite
from typer.testing import CliRunner

import mlora.cli.chat
import mlora.cli.models
from mlora.cli import app
from mlora.cli.adapters import parse_adapters
from mlora.cli.errors import InputError
from mlora.cli.lines import read_lines

LINES = [{"prompt": f"{number} {number + 5}", "id": number} for number in range(6)]


@pytest.fixture(scope="module")
def base(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save(llama, tmp_path_factory.mktemp("base")))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    seen: list[Any] = []
    load = mlora.cli.models.load_model
    monkeypatch.setattr(mlora.cli.models, "load_model", lambda *given: [seen.append(given), load(*given)][1])
    return seen


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return file


def run(*arguments: Any, stdin: str | None = None) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["generate", *map(str, arguments)], input=stdin)
    return result.exit_code, " ".join(result.output.split())


def answers(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def whole(base: str, source: Path, tmp_path: Path) -> list[dict[str, Any]]:
    """The answers of a run that nothing broke off."""
    code, output = run("--model", base, "--input", source, "--output", tmp_path / "whole", "--max-new-tokens", 3)
    assert code == 0 and "not read: id" in output, output
    return answers(tmp_path / "whole")


def test_an_output_stays_until_there_is_another(
    base: str, source: Path, tmp_path: Path, loads: list[Any], monkeypatch: pytest.MonkeyPatch, whole: Any
) -> None:
    loads.clear()
    out, part = tmp_path / "out", tmp_path / "out.part"
    out.write_text("hours of work\n")
    given = ("--model", base, "--input", source, "--output", out, "--max-new-tokens", 3, "--batch-size", 2)
    code, output = run(*given)
    assert code == 2 and f"{out} exists" in output and "--force" in output and not loads
    complete, calls = mlora.cli.chat.complete, []

    def breaks(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return complete(*arguments, **options)

    monkeypatch.setattr(mlora.cli.chat, "complete", breaks)
    code, output = run(*given, "--force")
    assert code == 130 and f"4 of 6 answers are in {part}" in output and "--resume" in output
    assert out.read_text() == "hours of work\n" and answers(part) == whole[:4]
    monkeypatch.setattr(mlora.cli.chat, "complete", complete)

    out.unlink()
    code, output = run(*given)
    assert code == 2 and "has 4 answers of a run that broke off" in output and answers(part) == whole[:4]
    code, output = run(*given[:-4], "--max-new-tokens", 4, "--resume")
    assert code == 2 and "--max-new-tokens is 4 and was 3; --force starts anew" in output, output
    code, output = run(*given, "--top-k", 2, "--resume")
    assert code == 2 and "--resume: --" in output and answers(part) == whole[:4], output
    with part.open("a") as file:
        file.write('{"prompt": "cut o')  # as a machine that lost its power leaves it
    code, output = run(*given, "--resume")
    assert code == 0 and answers(out) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out", "whole"]


def test_a_failure_before_the_first_answer_leaves_nothing(base: str, source: Path, tmp_path: Path) -> None:
    code, output = run("--model", base, "--input", source, "--output", tmp_path / "out", "--memory", "1")
    assert code == 0, output  # base rows need no room
    (tmp_path / "out").unlink()
    source.write_text(json.dumps({"prompt": "1", "adapter": "gone"}))
    code, output = run("--model", base, "--input", source, "--output", tmp_path / "out")
    assert code == 2 and sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"], output


@pytest.mark.parametrize("what", ["another", "longer", "damaged"])
def test_parts_of_another_input_are_refused(base: str, source: Path, tmp_path: Path, what: str, whole: Any) -> None:
    part = tmp_path / "out.part"
    texts = [json.dumps(answer) for answer in whole]
    texts = {"another": texts[1:2], "longer": texts * 2, "damaged": ["no JSON"]}[what]
    part.write_text("".join(text + "\n" for text in texts))
    code, output = run("--model", base, "--input", source, "--output", tmp_path / "out", "--resume")
    assert code == 2 and str(part) in output and part.exists(), output


def test_seeds(base: str, source: Path, tmp_path: Path, whole: Any) -> None:
    def drawn(name: str, *options: Any) -> list[str]:
        given = ("--model", base, "--input", source, "--output", tmp_path / name, "--max-new-tokens", 3)
        code, output = run(*given, "--batch-size", 4, *options)
        assert code == 0, output
        return [answer["completion"] for answer in answers(tmp_path / name)]

    greedy = [answer["completion"] for answer in whole]
    first = drawn("a", "--temperature", 5, "--seed", 1)
    assert first == drawn("b", "--temperature", 5, "--seed", 1) != drawn("c", "--temperature", 5, "--seed", 2)
    assert first != greedy == drawn("d", "--do-sample", "--top-k", 1)
    # what is resumed is drawn as it would have been
    whole_run = (tmp_path / "a").read_text().splitlines(keepends=True)
    (tmp_path / "e.part").write_text("".join(whole_run[:4]))
    assert drawn("e", "--temperature", 5, "--seed", 1, "--resume") == first


def test_stdin_and_stdout(base: str, whole: Any) -> None:
    text = "".join(json.dumps(line) + "\n" for line in LINES)
    arguments = ["generate", "--model", base, "--input", "-", "--output", "-", "--max-new-tokens", "3"]
    result = CliRunner().invoke(app, arguments, input=text)
    assert result.exit_code == 0 and [json.loads(line) for line in result.stdout.splitlines()] == whole
    assert "6 completions in stdout" in result.stderr


def test_a_reader_that_has_enough(base: str) -> None:
    command = [sys.executable, "-m", "mlora", "generate", "--model", base, "--input", "-", "--output", "-"]
    pipe = subprocess.Popen(
        [*command, "--batch-size", "1", "--max-new-tokens", "2"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert pipe.stdin and pipe.stdout and pipe.stderr
    pipe.stdin.write('{"prompt": "1"}\n' * 200)
    pipe.stdin.close()
    assert json.loads(pipe.stdout.readline())["prompt"] == "1"
    pipe.stdout.close()
    errors = pipe.stderr.read()
    assert pipe.wait() == 1 and "Traceback" not in errors and "Broken pipe" not in errors, errors


def test_chats(base: str, tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "7 8"}]}
    code, output = run(
        "--model", base, "--input", "-", "--output", tmp_path / "out", stdin=f'{json.dumps(chat)}\n{{"prompt": "7 8"}}'
    )
    assert code == 0, output
    one, other = answers(tmp_path / "out")
    assert one["completion"] == other["completion"] and one["messages"] == chat["messages"]
    code, output = run("--model", base, "--input", "-", "--output", "-", "--raw", stdin=json.dumps(chat))
    assert code == 2 and 'prompt 1: --raw has no template for "messages"' in output


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--temperature", "0"], "--temperature 0: wanted a number above 0"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--top-p", "1.5"], "--top-p 1.5"),
        (["--greedy", "--top-p", "0.5"], "--greedy excludes --top-p"),
        (["--seed", "1"], "--seed: greedy decoding draws nothing"),
        (["--dtype", "bf16"], "--dtype 'bf16': wanted auto"),
        (["--device", "gpu"], "--device 'gpu': wanted cpu"),
        (["--adapter", "no/such"], "--adapter 'no/such'"),
        (["--adapter", "{folder}/rs61"], "rs16'?)"),
        (["--adapter", "{folder}/r3@0.5"], '"adapter": {{"r3": 0.5}}'),
        (["--adapter", "one=0.5"], "as in one@0.5"),
        (["--adapter", "__base__={folder}/r3"], "the bare model's"),
        (["--adapter", "x={folder}/r3", "--adapter", "x={folder}/rs16"], "the name 'x' is taken"),
        (["--model", "./nowhere"], "model './nowhere': there is no such folder"),
        (["--model", "{folder}/r3"], "it is an adapter's; wanted its base"),
        (["--output", "{folder}"], "--output"),
    ],
)
def test_options_are_checked_before_the_model_is_loaded(
    base: str, loads: list[Any], source: Path, tmp_path: Path, folders: dict[str, Path], options: list[str], wanted: str
) -> None:
    where = {"folder": folders["r3"].parent}
    given = [option.format(**where) for option in options]
    before = sorted(tmp_path.iterdir())
    offline = "HF_HUB_OFFLINE" in os.environ
    if "no/such" in given and not offline:
        pytest.skip("it would be looked for on the hub")
    code, output = run("--model", base, "--input", source, "--output", tmp_path / "out", *given)
    assert code == 2 and wanted.format(**where) in output, output
    assert not loads and sorted(tmp_path.iterdir()) == before


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path, source: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    code, output = run("--model", tmp_path / "broken", "--input", source, "--output", tmp_path / "out")
    assert code == 2 and f"model '{tmp_path / 'broken'}' could not be loaded: " in output, output


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["a/sql"], [("sql", "a/sql", None)]),
        (["x=a/sql@0.5", "a/b=c"], [("x", "a/sql", 0.5), ("a/b", "c", None)]),
        (["a/sql@-1e-3"], [("sql", "a/sql", -0.001)]),
        (["a/final", "b/final"], [("a/final", "a/final", None), ("b/final", "b/final", None)]),
        (["s3://key@host/x?a=b"], [("x?a=b", "s3://key@host/x?a=b", None)]),
        (["x=s3://key@host/x@2"], [("x", "s3://key@host/x", 2.0)]),
        (["~/sql", "x=~/sql2"], [("sql", "HOME/sql", None), ("x", "HOME/sql2", None)]),
        (["there=1"], [("there=1", "there=1", None)]),
        (["there@1"], [("there@1", "there@1", None)]),
    ],
    ids=str,
)
def test_the_grammar_of_adapters(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: list[str], wanted: list[Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "HOME")
    (tmp_path / "there=1").mkdir()
    (tmp_path / "there@1").mkdir()
    assert [(one.name, one.source, one.weight) for one in parse_adapters(options)] == wanted


@pytest.mark.parametrize("option", ["", "=a", "x=", "@1", "x=@1"])
def test_what_is_not_of_the_grammar(option: str) -> None:
    with pytest.raises(InputError, match=r"wanted \[NAME=\]PATH\[@WEIGHT\]"):
        parse_adapters([option])


@pytest.mark.parametrize(
    ("key", "wanted"),
    [
        *[(key, 'did you mean "adapter"') for key in (
            "adapters", "adapter_name", "adapter_names", "Adapter", "adapterId", "adaptor", "lora", "lora_name", "LoRA",
            "loraName", "peft", "adpater", "adapter-name", "peftAdapter",
        )],
        ("model", "--model is for all lines"),
        ("temperature", "--temperature is for all lines"),
        ("maxNewTokens", "--max-new-tokens is for all lines"),
        ("weights", 'the value of "adapter"'),
        ("system", '"messages"'),
        ("message", '"messages"'),
        ("Messages", 'did you mean "messages"'),
        ("Prompt", 'did you mean "prompt"'),
        ("tools", "there is no option for it"),
    ],
)  # fmt: skip
def test_fields_that_would_be_lost(tmp_path: Path, key: str, wanted: str) -> None:
    (tmp_path / "in").write_text(json.dumps({"prompt": "x", key: "sql"}))
    with pytest.raises(InputError) as caught:
        read_lines(tmp_path / "in", {"sql"})
    assert f'line 1: "{key}" is not read' in str(caught.value) and wanted in str(caught.value)


@pytest.mark.parametrize(
    "key", ["id", "custom_id", "note", "label", "exploration", "prompt_id", "reference", "language"]
)
def test_fields_that_are_copied(tmp_path: Path, key: str) -> None:
    (tmp_path / "in").write_text(json.dumps({"prompt": "x", key: "sql", "completion": "of before"}))
    assert read_lines(tmp_path / "in", {"sql"})[0][key] == "sql"


def test_what_no_line_uses_and_what_is_near(base: str, folders: dict[str, Path], tmp_path: Path) -> None:
    given = ("--model", base, "--adapter", folders["r3"], "--input", "-", "--output", tmp_path / "out")
    code, output = run(*given, stdin='{"prompt": "1"}')
    assert code == 0 and "no line uses r3" in output
    code, output = run(*given, "--force", stdin='{"prompt": "1", "adapter": "r33"}')
    assert code == 2 and "stdin line 1: unknown adapter 'r33' (there are: r3); did you mean 'r3'?" in output


def test_a_mix_larger_than_the_slots(base: str, loads: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    given = ("--model", base, "--adapter", folders["r3"], "--adapter", folders["rs16"], "--max-adapters", 1)
    line = json.dumps({"prompt": "1", "adapter": {"r3": 1, "rs16": 1}})
    code, output = run(*given, "--input", "-", "--output", tmp_path / "out", stdin=line)
    assert code == 2 and "needs 2 adapters at once; --max-adapters is 1" in output and not loads


def test_an_interrupted_run(base: str, source: Path, tmp_path: Path) -> None:
    """A real Ctrl-C, with no terminal."""
    out = tmp_path / "out"
    source.write_text('{"prompt": "1"}\n' * 5000)
    command = [sys.executable, "-m", "mlora", "generate", "--model", base, "--input", str(source), "--output", str(out)]
    command += ["--batch-size", "1"]
    done = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    part = tmp_path / "out.part"
    while done.poll() is None and not (part.exists() and part.stat().st_size):
        time.sleep(0.05)
    done.send_signal(signal.SIGINT)
    _, errors = done.communicate(timeout=60)
    assert done.returncode == 130 and errors.endswith("mlora: interrupted\n") and "Traceback" not in errors, errors
    assert f"answers are in {part}" in errors and not out.exists() and answers(part)[0]["prompt"] == "1"


def test_what_a_config_promises_and_the_files_lack(base: str, folders: dict[str, Path], tmp_path: Path) -> None:
    rewrite(folders["r3"], tmp_path / "ad", {"target_modules": ["q_proj", "k_proj", "v_proj"]})
    given = ("--model", base, "--adapter", tmp_path / "ad", "--input", "-", "--output", "-")
    line = '{"prompt": "1", "adapter": "ad"}'
    code, output = run(*given, stdin=line)
    assert code == 0 and "mlora: warning: adapter 'ad' from" in output and "UserWarning" not in output, output
    code, output = run(*given, "--strict", stdin=line)
    assert code == 1 and "mlora: error: adapter" in output and "k_proj" in output, output
