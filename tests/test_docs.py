"""The pages and examples: their code runs, their links and paths lead somewhere, and the README stays short."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import io
import json
import re
import shlex
import shutil
import string
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCAB, build, make_adapter
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import mlora
from mlora.cli import app, demo_model

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
ADAPTERS: dict[str, dict[str, Any]] = {  # of the kinds in examples/adapters
    "sql": {"r": 8, "target_modules": ["q_proj", "v_proj"]},
    "json": {"r": 16, "use_rslora": True, "target_modules": ["k_proj", "o_proj", "q_proj", "v_proj"]},
    "emoji": {"r": 4, "use_dora": True, "target_modules": ["q_proj", "v_proj"]},
    "pirate": {"r": 2, "target_modules": "all-linear"},
}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like the root of a checkout after `make demo`, with a tiny model in the demo's place."""
    model = build("llama")
    model.config.max_position_embeddings = 1024  # letters are tokens
    folder = tmp_path / "cache" / "SmolLM2-135M-Instruct"
    model.save_pretrained(folder)
    letters = {
        letter: i for i, letter in enumerate(["<pad>", "?", *(string.ascii_letters + " .,'_\n\"{}()")[: VOCAB - 2]])
    }
    tokens = Tokenizer(models.WordLevel(letters, unk_token="?"))
    tokens.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", unk_token="?", chat_template=template
    ).save_pretrained(folder)
    examples = tmp_path / "examples"
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        make_adapter(examples / "adapters" / name, model, seed, **config)
    shutil.copy(ROOT / "examples" / "prompts.jsonl", examples)
    monkeypatch.setattr(demo_model, "_hub_snapshot", lambda local_files_only: None)
    monkeypatch.setenv("MLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_block_of_using_runs(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python in one session, `mlora` on its command line, and a YAML file under the name in its first line."""
    page = ROOT / "docs" / "using.md"
    text = page.read_text(encoding="utf-8")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    scope: dict[str, Any] = {}
    ran = 0
    for block in BLOCK.finditer(text):
        kind, code = block.groups()
        line = text.count("\n", 0, block.start()) + 2
        if kind == "python":
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), scope)
        elif kind == "yaml":
            (checkout / code.splitlines()[0].removeprefix("# ")).write_text(code)
        else:
            assert kind == "bash", f"{page}:{line}: a block of {kind!r} is not run"
            for command in code.replace("\\\n", " ").splitlines():
                program, *arguments = shlex.split(command)
                assert program == "mlora", f"{page}:{line}: {command} is not run"
                done = CliRunner().invoke(app, arguments)
                assert done.exit_code == 0, f"{page}:{line}: {command}\n{done.output}"
        ran += 1
    assert ran == text.count("\n```") / 2 > 15


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of examples/NAME.py, which finds its neighbours."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module(name)


def run(module: Any, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> str:
    """What an example prints on its command line."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        module.main()
    return printed.getvalue()


def test_the_examples_train_and_judge(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tiny model: what examples/train.py ships, examples/merging.py reads."""
    train, tasks = example("train", monkeypatch), example("tasks", monkeypatch)
    adapters = checkout / "examples" / "adapters"
    given = ("sql", "--steps", 2, "--batch-size", 2, "--out", adapters)
    printed = run(train, monkeypatch, *given)
    assert "wanted: " in printed and "LoRA, r=8" in printed
    shipped = json.loads((ROOT / "examples/adapters/sql/adapter_config.json").read_text())
    config = json.loads((adapters / "sql" / "adapter_config.json").read_text())
    assert {**config, "peft_version": ""} == {**shipped, "peft_version": ""}
    saved = mlora.Adapter.from_pretrained(adapters / "sql")
    assert {tensor.dtype for tensor in saved.tensors.values()} == {torch.bfloat16}
    assert "| `sql` | a request in English" in (adapters / "README.md").read_text(encoding="utf-8")
    assert len(json.loads((checkout / "build/examples/sql/trainer_state.json").read_text())["settings"]) > 20
    first = (adapters / "sql" / "adapter_model.safetensors").read_bytes()
    run(train, monkeypatch, *given)  # goes on from what is there, which has ended
    assert (adapters / "sql" / "adapter_model.safetensors").read_bytes() == first

    with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()) as told:
        run(train, monkeypatch, *given, "--seed", 1)
    assert "sql" in told.getvalue() and "--restart starts anew" in told.getvalue()

    for name in ("json", "emoji"):
        train.write_rows(adapters / "held_out" / f"{name}.jsonl", tasks.made_up(name, 3, True))
    said = dict.fromkeys(tasks.questions(True)[:3], "The sea is near you and the town.")
    train.write_rows(adapters / "held_out" / "pirate.jsonl", tasks.in_voice(said))
    merging = example("merging", monkeypatch)
    out = checkout / "merging.jsonl"
    printed = run(merging, monkeypatch, "--adapters", adapters, "--prompts", 2, "--only", "svd", "--out", out)
    assert "| `svd r16 x0.7 sql+json` |" in printed
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["strategy"] for record in records] == ["bare", "alone", "svd", "svd", "svd"]
    assert list(records[1]["tasks"]) == ["sql", "json", "emoji", "pirate"]

    rates = example("learning_rates", monkeypatch)
    printed = run(rates, monkeypatch, "--steps", 2, "--rates", 0.001, 0.01, "--out", checkout / "rates")
    assert "0.001" in printed and (checkout / "rates" / "losses.png").stat().st_size > 1000


