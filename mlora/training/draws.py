"""The numbers with which PEFT starts an adapter's layer around one module, drawn from torch's generator."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import errors
from ..lowering import BaseLinear
from ..lowering.ia3 import is_feedforward
from ..lowering.targets import pattern_value


def drawn(fields: Mapping[str, Any], base: BaseLinear, init: bool | str) -> dict[str, Tensor]:
    """The tensors of a module that a config targets, by what follows its name in files: for `nn.Linear` A and B their
    own first values, and then those of `init`, the config's `init_lora_weights`."""
    if fields["peft_type"].upper() == "IA3":
        gain = torch.randn((1, base.in_features) if is_feedforward(fields, base.name) else (base.out_features, 1))
        return {"ia3_l": gain.fill_(1.0) if fields.get("init_ia3_weights", True) else gain}
    rank = pattern_value(fields.get("rank_pattern"), base.name, fields.get("r", 8))
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise errors.AdapterError(f"config: r of {base.name} is {rank!r}; it must be a positive integer")
    if base.embed_scale is not None:
        return _embedding(fields, base, init, rank)
    a, b = _linear(init, base, rank, bool(fields.get("lora_bias")))
    parts = {"lora_A.weight": a.weight, "lora_B.weight": b.weight, "lora_B.bias": b.bias}
    own = {part: tensor.detach() for part, tensor in parts.items() if tensor is not None}
    if fields.get("use_dora"):
        alpha = pattern_value(fields.get("alpha_pattern"), base.name, fields.get("lora_alpha", 8))
        scale = alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank)
        own["lora_magnitude_vector"] = _norm(base, own["lora_A.weight"], own["lora_B.weight"], scale)
    return own


def _embedding(fields: Mapping[str, Any], base: BaseLinear, init: bool | str, rank: int) -> dict[str, Tensor]:
    unserved = [option for option in ("use_dora", "lora_bias") if fields.get(option)]
    if unserved or init in ("mica", "eva"):
        option = unserved[0] if unserved else f"init_lora_weights={init!r}"
        raise errors.UnsupportedAdapterError(f"config: option {option} is not trained on {base.name}, an embedding")
    a, b = torch.randn(rank, base.in_features), torch.randn(base.out_features, rank)
    if init is not False:
        a.zero_()
        nn.init.normal_(b)
    return {"lora_embedding_A": a, "lora_embedding_B": b}


def _linear(init: bool | str, base: BaseLinear, rank: int, bias: bool) -> tuple[nn.Linear, nn.Linear]:
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
    """The magnitude that a DoRA starts with: |W + s B A| by rows, as PEFT rounds it, of factors in the base's dtype."""
    a, b = a.to(base.dtype), b.to(base.dtype)
    product = (b.float() @ a.float()).half() if base.dtype is torch.float16 else b @ a
    return torch.linalg.norm(base.weight().to(base.dtype) + scale * product, dim=1).to(base.dtype)
