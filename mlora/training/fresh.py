"""A new adapter of a config: the modules that PEFT would choose, and the numbers that PEFT would draw.

PEFT makes a layer around one module after the other, in the order of `named_modules`, and draws for each `nn.Linear`'s
own first values of A and B before those of `init_lora_weights`. So the same seed gives the same start.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import errors
from ..adapters.adapter import Adapter
from ..lowering import BaseLinear
from ..lowering.targets import is_target, pattern_value, some, targets_of
from .eva import eva_start
from .trainable import check_config

_REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga")


def fresh(
    config: Any,
    model: nn.Module,
    bases: Mapping[str, BaseLinear],
    seed: int | None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
) -> Adapter:
    """The adapter that `peft.get_peft_model(model, config)` has after `torch.manual_seed(seed)`.

    Args:
        config: a `peft.LoraConfig`, or its fields as a mapping.
        model: the patched one. `bases`: what adapters can change of it.
        seed: None draws from torch's generator as it is.
        eva_state_dict: of a config with `init_lora_weights="eva"`, see `eva_start`.

    Raises:
        UnsupportedAdapterError: the config has an option that is not trained. AdapterError: it does not fit the model.
    """
    fields = _fields(config, model)
    init = _init_of(fields)
    check_config(fields, "config")
    names = _modules(fields, model, bases)
    starts: dict[str, Tensor] = {}
    if init == "eva":
        fields, starts = eva_start(fields, names, bases, eva_state_dict)
        names = [name for name in names if name in starts]
    elif eva_state_dict is not None:
        raise errors.AdapterError(f"config: init_lora_weights is {init!r}; eva_state_dict is of 'eva'")
    tensors: dict[str, Tensor] = {}
    with _seeded(seed):
        for name in names:
            base = bases[name]
            rank = pattern_value(fields.get("rank_pattern"), name, fields.get("r", 8))
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise errors.AdapterError(f"config: r of {name} is {rank!r}; it must be a positive integer")
            bias = bool(fields.get("lora_bias"))
            a, b = _drawn(init, base, rank, bias)
            parts = {"lora_A.weight": a.weight, "lora_B.weight": b.weight, "lora_B.bias": b.bias}
            # Rounded as PEFT does, which moves them to the base's dtype first.
            own = {part: tensor.detach().to(base.dtype) for part, tensor in parts.items() if tensor is not None}
            if fields.get("use_dora"):
                alpha = pattern_value(fields.get("alpha_pattern"), name, fields.get("lora_alpha", 8))
                scale = alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank)
                own["lora_magnitude_vector"] = _norm(base, own["lora_A.weight"], own["lora_B.weight"], scale)
            wide = torch.promote_types(base.dtype, torch.float32)
            tensors.update({f"{name}.{part}": tensor.to(wide) for part, tensor in own.items()})
            if name in starts:
                tensors[f"{name}.lora_A.weight"] = starts[name]
    return Adapter(fields, tensors, source="config")


def _fields(config: Any, model: nn.Module) -> dict[str, Any]:
    if not isinstance(config, Mapping) and not hasattr(config, "to_dict"):
        raise errors.AdapterError(
            f"add_adapter takes an mlora.Adapter, a peft.LoraConfig or its fields as a mapping, not {config!r}; "
            f"load_adapter reads files"
        )
    fields = dict(config if isinstance(config, Mapping) else config.to_dict())
    fields["peft_type"] = str(getattr(fields.get("peft_type"), "value", fields.get("peft_type") or ""))
    if fields.get("target_modules") is None:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        fields["target_modules"] = _usual_targets(kind)
    fields["base_model_name_or_path"] = fields.get("base_model_name_or_path") or getattr(model, "name_or_path", None)
    return fields


def _usual_targets(kind: Any) -> list[str]:
    try:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as usual
    except ImportError:
        usual = {}
    if kind not in usual:
        raise errors.AdapterError(f"config: target_modules is None, and PEFT has no usual ones for a model {kind!r}")
    return sorted(usual[kind])


def _init_of(fields: Mapping[str, Any]) -> bool | str:
    """How A and B start."""
    init = fields.get("init_lora_weights", True)
    if isinstance(init, bool):
        return init
    name = str(init).lower()
    if name in ("gaussian", "mica") or init in ("orthogonal", "eva"):  # PEFT takes the first two in any case
        return name
    why = "PEFT has none of that name"
    if name.startswith(_REWRITING):
        why = "it rewrites the base weights; make it with PEFT and load what it converts to a LoRA of the base"
    raise errors.UnsupportedAdapterError(f"config: option init_lora_weights={init!r} is not served: {why}")


def _modules(fields: Mapping[str, Any], model: nn.Module, bases: Mapping[str, BaseLinear]) -> list[str]:
    """Those that the config targets, in the order in which PEFT visits them."""
    paths = [name for name, _ in model.named_modules() if name]
    wanted = targets_of(fields, bases)
    if strange := [name for name in paths if name not in bases and is_target(fields, name)]:
        raise errors.AdapterError(
            f"config: its target_modules {fields.get('target_modules')!r} name {some(strange)}, which adapters cannot "
            f"change"
        )
    if other := [name for name in paths if name in wanted and not bases[name].linear]:
        raise errors.UnsupportedAdapterError(
            f"config: its target_modules {fields.get('target_modules')!r} name {some(other)}; adapters are trained on "
            f"linears only"
        )
    found = [name for name in paths if name in wanted]
    if not found:
        raise errors.AdapterError(
            f"config: its target_modules {fields.get('target_modules')!r} name no module of this model"
        )
    return found


def _drawn(init: Any, base: BaseLinear, rank: int, bias: bool) -> tuple[nn.Linear, nn.Linear]:
    """A and B as PEFT's `update_layer` makes them."""
    a, b = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=bias)
    if init is False:
        return a, b
    with torch.no_grad():
        if init == "orthogonal":
            if rank % 2:
                raise errors.AdapterError(f"config: r is {rank}; init_lora_weights='orthogonal' takes even ones")
            q, _ = torch.linalg.qr(torch.randn(rank, rank))
            a.weight.copy_(torch.randn(base.in_features, rank // 2).mm(q[0::2]).T / 10.0)
            b.weight.copy_(torch.randn(rank // 2, base.out_features).T.mm(q[1::2]) / 10.0)
            return a, b
        if init == "mica":
            if rank > min(base.in_features, base.out_features):
                raise errors.AdapterError(f"config: r is {rank} on {base.name}, beyond its widths; MiCA takes no more")
            u, _, _ = torch.linalg.svd(base.weight(), full_matrices=False)
            a.weight.zero_()
            b.weight.copy_(u[:, -rank:])
            return a, b
        if init == "gaussian":
            nn.init.normal_(a.weight, std=1 / rank)
        else:
            nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
        nn.init.zeros_(b.weight)
        if b.bias is not None:
            nn.init.zeros_(b.bias)
    return a, b


def _norm(base: BaseLinear, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The magnitude that a DoRA starts with: |W + s B A| by rows, as PEFT rounds it."""
    product = (b.float() @ a.float()).half() if base.dtype is torch.float16 else b @ a
    return torch.linalg.norm(base.weight().to(base.dtype) + scale * product, dim=1).to(base.dtype)


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Of torch's generator on the CPU, which goes on as if nothing was drawn where a seed is given."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
