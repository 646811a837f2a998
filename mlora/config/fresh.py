"""A fresh LoRA: as training starts it, which changes nothing yet."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .. import errors
from ..adapters.adapter import Adapter
from ..lowering.targets import pattern_value, targets_of
from ..runtime import Runtime

# Ludwig's names of fields -> PEFT's.
_NAMES = {"alpha": "lora_alpha"}


def lora_fields(entry: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's config of a checked entry without weights, with Ludwig's defaults: r 8, alpha 2 r, dropout 0.05."""
    config: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_dropout": 0.05}
    config.update({_NAMES.get(key, key): value for key, value in entry.items() if key != "type"})
    config.setdefault("lora_alpha", 2 * config["r"])
    return config


def fresh_lora(runtime: Runtime, name: str, entry: Mapping[str, Any]) -> Adapter:
    """The LoRA of a checked entry without weights: A is random (Kaiming uniform with a = sqrt(5)), B zero."""
    config = lora_fields(entry)
    if "target_modules" not in config:
        config["target_modules"] = _usual_targets(runtime.model, name)
    tensors = {}
    draw = torch.Generator().manual_seed(0)
    wanted = targets_of(config, runtime.bases)
    for path in (path for path in runtime.bases if path in wanted):
        base = runtime.bases[path]
        rank = pattern_value(config.get("rank_pattern"), path, config["r"])
        if base.embed_scale is not None:  # PEFT starts embeddings the other way round
            tensors[f"{path}.lora_embedding_A"] = torch.zeros(rank, base.in_features)
            tensors[f"{path}.lora_embedding_B"] = torch.randn(base.out_features, rank, generator=draw)
            continue
        a = torch.empty(rank, base.in_features)
        nn.init.kaiming_uniform_(a, math.sqrt(5), generator=draw)
        tensors[f"{path}.lora_A.weight"] = a
        tensors[f"{path}.lora_B.weight"] = torch.zeros(base.out_features, rank)
        if config.get("use_dora"):
            tensors[f"{path}.lora_magnitude_vector"] = base.weight().norm(dim=1)
    if not tensors:
        raise errors.ConfigError(f"adapter {name!r}: target_modules {config['target_modules']!r} name no linear")
    return Adapter(config, tensors, source="config")


def _usual_targets(model: nn.Module, name: str) -> Any:
    """PEFT's default for the model's type, which is Ludwig's."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    try:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as usual
    except ImportError as error:
        raise errors.ConfigError(
            f"adapter {name!r} has no target_modules, and PEFT, which has a list of what is usual, is not installed; "
            f"install peft, or name them"
        ) from error
    if kind not in usual:
        raise errors.ConfigError(
            f"adapter {name!r} has no target_modules, and PEFT knows none that are usual for models of type {kind!r}; "
            f"name them"
        )
    return usual[kind]
