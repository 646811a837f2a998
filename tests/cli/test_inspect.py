"""`mlora inspect`: what an adapter is, and whether it is served exactly, approximately or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
from conftest import build
from typer.testing import CliRunner

from mlora.cli import app


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    import mlora.cli.models

    monkeypatch.setattr(mlora.cli.models, "load_model", lambda name, device, dtype: build("llama"))


def inspect(config: Any, folder: Path, *options: str) -> tuple[int, str]:
    peft.get_peft_model(build("llama"), config).save_pretrained(folder)
    result = CliRunner().invoke(app, ["inspect", str(folder), *options])
    return result.exit_code, result.output


TARGETS = ["q_proj", "down_proj"]


@pytest.mark.parametrize(
    ("config", "zero"),
    [
        (peft.LoraConfig(r=3, target_modules=TARGETS), True),  # never trained
        (peft.LoraConfig(r=3, lora_alpha=0, init_lora_weights=False, target_modules=TARGETS), True),
        (peft.LoraConfig(r=3, init_lora_weights=False, target_modules=TARGETS), False),
        (peft.LoraConfig(r=3, use_dora=True, init_lora_weights=False, target_modules=TARGETS), False),
        (peft.LoHaConfig(r=3, target_modules=TARGETS), True),
    ],
)
def test_an_adapter_that_changes_nothing_is_said_to(model: None, tmp_path: Path, config: Any, zero: bool) -> None:
    for options in ((), ("--model", "x")):
        code, output = inspect(config, tmp_path, *options)
        tells = bool(options) or config.peft_type == "LORA"  # of other types the base tells
        assert code == 0 and ("its delta is zero" in output) == (zero and tells), output
        assert ("lora_alpha=0" in output) == (getattr(config, "lora_alpha", 1) == 0)


@pytest.mark.parametrize(
    ("config", "options", "code", "wanted"),
    (
        (peft.LoraConfig(r=3, target_modules=TARGETS), (), 0, ("LORA", "4 (down_proj, q_proj)", "ranks    3", "yes")),
        (peft.LoHaConfig(r=3, target_modules=TARGETS), (), 0, ("LOHA", "4 (down_proj, q_proj)", "pass --model")),
        (peft.LoraConfig(r=3, target_modules=["lm_head"]), (), 0, ("LORA", "1 (lm_head)", "pass --model")),
        (peft.LoHaConfig(r=3, target_modules=TARGETS), ("--model", "x"), 0, ("exactly, on 4 modules of x",)),
        (peft.HiraConfig(r=3, target_modules=TARGETS), ("--model", "x"), 1, ("served   no", "HIRA", "full rank")),
        (peft.LilyConfig(target_modules=TARGETS), (), 1, ("served   no", "'LILY'", "other rows")),
        (peft.LoraConfig(init_lora_weights="olora", target_modules=TARGETS), (), 0, ("LORA", "pass --model")),
        (
            peft.LoraConfig(init_lora_weights="olora", target_modules=TARGETS),
            ("--model", "x"),
            0,
            ("exactly, on 4 modules of x", "its delta is zero"),
        ),
        (
            peft.FourierFTConfig(n_frequency=40, init_weights=False, target_modules=TARGETS),
            ("--model", "x", "--approximate", "2"),
            0,
            ("with an error of up to ", "model.layers.0.mlp.down_proj"),
        ),
        (
            peft.RandLoraConfig(r=3, save_projection=False, target_modules=TARGETS),
            ("--model", "x"),
            1,
            ("served   no", "save_projection=False"),
        ),
        (
            peft.LoraConfig(r=3, target_modules=TARGETS, trainable_token_indices=[1], modules_to_save=["norm"]),
            ("--model", "x"),
            0,
            ("exactly, on 10 modules of x",),
        ),
        (
            peft.LNTuningConfig(target_modules=["norm"]),
            ("--model", "x"),
            0,
            ("LN_TUNING", "exactly, on 1 modules of x"),
        ),
    ),
    ids=(
        "lora",
        "loha",
        "head",
        "loha-fits",
        "refused",
        "no-such-type",
        "rewriting",
        "rewriting-fits",
        "approximate",
        "option",
        "trained-parts",
        "norms",
    ),
)
def test_inspect(
    model: None, tmp_path: Path, config: Any, options: tuple[str, ...], code: int, wanted: tuple[str, ...]
) -> None:
    got, output = inspect(config, tmp_path, *options)
    assert got == code, output
    for part in wanted:
        assert part in output, output


def test_every_option_with_a_value_is_shown(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, target_modules=TARGETS, lora_alpha=0, rank_pattern={}, lora_dropout=0.0)
    _, output = inspect(config, tmp_path)
    for option in ("lora_alpha=0,", "lora_dropout=0.0,", "r=3,", "use_rslora=false"):
        assert option in output, output
    for option in ("rank_pattern", "layers_pattern"):
        assert option not in output


def test_approximate_takes_a_model(tmp_path: Path) -> None:
    code, output = inspect(peft.LoraConfig(r=3, target_modules=TARGETS), tmp_path, "--approximate", "2")
    assert code == 2 and "wanted --model beside it" in output


def test_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "sql").mkdir()
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "sqk")])
    output = " ".join(result.output.split())
    assert result.exit_code == 2 and f"did you mean '{tmp_path / 'sql'}'" in output and "--adapter" not in output, (
        output
    )


def test_ignore(tmp_path: Path) -> None:
    """What is not known is refused with the way out, and that is one."""
    code, output = inspect(peft.LoraConfig(r=3, target_modules=TARGETS), tmp_path)
    assert code == 0 and "ignored" not in output
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "sparkle": 3}))
    refused = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert refused.exit_code == 1 and "sparkle" in refused.output and "ignore" in refused.output
    taken = CliRunner().invoke(app, ["inspect", str(tmp_path), "--ignore", "sparkle"])
    assert taken.exit_code == 0 and "ignored  sparkle" in taken.output
