"""LoRA of fused experts' parameters (`target_parameters`).

A parameter holds a matrix for each of E experts, W_e; the delta of each is s B_e A_e with s = alpha / r, or alpha /
sqrt(r) with rsLoRA. PEFT saves `lora_A.weight` as (E * r, in), expert by expert, and `lora_B.weight` as (out, r * E),
whose columns are strided by E: column j * E + e is B_e's column j (`ParamWrapper.get_delta_factors`).
"""

from __future__ import annotations

from .. import errors
from .delta import Delta
from .module import Module, scaling

# Options that PEFT does not define here, and raises at.
_UNDEFINED = ("lora_bias", "use_dora", "kasa_config", "use_bdlora", "velora_config", "fan_in_fan_out", "lora_dropout")


def expert_delta(module: Module) -> Delta:
    """The delta of one parameter: as many rank rows for each expert, those of the first expert first."""
    config, experts = module.config, module.base.experts
    if option := next((option for option in _UNDEFINED if config.get(option)), None):
        raise errors.UnsupportedAdapterError(
            f"{module.where}: option {option}={config[option]!r} is not served with target_parameters, for which PEFT "
            f"does not define it"
        )
    if unserved := sorted(module.parts.keys() - {"lora_A", "lora_B"}):
        raise errors.AdapterError(f"{module.where}: a parameter has lora_A and lora_B; the file has {unserved[0]}")
    rank = module.integer("r", 8, "rank_pattern")
    a = module.part("lora_A", experts * rank, module.base.in_features)
    b = module.part("lora_B", module.base.out_features, rank * experts)
    scale = scaling(module, rank, "lora_alpha", rslora=bool(config.get("use_rslora")))
    return Delta(a, b.unflatten(1, (rank, experts)).permute(2, 1, 0).flatten(0, 1), scale)
