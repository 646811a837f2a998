"""An adapter's own tokenizer and chat template serve its rows; copies of the base's are no matter."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from chat_model import WORDS, save, tokenizer
from conftest import make_adapter, peft_alone
from typer.testing import CliRunner

from mlora.cli import app

OWN = "{% for m in messages %}9 {{ m['content'] }} 8 7 {% endfor %}"
NEW = ("NEW0", "NEW1", "NEW2")


@pytest.fixture(scope="module")
def world(llama: Any, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/; adapters: new (tokens and a template), template (a template alone, in a file), copy and pad (the base's
    tokenizer, saved again), broken, and plain (none)."""
    root = tmp_path_factory.mktemp("world")
    save(llama, root / "base")
    for name in ("template", "copy", "pad", "broken", "plain"):
        shutil.copytree(folders["r3" if name != "copy" else "rs16"], root / name)
    (root / "template" / "chat_template.jinja").write_text(OWN)
    tokenizer().save_pretrained(root / "copy")
    tokenizer(pad=None).save_pretrained(root / "pad")
    (root / "broken" / "tokenizer.json").write_text("{")
    torch.manual_seed(0)
    wider = copy.deepcopy(llama)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wider.resize_token_embeddings(WORDS + len(NEW))
        made = make_adapter(
            root / "new", wider, 5, r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
        )
    tokenizer(OWN, NEW).save_pretrained(made)
    return root


def generate(world: Path, lines: list[Any], *options: str, adapters: tuple[str, ...]) -> tuple[int, str, list[str]]:
    given = [part for name in adapters for part in ("--adapter", str(world / name))]
    arguments = ["generate", "--model", str(world / "base"), *given, "--max-new-tokens", "5", *options]
    text = "".join(json.dumps({"prompt": prompt, "adapter": entry}) + "\n" for prompt, entry in lines)
    result = CliRunner().invoke(app, [*arguments, "--input", "-", "--output", "-"], input=text)
    answers = [json.loads(line)["completion"] for line in result.stdout.splitlines()] if result.exit_code == 0 else []
    return result.exit_code, " ".join(result.output.split()), answers


def alone(model: Any, words: Any, prompt: str) -> str:
    text = words.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([words(text, add_special_tokens=False)["input_ids"]])
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    return words.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_rows_of_mixed_tokenizers(world: Path, llama: Any) -> None:
    prompts = ["5 NEW1 6", "5 6 11 12 13 14"]
    names = ("new", "template", "copy", "plain")
    lines = [(prompt, name) for prompt in prompts for name in (*names, None)]
    code, output, answers = generate(world, lines, adapters=names)
    assert code == 0, output
    wider = copy.deepcopy(llama)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wider.resize_token_embeddings(WORDS + len(NEW))
    alones = {
        "new": (peft_alone(wider, world / "new"), tokenizer(OWN, NEW)),
        "template": (peft_alone(llama, world / "template"), tokenizer(OWN)),
        "copy": (peft_alone(llama, world / "copy"), tokenizer()),
        "plain": (peft_alone(llama, world / "plain"), tokenizer()),
        None: (llama, tokenizer()),
    }
    assert answers == [alone(*alones[name], prompt) for prompt, name in lines]
    # the tokenizers tell, so that the wrong one would be seen
    assert alone(*alones["template"], prompts[1]) != alone(*alones["plain"], prompts[1])


def test_the_bases_on_request(world: Path, llama: Any) -> None:
    code, output, answers = generate(
        world, [("5 6 11 12 13 14", "template"), ("5 6 11 12 13 14", "broken")], "--base-tokenizer",
        adapters=("template", "broken"),
    )  # fmt: skip
    assert code == 0, output
    assert answers == [alone(peft_alone(llama, world / "plain"), tokenizer(), "5 6 11 12 13 14")] * 2


