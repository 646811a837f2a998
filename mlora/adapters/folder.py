"""Files of a folder that others may write to meanwhile: each read whole, and all as they were at one moment.

A file is opened once and read, not mapped: a mapped file that is cut off ends the process. Where one was written to
while it was read, all are read again. Two cases do not show in that:

- A file is written to twice within one tick of the clock that stamps it. Files are therefore read when their stamps are
  older than a tick.
- Of two files that belong together one was replaced and the other is about to be. So the older of them must still be in
  its place a moment after the younger came, unless the whole folder gave way to another.
"""

from __future__ import annotations

import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from .. import errors

T = TypeVar("T")

# Seconds. Stamps are as coarse as 10 ms, and as 2 s on filesystems that count whole seconds; who replaces one file and
# then another takes a few more on a busy machine.
MOMENT, WHOLE_SECONDS = 0.05, 2.0

_SPARE = 1 << 17, 1 << 26  # bytes; least and most of the memory that is kept to be used again

PATIENCE = 3.0  # seconds, with files that do not come to rest


class File:
    """An open file of `size` bytes. `parts`: what was read of it, uint8, in the order of reading."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self.first = self.state = os.fstat(descriptor)
        self.parts: list[Tensor] = []

    @property
    def size(self) -> int:
        return self.state.st_size

    def read(self, start: int, count: int) -> Tensor:
        """`count` bytes from `start` on, uint8; raises `ValueError` where there are fewer."""
        if not count:
            return torch.empty(0, dtype=torch.uint8)
        buffer = _memory(count)
        data = torch.frombuffer(buffer, dtype=torch.uint8, count=count)
        rest = memoryview(buffer)[:count]
        while rest:
            if not (got := os.preadv(self._descriptor, [rest], start)):
                raise ValueError(f"it ends before its {start + len(rest):,} bytes")
            start, rest = start + got, rest[got:]
        self.parts.append(data)
        return data

    def text(self, start: int, count: int) -> bytes:
        """The same as bytes."""
        return self.read(start, count).numpy().tobytes()

    def changed(self) -> bool:
        """Whether it was written to since it came to rest. That its last name went is no matter."""
        then, now = self.state, os.fstat(self._descriptor)
        same = (then.st_size, then.st_mtime_ns) == (now.st_size, now.st_mtime_ns)
        return not same or (then.st_ctime_ns != now.st_ctime_ns and then.st_nlink == now.st_nlink)

    def rests(self, until: float) -> bool:
        """Wait until its stamps are older than a tick; False where they are not by then."""
        while (wait := _young(self.state)) > 0 and self._written_in(wait):
            if time.monotonic() > until:
                return False
        return True

    def _written_in(self, seconds: float) -> bool:
        before = self.state
        time.sleep(seconds)
        self.state = os.fstat(self._descriptor)
        return before.st_ctime_ns != self.state.st_ctime_ns


_spare: list[bytearray] = []
_spare_lock = threading.Lock()


def _memory(count: int) -> bytearray:
    """`count` bytes, in the memory of the last large file if no tensor has it any more: fresh memory takes longer than
    to read a file into it."""
    with _spare_lock:
        if not _spare or not count <= len(_spare[0]) <= 2 * count or sys.getrefcount(_spare[0]) > 2:
            buffer = bytearray(count)
            if not _SPARE[0] <= count <= _SPARE[1]:
                return buffer
            _spare[:] = [buffer]
        return _spare[0]


def _young(state: os.stat_result) -> float:
    """For how many seconds a file's stamps are not older than a tick."""
    tick = MOMENT if state.st_ctime_ns % 10**9 else WHOLE_SECONDS
    age = time.time() - state.st_ctime_ns / 1e9
    return min(tick - age, tick)


def read_files(folder: Path, names: Sequence[str], read: Callable[[dict[str, File]], T]) -> T:
    """`read` of those of `names` that are files in `folder`: name -> file, open until it returns.

    Raises:
        AdapterError: the folder cannot be opened, or its files do not come to rest; and whatever `read` raises of
            files that did.
    """
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        with _opened(folder, names, until) as files:
            if files is None:
                continue
            error, result = None, None
            try:
                result = read(files)
            except errors.AdapterError as raised:
                error = raised
            if any(file.changed() for file in files.values()):
                continue
            if error is not None:
                raise error
            return result  # type: ignore[return-value]
    raise errors.AdapterError(
        f"{folder} was written to again and again while it was read, for {PATIENCE:g} seconds; write new files beside "
        f"the old ones and rename them, or the folder, when they are complete"
    )


@contextmanager
def _opened(folder: Path, names: Sequence[str], until: float) -> Iterator[dict[str, File] | None]:
    """The files, at rest and of one moment; None where they are not."""
    with ExitStack() as stack:
        try:
            at = os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
        except OSError as error:
            raise errors.AdapterError(f"{folder} cannot be read: {error.strerror}") from error
        stack.callback(os.close, at)
        files: dict[str, File] = {}
        for name in names:
            if _is_file(name, at) and (file := _open(stack, folder / name, at)) is not None:
                files[name] = file
        whole = all(_is_file(name, at, files.get(name)) == (name in files) for name in names)
        if not whole or not os.fstat(at).st_nlink or not all(file.rests(until) for file in files.values()):
            yield None
            return
        older = sorted(files, key=lambda name: files[name].first.st_ctime_ns)[:-1]
        yield files if all(_is_file(name, at, files[name]) for name in older) or _gave_way(folder, at) else None


def _open(stack: ExitStack, path: Path, at: int) -> File | None:
    """A file of the folder `at`; None if it is gone."""
    try:
        descriptor = os.open(path.name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=at)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise errors.AdapterError(f"{path} cannot be read: {error.strerror}") from error
    stack.callback(os.close, descriptor)
    return File(path, descriptor)


def _gave_way(folder: Path, at: int) -> bool:
    """Whether the folder `at` is not at its path any more, so that its files are no one's to replace."""
    try:
        return not os.path.samestat(os.stat(folder), os.fstat(at))
    except OSError:
        return True


def _is_file(name: str, at: int, file: File | None = None) -> bool:
    """Whether a folder has a file of that name, and it is `file`."""
    try:
        now = os.stat(name, dir_fd=at)
    except OSError:
        return False
    same = file is None or (now.st_dev, now.st_ino) == (file.first.st_dev, file.first.st_ino)
    return stat.S_ISREG(now.st_mode) and same
