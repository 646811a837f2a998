"""Files -> the config and the tensors of an adapter. Nothing here trusts a file."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import errors
from .bare import contents_of
from .folder import File, read_files
from .header import DTYPES, MAX_HEADER, Header, InMemory, cut, parse
from .instead import X_LORA, instead, names_under
from .keys import check_ignore, is_ignored, without
from .on_disk import OnDisk
from .sources import CONFIG, DIFFUSERS, FILES, PICKLE, WEIGHTS, local_path

MAX_CONFIG = 16 << 20  # bytes; AdaLoRA's masks are the largest configs, some hundred KB


class Contents(NamedTuple):
    """What was read: the fields of an `Adapter`; and `raw`, the bytes of the files, uint8.

    `tensors` are `InMemory` where all of a safetensors file beside a config was taken.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    source: str
    ignored: tuple[str, ...]
    raw: list[Tensor]


def read_adapter(
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    subfolder: str | None = None,
    allow_pickle: bool = False,
    ignore: Sequence[str] = (),
    in_memory: bool = True,
) -> Contents:
    """See `Adapter.from_pretrained`."""
    check_source(path_or_id)
    check_ignore(ignore)
    source = str(path_or_id)
    path = local_path(source, revision, token, subfolder)
    folder, single = (path, "") if path.is_dir() else (path.parent, path.name)

    def read(files: dict[str, File]) -> tuple[Mapping[str, Any], Mapping[str, Tensor], list[Tensor]]:
        return *parsed(files), [part for file in files.values() for part in file.parts]

    def parsed(files: dict[str, File]) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
        if CONFIG in files:
            weights = files.get(single or WEIGHTS)
            if weights is not None and not in_memory and not ignore and (left := _on_disk(weights)) is not None:
                return _config(files[CONFIG]), left
            return _config(files[CONFIG]), _tensors(folder, single or WEIGHTS, files, allow_pickle, ignore)
        if file := files.get(single or DIFFUSERS):
            header, tensors = _safetensors(file, ignore)
            return contents_of(file.path, header.metadata, tensors)
        if single:
            raise errors.AdapterError(f"{folder} has no {single}")
        raise errors.AdapterError(
            f"{folder} has no {CONFIG}: it is not a PEFT adapter folder{instead(names_under(folder))}"
        )

    names = (CONFIG, single) if single else FILES
    read_config, read_tensors, raw = read_files(folder, names, read)
    config, tensors, ignored = without(read_config, read_tensors, ignore)
    return Contents(config, tensors, f"{source.rstrip('/')}/{subfolder}" if subfolder else source, ignored, raw)


def check_source(path_or_id: object) -> None:
    """Raise `AdapterError` where nothing could be read from it."""
    if not isinstance(path_or_id, (str, os.PathLike)):
        raise errors.AdapterError(
            f"an adapter is read from a path or a hub id, not from this {type(path_or_id).__name__}; one in memory is "
            f"for add_adapter"
        )


def _config(file: File) -> dict[str, Any]:
    if file.size > MAX_CONFIG:
        raise errors.AdapterError(f"{file.path} has {file.size:,} bytes; a config has at most {MAX_CONFIG:,}")
    try:
        config = json.loads(file.text(0, file.size).decode("utf-8-sig"))  # some editors put a mark first
    except (OSError, ValueError, RecursionError) as error:
        raise errors.AdapterError(f"{file.path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise errors.AdapterError(f"{file.path} holds a JSON {type(config).__name__}; it must be an object")
    if str(config.get("peft_type")).upper() == "XLORA":
        raise errors.UnsupportedAdapterError(f"{file.path.parent} is {X_LORA}")
    return config


def _tensors(
    folder: Path, weights: str, files: Mapping[str, File], allow_pickle: bool, ignore: Sequence[str]
) -> Mapping[str, Tensor]:
    if weights in files:
        return _safetensors(files[weights], ignore)[1]
    if PICKLE not in files:
        raise errors.AdapterError(f"{folder} has no {weights}{instead(names_under(folder))}")
    if not allow_pickle:
        raise errors.AdapterError(
            f"{folder} has only {PICKLE}, a pickle, which can run code when read; convert it to {WEIGHTS}, "
            "or pass allow_pickle=True to read it with torch's weights_only unpickler"
        )
    file = files[PICKLE]
    _check_size(file)
    try:
        tensors = torch.load(io.BytesIO(file.text(0, file.size)), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises pickle, zip, runtime and end-of-file errors
        raise errors.AdapterError(f"{file.path} cannot be read safely: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise errors.AdapterError(f"{file.path} must hold a dictionary of tensors")
    return tensors


def _header(file: File) -> tuple[bytes, Header, int]:
    """Its header, as it is there and parsed, and where the bytes behind it start."""
    try:
        length = int.from_bytes(file.text(0, 8), "little")
        if length > min(MAX_HEADER, file.size - 8):
            raise ValueError(f"its header would have {length:,} bytes")
        text = file.text(8, length)
        header, start = parse(text), 8 + length
        if start + header.nbytes != file.size:
            raise ValueError(f"its header tells of {header.nbytes:,} bytes of tensors; it has {file.size - start:,}")
    except (OSError, ValueError) as error:
        raise errors.AdapterError(f"{file.path} is damaged or not a safetensors file: {error}") from error
    return text, header, start


def _on_disk(file: File) -> OnDisk | None:
    """The tensors left where they are; None where one is of a dtype that is not read."""
    _, header, start = _header(file)
    if any(place.dtype not in DTYPES for place in header.places):
        return None
    return OnDisk(file.path, file.state, start, {place.key: place for place in header.places})


def _safetensors(file: File, ignore: Sequence[str]) -> tuple[Header, Mapping[str, Tensor]]:
    """The tensors in memory of their own, one piece for all; of what is ignored and cannot be read, the bytes."""
    _check_size(file)
    text, header, start = _header(file)
    try:
        data = file.read(start, header.nbytes)
    except (OSError, ValueError) as error:
        raise errors.AdapterError(f"{file.path} is damaged or not a safetensors file: {error}") from error
    foreign = [place for place in header.places if place.dtype not in DTYPES]
    if unread := [place for place in foreign if not is_ignored(place.key, ignore)]:
        raise errors.UnsupportedAdapterError(
            f"{file.path}: its tensor {unread[0].key} is of dtype {unread[0].dtype}, which is not read; those that "
            f"are: {', '.join(DTYPES)}"
        )
    if not foreign:
        return header, InMemory(text, header.places, data)
    bytes_of = {place.key: data[place.start : place.end] for place in foreign}
    return header, cut([place for place in header.places if place.dtype in DTYPES], data) | bytes_of


def _check_size(file: File) -> None:
    """A file's length may be a lie that costs nothing on disk; its tensors are read into memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if file.size > memory:
        raise errors.AdapterError(f"{file.path} has {file.size:,} bytes, more than this machine's memory of {memory:,}")