@pytest.mark.parametrize(
    ("entry", "options", "wanted"),
    [
        ({"template": 1, "plain": 1}, [], "prompt 1: adapters 'template' and 'plain' have different chat templates"),
        ({"ids": ["copy", "template"]}, [], "adapters 'copy' and 'template' have different chat templates"),
        ({"new": 1, "plain": 0.5}, ["--raw"], "'new' and 'plain' have different tokenizers"),
        ({"template": 1, "plain": 1}, ["--raw"], ""),
        ({"template": 1, "plain": 1}, ["--base-tokenizer"], ""),
        ({"template": 1, "plain": 0}, [], ""),
        ({"copy": 1, "plain": 1, "pad": 1}, [], ""),
    ],
)
def test_mixes(world: Path, entry: Any, options: list[str], wanted: str) -> None:
    adapters = tuple(entry.get("ids", entry))
    code, output, answers = generate(world, [("5 6", entry)], *options, adapters=adapters)
    if wanted:
        assert code == 2 and wanted in output and "--base-tokenizer" in output
    else:
        assert code == 0 and len(answers) == 1, output


def test_one_that_cannot_be_read(world: Path) -> None:
    code, output, _ = generate(world, [("5", "broken")], adapters=("broken",))
    assert code == 2 and "adapter 'broken' brings a tokenizer (tokenizer.json) that cannot be read" in output


def test_no_template(world: Path, llama: Any, tmp_path: Path) -> None:
    """A base without a template: adapters with their own are served, others and the base ask for --raw."""
    base = str(save(llama, tmp_path / "base", template=None))
    code, output, answers = generate(world, [("5", "template")], "--model", base, adapters=("template",))
    assert code == 0 and len(answers) == 1, output
    code, output, _ = generate(world, [("5", "template"), ("5", None)], "--model", base, adapters=("template",))
    assert code == 2 and "prompt 2: the tokenizer has no chat template: pass --raw" in output


def test_a_template_that_refuses(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "plain", tmp_path / "strict")
    (tmp_path / "strict" / "chat_template.jinja").write_text("{{ raise_exception('no such role') }}")
    code, output, _ = generate(world, [("5", "strict")], adapters=(str(tmp_path / "strict"),))
    assert code == 2 and "prompt 1: no such role" in output


def merge(world: Path, out: Path, *given: str) -> tuple[int, str]:
    adapters = [part for name in given if name[0] != "-" for part in ("--adapter", str(world / name))]
    result = CliRunner().invoke(app, ["merge", str(out), *adapters, *(name for name in given if name[0] == "-")])
    return result.exit_code, " ".join(result.output.split())


def test_merges(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "template", tmp_path / "same")
    code, output = merge(world, tmp_path / "a", "template", str(tmp_path / "same"))
    assert code == 0 and (tmp_path / "a" / "chat_template.jinja").read_text() == OWN, output
    code, output = merge(world, tmp_path / "b", "template", "plain")
    assert code == 0 and "template brings a tokenizer and others do not" in output
    assert sorted(file.name for file in (tmp_path / "b").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    (tmp_path / "same" / "chat_template.jinja").write_text("another")
    for pair in (("template", str(tmp_path / "same")), ("template", "copy"), ("template", "pad")):
        code, output = merge(world, tmp_path / "c", *pair)
        assert code == 2 and "chat template" in output and "--base-tokenizer" in output, output
        assert not (tmp_path / "c").exists()
    code, output = merge(world, tmp_path / "c", "template", str(tmp_path / "same"), "--base-tokenizer")
    assert code == 0 and not (tmp_path / "c" / "chat_template.jinja").exists()
    # what stays from an earlier merge would be another adapter's
    code, output = merge(world, tmp_path / "a", "plain", "--force")
    assert code == 0 and not (tmp_path / "a" / "chat_template.jinja").exists(), output


def test_copies_saved_with_other_padding_are_the_same(world: Path, tmp_path: Path) -> None:
    code, output = merge(world, tmp_path / "out", "copy", "pad")
    assert code == 0 and "brings the adapters' tokenizer" in output, output


def test_inspect_says_it(world: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(world / "template")])
    assert "brings   a tokenizer or chat template (chat_template.jinja)" in result.output, result.output


def test_peft_takes_the_merged_folder(world: Path, tmp_path: Path) -> None:
    assert merge(world, tmp_path / "out", "copy", "pad")[0] == 0
    assert peft.PeftConfig.from_pretrained(str(tmp_path / "out")).peft_type == "LORA"
