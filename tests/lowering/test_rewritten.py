"""Adapters whose initialisation took a part out of the base, unconverted, on the base as it was."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import assert_close, build, inputs_for, logits, peft_alone, refused, row_of, state_hash
from torch import Tensor, nn

import mlora
from mlora import errors
from mlora.lowering import Names, untouched

LORA = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj", "down_proj"]}
CASES = {
    "pissa": {**LORA, "init_lora_weights": "pissa"},
    "olora": {**LORA, "init_lora_weights": "olora", "target_modules": ["q_proj", "up_proj"]},
    "patterns": {
        **LORA, "init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"v_proj": 5},
        "alpha_pattern": {r".*\.1\..*q_proj": 2},
    },
}  # fmt: skip


def saved(folder: Path, base: Any, step: float, seed: int = 1, **config: Any) -> Path:
    """As PEFT saves it unconverted, `step` times the size of each tensor away from where it started."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(step * parameter.norm() / math.sqrt(parameter.numel()) * noise)
        model.save_pretrained(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["init_lora_weights"] == config["init_lora_weights"]
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, base = tmp_path_factory.mktemp("rewritten"), build("llama")
    return {name: saved(root / name, base, 0.5, seed, **how) for seed, (name, how) in enumerate(CASES.items())}


@pytest.fixture
def loaded(llama: Any, made: dict[str, Path]) -> Any:
    model = copy.deepcopy(llama)
    runtime = mlora.patch(model, memory=4 << 20)
    for name, folder in made.items():
        runtime.load_adapter(folder, name)
    return model


def test_several_beside_each_other_leave_the_base_alone(llama: Any, made: dict[str, Path], loaded: Any) -> None:
    names = [*made, None, *reversed(made)]
    batch = inputs_for("llama", len(names))
    got = logits(loaded, batch, adapter_names=names)
    for row, name in enumerate(names):
        oracle = llama if name is None else peft_alone(llama, made[name])
        assert_close(got[row : row + 1], logits(oracle, row_of(batch, row)))
    assert state_hash(loaded) == state_hash(llama)


def test_mixes_and_folding(llama: Any, made: dict[str, Path], loaded: Any, batch: dict[str, Tensor]) -> None:
    mix = {"pissa": 0.5, "olora": -0.7, "patterns": 0.4}
    want = copy.deepcopy(llama)
    state = want.state_dict()
    for name, weight in mix.items():
        merged = peft_alone(llama, made[name]).merge_and_unload().state_dict()
        for key, value in llama.state_dict().items():
            state[key] = state[key] + weight * (merged[key] - value)
    want.load_state_dict(state)
    assert_close(logits(loaded, batch, adapter_names=mix), logits(want, batch))
    loaded.mlora.merge_adapter(mix)
    assert_close(logits(loaded, batch), logits(want, batch))
    loaded.mlora.unmerge_adapter()
    assert state_hash(loaded) == state_hash(llama)


@pytest.mark.parametrize("name", CASES)
def test_saved_as_a_lora_that_leaves_pefts_base_alone(
    llama: Any, made: dict[str, Path], loaded: Any, batch: dict[str, Tensor], tmp_path: Path, name: str
) -> None:
    loaded.mlora.save_adapter(name, tmp_path)
    again = peft_alone(llama, tmp_path)
    assert_close(logits(again, batch), logits(peft_alone(llama, made[name]), batch))
    with again.disable_adapter():
        assert torch.equal(logits(again, batch), logits(llama, batch))
    info = loaded.mlora.load_adapter(tmp_path, "again")
    assert info.ranks == loaded.mlora.adapters[name].ranks == ((6, 10) if name == "patterns" else (6,))
    assert torch.equal(logits(loaded, batch, adapter_names="again"), logits(loaded, batch, adapter_names=name))


def test_one_that_was_not_trained_changes_nothing(llama: Any, model: Any, tmp_path: Path) -> None:
    """Not within rounding: its factors are the very ones that were taken out."""
    folder = saved(tmp_path / "fresh", llama, 0.0, **CASES["pissa"])
    assert mlora.patch(model, memory=1 << 20).load_adapter(folder).zero


def test_signs_of_singular_vectors_cancel(llama: Any, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another library may give other ones; B0 A0 is the same."""
    adapter = mlora.Adapter.from_pretrained(made["pissa"])
    runtime = mlora.patch(copy.deepcopy(llama), memory=1 << 20)
    names, svd = Names(None, runtime.bases), torch.linalg.svd

    def flipped(weight: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = svd(weight, **options)
        sign = torch.where(torch.arange(len(s)) % 2 == 0, -1.0, 1.0)
        return u * sign, s, vh * sign[:, None]

    here = untouched(adapter, names).tensors
    monkeypatch.setattr(torch.linalg, "svd", flipped)
    there = untouched(adapter, names).tensors
    assert here.keys() == there.keys() and all(torch.equal(here[key], there[key]) for key in here)


def test_bf16_loses_less_than_pefts_own_conversion(llama: Any, tmp_path: Path) -> None:
    """As training leaves it: near where it started. PEFT's factors are large, and what is left of them small."""
    base = copy.deepcopy(llama).to(torch.bfloat16).float()
    how = {**CASES["pissa"], "r": 12}
    folder = saved(tmp_path / "near", base, 0.03, **how)
    adapter = mlora.Adapter.from_pretrained(folder)
    runtime = mlora.patch(copy.deepcopy(base), memory=1 << 20)
    ours = untouched(adapter, Names(None, runtime.bases)).tensors
    key = "model.layers.0.self_attn.q_proj.lora_{}.weight"
    a, b = (adapter.tensors[key.format(part)].double() for part in "AB")
    weight = base.get_submodule("model.layers.0.self_attn.q_proj").weight.detach()
    u, s, vh = torch.linalg.svd(weight)
    root = (s[:12] * 12 / 7).sqrt()
    a0, b0 = (root[:, None] * vh[:12]).double(), (u[:, :12] * root).double()
    want = b @ a - b0 @ a0

    def error(b: Tensor, a: Tensor) -> float:
        return ((b.bfloat16().double() @ a.bfloat16().double() - want).norm() / want.norm()).item()

    mine = error(ours[key.format("B")], ours[key.format("A")])
    assert mine < 0.01 < 5 * mine < error(torch.cat([b, -b0], dim=1), torch.cat([a, a0]))


def test_conv1d_as_peft_takes_it(tmp_path: Path) -> None:
    base, batch = build("gpt2"), inputs_for("gpt2", 3)
    how = {"r": 3, "target_modules": ["attn.c_proj"], "fan_in_fan_out": True}
    folders = {init: saved(tmp_path / init, base, 0.5, init_lora_weights=init, **how) for init in ("pissa", "olora")}
    model = copy.deepcopy(base)
    runtime = mlora.patch(model, memory=1 << 20)
    for init, folder in folders.items():
        runtime.load_adapter(folder, init)
        assert_close(logits(model, batch, adapter_names=init), logits(peft_alone(base, folder), batch))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 32), nn.Linear(32, 32)
        self.down.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


def quantized() -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    quantize_(model, Int8WeightOnlyConfig())
    return model


@pytest.mark.parametrize(
    ("dense", "make", "target", "words"),
    (
        (Tied, Tied, "up", ("down", "they are one")),
        (lambda: nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), quantized, "0", ("quantized",)),
    ),
    ids=("tied", "quantized"),
)
def test_weights_of_which_no_part_can_be_taken_for_one_row(
    dense: Callable[[], nn.Module], make: Callable[[], nn.Module], target: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    folder = saved(tmp_path / "a", dense(), 0.1, r=2, init_lora_weights="pissa", target_modules=[target])
    model = make()
    mlora.patch(model, memory=1 << 20)
    with pytest.raises(errors.UnsupportedAdapterError) as caught:
        model.mlora.load_adapter(folder)
    assert all(word in str(caught.value) for word in ("'pissa'", "conversion", *words)), caught.value


def test_it_is_served_and_not_trained(loaded: Any, made: dict[str, Path]) -> None:
    with refused(loaded, errors.UnsupportedAdapterError, "'olora'", "not trained"):
        loaded.mlora.load_adapter(made["olora"], "trained", is_trainable=True)


def test_a_live_model_whose_base_is_rewritten_already(llama: Any, made: dict[str, Path]) -> None:
    live = peft_alone(llama, made["pissa"])
    with pytest.raises(errors.UnsupportedAdapterError, match="rewritten its base weights"):
        mlora.patch(live, memory=1 << 20)
