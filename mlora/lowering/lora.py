"""LoRA with rsLoRA, DoRA, rank and alpha patterns and `lora_bias`.

    LoRA    dW = s B A, s = alpha / r          (Hu et al., arXiv:2106.09685)
    rsLoRA  s = alpha / sqrt(r)                (Kalajdzievski, arXiv:2312.03732)
    DoRA    W' = m (W + s B A) / |W + s B A|   (Liu et al., arXiv:2402.09353), rows of (out, in)

In PEFT's layout `lora_A.weight` is (r, in) and `lora_B.weight` is (out, r), for `nn.Linear` and for
GPT-2's `Conv1D` alike, so `fan_in_fan_out` only says how the base weight lies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import errors
from ..adapter import Adapter
from .delta import BaseLinear, Delta
from .targets import is_target, pattern_value

_PARTS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_B.bias": "bias",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "base_layer.weight": "copy",  # PEFT adds the base weight of a targeted lm_head
}

# Options that this lowering reads.
_HONOURED = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias", "fan_in_fan_out",
    "init_lora_weights",
}  # fmt: skip

# Options that do not change what a trained adapter computes: bookkeeping, training, initialisation.
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "task_type", "inference_mode",
    "lora_dropout", "megatron_core", "runtime_config", "eva_config", "corda_config", "loftq_config",
    "lora_ga_config", "qalora_group_size", "use_qalora", "velora_config", "monteclora_config",
    "ensure_weight_tying",
}  # fmt: skip

_FLOAT32_MAX = torch.finfo(torch.float32).max

# Initialisations that leave the base weights alone; the others rewrite them.
_PLAIN_INITS = {True, False, None, "gaussian", "eva", "orthogonal", "mica"}


def lower_lora(adapter: Adapter, bases: Mapping[str, BaseLinear]) -> dict[str, Delta]:
    """Lower a LoRA adapter. See `mlora.lowering.lower`."""
    config = adapter.config
    _refuse_options(adapter)
    modules = _group(adapter)
    _check_targets(adapter, modules, bases)
    deltas = {}
    for name, parts in modules.items():
        base = bases[name]
        where = f"adapter from {adapter.source}, module {name}"
        _check_shapes(where, parts, base)
        for option, part in (("lora_bias", "bias"), ("use_dora", "magnitude")):
            if bool(config.get(option)) != (part in parts):
                state = "has no" if config.get(option) else "has a"
                raise errors.AdapterError(f"{where}: {option} is {config.get(option)!r} but it {state} {part} tensor")
        if "copy" in parts and not torch.equal(parts["copy"].float(), base.weight()):
            raise errors.AdapterError(
                f"{where}: the file has its own copy of the base weight, of shape {tuple(parts['copy'].shape)}, which "
                f"is not this model's ({base.out_features}, {base.in_features}); was it made for another base?"
            )
        rank = parts["A"].shape[0]
        wanted = pattern_value(config.get("rank_pattern"), name, config.get("r", 8))
        if rank != wanted:
            raise errors.AdapterError(f"{where}: lora_A has rank {rank}, its config says {wanted!r}")
        alpha = pattern_value(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) <= _FLOAT32_MAX:
            raise errors.AdapterError(f"{where}: alpha is {alpha!r}; it must be a finite number of fp32's range")
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        deltas[name] = _dora(parts, base, scale) if config.get("use_dora") else _plain(parts, scale)
    return deltas


def _plain(parts: dict[str, Tensor], scale: float) -> Delta:
    shift = parts["bias"].float() * scale if "bias" in parts else None
    return Delta(parts["A"], parts["B"].t(), scale, shift=shift)


def _dora(parts: dict[str, Tensor], base: BaseLinear, scale: float) -> Delta:
    """y = base + (g-1)(base - bias) + g s B A x with g = m / |W + s B A|, as PEFT computes it."""
    a, b = parts["A"].float(), parts["B"].float()
    norm = torch.linalg.vector_norm(torch.addmm(base.weight(), b, a, alpha=scale), dim=1)
    if not (norm > 0).all():
        raise errors.AdapterError(f"module {base.name}: DoRA divides by a zero row norm of W + s B A")
    gain = parts["magnitude"].float() / norm
    bias = base.bias()
    shift = None if bias is None else (1 - gain) * bias
    return Delta(a, (b * gain[:, None]).t(), scale, gain=gain - 1, shift=shift)


def _refuse_options(adapter: Adapter) -> None:
    config = adapter.config

    def refuse(option: str, why: str) -> errors.UnsupportedAdapterError:
        return errors.UnsupportedAdapterError(
            f"adapter from {adapter.source}: option {option}={config[option]!r} is not served: {why}"
        )

    for option, value in config.items():
        if option in _HONOURED or option in _NEUTRAL or value in (None, False, {}, []):
            continue
        raise refuse(option, "it may change what the adapter computes and mlora does not implement it")
    if config.get("bias", "none") != "none":
        raise refuse("bias", "trained base biases are not served yet; only bias='none' is")
    init = config.get("init_lora_weights", True)
    if isinstance(init, (dict, list)) or init not in _PLAIN_INITS:
        raise refuse(
            "init_lora_weights",
            "this initialisation rewrites the base weights; save the adapter with PEFT's "
            "path_initial_model_for_weight_conversion, which turns it into a plain LoRA",
        )
    if config.get("use_dora") and config.get("lora_bias"):
        raise refuse("lora_bias", "PEFT does not define it together with use_dora")
    rank = config.get("r", 8)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise errors.AdapterError(f"adapter from {adapter.source}: r is {rank!r}; it must be a positive integer")
    for option in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(option) or {}, dict):
            raise errors.AdapterError(f"adapter from {adapter.source}: {option} must be an object")


def _group(adapter: Adapter) -> dict[str, dict[str, Tensor]]:
    """Module path -> its tensors by part; every key must be one that this lowering understands."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in adapter.tensors.items():
        for suffix, part in _PARTS.items():
            if key.endswith("." + suffix):
                if not tensor.is_floating_point():
                    raise errors.AdapterError(
                        f"adapter from {adapter.source}: {key} is {tensor.dtype}; it must be floating-point"
                    )
                modules.setdefault(key[: -len(suffix) - 1], {})[part] = tensor
                break
        else:
            what = "embedding LoRA" if "lora_embedding_" in key else "a trained copy of a base weight, or unknown"
            raise errors.UnsupportedAdapterError(
                f"adapter from {adapter.source}: tensor {key!r} is left over ({what}); it is not served"
            )
    return modules