def test_the_examples_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = example("tasks", monkeypatch)
    for name in tasks.MAKERS:
        rows, held_out = tasks.made_up(name, 300, False), tasks.made_up(name, 40, True)
        assert not {row["prompt"] for row in rows} & {row["prompt"] for row in held_out}
        shipped = (ROOT / "examples/adapters/held_out" / f"{name}.jsonl").read_text(encoding="utf-8")
        assert [json.loads(line) for line in shipped.splitlines()] == held_out
        assert all(tasks.right(f" {row['completion']}\n", row["completion"]) for row in rows)
    assert tasks.pirate("You are my friend, hello!") == "Arr, matey! Ye be me matey, ahoy!"
    (row,) = tasks.in_voice({"Who?": "It is the sea, my friend. The rest.", "What?": "No"})
    assert row == {"prompt": "Who?", "completion": "Arr, matey! It be th' seven seas, me matey."}
    assert tasks.right("Arr, matey! It be so.", row["completion"])
    assert not tasks.right("Arr, matey! It is so.", row["completion"])


def test_the_picture_is_drawn(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tiny model's answers, and of the figures that are recorded."""
    picture = example("picture", monkeypatch)
    monkeypatch.setattr(picture, "ROOT", checkout)
    found = picture.answers("Who?")
    assert list(found) == ["no adapter", "sql", "json", "emoji", "pirate"]
    lines = (ROOT / "bench/results/generate.jsonl").read_text(encoding="utf-8").splitlines()
    drawn = picture.draw("Who?", found, [json.loads(line) for line in lines], checkout / "picture.png")
    assert drawn.stat().st_size > 10_000


def test_the_readmes_lines_print_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the demo's own model, if it is here."""
    try:
        demo_model.resolve_model(None, progress=False)
    except RuntimeError as error:
        pytest.skip(str(error))
    blocks = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    code = next(text for kind, text in blocks if kind == "python")
    wanted = next(text for kind, text in blocks if kind == "text")
    monkeypatch.chdir(ROOT)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    for line, told in zip(printed.getvalue().splitlines(), wanted.splitlines(), strict=True):
        # The bare model's bf16 makes up its mind about a full stop by the last bit, which differs between processors.
        assert line == told if not told.startswith("None") else line.startswith(told.removesuffix(".")), line


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in _anchors(file), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_are_there(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        return  # of what was there
    for path in re.findall(r"`((?:mlora|tests|bench|csrc|docs|examples)/[\w./-]*)", page.read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_the_picture_of_the_rooms_has_all_of_them() -> None:
    picture = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## One call")[0]
    rooms = {
        path.stem for path in (ROOT / "mlora").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert {room for room in rooms if not room.startswith("_") and f"{room}<br>" not in picture} == {"errors"}


def test_what_is_public_says_what_it_is() -> None:
    for name in set(mlora.__all__) - {"BASE"}:
        thing = getattr(mlora, name)
        members = {} if callable(thing) and not isinstance(thing, type) else vars(thing)
        for member, value in {"": thing, **members}.items():
            if not member.startswith("_") and (callable(value) or isinstance(value, (property, classmethod))):
                assert inspect.getdoc(value), f"mlora.{name}.{member} has no docstring"


def _anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
