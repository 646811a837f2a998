"""`mlora demo`, on a tiny model: every row with its adapter, and the table of what it is compared with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_model import save, tokenizer
from typer.testing import CliRunner

import mlora.cli.demo
import mlora.cli.timing
from mlora.cli import app
from mlora.cli.chat import encode


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch, llama: Any, folders: dict[str, Path], tmp_path: Path) -> Any:
    """Runs it on the adapters of those names; gives its code and output."""
    base = str(save(llama, tmp_path / "model" / "base"))
    monkeypatch.setattr(mlora.cli.timing, "TIMED_TOKENS", 2)
    monkeypatch.setenv("COLUMNS", "160")

    def run(*names: str, options: tuple[str, ...] = ()) -> tuple[int, str]:
        for name in names:
            (tmp_path / name).symlink_to(folders[name], target_is_directory=True)
        result = CliRunner().invoke(
            app, ["demo", "--model", base, "--adapters", str(tmp_path), "--max-new-tokens", "3", *options]
        )
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
        ids = torch.tensor([encode(tokenizer(), prompt)])
        out = runtime.model.generate(ids, adapter_names=[entry], max_new_tokens=3, do_sample=False)
        answer = tokenizer().decode(out[0, ids.shape[1] :], skip_special_tokens=True)
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