def _check_targets(adapter: Adapter, modules: Mapping[str, dict[str, Tensor]], bases: Mapping[str, BaseLinear]) -> None:
    config = adapter.config
    if missing := [name for name in modules if name not in bases]:
        raise errors.AdapterError(
            f"adapter from {adapter.source}: it has weights for {_some(missing)}, which this model has no linear "
            f"for; was it made for another base? (its config names {config.get('base_model_name_or_path')!r})"
        )
    targets = config.get("target_modules")
    if targets is None or targets == "all-linear":
        return  # resolved by PEFT when it was trained: the tensors say which
    if not isinstance(targets, (str, list, tuple, set)):
        raise errors.AdapterError(f"adapter from {adapter.source}: target_modules is {targets!r}")
    wanted = {name for name in bases if is_target(config, name)}
    if left := [name for name in modules if name not in wanted]:
        raise errors.AdapterError(
            f"adapter from {adapter.source}: it has weights for {_some(left)}, which its target_modules "
            f"{targets!r} do not name"
        )
    if lacking := sorted(wanted - modules.keys()):
        raise errors.AdapterError(
            f"adapter from {adapter.source}: its target_modules {targets!r} name {_some(lacking)}, "
            "for which it has no weights"
        )


def _check_shapes(where: str, parts: dict[str, Tensor], base: BaseLinear) -> None:
    wanted: dict[str, Any] = {"A": ("lora_A", 1, base.in_features), "B": ("lora_B", 0, base.out_features)}
    for part, (label, axis, width) in wanted.items():
        if part not in parts:
            raise errors.AdapterError(f"{where}: {label} is missing")
        if parts[part].dim() != 2:
            raise errors.AdapterError(f"{where}: {label} has shape {tuple(parts[part].shape)}; it must be a matrix")
        if parts[part].shape[axis] != width:
            axis_name = "columns" if axis == 1 else "rows"
            raise errors.AdapterError(
                f"{where}: {label} has {parts[part].shape[axis]} {axis_name}, the module takes {width}"
            )
    if parts["A"].shape[0] != parts["B"].shape[1] or parts["A"].shape[0] == 0:
        raise errors.AdapterError(
            f"{where}: lora_A has rank {parts['A'].shape[0]}, lora_B has rank {parts['B'].shape[1]}; "
            "they must be equal and positive"
        )
    for part, label in (("bias", "lora_B.bias"), ("magnitude", "lora_magnitude_vector")):
        if part in parts and parts[part].shape != (base.out_features,):
            raise errors.AdapterError(
                f"{where}: {label} has shape {tuple(parts[part].shape)}; it must be ({base.out_features},)"
            )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
