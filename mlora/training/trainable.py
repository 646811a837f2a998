"""Which adapters can be trained, and which of their tensors belong to which module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .. import errors
from ..adapters.adapter import Adapter
from ..adapters.keys import PEFT_PREFIX
from ..gradients.parts import Keys
from ..lowering import BaseLinear, Delta, Names, is_rewriting
from ..lowering.targets import saved_by

# Options that do not change how an adapter is trained, or that training honours: of every type, and of each.
_ANY = frozenset((
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern",
    "layers_to_transform", "modules_to_save", "peft_type", "peft_version", "revision", "target_modules", "task_type",
))  # fmt: skip
_TRAINED = {
    "LORA": _ANY | {
        "alpha_pattern", "eva_config", "init_lora_weights", "lora_alpha", "lora_bias", "lora_dropout",
        "megatron_core",
        "qalora_group_size", "r", "rank_pattern", "runtime_config", "trainable_token_indices", "use_dora", "use_rslora",
    },
    "IA3": _ANY | {"feedforward_modules", "init_ia3_weights"},
}  # fmt: skip

# What tensors are called -> the kind that a module has by them, and their names there (`gradients.parts`).
_SUFFIXES = {
    ".lora_A.weight": ("lora", "a"),
    ".lora_B.weight": ("lora", "b"),
    ".lora_B.bias": ("lora", "bias"),
    ".lora_magnitude_vector": ("lora", "magnitude"),
    ".lora_magnitude_vector.weight": ("lora", "magnitude"),
    ".lora_embedding_A": ("lora", "a"),
    ".lora_embedding_B": ("lora", "b"),
    ".token_adapter.trainable_tokens_delta": ("tokens", "tokens"),
    ".ia3_l": ("gain", "gain"),
    ".weight": ("saved", "weight"),
    ".bias": ("saved", "bias"),
}
_COPY = ".base_layer.weight"  # of the base's, which PEFT saves with a head that it targets
_VECTOR = "lora_magnitude_vector"  # as files have it; in a model it is a module with a weight


def check_config(config: Mapping[str, Any], source: str) -> None:
    """Raise `UnsupportedAdapterError` unless an adapter of this config can be trained."""
    kind = str(getattr(config["peft_type"], "value", config["peft_type"])).upper()
    if kind not in _TRAINED:
        raise errors.UnsupportedAdapterError(
            f"adapter from {source}: peft_type {kind!r} is served and not trained; trained are LORA and IA3 adapters"
        )
    if is_rewriting(config):
        raise errors.UnsupportedAdapterError(
            f"adapter from {source}: option init_lora_weights={config['init_lora_weights']!r} is not trained: the base "
            f"that it is trained on was rewritten; load it without is_trainable to serve it"
        )
    chance = config.get("lora_dropout") or 0.0
    if not 0 <= chance < 1:
        raise errors.AdapterError(f"adapter from {source}: lora_dropout is {chance!r}, must be in [0, 1)")
    for option, value in config.items():
        if option in _TRAINED[kind] or value in (None, False, 0, "none", {}, []):
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
    found: dict[str, tuple[str, dict[str, str]]] = {}
    for key in adapter.tensors:
        if key.endswith(_COPY):
            continue
        suffix = next((suffix for suffix in _SUFFIXES if key.endswith(suffix)), "")
        name = key.removesuffix(suffix)
        path = names.find(name)
        kind, part = _SUFFIXES.get(suffix, ("", ""))
        if kind == "saved" and saved_by(adapter.config, name) is None and path in deltas and deltas[path].is_empty:
            continue  # saved along, and the base's
        if not kind or path not in deltas or not _is_trained(kind, part, deltas[path], bases[path], adapter, name):
            raise errors.UnsupportedAdapterError(
                f"adapter from {adapter.source}: tensor {key!r} is served and not trained; trained are LoRAs of this "
                f"model's linears and token embeddings, DoRAs and IA3 of its linears, its tokens, and whole linears, "
                f"token embeddings and norms of the model's own sizes"
            )
        _check_norm(bases[path], kind, adapter.source)
        found.setdefault(path, (kind, {}))[1][part] = key
    keys: dict[int, Keys] = {}
    for path, (kind, own) in found.items():
        if indices[path] in keys:
            raise errors.UnsupportedAdapterError(
                f"adapter from {adapter.source}: it has weights for one shared module under several names, of which "
                f"{path} is one; that is not trained"
            )
        kind = "dora" if "magnitude" in own else "norm" if bases[path].offset is not None else kind
        keys[indices[path]] = Keys(kind, own, _tokens(deltas[path], bases[path]) if kind == "tokens" else ())
    for path in [path for path, (kind, _) in found.items() if kind == "tokens"]:
        for other in bases[path].tied if bases[path].embed_scale is not None else ():
            if other in deltas and other not in found:
                keys[indices[other]] = Keys("tokens", found[path][1], _tokens(deltas[other], bases[other]))
    if left := [path for path, delta in deltas.items() if not delta.is_empty and indices[path] not in keys]:
        raise errors.UnsupportedAdapterError(
            f"adapter from {adapter.source}: what it does to {left[0]} is served and not trained"
        )
    return dict(sorted(keys.items()))  # in the order of the model, not of the file: optimizers count parameters


def peft_name(key: str, adapter_name: str, config: Mapping[str, Any]) -> str:
    """What a `PeftModel` calls the parameter that files have under `key`."""
    module, _, part = (f"{key}.weight" if key.endswith(_VECTOR) else key).rpartition(".")
    if part not in ("weight", "bias"):
        return f"{PEFT_PREFIX}{key}.{adapter_name}"
    if (saved := saved_by(config, module)) is not None and not module.endswith((".lora_A", ".lora_B", f".{_VECTOR}")):
        inner = f"{module}.{part}".removeprefix(f"{saved}.")
        return f"{PEFT_PREFIX}{saved}.modules_to_save.{adapter_name}.{inner}"
    return f"{PEFT_PREFIX}{module}.{adapter_name}.{part}"


def _is_trained(kind: str, part: str, delta: Delta, base: BaseLinear, adapter: Adapter, name: str) -> bool:
    """Whether that is a kind of parameter that the module can have."""
    if delta.is_empty or delta.replaces:
        return False
    embeds = base.embed_scale is not None
    if kind == "saved":
        whole = base.offset is not None or ((base.linear or embeds) and base.turned is not None)
        return saved_by(adapter.config, name) is not None and whole
    if kind == "gain":
        return base.linear
    if kind == "lora":
        return base.linear or (embeds and part in ("a", "b"))
    return True


def _check_norm(base: BaseLinear, kind: str, source: str) -> None:
    if kind == "saved" and base.offset is not None and not (base.weight() + base.offset).all():
        raise errors.UnsupportedAdapterError(
            f"adapter from {source}, module {base.name}: this model's norm has zeros among its weights, from which no "
            f"factor leads to trained ones; it is not trained"
        )


def _tokens(delta: Delta, base: BaseLinear) -> tuple[int, ...]:
    """Those that are trained, of the one-hot factor."""
    one_hot: Tensor | None = delta.a if base.embed_scale is not None else delta.b
    assert one_hot is not None
    return tuple(one_hot.argmax(dim=1).tolist())
