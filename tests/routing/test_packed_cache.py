"""Packed adapters on disk: what is found there is what lowering makes, or it is not found."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build, inputs_for, logits, make_adapter, served

import mlora
from mlora import errors
from mlora.routing import kept
from mlora.routing.registry import Registry

CONFIGS: dict[str, dict[str, Any]] = {
    "dora": {"r": 2, "use_dora": True},
    "pissa": {"r": 2, "init_lora_weights": "pissa"},
    "lora": {"r": 3},
}
TARGETS = ["q_proj", "down_proj"]


class World:
    def __init__(self, root: Path) -> None:
        self.base, self.batch = build("llama"), inputs_for("llama", 3)
        self.folders = {
            name: make_adapter(root / name, self.base, seed, target_modules=TARGETS, **config)
            for seed, (name, config) in enumerate(CONFIGS.items())
        }
        lokr(root / "lokr", self.base)
        self.folders["lokr"] = root / "lokr"
        model = served(self.base, self.folders, memory=1 << 22)
        self.wanted = {name: logits(model, self.batch, adapter_names=name) for name in self.folders}
        self.infos = model.mlora.adapters

    def runtime(self, cache: Path, base: Any = None, **options: Any) -> mlora.Runtime:
        """With all of them registered."""
        runtime = served(base or self.base, {}, memory=1 << 22, packed_cache=cache, **options).mlora
        for name, folder in self.folders.items():
            runtime.register_adapter(folder, name)
        return runtime

    def check(self, runtime: mlora.Runtime) -> None:
        """To the bit."""
        for name, wanted in self.wanted.items():
            assert logits(runtime.model, self.batch, adapter_names=name).equal(wanted), name
            info = runtime.adapter(name)
            assert info == self.infos[name], name


def lokr(folder: Path, base: Any) -> None:
    from peft import LoKrConfig, get_peft_model

    wrapped = get_peft_model(build("llama"), LoKrConfig(r=2, alpha=4, target_modules=TARGETS, decompose_both=True))
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    wrapped.save_pretrained(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The types of what is lowered."""
    found: list[str] = []
    lower = Registry.lowered

    def noting(registry: Registry, adapter: Any, *args: Any, **options: Any) -> Any:
        found.append(adapter.source.rpartition("/")[2])
        return lower(registry, adapter, *args, **options)

    monkeypatch.setattr(Registry, "lowered", noting)
    return found


DEAR = ["dora", "lokr", "pissa"]


def test_what_takes_long_is_lowered_once(world: World, tmp_path: Path, lowered: list[str]) -> None:
    """A plain LoRA's files are as good as its blob."""
    world.check(world.runtime(tmp_path / "cache"))
    assert sorted(lowered) == sorted([*DEAR, "lora"])
    assert len(list((tmp_path / "cache").iterdir())) == 3
    lowered.clear()
    again = world.runtime(tmp_path / "cache")
    world.check(again)
    assert lowered == ["lora"]
    # Merges and copies need its tensors, which are read again.
    merged = served(world.base, world.folders, memory=1 << 22)
    for one in (again, merged.mlora):
        one.add_weighted_adapter(["dora", "lora"], [0.5, 0.5], "both")
    both = [logits(one.model, world.batch, adapter_names="both") for one in (again, merged.mlora)]
    assert both[0].equal(both[1])
    again.save_adapter("dora", tmp_path / "saved")
    assert mlora.Adapter.from_pretrained(tmp_path / "saved").peft_type == "LORA"


def test_dropped_ones_come_back_from_it(world: World, tmp_path: Path, lowered: list[str]) -> None:
    runtime = world.runtime(tmp_path, host_memory=30000)
    for _ in range(3):
        world.check(runtime)
    assert runtime.host.drops > 4 and sorted(set(lowered)) == sorted([*DEAR, "lora"])
    assert [name for name in lowered if name != "lora"] == [name for name in CONFIGS if name != "lora"] + ["lokr"]


@pytest.mark.parametrize("how", ["cut", "short", "flipped", "header", "empty", "longer", "magic"])
def test_a_damaged_entry_is_none(world: World, tmp_path: Path, lowered: list[str], how: str) -> None:
    """It is made again, and whole."""
    world.check(world.runtime(tmp_path))
    entries = {entry: entry.read_bytes() for entry in tmp_path.iterdir()}
    for entry, data in entries.items():
        middle = len(data) // 2
        entry.write_bytes(
            {
                "cut": data[: len(data) // 3],
                "short": data[:-1],
                "flipped": data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :],
                "header": data[:40] + b"}" + data[41:],
                "empty": b"",
                "longer": data + b"\0",
                "magic": b"x" + data[1:],
            }[how]
        )
    lowered.clear()
    runtime = world.runtime(tmp_path)
    world.check(runtime)
    assert sorted(lowered) == sorted([*DEAR, "lora"])
    assert {entry: entry.read_bytes() for entry in tmp_path.iterdir()} == entries
    assert runtime.host.used == sum(packed.held for packed in runtime._store._adapters.values())


