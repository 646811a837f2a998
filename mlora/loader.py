"""Files -> `Adapter`: local PEFT folders and Hugging Face hub ids."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from . import errors
from .adapter import Adapter

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def read_adapter(
    path_or_id: str | Path, *, revision: str | None = None, token: str | None = None, allow_pickle: bool = False
) -> Adapter:
    """See `Adapter.from_pretrained`."""
    folder = Path(path_or_id)
    if not folder.is_dir():
        folder = _from_hub(str(path_or_id), revision, token)
    return Adapter(_read_config(folder), _read_tensors(folder, allow_pickle), source=str(path_or_id))


def _from_hub(name: str, revision: str | None, token: str | None) -> Path:
    if Path(name).exists():
        raise errors.AdapterError(f"{name!r} is a file; a PEFT adapter is a folder with {CONFIG} and {WEIGHTS}")
    if not _HUB_ID.fullmatch(name):
        raise errors.AdapterError(f"there is no folder {name!r}, and it is not a hub id of the form 'org/name'")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=[CONFIG, WEIGHTS, PICKLE]))
    except Exception as error:  # the hub client's errors have no common base short of Exception
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise errors.AdapterError(
            f"there is no folder {name!r}, and as a hub id it could not be fetched: {reason}"
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise errors.AdapterError(f"{folder} has no {CONFIG}: it is not a PEFT adapter folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise errors.AdapterError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise errors.AdapterError(f"{path} holds a JSON {type(config).__name__}; it must be an object")
    return config


def _read_tensors(folder: Path, allow_pickle: bool) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if path.is_file():
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise errors.AdapterError(f"{path} is damaged or not a safetensors file: {error}") from error
    pickle = folder / PICKLE
    if not pickle.is_file():
        raise errors.AdapterError(f"{folder} has no {WEIGHTS}")
    if not allow_pickle:
        raise errors.AdapterError(
            f"{folder} has only {PICKLE}, a pickle, which can run code when read; convert it to {WEIGHTS}, "
            "or pass allow_pickle=True to read it with torch's weights_only unpickler"
        )
    try:
        tensors = torch.load(pickle, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises pickle, zip, runtime and end-of-file errors
        raise errors.AdapterError(f"{pickle} cannot be read safely: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise errors.AdapterError(f"{pickle} must hold a dictionary of tensors")
    return tensors
