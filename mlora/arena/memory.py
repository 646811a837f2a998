"""How much memory the arena takes by default, and where it lies.

On the CPU the arena is address space, whose pages cost nothing before they are touched: the default is a share of what
this process may still use, and adapters take of it what they need, from the lowest addresses on.
"""

from __future__ import annotations

import mmap
import resource
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import errors

_LEAST = 64 << 20
_REACH = (1 << 31) - 1  # elements over which 32 bits reach; kernels of GPUs are others beyond
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # which Python has from 3.13 on


_SETS = "patch(memory=...) sets it"


@dataclass(frozen=True)
class Room:
    """What an arena takes.

    Args:
        size: bytes. `why`: so many, for people.
        ready: so many of them, at the lowest addresses, are filled as soon as adapters are registered, and stay this
            process's. What lies beyond is filled when a batch needs it, and given back when adapters leave.
    """

    size: int
    why: str
    ready: int


def fixed(size: int) -> Room:
    """What `patch(memory=...)` asks for."""
    return Room(size, "patch(memory=...)", size)


def default_room(weights: int, dtype: torch.dtype, device: torch.device) -> Room:
    """The default for a model of so many bytes: half of them, at least 64 MiB and at most half of what is free; or a
    quarter of what is free, where that is more. On a GPU, where it is taken at once, that quarter ends where 32-bit
    offsets do."""
    if device.type == "cuda":
        free, where = torch.cuda.mem_get_info(device)[0], f"{device} had free"
    else:
        free, where = free_memory()
    usual = max(1, min(max(weights // 2, _LEAST), free // 2))
    share, part = free // 4, "a quarter"
    if device.type == "cuda" and share > _REACH * dtype.itemsize:
        share, part = _REACH * dtype.itemsize, "as far as 32-bit offsets reach,"
    if share <= usual:
        return Room(usual, f"for a model of {weights:,} bytes; {where} {free:,}; {_SETS}", usual)
    ready = usual if device.type == "cpu" else share
    return Room(share, f"{part} of the {free:,} bytes that {where}; {_SETS}", ready)


def free_memory(root: Path = Path("/")) -> tuple[int, str]:
    """Bytes of host memory that this process can still use, and what limits them: the machine, a container or another
    control group, or an address space limit (ulimit -v). `root`: where proc and sys are mounted."""
    found = [(_meminfo(root / "proc/meminfo"), "the machine had available")]
    found += [(free, "its container or control group had left") for free in _control_groups(root)]
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        pages = int((root / "proc/self/statm").read_text().split()[0])
        found.append((max(0, limit - pages * mmap.PAGESIZE), "its address space limit had left"))
    return min(found)


def _meminfo(file: Path) -> int:
    values = dict(line.split(":") for line in file.read_text().splitlines())
    return int(values["MemAvailable"].split()[0]) * 1024


def _control_groups(root: Path) -> Iterator[int]:
    """What each control group that limits this process has left; pages of files that it can drop count as free.

    Version 2 has one tree, version 1 one of memory. A group's own path need not be there inside of a container, where
    the tree starts at the container's group: so every folder above is looked at, too.
    """
    file = root / "proc/self/cgroup"
    lines = file.read_text().splitlines() if file.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and "memory" not in controllers.split(","):
            continue
        tree = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        names = ("max", "current", "inactive_file")
        if controllers:
            names = ("limit_in_bytes", "usage_in_bytes", "total_inactive_file")
        group = tree / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(tree):
                break
            limit, used = (folder / f"memory.{name}" for name in names[:2])
            if limit.exists() and used.exists() and (most := limit.read_text().strip()) != "max":
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield max(0, int(most) - int(used.read_text()) + int(stat.get(names[2], 0)))


def reserve(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, mmap.mmap | None]:
    """An uninitialised 1-D tensor of at most `size` bytes, and the pages that it lies in on the CPU.

    Raises:
        CapacityError: there is no such room.
    """
    elements = size // dtype.itemsize
    if device.type != "cpu":
        return torch.empty(elements, dtype=dtype, device=device), None
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    try:
        pages = mmap.mmap(-1, max(size, 1), flags=flags)
    except (OSError, OverflowError) as error:
        raise errors.CapacityError(
            f"{size:,} bytes for adapters cannot be reserved ({error}); ask for less with patch(memory=...)"
        ) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):  # fewer pages to look up: adapters are read at up to a third more bytes a second
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype, count=elements) if elements else torch.empty(0, dtype=dtype), pages


def give_back(pages: mmap.mmap, start: int, end: int) -> None:
    """Let the system have the pages that lie wholly in these bytes; what is in them is lost."""
    start, end = start + -start % mmap.PAGESIZE, end - end % mmap.PAGESIZE
    if start < end:
        pages.madvise(mmap.MADV_DONTNEED, start, end - start)