def test_a_write_that_was_broken_off_leaves_no_entry(world: World, tmp_path: Path) -> None:
    """The process is killed before the entry has its name, and before it is whole."""
    code = """
import os, sys
sys.path[:0] = {path!r}
from pathlib import Path
import mlora
from conftest import build, served
from mlora.arena import cache
{stop}
runtime = served(build("llama"), {{}}, memory=1 << 22, packed_cache={folder!r}).mlora
runtime.load_adapter({adapter!r}, "dora")
"""
    stops = {
        "before its name": "os.replace = lambda *_: os._exit(9)",
        "half": "write = cache._write\ncache._write = lambda file, part: (write(file, part[:30]), os._exit(9))",
    }
    for name, stop in stops.items():
        text = code.format(path=sys.path, stop=stop, folder=str(tmp_path), adapter=str(world.folders["dora"]))
        assert subprocess.run([sys.executable, "-c", text], timeout=300, capture_output=True).returncode == 9, name
    assert [entry.name.startswith("half-") for entry in tmp_path.iterdir()] == [True, True]
    world.check(world.runtime(tmp_path))


def test_another_base_another_version_and_other_options_are_others(
    world: World, tmp_path: Path, lowered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    world.check(world.runtime(tmp_path))
    other = build("llama")
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.mul_(1.5)
    fresh = served(other, world.folders, memory=1 << 22)
    lowered.clear()
    runtime = world.runtime(tmp_path, other)
    for name in ("dora", "pissa", "lokr"):
        got, wanted = (logits(one, world.batch, adapter_names=name) for one in (runtime.model, fresh))
        assert got.equal(wanted), name
    assert lowered == ["dora", "pissa"]  # which read the weights of the base; LoKr does not
    lowered.clear()
    monkeypatch.setattr(kept, "_code", lambda: "of another version")
    world.check(world.runtime(tmp_path))
    assert sorted(lowered) == sorted([*DEAR, "lora"])
    monkeypatch.undo()
    runtime = world.runtime(tmp_path, dtype=torch.bfloat16)
    assert runtime.adapter("lokr").location == "files"
    runtime.prefetch("lokr").result(60)
    assert runtime.adapter("lokr").bytes == world.infos["lokr"].bytes // 2


def test_weights_that_are_written_to_are_looked_at_again(world: World, tmp_path: Path) -> None:
    world.check(world.runtime(tmp_path))
    runtime = world.runtime(tmp_path)
    logits(runtime.model, world.batch, adapter_names="dora")
    weight = runtime.model.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        weight.mul_(1.5)
    runtime.load_adapter(world.folders["dora"], "new")
    fresh = served(world.base, {}, memory=1 << 22)
    with torch.no_grad():
        fresh.model.layers[0].self_attn.q_proj.weight.mul_(1.5)
    fresh.mlora.load_adapter(world.folders["dora"], "new")
    assert logits(runtime.model, world.batch, adapter_names="new").equal(
        logits(fresh, world.batch, adapter_names="new")
    )


def test_files_that_changed_are_seen(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "dora"
    shutil.copytree(world.folders["dora"], folder)
    runtime = world.runtime(tmp_path / "cache", host_memory=30000)
    runtime.register_adapter(folder, "own")
    assert logits(runtime.model, world.batch, adapter_names="own").equal(world.wanted["dora"])
    for name in world.folders:
        logits(runtime.model, world.batch, adapter_names=name)
    assert runtime.adapter("own").location == "files"
    shutil.copy(world.folders["pissa"] / "adapter_model.safetensors", folder)
    with pytest.raises(errors.AdapterError, match=r"'own'.*have changed"):
        logits(runtime.model, world.batch, adapter_names="own")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to(world: World, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.warns(UserWarning, match="nothing is kept"):
        world.check(world.runtime(tmp_path))


def test_a_folder_that_is_a_file(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="nothing is kept in packed_cache"):
        world.check(world.runtime(tmp_path / "file"))
