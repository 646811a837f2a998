"""Adapters that nobody loaded: in folders that were opened, and on the hub by a list of what may be fetched."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ...adapters.sources import FILES
from ..tokenizers import FILES as TOKENIZER_FILES

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w./-]+))?")


class Roots:
    """Folders whose subfolders are adapters, named by their path in there.

    What a name leads to lies inside of its root, and so does each file that is read from it, links followed. A root
    whose owner is not trusted should not be opened: what is checked now may be another file when it is read.
    """

    def __init__(self, folders: Sequence[str | Path]) -> None:
        self._roots = [Path(folder).expanduser() for folder in folders]
        for root in self._roots:
            if not root.is_dir():
                raise ValueError(f"the adapter root {str(root)!r} is no folder")

    def find(self, name: str) -> tuple[str, Path] | None:
        """The one spelling of the name, and the folder; None where there is none. LoRAX's absolute paths are names too,
        if they lie in a root. Reads the file system."""
        for root in self._roots:
            inner = self._inner(name, root)
            if inner is not None and (folder := _checked(root, inner)) is not None:
                return inner, folder
        return None

    def _inner(self, name: str, root: Path) -> str | None:
        """The name relative to a root, if it is one that may be."""
        if not name or len(name) > 512 or any(not char.isprintable() or char == "\\" for char in name):
            return None
        path = PurePosixPath(name)
        if path.is_absolute():
            if str(path) != name or not path.is_relative_to(root.absolute()):
                return None
            path = path.relative_to(root.absolute())
            name = str(path)
        if str(path) != name or any(part.startswith(".") for part in path.parts):  # one spelling each
            return None
        return name if path.parts else None


def _checked(root: Path, name: str) -> Path | None:
    """The folder of an adapter, all of which lies inside of its root."""
    try:
        inside = root.resolve(strict=True)
        folder = (inside / name).resolve(strict=True)
        if not folder.is_relative_to(inside) or not (folder / FILES[0]).is_file():
            return None
        there = [folder / file for file in (*FILES, *TOKENIZER_FILES) if (folder / file).is_symlink()]
        if any(not file.resolve().is_relative_to(inside) for file in there):
            return None
    except (OSError, ValueError, RuntimeError):
        return None
    return folder


def is_hub_id(name: str) -> bool:
    """Whether it has the form of one."""
    return _HUB_ID.fullmatch(name) is not None and "@" not in name


class HubIds:
    """What may be fetched: `org/name`, or `org/name@revision`, which says of when."""

    def __init__(self, ids: Sequence[str]) -> None:
        self._revisions: dict[str, str | None] = {}
        for given in ids:
            found = _HUB_ID.fullmatch(given)
            if found is None:
                raise ValueError(f"{given!r} is no hub id; wanted org/name, or org/name@revision")
            self._revisions[found[1]] = found[2]

    def __contains__(self, name: str) -> bool:
        return name in self._revisions

    def revision(self, name: str) -> str | None:
        """Of one that may be fetched; None for the newest, and for others."""
        return self._revisions.get(name)
