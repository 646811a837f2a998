"""Tensors that stay in their file: whole, in slices, and what happens when the file does not stay."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mlora import Adapter, errors
from mlora.adapters import on_disk
from mlora.adapters.on_disk import OnDisk

WEIGHTS = "adapter_model.safetensors"
DOWN = "model.layers.0.mlp.down_proj.lora_A.weight"


@pytest.fixture
def folder(folders: dict[str, Path]) -> Path:
    return folders["rs16"]


def _left(folder: Path) -> OnDisk:
    tensors = Adapter.from_pretrained(folder, in_memory=False).tensors
    assert isinstance(tensors, OnDisk)
    return tensors


def test_it_is_what_reading_gives(folder: Path) -> None:
    left, read = Adapter.from_pretrained(folder, in_memory=False), Adapter.from_pretrained(folder)
    assert left.config == read.config and list(left.tensors) == list(read.tensors)
    assert all(torch.equal(left.tensors[key], tensor) for key, tensor in read.tensors.items())


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("spans", [((0, 5),), ((3, 16),), ((1, 4), (9, 12))])
def test_slices(folder: Path, dim: int, spans: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more is read than they have."""
    left = _left(folder)
    whole, read = left[DOWN], 0
    own = os.preadv

    def preadv(descriptor: int, buffers: list[Any], start: int) -> int:
        nonlocal read
        got = own(descriptor, buffers, start)
        read += got
        return got

    monkeypatch.setattr(on_disk.os, "preadv", preadv)
    got = left.narrowed({DOWN: (dim, spans)})[DOWN]
    assert torch.equal(got, torch.cat([whole.narrow(dim, a, b - a) for a, b in spans], dim))
    assert read == got.nbytes


def test_a_file_that_changes_is_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("adapter_config.json", WEIGHTS):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    left = _left(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file(tensors, tmp_path / "new", metadata={"format": "pt"})
    (tmp_path / "new").rename(tmp_path / WEIGHTS)
    with pytest.raises(errors.AdapterError, match="written to or replaced"):
        left[DOWN]
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(errors.AdapterError, match="No such file"):
        left[DOWN]


def test_numbers_are_checked_when_they_are_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    tensors = load_file(folder / WEIGHTS)
    key = f"base_model.model.{DOWN}"
    tensors[key][0, 3] = float("nan")
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    left = _left(tmp_path)
    with pytest.raises(errors.AdapterError, match="NaN"):
        left[DOWN]
    left.narrowed({DOWN: (1, ((4, 8),))})[DOWN]
