"""The pages: their code runs, their links and paths lead somewhere, and the README stays short."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import io
import json
import re
import shlex
import shutil
import string
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


def test_the_picture_is_drawn(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tiny model's answers, and of the figures that are recorded."""
    spec = importlib.util.spec_from_file_location("picture", ROOT / "examples" / "picture.py")
    picture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(picture)
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
