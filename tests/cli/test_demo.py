"""`mlora demo`, on a tiny model: every row with its adapter, and the table of what it is compared with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import mlora.cli.chat
import mlora.cli.demo
import mlora.cli.models
import mlora.cli.timing
from mlora.cli import app


class Tokenizer:
    """Writes tokens as numbers."""

    def batch_decode(self, rows: torch.Tensor, skip_special_tokens: bool) -> list[str]:
        return [f"tokens {' '.join(map(str, row.tolist()))}" for row in rows]


class Inputs(dict):
    def to(self, device: Any) -> Inputs:
        return self


def encode(tokenizer: Any, prompts: list[str], raw: bool = False) -> Inputs:
    """The same five tokens for the same prompt."""
    ids = torch.stack([torch.randint(2, 67, (5,), generator=torch.Generator().manual_seed(len(p))) for p in prompts])
    return Inputs(input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch, llama: Any, folders: dict[str, Path], tmp_path: Path) -> Any:
    """Runs it on the adapters of those names; gives its code and output."""
    monkeypatch.setattr(mlora.cli.models, "load_tokenizer", lambda name: Tokenizer())
    monkeypatch.setattr(mlora.cli.models, "load_model", lambda name: copy.deepcopy(llama))
    for module in (mlora.cli.chat, mlora.cli.timing):
        monkeypatch.setattr(module, "encode", encode)
    monkeypatch.setattr(mlora.cli.timing, "TIMED_TOKENS", 2)
    monkeypatch.setenv("COLUMNS", "160")

    def run(*names: str, options: tuple[str, ...] = ()) -> tuple[int, str]:
        for name in names:
            (tmp_path / name).symlink_to(folders[name], target_is_directory=True)
        result = CliRunner().invoke(app, ["demo", "--adapters", str(tmp_path), "--max-new-tokens", "3", *options])
        return result.exit_code, " ".join(result.output.split())

    return run


def test_rows_and_table(demo: Any, llama: Any, folders: dict[str, Path]) -> None:
    code, output = demo("dora1", "r3", "rs16")
    assert code == 0, output
    runtime = mlora.patch(copy.deepcopy(llama))
    for name in ("dora1", "r3", "rs16"):
        runtime.load_adapter(folders[name], name)
    entries = [None, "dora1", "r3", "rs16", {"dora1": 0.5, "r3": 0.5}]
    prompts = [mlora.cli.demo.PROMPTS[row % len(mlora.cli.demo.PROMPTS)] for row in range(len(entries))]
    for prompt, entry in zip(prompts, entries, strict=True):
        answer = mlora.cli.chat.complete(runtime.model, Tokenizer(), [prompt], [entry], 3)[0]

        label = mlora.cli.demo.label(entry).replace("0.5 dora1 + 0.5 r3", "0.5 dora1 +")
        assert f"│ {label} │ {prompt} │ {answer} │" in output
    for line in (
        "bare model", "mlora, no adapter", "mlora, one adapter (dora1)", "mlora, 3 adapters mixed",
        "mlora, same rows, one adapter after another", "PEFT's mixed batch, 2 adapters",
    ):  # fmt: skip
        assert f"│ {line} │" in output
    assert "PEFT cannot mix dora1 (" in output and "its line uses r3, rs16 instead" in output


def test_rows_alone(demo: Any) -> None:
    code, output = demo("r3", options=("--no-table",))
    assert code == 0 and "│ r3 │" in output and "bare model" not in output, output


def test_no_adapters(demo: Any) -> None:
    code, output = demo()
    assert code == 1 and "mlora: error: no adapters in" in output
