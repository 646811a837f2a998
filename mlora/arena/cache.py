"""Packed adapters on disk, for what takes long to lower.

An entry is one file:

    MAGIC                 16 bytes
    length                8 bytes, little-endian: of the header
    header                JSON: what of `Packed` is no array, and what whoever wrote it knows beside
    blob, rows, touches   as they are in memory
    SHA-256               32 bytes, of all before

It is written under another name, synchronized and renamed, so that it is whole or not there; and what a disk or
somebody spoilt since does not have its sum. An entry that cannot be read is as good as none. Entries are trusted as the
code is: the folder should belong to who runs it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .pack import Packed

MAGIC = b"mlora packed 1\n\0"
_HEADER = 64 << 20  # bytes at most

Memory = Callable[[int], Tensor]


class Cache:
    """Entries in a folder, by name; they stay until somebody deletes them."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()

    def beside(self, name: str) -> dict[str, Any]:
        """What was written beside the adapter.

        Raises:
            OSError: there is no such entry. ValueError, KeyError, TypeError: its header is damaged.
        """
        with (self.folder / name).open("rb") as file:
            return dict(_header(file)[1]["beside"])

    def read(self, name: str, memory: Memory, rows: np.ndarray, dtype: torch.dtype) -> Packed:
        """The adapter. `memory`: makes an empty blob of so many elements. `rows`, `dtype`: what the entry's are like;
        raises as `beside`."""
        with (self.folder / name).open("rb", buffering=0) as file:
            return _read(file, memory, rows, dtype)

    def write(self, name: str, packed: Packed, beside: Mapping[str, Any]) -> None:
        """Make an entry, or warn where the folder cannot be written to."""
        fields = {
            "numel": packed.blob.numel(),
            "cuts": list(packed.cuts),
            "heads": [[index, *found] for index, found in packed.heads.items()],
            "trained": sorted(packed.trained),
            "rests": packed.rests,
            "invocation": list(packed.invocation),
            "beside": dict(beside),
        }
        header = json.dumps(fields).encode()
        start = MAGIC + len(header).to_bytes(8, "little") + header
        parts = [memoryview(start), *_arrays(packed.blob, packed.rows, packed.touches)]
        half = ""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor, half = tempfile.mkstemp(dir=self.folder, prefix="half-")
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                found = hashlib.sha256()
                for part in parts:
                    found.update(part)
                    _write(file, part)
                _write(file, found.digest())
                os.fsync(file.fileno())
            os.replace(half, self.folder / name)
            half = ""
            at = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(at)
            finally:
                os.close(at)
        except OSError as error:
            warnings.warn(f"nothing is kept in packed_cache {str(self.folder)!r}: {error.strerror}", stacklevel=2)
        finally:
            if half:
                with suppress(OSError):
                    os.unlink(half)


def _write(file: Any, part: Any) -> None:
    left = memoryview(part)
    while left:
        left = left[file.write(left) :]


def _header(file: Any) -> tuple[bytes, dict[str, Any]]:
    """The bytes up to its end, and what it says."""
    start = file.read(len(MAGIC) + 8)
    length = int.from_bytes(start[len(MAGIC) :], "little")
    if start[: len(MAGIC)] != MAGIC or length > _HEADER:
        raise ValueError("no entry")
    text = file.read(length)
    found = json.loads(text)
    return start + text, found


def _read(file: Any, memory: Memory, rows: np.ndarray, dtype: torch.dtype) -> Packed:
    size = os.fstat(file.fileno()).st_size
    begin, fields = _header(file)
    numel = int(fields["numel"])
    rows, touches = np.empty_like(rows), np.empty(len(rows), dtype=np.uint8)
    wanted = len(begin) + numel * dtype.itemsize + rows.nbytes + touches.nbytes + hashlib.sha256().digest_size
    if size != wanted:
        raise ValueError("its size is another")
    blob = memory(numel)
    found = hashlib.sha256(begin)
    for part in _arrays(blob, rows, touches):
        left = part
        while left:
            if not (got := file.readinto(left)):
                raise ValueError("it ends before its end")
            left = left[got:]
        found.update(part)
    if file.read() != found.digest():
        raise ValueError("its sum is another")
    heads = {index: (a, bias, width) for index, a, bias, width in fields["heads"]}
    invocation, trained = tuple(fields["invocation"]), frozenset(fields["trained"])
    return Packed(blob, tuple(fields["cuts"]), rows, touches, heads, trained, fields["rests"], invocation)


def _arrays(blob: Tensor, rows: np.ndarray, touches: np.ndarray) -> list[memoryview]:
    """Their very bytes; none of what has none."""
    arrays: list[Any] = [blob.view(torch.uint8).numpy(), rows.reshape(-1), touches]
    return [memoryview(array).cast("B") for array in arrays if array.size]
