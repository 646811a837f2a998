"""Adapters that are known by their files, which are read when they are needed, and again when they were dropped."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .. import errors
from ..adapters.adapter import Adapter
from ..adapters.loader import Contents, check_source, read_adapter
from ..adapters.same import mark
from ..adapters.sources import local_path
from .info import AdapterInfo

_SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of files since they were first read.

    Args:
        path: where they are on this machine. `mark`: of their bytes, see `adapters/same.py`.
        key, number: under which the store had the adapter, and will have it again. `info`: as it was.
        plain: whether a blob holds what the files do, so that it is no use to keep it elsewhere.
    """

    path: str
    mark: bytes
    key: str
    number: int
    info: AdapterInfo
    plain: bool


@dataclass(frozen=True)
class Read:
    """What `Files.read` found.

    Args:
        source: for messages and listings. `path`: where the files are. `mark`: of their bytes.
    """

    found: Contents
    source: str
    path: str
    mark: bytes

    @cached_property
    def adapter(self) -> Adapter:
        """Raises `AdapterError` where it is none."""
        return Adapter(self.found.config, self.found.tensors, self.source, self.found.ignored)


@dataclass(slots=True, eq=False)
class Files:
    """Where an adapter is read from. There may be very many of them, most of which never are.

    Args:
        source: path, URL or hub id. `options`: of `Runtime.load_adapter`, which many may share.
        seen: None before it was first loaded.
    """

    source: str
    options: Mapping[str, Any]
    seen: Seen | None = None

    @property
    def lowering(self) -> dict[str, Any]:
        """Those of the options that say how it is served."""
        return {key: self.options[key] for key in ("approximate", "dense", "strict") if key in self.options}

    def read(self, name: str, again: bool = True) -> Read:
        """The files, as they were when the adapter was first loaded. `again`: whether it may be read once more.

        Raises:
            AdapterError: something is missing or damaged, or is not what it was.
        """
        options, seen = self.options, self.seen
        subfolder = options.get("subfolder")
        if seen is None:
            path = str(local_path(self.source, options.get("revision"), options.get("token"), subfolder))
        else:
            path = seen.path
        found = read_adapter(path, allow_pickle=options.get("allow_pickle", False), ignore=options.get("ignore", ()))
        marked = mark(found.raw) if again else b""
        if seen is not None and seen.mark != marked:
            raise errors.AdapterError(
                f"the files of adapter {name!r}, in {path}, have changed since it was loaded first; "
                f"replace_adapter({name!r}, {self.source!r}) takes them as they are now"
            )
        source = f"{self.source.rstrip('/')}/{subfolder}" if subfolder else self.source
        return Read(found, source, path, marked)


def default_name(path_or_id: str | Path, subfolder: str | None = None) -> str:
    """That of an adapter whose files are there, where none is given."""
    return Path(subfolder or path_or_id).name


def files_of(path_or_id: str | Path, options: Mapping[str, Any]) -> Files:
    """Raises `AdapterError` where it is neither a path nor a name."""
    check_source(path_or_id)
    return Files(str(path_or_id), options)


def in_folder(folder: str | Path) -> Iterator[tuple[str, str]]:
    """(name, path) of what may be adapters in a folder, by one look at it: its folders and `.safetensors` files, links
    to either included; what begins with a dot is none.

    Raises:
        AdapterError: there is no such folder.
    """
    root = os.path.abspath(os.path.expanduser(folder))
    try:
        with os.scandir(root) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith("."):
                    continue
                if name.endswith(_SUFFIX):
                    yield name[: -len(_SUFFIX)], entry.path
                elif entry.is_dir():
                    yield name, entry.path
    except OSError as error:
        raise errors.AdapterError(f"{root} cannot be read as a folder of adapters: {error.strerror}") from error
