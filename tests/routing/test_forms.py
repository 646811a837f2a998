"""Adapters of one form: what is copied by the form of another is what lowering and packing make of it, to the bit. The
conformance suite asks that of every type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import HIDDEN, build, make_adapter, served
from safetensors.torch import load_file, save_file
from torch import Tensor

import mlora
from mlora import errors
from mlora.routing import forms
from mlora.routing.registry import Registry

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TARGETS = ["q_proj", "v_proj", "down_proj"]
ALORA = {"task_type": "CAUSAL_LM", "alora_invocation_tokens": [5, 9]}

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 3, "lora_alpha": 7},
    "rank 1": {"r": 1, "use_rslora": True},
    "ranks": {"r": 2, "rank_pattern": {"v_proj": 5}, "alpha_pattern": {"q_proj": 3}},
    "aLoRA": {"r": 2, **ALORA},
}
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16),
          (torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)]  # fmt: skip


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders of what is lowered."""
    found: list[str] = []
    lower = Registry.lowered

    def noting(registry: Registry, adapter: Any, *args: Any, **options: Any) -> Any:
        found.append(Path(adapter.source).name)
        return lower(registry, adapter, *args, **options)

    monkeypatch.setattr(Registry, "lowered", noting)
    return found


def two(root: Path, base: Any, dtype: torch.dtype = torch.float32, **config: Any) -> list[Path]:
    options = {"target_modules": TARGETS, **config}
    return [make_adapter(root / name, base, seed, dtype, **options) for seed, name in enumerate("ab")]


def runtime(base: Any, *folders: Path, **options: Any) -> mlora.Runtime:
    return served(base, {folder.name: folder for folder in folders}, memory=1 << 22, **options).mlora


def same(one: mlora.Runtime, other: mlora.Runtime, name: str) -> None:
    """All that they know of an adapter."""
    mine, its = (runtime._store[name] for runtime in (one, other))
    assert mine.blob.view(torch.uint8).equal(its.blob.view(torch.uint8))
    assert np.array_equal(mine.rows, its.rows) and np.array_equal(mine.touches, its.touches)
    for field in ("cuts", "heads", "trained", "rests", "invocation"):
        assert getattr(mine, field) == getattr(its, field), field
    assert one.adapter(name) == other.adapter(name)
    adapters = [runtime._registry.adapter(name) for runtime in (one, other)]
    assert adapters[0].config == adapters[1].config and adapters[0].source == adapters[1].source
    tensors = [list(adapter.tensors.items()) for adapter in adapters]
    assert [key for key, _ in tensors[0]] == [key for key, _ in tensors[1]]
    assert all(a.dtype == b.dtype and a.equal(b) for (_, a), (_, b) in zip(*tensors, strict=True))


def configure(folder: Path, **values: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | values))


def change(folder: Path, edit: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("bounded", [False, True], ids=["", "bounded"])
@pytest.mark.parametrize(("dtype", "stored"), DTYPES, ids=[f"{a}-{b}".replace("torch.", "") for a, b in DTYPES])
def test_the_second_is_what_it_is_alone(
    tmp_path: Path, lowered: list[str], dtype: torch.dtype, stored: torch.dtype, bounded: bool
) -> None:
    base = build("llama", dtype)
    options = {"host_memory": 1 << 22} if bounded else {}
    for name, config in CONFIGS.items():
        folders = two(tmp_path / name, base, stored, **config)
        lowered.clear()
        both = runtime(base, *folders, **options)
        assert lowered == ["a"], name
        same(both, runtime(base, folders[1], **options), "b")


def test_only_the_order_of_target_modules_may_differ(tmp_path: Path, lowered: list[str]) -> None:
    base = build("llama")
    folders = [*two(tmp_path, base, r=3), make_adapter(tmp_path / "c", base, 3, r=4, target_modules=TARGETS)]
    configure(folders[1], target_modules=TARGETS[::-1])
    runtime(base, *folders)
    assert lowered == ["a", "c"]
    for values in ({"lora_alpha": 9}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 2}}):
        configure(folders[1], **values)
        lowered.clear()
        both = runtime(base, *folders[:2])
        assert lowered == ["a", "b"]
        same(both, runtime(base, folders[1]), "b")
    with pytest.raises(errors.AdapterError, match="do not name"):
        configure(folders[1], target_modules=["k_proj"])
        runtime(base, *folders[:2])
    lowered.clear()
    both = runtime(base, folders[0])
    both.load_adapter(folders[0], "strict", strict=True)
    assert lowered == ["a", "a"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_values_are_checked(tmp_path: Path, value: float) -> None:
    """The error is the one of an adapter by itself; the memory of the blob is given back."""
    base = build("llama", torch.float16)
    folders = two(tmp_path, base, r=3)

    def edit(tensors: dict[str, Tensor]) -> None:
        next(iter(tensors.values()))[1, 2] = value

    change(folders[1], edit)
    told = []
    for first in ([], [folders[0]]):
        one = runtime(base, *first)
        used = one.host.used
        with pytest.raises(errors.AdapterError) as caught:
            one.load_adapter(folders[1], "b")
        told.append(str(caught.value))
        assert one.host.used == used
    assert told[0] == told[1]


def test_zeros(tmp_path: Path) -> None:
    """Also such as 16 bits round to zero, which the file has not."""
    base = build("llama", torch.float16)
    folders = [make_adapter(tmp_path / name, base, 0, r=3, target_modules=TARGETS) for name in "abcd"]

    def fill(value: float) -> Any:
        return lambda tensors: [t.fill_(value) for key, t in tensors.items() if "lora_B" in key]

    change(folders[0], fill(0.0))
    change(folders[1], fill(1e-20))
    change(folders[3], fill(0.0))
    both = runtime(base, *folders)
    assert [info.zero for info in both.adapters.values()] == [True, False, False, True]
    for folder in folders[1:]:
        same(both, runtime(base, folder), folder.name)


def test_factors_that_may_be_identities_are_looked_at(tmp_path: Path, lowered: list[str]) -> None:
    base = build("llama")
    folders = [make_adapter(tmp_path / name, base, 0, r=HIDDEN, target_modules=["q_proj"]) for name in "ab"]
    change(folders[0], lambda tensors: [t.copy_(torch.eye(HIDDEN)) for key, t in tensors.items() if "lora_B" in key])
    both = runtime(base, *folders)
    assert lowered == ["a", "b"]
    same(both, runtime(base, folders[1]), "b")


def test_few_are_remembered(tmp_path: Path, lowered: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    base = build("llama")
    folders = [make_adapter(tmp_path / f"r{r}", base, r, r=r, target_modules=TARGETS) for r in (2, 3, 4)]
    monkeypatch.setattr(forms, "_MOST", 2 * len(load_file(folders[0] / WEIGHTS)))
    one = runtime(base)
    for number, folder in enumerate((*folders, folders[1], folders[0], folders[1], folders[2])):
        one.load_adapter(folder, f"a{number}")
    assert lowered == ["r2", "r3", "r4", "r2", "r4"]
    assert len(one._tiers._forms._known) == 2
