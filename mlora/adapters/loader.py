"""Files -> the config and the tensors of an adapter. Nothing here trusts a file."""

from __future__ import annotations

import json
import math
import os
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import errors
from .sources import CONFIG, DIFFUSERS, PICKLE, WEIGHTS, local_path

MAX_CONFIG = 16 << 20  # bytes; AdaLoRA's masks are the largest configs, some hundred KB

# Where diffusers keeps the config of an adapter that it saves: in the header of the weights.
_METADATA = "lora_adapter_metadata"

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class Contents(NamedTuple):
    """What was read: the fields of an `Adapter`."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    source: str
    mapped: tuple[Path, os.stat_result] | None


def read_adapter(
    path_or_id: str | Path, *, revision: str | None = None, token: str | None = None, allow_pickle: bool = False
) -> Contents:
    """See `Adapter.from_pretrained`."""
    if not isinstance(path_or_id, (str, os.PathLike)):
        raise errors.AdapterError(
            f"an adapter is read from a path or a hub id, not from this {type(path_or_id).__name__}; one in memory is "
            f"for add_adapter"
        )
    source = str(path_or_id)
    path = local_path(source, revision, token)
    folder, weights = (path, path / WEIGHTS) if path.is_dir() else (path.parent, path)
    if (folder / CONFIG).is_file():
        mapped = (weights, weights.stat()) if weights.is_file() else None
        config = _read_config(folder)
        return Contents(config, _read_tensors(folder, weights, allow_pickle), source, mapped)
    if path.is_dir():
        weights = path / DIFFUSERS
        if not weights.is_file():
            raise errors.AdapterError(f"{folder} has no {CONFIG}: it is not a PEFT adapter folder")
    return _without_config(weights, source)


def _without_config(file: Path, source: str) -> Contents:
    """A file of kohya-ss, LyCORIS or diffusers: its config is in its header or follows from its keys."""
    mapped = file, file.stat()
    tensors = _load(file)
    try:
        with safe_open(file, "pt") as handle:
            text = (handle.metadata() or {}).get(_METADATA)
        values = json.loads(text) if text is not None else {}
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise errors.AdapterError(f"{file}: its {_METADATA} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise errors.AdapterError(f"{file}: its {_METADATA} holds a JSON {type(values).__name__}; it must be an object")
    components = sorted({key.partition(".")[0] for key in values})
    if len(components) > 1:
        raise errors.AdapterError(
            f"{file} holds adapters of several models ({', '.join(components)}); save the one for this model by itself"
        )
    if not components:
        return Contents({"peft_type": "LYCORIS"}, tensors, source, mapped)
    prefix = f"{components[0]}."
    config = {key.removeprefix(prefix): value for key, value in values.items()}
    own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return Contents({"peft_type": "LORA", **config}, own, source, mapped)


def _read_config(folder: Path) -> dict[str, Any]:
    path = _inside(folder, folder / CONFIG)
    if path.stat().st_size > MAX_CONFIG:
        raise errors.AdapterError(f"{path} has {path.stat().st_size:,} bytes; a config has at most {MAX_CONFIG:,}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise errors.AdapterError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise errors.AdapterError(f"{path} holds a JSON {type(config).__name__}; it must be an object")
    return config


def _read_tensors(folder: Path, path: Path, allow_pickle: bool) -> dict[str, Tensor]:
    if path.is_file():
        return _load(_inside(folder, path))
    pickle = folder / PICKLE
    if not pickle.is_file():
        raise errors.AdapterError(f"{folder} has no {WEIGHTS}")
    if not allow_pickle:
        raise errors.AdapterError(
            f"{folder} has only {PICKLE}, a pickle, which can run code when read; convert it to {WEIGHTS}, "
            "or pass allow_pickle=True to read it with torch's weights_only unpickler"
        )
    _check_size(_inside(folder, pickle))
    try:
        tensors = torch.load(pickle, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises pickle, zip, runtime and end-of-file errors
        raise errors.AdapterError(f"{pickle} cannot be read safely: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise errors.AdapterError(f"{pickle} must hold a dictionary of tensors")
    return tensors


def _load(path: Path) -> dict[str, Tensor]:
    _check_size(path)
    try:
        return map_tensors(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        raise errors.AdapterError(f"{path} is damaged or not a safetensors file: {error}") from error


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The file's tensors, mapped into memory. The library checks the header, and that the tensors lie in the file
    without gaps in the order of `offset_keys`; cutting them out here takes less than half the time of `load_file`."""
    with safe_open(path, "pt") as file:
        parts = [(key, file.get_slice(key)) for key in file.offset_keys()]
        shapes = [part.get_shape() for _, part in parts]
        dtypes = [_DTYPES[part.get_dtype()] for _, part in parts]
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
    data = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
    data = data[data.numel() - sum(sizes) :]
    keys = [key for key, _ in parts]
    if len(set(dtypes)) == 1 and data.storage_offset() % dtypes[0].itemsize == 0:  # as good as always
        flat = data.view(dtypes[0])
        starts = accumulate((size // flat.itemsize for size in sizes), initial=flat.storage_offset())
        return {
            key: flat.as_strided(shape, _strides(tuple(shape)), start)
            for key, shape, start in zip(keys, shapes, starts, strict=False)
        }
    parted = zip(keys, data.split(sizes), dtypes, shapes, strict=True)
    return {key: part.clone().view(dtype).view(shape) for key, part, dtype, shape in parted}


@lru_cache
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _check_size(path: Path) -> None:
    """A file's length may be a lie that costs nothing on disk; its tensors are read into memory."""
    size, memory = path.stat().st_size, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise errors.AdapterError(f"{path} has {size:,} bytes, more than this machine's memory of {memory:,}")


def _inside(folder: Path, path: Path) -> Path:
    """`path`, if it leads into `folder`, or as the hub's cache links them, into the `blobs` beside the snapshots."""
    roots = [folder.resolve()]
    if folder.parent.name == "snapshots":
        roots.append(folder.parent.parent.resolve() / "blobs")
    target = path.resolve()
    if not any(target.is_relative_to(root) for root in roots):
        raise errors.AdapterError(f"{path} is a link out of its folder, to {target}")
    return path
