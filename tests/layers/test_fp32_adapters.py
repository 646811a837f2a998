"""Adapters in fp32 on a model in bf16: PEFT keeps them so by default, and `dtype=torch.float32` does."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch
from conftest import build, inputs_for, logits, make_adapter, peft_alone

import mlora

KINDS = {
    "one": {"r": 1},
    "eight": {"r": 8},
    "dora": {"r": 4, "use_dora": True},
    "rs": {"r": 16, "use_rslora": True},
}


def test_rows_are_as_near_as_pefts(tmp_path: Path) -> None:
    """Against PEFT in fp32, beside PEFT on the model in bf16; rounded to that, adapters are further off."""
    base, batch = build("mlp", torch.bfloat16), inputs_for("mlp", 48, dtype=torch.bfloat16)
    wide, narrow = copy.deepcopy(base), copy.deepcopy(base)
    runtimes = mlora.patch(wide, memory=1 << 20, dtype=torch.float32), mlora.patch(narrow, memory=1 << 20)
    ratios: dict[torch.nn.Module, list[float]] = {wide: [], narrow: []}
    for seed, (name, options) in enumerate(KINDS.items()):
        targets = ["up", "blocks.0", "blocks.2", "head"]
        folder = make_adapter(tmp_path / name, base, seed, target_modules=targets, lora_alpha=8, **options)
        exact = logits(peft_alone(copy.deepcopy(base).float(), folder), {"x": batch["x"].float()}).double()
        theirs = (logits(peft_alone(base, folder), batch).double() - exact).norm()
        for runtime, (model, found) in zip(runtimes, ratios.items(), strict=True):
            runtime.load_adapter(folder, name)
            ours = logits(model, batch, adapter_names=[name] * 48).double()
            found.append(float((ours - exact).norm() / theirs))
    mean, rounded = (math.exp(sum(map(math.log, found)) / len(found)) for found in ratios.values())
    assert mean <= 1 and max(ratios[wide]) <= 1.05, ratios[wide]
    assert rounded > 1.1
