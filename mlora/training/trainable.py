"""Which adapters can be trained, and which of their tensors belong to which module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import errors
from ..adapters.adapter import Adapter
from ..gradients.trained import Keys
from ..lowering import BaseLinear, Delta, Names, is_rewriting

# Options that do not change how a LoRA is trained, or that training honours.
_TRAINED = frozenset((
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_bias",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora",
))  # fmt: skip

_SUFFIXES = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_B.bias": "bias",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
_COPY = ".base_layer.weight"  # of the base's, which PEFT saves with a head that it targets


def check_config(config: Mapping[str, Any], source: str) -> None:
    """Raise `UnsupportedAdapterError` unless an adapter of this config can be trained."""
    kind = str(getattr(config["peft_type"], "value", config["peft_type"])).upper()
    if kind != "LORA":
        raise errors.UnsupportedAdapterError(
            f"adapter from {source}: peft_type {kind!r} is served and not trained; trained are LORA adapters"
        )
    if is_rewriting(config):
        raise errors.UnsupportedAdapterError(
            f"adapter from {source}: option init_lora_weights={config['init_lora_weights']!r} is not trained: the base "
            f"that it is trained on was rewritten; load it without is_trainable to serve it"
        )
    for option, value in config.items():
        if option in _TRAINED or value in (None, False, 0, "none", {}, []):
            continue
        raise errors.UnsupportedAdapterError(
            f"adapter from {source}: option {option}={value!r} is not trained; load it without is_trainable to serve it"
        )


def keys_of(
    adapter: Adapter,
    deltas: Mapping[str, Delta],
    names: Names,
    indices: Mapping[str, int],
    bases: Mapping[str, BaseLinear],
) -> dict[int, Keys]:
    """Module number -> its tensors, in order, of an adapter that was lowered to `deltas` (dotted path -> delta).

    Raises:
        UnsupportedAdapterError: it has parts that are not trained.
    """
    check_config(adapter.config, adapter.source)
    found: dict[str, dict[str, str]] = {}
    for key in adapter.tensors:
        if key.endswith(_COPY):
            continue
        suffix = next((suffix for suffix in _SUFFIXES if key.endswith(suffix)), None)
        path = "" if suffix is None else names.find(key.removesuffix(suffix))
        if suffix is None or path not in deltas or not bases[path].linear:
            raise errors.UnsupportedAdapterError(
                f"adapter from {adapter.source}: tensor {key!r} is served and not trained; trained are the LoRAs "
                f"and DoRAs of this model's linears"
            )
        found.setdefault(path, {})[_SUFFIXES[suffix]] = key
    keys: dict[int, Keys] = {}
    for path, own in found.items():
        if indices[path] in keys:
            raise errors.UnsupportedAdapterError(
                f"adapter from {adapter.source}: it has weights for one shared module under several names, of which "
                f"{path} is one; that is not trained"
            )
        keys[indices[path]] = Keys(own["a"], own["b"], own.get("bias"), own.get("magnitude"))
    return dict(sorted(keys.items()))  # in the order of the model, not of the file: optimizers count parameters
