"""The default size of the arena: what is free, what a container leaves, and pages that are taken only when used."""

from __future__ import annotations

import mmap
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import inputs_for, logits
from torch import nn

import mlora
from mlora import errors
from mlora.arena import memory
from mlora.arena.memory import Room, default_room, free_memory
from mlora.arena.store import Store
from mlora.lowering import Delta

CPU = torch.device("cpu")
MIB = 1 << 20


def system(root: Path, available: int, files: dict[str, Any], groups: str = "0::/") -> Path:
    files = {
        "proc/meminfo": f"MemTotal: 99 kB\nMemAvailable: {available >> 10} kB\n",
        "proc/self/cgroup": groups,
        **files,
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(str(content))
    return root


V2 = "sys/fs/cgroup/"
V1 = "sys/fs/cgroup/memory/"


@pytest.mark.parametrize(
    "files, groups, free",
    [
        ({}, "", 900),
        ({f"{V2}memory.max": "max", f"{V2}memory.current": 5}, "0::/", 900),
        ({f"{V2}memory.max": 500, f"{V2}memory.current": 300, f"{V2}memory.stat": "inactive_file 40"}, "0::/", 240),
        # A limit of a group above its own.
        (
            {
                f"{V2}pod/memory.max": 600, f"{V2}pod/memory.current": 100, f"{V2}pod/memory.stat": "anon 1",
                f"{V2}pod/one/memory.max": "max", f"{V2}pod/one/memory.current": 7,
            },
            "0::/pod/one", 500,
        ),
        # Version 1; inside of a container the path is the host's, and the tree starts at the container's own group.
        (
            {f"{V1}memory.limit_in_bytes": 400, f"{V1}memory.usage_in_bytes": 150,
             f"{V1}memory.stat": "inactive_file 9\ntotal_inactive_file 50"},
            "5:cpu,cpuacct:/docker/ab\n4:memory:/docker/ab\n0::/docker/ab", 300,
        ),
        (
            {f"{V1}memory.limit_in_bytes": 400, f"{V1}memory.usage_in_bytes": 500, f"{V1}memory.stat": ""},
            "4:memory:/", 0,
        ),
    ],
    ids=["none", "unlimited", "container", "pod", "version 1", "over"],
)  # fmt: skip
def test_what_is_free(tmp_path: Path, files: dict[str, Any], groups: str, free: int) -> None:
    scaled = {
        name: "\n".join(
            " ".join(str(int(w) * MIB) if w.isdigit() else w for w in line.split()) for line in str(text).splitlines()
        )
        for name, text in files.items()
    }
    seen, limit = free_memory(system(tmp_path, 900 * MIB, scaled, groups))
    assert seen == free * MIB
    assert ("machine" in limit) == (free == 900)


def test_an_address_space_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    monkeypatch.setattr(resource, "getrlimit", lambda what: (pages * mmap.PAGESIZE + 10 * MIB, -1))
    free, limit = free_memory()
    assert free <= 10 * MIB and "address space" in limit


@pytest.mark.parametrize(
    "free, weights, size, ready",
    [
        (4000 * MIB, 10 * MIB, 1000 * MIB, 64 * MIB),
        (4000 * MIB, 1000 * MIB, 1000 * MIB, 500 * MIB),
        (4000 * MIB, 3000 * MIB, 1500 * MIB, 1500 * MIB),
        (4000 * MIB, 9000 * MIB, 2000 * MIB, 2000 * MIB),
        (100 * MIB, 10 * MIB, 50 * MIB, 50 * MIB),
        (0, 10 * MIB, 1, 1),
    ],
)
def test_the_default_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, free: int, weights: int, size: int, ready: int
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: (free, "the machine had available"))
    room = default_room(weights, torch.bfloat16, CPU)
    assert (room.size, room.ready) == (size, ready) and f"{free:,}" in room.why


@pytest.mark.parametrize(
    "free, weights, size",
    [
        (2000 * MIB, 10 * MIB, 500 * MIB),
        (64000 * MIB, 10 * MIB, ((1 << 31) - 1) * 2),  # kernels with 64-bit offsets begin there
        (64000 * MIB, 14000 * MIB, 7000 * MIB),
    ],
)
def test_the_default_on_a_gpu(monkeypatch: pytest.MonkeyPatch, free: int, weights: int, size: int) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80000 * MIB))
    room = default_room(weights, torch.bfloat16, torch.device("cuda:0"))
    assert (room.size, room.ready) == (size, size) and "cuda:0 had free" in room.why


def touched() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_pages_are_taken_when_they_are_used_and_given_back() -> None:
    """In a process of its own, whose memory nothing else takes or gives back."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    code = "import test_memory; test_memory.take_and_give_back()"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def take_and_give_back() -> None:
    size, ready = free_memory()[0] // 2, 20 * MIB
    big = Delta(torch.ones(1, 4 * MIB), torch.ones(1, 1))  # 16 MiB
    before = touched()
    store = Store([CPU], torch.float32, [Room(size, "", ready)], [0], 8)
    assert store.spaces[0].capacity > size - 64 and touched() - before < 8 * MIB
    for name in "abcd":
        store.register(name, store.pack({0: big}, name))
    assert [store[name].resident for name in "abcd"] == [True, False, False, False], "no more than what is ready"
    blobs = touched()
    store.acquire("abcd")
    assert touched() - blobs > 40 * MIB
    store.release("abcd")
    for name in "bcd":
        store.unregister(name)
    assert touched() - before < 16 * MIB + ready + 8 * MIB, "blobs and pages of those that left are gone"
    a = store["a"]
    assert bool((store.spaces[0].place(a.offsets[0], 4 * MIB) == 1).all())
    store.unregister("a")
    assert touched() - before > 12 * MIB, "what is ready stays"


def test_what_cannot_be_reserved_is_an_error_that_says_how_to_ask_for_less() -> None:
    for size in (1 << 60, 1 << 70):
        with pytest.raises(errors.CapacityError, match=rf"{size:,} bytes .*patch\(memory=...\)"):
            mlora.patch(nn.Sequential(nn.Linear(2, 2)), memory=size)


def test_a_batch_of_more_adapters_than_half_of_the_model(
    model: Any, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default the arena serves what the machine holds; `memory=` still says how much."""
    monkeypatch.setattr(memory, "_LEAST", 1)
    runtime = mlora.patch(model)
    names = [f"{name}{turn}" for turn in range(8) for name in folders]
    for name in names:
        runtime.load_adapter(folders[name[:-1]], name)
    where = [info.location for info in runtime.adapters.values()]
    assert where[0] == "device" and where[-1] == "host"
    batch = inputs_for("llama", len(names))
    got = logits(model, batch, adapter_names=names)
    for row in (0, len(names) - 1):
        alone = logits(model, {key: value[row : row + 1] for key, value in batch.items()}, adapter_names=names[row])
        torch.testing.assert_close(got[row : row + 1], alone, rtol=1e-5, atol=1e-5)
    assert "the machine had available" in runtime.status() or "had left" in runtime.status()
    mlora.unpatch(model)
    fixed = mlora.patch(model, memory=1 << 16)
    assert (
        fixed._store.spaces[0].capacity == 1 << 16
        and "65,536 bytes" in fixed.status()
        and "patch(memory=...)" in fixed.status()
    )
