"""Files of kohya-ss, LyCORIS or diffusers: their config is in the header of the weights, or follows from their keys."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import errors
from .instead import FULL_MODEL

# Where diffusers keeps the config of an adapter that it saves, or the configs of several, each behind its model's name.
METADATA = "lora_adapter_metadata"

# What occurs in a key of any adapter, and in none of a model.
_OF_ADAPTERS = re.compile(
    r"lora|lycoris|hada_|lokr|loha|glora|dora|oft_|boft|ia3|delta_|\.(?:alpha|diff|diff_b|on_input|w_norm|b_norm)$"
    r"|vera_|road_|hra_u|miss_block|shira|hira|c3a|fourierft|waveft|trainable_tokens"
)

_FACTORS = re.compile(
    r"(.*)\.(?:lora_down|lora\.down|lora_linear_layer\.down|lora_A|hada_w1_b|lokr_w[12]_b)(?:\.weight)?"
)


def contents_of(
    path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of a file that no config lies beside.

    Raises:
        AdapterError: its header cannot be read, or it holds no adapter.
    """
    if tensors and METADATA not in metadata and not any(map(_OF_ADAPTERS.search, tensors)):
        raise errors.AdapterError(
            f"{path} has no tensors of an adapter ({next(iter(tensors))!r}, ...): it seems to hold {FULL_MODEL}"
        )
    values = _values(path, metadata)
    if not values:
        return {"peft_type": "LYCORIS", **_untold(metadata, tensors)}, dict(tensors)
    names = {key.partition(".")[0] for key in (*values, *tensors)}
    if len(names) > 1:  # which is the model's shows when it is known
        return {"peft_type": "LORA", METADATA: values}, dict(tensors)
    (prefix,) = (f"{name}." for name in names)
    config = {key.removeprefix(prefix): value for key, value in values.items()}
    return {"peft_type": "LORA", **config}, {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}


def _values(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        values = json.loads(metadata.get(METADATA, "{}"))
    except (ValueError, RecursionError) as error:
        raise errors.AdapterError(f"{path}: its {METADATA} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise errors.AdapterError(f"{path}: its {METADATA} holds a JSON {type(values).__name__}; it must be an object")
    return values


def _untold(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The alpha that the header tells and the tensors do not, unless it is the rank of all of these modules, which
    says no more than its absence. Some readers take it and some do not, so that it is an option which is not served."""
    ranks = {
        _rank(match[0], tensor)
        for key, tensor in tensors.items()
        if (match := _FACTORS.fullmatch(key)) and f"{match[1]}.alpha" not in tensors
    }
    told = {key: value for key, value in metadata.items() if key.lower().endswith("alpha")}
    return {key: value for key, value in told.items() if ranks and not all(_is(value, rank) for rank in ranks)}


def _rank(key: str, tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.dim() else 0


def _is(text: str, rank: int) -> bool:
    try:
        return float(text) == rank
    except ValueError:
        return False
