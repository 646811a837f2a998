"""LoRAs whose initialisation took a part out of the base weights, as LoRAs of the base as it was.

PiSSA  W' = W - s B0 A0, A0 = sqrt(S / s) V^T and B0 = U sqrt(S / s) of W's r largest singular triplets
                                                                       (Meng et al., arXiv:2404.02948)
OLoRA  W' = W - s Q R, of the first r columns of Q and rows of R of W = Q R   (Büyükakyüz, arXiv:2406.01775)

PEFT does this to the base whenever it makes or loads such an adapter, and saves A and B alone. What a row then gets is
W' + s B A, so the delta to the untouched base is s (B A - B0 A0): an exact LoRA of rank 2 r. Both are computed in fp32
of the base's weight, whatever its dtype, as PEFT does it. Singular vectors are known up to their signs, which cancel in
B0 A0.

Training moves A and B little, so s B A and s B0 A0 are large and nearly equal. The rank rows are therefore those of
(B - B0) A + B0 (A - A0), see `minus`. PEFT's own conversion ([B, -B0] [A; A0]) is the same delta, and loses more in 16
bits.

PEFT takes the weight of GPT-2's `Conv1D`, (in, out), for (out, in) in OLoRA; so does this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import errors
from ..adapters.adapter import Adapter
from .delta import minus
from .gather import gather
from .lora import LORA, factors, scale_of
from .module import Module
from .names import Names
from .targets import some

# What PEFT computes again, the same each time, when it loads such an adapter.
_RESTORED = ("pissa", "olora")

# Options under which it means something else to take a part out of the weight, or nothing.
_ALONE = ("kasa_config", "use_bdlora", "alora_invocation_tokens", "lora_bias", "target_parameters", "layer_replication")


def is_rewriting(config: Mapping[str, Any]) -> bool:
    """Whether it is the config of an adapter that `untouched` converts."""
    kind = str(getattr(config.get("peft_type"), "value", config.get("peft_type"))).upper()
    return kind == "LORA" and _init(config) in _RESTORED


def untouched(adapter: Adapter, names: Names) -> Adapter:
    """A PiSSA or OLoRA as it is saved, for the untouched base: a LoRA of twice its rank. Any other as it is.

    Raises:
        UnsupportedAdapterError: one of its options or modules has no such form. AdapterError: it does not fit.
    """
    config = adapter.config
    if not is_rewriting(config):
        return adapter
    init = _init(config)
    if option := next((option for option in _ALONE if config.get(option)), None):
        raise errors.UnsupportedAdapterError(
            f"adapter from {adapter.source}: option {option}={config[option]!r} is not served together with "
            f"init_lora_weights={init!r}, which PEFT does not define"
        )
    gathered = gather(adapter, LORA, names)
    if init == "olora" and (turned := [name for name in gathered.missing if names.bases[name].turned]):
        raise errors.AdapterError(
            f"adapter from {adapter.source}: it has no weights for {some(turned)}, which its config targets, and where "
            f"PEFT's OLoRA would change the result"
        )
    tensors = dict(adapter.tensors)
    for module in gathered.modules:
        if module.parts.keys() & {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"}:
            _check(module, adapter, init)
            a, b = _difference(module, init)
            tensors[f"{module.file}.lora_A.weight"] = a
            tensors[f"{module.file}.lora_B.weight"] = b
    return Adapter(_doubled(config), tensors, adapter.source, adapter.ignored)


def _init(config: Mapping[str, Any]) -> Any:
    """`init_lora_weights`, of which PEFT reads OLoRA's in whichever case."""
    init = config.get("init_lora_weights")
    return "olora" if isinstance(init, str) and init.lower() == "olora" else init


def _check(module: Module, adapter: Adapter, init: str) -> None:
    base, option = module.base, f"option init_lora_weights={init!r}"
    if not base.linear:
        raise errors.UnsupportedAdapterError(f"{module.where}: {option} is served on linears only, as in PEFT")
    if base.turned is None:
        raise errors.UnsupportedAdapterError(
            f"{module.where}: {option} takes a part out of its weight, which is quantized or no plain linear's: what "
            f"PEFT leaves of it depends on how it is quantized again. Save the adapter with PEFT's "
            f"path_initial_model_for_weight_conversion, which turns it into a plain LoRA"
        )
    if base.tied or base.aliases:
        raise errors.UnsupportedAdapterError(
            f"{module.where}: {option} takes a part out of its weight, which in PEFT is taken out of "
            f"{some(sorted((*base.tied, *base.aliases)))} too: they are one. Save the adapter with PEFT's "
            f"path_initial_model_for_weight_conversion, which turns it into a plain LoRA"
        )
    if module.config is not adapter.config:
        raise errors.UnsupportedAdapterError(
            f"{module.where}: {option} is not served for linears that became one module in this model, whose weight "
            f"has other singular vectors"
        )


def _difference(module: Module, init: str) -> tuple[Tensor, Tensor]:
    """A, (2 r, in), and B, (out, 2 r), of B A - B0 A0, in fp32."""
    a, b = (factor.float() for factor in factors(module))
    rank = a.shape[0]
    module.expect("lora_A has rank", rank, module.integer("r", 8, "rank_pattern"))
    scale = scale_of(module, rank)
    if not scale > 0:
        raise errors.AdapterError(f"{module.where}: its scaling is {scale}; init_lora_weights={init!r} divides by it")
    a0, b0 = _principal(module, rank, scale) if init == "pissa" else _orthogonal(module, rank)
    if a0.shape != a.shape or b0.shape != b.shape:
        raise errors.AdapterError(
            f"{module.where}: its factors have shapes {tuple(b.shape)} and {tuple(a.shape)}, and what "
            f"init_lora_weights={init!r} makes of its weight {tuple(b0.shape)} and {tuple(a0.shape)}"
        )
    rows, columns = minus(a, b.t(), a0, b0.t())
    return rows, columns.t().contiguous()


def _principal(module: Module, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(module.base.weight(), full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def _orthogonal(module: Module, rank: int) -> tuple[Tensor, Tensor]:
    weight = module.base.weight()
    if module.base.turned:
        q, r = torch.linalg.qr(weight.t())
        return q[:, :rank].t(), r[:rank].t()
    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]


def _doubled(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a LoRA of twice the rank with the same scalings."""
    more = math.sqrt(2) if config.get("use_rslora") else 2
    return {
        **config,
        "init_lora_weights": True,
        "r": _times(2, config.get("r", 8)),
        "lora_alpha": _times(more, config.get("lora_alpha", 8)),
        "rank_pattern": {key: _times(2, value) for key, value in (config.get("rank_pattern") or {}).items()},
        "alpha_pattern": {key: _times(more, value) for key, value in (config.get("alpha_pattern") or {}).items()},
    }


def _times(factor: float, value: Any) -> Any:
    """What is no number is left to be refused by name."""
    return factor * value if type(value) in (int, float) else value
