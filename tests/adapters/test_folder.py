"""Folders that others write to while they are read: one state of all files, or an error, and never a signal."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import mlora
from mlora import errors
from mlora.adapters import folder as reading

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write(folder: Path, generation: int, rank: int = 2) -> Path:
    """An adapter whose every value is `generation`, as its config says too."""
    folder.mkdir(exist_ok=True)
    tensors = {f"{i}.lora_{part}.weight": torch.full((rank, 64), float(generation)) for i in range(64) for part in "AB"}
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": generation}))
    return folder


def generation(folder: Path) -> int:
    """That which is read; config and weights agree on it."""
    adapter = mlora.Adapter.from_pretrained(folder)
    values = {value for tensor in adapter.tensors.values() for value in tensor.unique().tolist()}
    assert values == {float(adapter.config["lora_alpha"])}, f"a mixture: {values} and {adapter.config}"
    assert all(len(tensor) == adapter.config["r"] for tensor in adapter.tensors.values())
    return int(adapter.config["lora_alpha"])


@pytest.fixture
def new(tmp_path: Path) -> Path:
    return write(tmp_path / "new", 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An old one: its files are at rest."""
    folder = write(tmp_path / "folder", 1)
    time.sleep(2 * reading.MOMENT)
    return folder


def once(monkeypatch: pytest.MonkeyPatch, name: str, do: Callable[[], Any], at: int = 1) -> None:
    """Have `do` happen before the call number `at` of the os function `name`."""
    real, calls = getattr(os, name), []

    def hooked(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == at:
            do()
        return real(*args, **options)

    monkeypatch.setattr(reading.os, name, hooked)


def overwrite(new: Path, folder: Path, *names: str) -> None:
    for name in names:
        with (folder / name).open("r+b") as file:
            file.write((new / name).read_bytes())
            file.truncate()


def replace(new: Path, folder: Path, *names: str) -> None:
    for name in names:
        shutil.copy(new / name, folder / "half")
        (folder / "half").replace(folder / name)


# Of a load that is not disturbed, calls of preadv: the config, the header's length, the header, the tensors.
@pytest.mark.parametrize("at", (1, 2, 3, 4))
@pytest.mark.parametrize("change", (overwrite, replace))
def test_files_that_change_while_they_are_read(
    new: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, change: Any, at: int
) -> None:
    once(monkeypatch, "preadv", lambda: change(new, folder, WEIGHTS, CONFIG), at)
    assert generation(folder) == (2 if change is overwrite else 1)


def test_weights_that_are_overwritten_half_way(new: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same size and with the same stamp of modification, which whoever writes can set."""
    file, real, before = folder / WEIGHTS, os.preadv, (folder / WEIGHTS).stat()
    turns = []

    def half(descriptor: int, buffers: Any, offset: int) -> int:
        if len(buffers[0]) < 50_000 or turns:  # the header
            return real(descriptor, buffers, offset)
        turns.append(1)
        got = real(descriptor, [buffers[0][: len(buffers[0]) // 2]], offset)
        overwrite(new, folder, WEIGHTS)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        return got

    monkeypatch.setattr(reading.os, "preadv", half)
    values = {value for t in mlora.Adapter.from_pretrained(folder).tensors.values() for value in t.unique().tolist()}
    assert values == {2.0} and turns


@pytest.mark.parametrize("size", (0, 7, 100, 20_000))
def test_weights_that_are_cut_off_while_they_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    once(monkeypatch, "preadv", lambda: os.truncate(folder / WEIGHTS, size), 4)
    with pytest.raises(errors.AdapterError, match="damaged"):
        generation(folder)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a busy machine does not make what was just written look old."""
    monkeypatch.setattr(reading, "MOMENT", 0.5)


def test_a_writer_that_is_not_done(new: Path, folder: Path, patient: None) -> None:
    """It has written some and waits a moment: what is there is young, and is not taken for the whole."""
    content = (new / WEIGHTS).read_bytes()
    with (folder / WEIGHTS).open("wb") as file:
        file.write(content[:100])
        file.flush()

        def rest() -> None:
            time.sleep(reading.MOMENT / 4)
            file.write(content[100:])
            file.flush()
            overwrite(new, folder, CONFIG)

        thread = threading.Thread(target=rest)
        thread.start()
        assert generation(folder) == 2
        thread.join()


def test_two_writes_within_one_tick(new: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose stamps are alike: a file is read when a write would show."""
    overwrite(new, folder, WEIGHTS, CONFIG)
    state = os.stat(folder / WEIGHTS)
    ages: list[float] = []
    once(monkeypatch, "preadv", lambda: ages.append(time.time() - state.st_ctime_ns / 1e9))
    assert generation(folder) == 2
    assert ages[0] >= reading.MOMENT


@pytest.mark.parametrize("names", ((WEIGHTS, CONFIG), (CONFIG, WEIGHTS)), ids=("weights-first", "config-first"))
def test_two_files_that_are_replaced_one_after_the_other(
    new: Path, folder: Path, patient: None, monkeypatch: pytest.MonkeyPatch, names: tuple[str, str]
) -> None:
    replace(new, folder, names[0])
    real, done = time.sleep, []

    def sleep(seconds: float) -> None:  # the loader waits, since a file is young
        if not done:
            done.append(replace(new, folder, names[1]))
        real(seconds)

    monkeypatch.setattr(reading.time, "sleep", sleep)
    assert generation(folder) == 2 and done


@pytest.mark.parametrize("at", (2, 3, 4))
def test_a_folder_that_another_takes_the_place_of(
    new: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Calls of open: the folder, the config, the weights."""

    def switch() -> None:
        folder.rename(folder.with_name("old"))
        new.rename(folder)

    once(monkeypatch, "open", switch, at)
    assert generation(folder) == 1
    assert generation(folder) == 2


def test_young_files_of_a_folder_that_is_replaced_and_removed(
    new: Path, folder: Path, patient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were of one state when they were opened, which is all that there is of them."""
    real, done = time.sleep, []

    def sleep(seconds: float) -> None:
        if not done:
            folder.rename(folder.with_name("old"))
            new.rename(folder)
            shutil.rmtree(folder.with_name("old"))
            done.append(1)
        real(seconds)

    overwrite(folder, folder, WEIGHTS, CONFIG)
    monkeypatch.setattr(reading.time, "sleep", sleep)
    assert generation(folder) == 1 and done


@pytest.mark.parametrize("at", (2, 3, 4))
def test_a_link_to_a_folder_that_is_switched(
    new: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    (tmp_path / "link").symlink_to(folder)

    def switch() -> None:
        (tmp_path / "half").symlink_to(new)
        (tmp_path / "half").replace(tmp_path / "link")

    once(monkeypatch, "open", switch, at)
    assert generation(tmp_path / "link") == 1
    assert generation(tmp_path / "link") == 2


@pytest.mark.parametrize("at", (2, 3))
def test_a_folder_that_is_removed_and_made_anew(
    new: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    def switch() -> None:
        shutil.rmtree(folder)
        new.rename(folder)

    once(monkeypatch, "open", switch, at)
    assert generation(folder) == 2


def test_weights_that_are_replaced_all_the_time(folder: Path, tmp_path: Path) -> None:
    """Beside a config that is not: each load gets those of one moment, and none fails."""
    other = write(tmp_path / "other", 3)
    (other / CONFIG).write_text((folder / CONFIG).read_text())
    sources, stop = [shutil.copytree(folder, tmp_path / "first"), other], threading.Event()

    def work() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            replace(sources[turn % 2], folder, WEIGHTS)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(10):
            tensors = mlora.Adapter.from_pretrained(folder).tensors
            assert len({value for tensor in tensors.values() for value in tensor.unique().tolist()}) == 1
    finally:
        stop.set()
        thread.join()


def test_a_file_that_is_written_to_all_the_time(
    new: Path, folder: Path, patient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PATIENCE", 0.2)
    real = time.sleep

    def sleep(seconds: float) -> None:
        real(seconds)
        overwrite(new, folder, WEIGHTS)

    overwrite(new, folder, WEIGHTS)
    monkeypatch.setattr(reading.time, "sleep", sleep)
    with pytest.raises(errors.AdapterError, match="written to again and again"):
        generation(folder)


def test_stamps_of_the_future_and_of_whole_seconds() -> None:
    class State:
        def __init__(self, stamp: float) -> None:
            self.st_ctime_ns = int(stamp * 1e9)

    now = time.time()
    assert reading._young(State(now - 1.5)) < 0  # type: ignore[arg-type]
    assert 1 < reading._young(State(int(now))) <= reading.WHOLE_SECONDS  # type: ignore[arg-type]
    assert reading._young(State(now + 1e6 + 1e-3)) == reading.MOMENT  # type: ignore[arg-type]


def test_what_is_no_file(folder: Path) -> None:
    """A pipe, which would be waited for, and a folder."""
    for make in (os.mkfifo, os.mkdir):
        (folder / WEIGHTS).unlink()
        make(folder / WEIGHTS)
        with pytest.raises(errors.AdapterError, match=f"has no {WEIGHTS}"):
            generation(folder)


def test_every_file_is_closed(folder: Path, tmp_path: Path) -> None:
    open_files = Path("/proc/self/fd")
    if not open_files.is_dir():
        pytest.skip("this system does not list open files")
    before = len(list(open_files.iterdir()))
    for _ in range(3):
        generation(folder)
        with pytest.raises(errors.AdapterError):
            mlora.Adapter.from_pretrained(tmp_path)
    assert len(list(open_files.iterdir())) == before


def test_memory_is_used_again_when_no_tensor_has_it(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(range(256)) * 4096)

    def read(files: dict[str, reading.File]) -> torch.Tensor:
        return files["x"].read(0, files["x"].size)

    first, second = (reading.read_files(tmp_path, ["x"], read) for _ in range(2))
    part, where = second[5:9], second.data_ptr()
    assert first.data_ptr() != where and torch.equal(first, second)
    del second
    third = reading.read_files(tmp_path, ["x"], read)
    assert third.data_ptr() not in (first.data_ptr(), where) and part.tolist() == [5, 6, 7, 8]
    where = third.data_ptr()
    del third
    assert reading.read_files(tmp_path, ["x"], read).data_ptr() == where
