"""LoRA of parameters (`target_parameters`): fused experts', other modules' own matrices, and linears' weights.

A parameter holds a matrix for each of E experts, W_e; the delta of each is s B_e A_e with s = alpha / r, or alpha /
sqrt(r) with rsLoRA. PEFT saves `lora_A.weight` as (E * r, in), expert by expert, and `lora_B.weight` as (out, r * E),
whose columns are strided by E: column j * E + e is B_e's column j (`ParamWrapper.get_delta_factors`).

A matrix is that of one expert, and the delta s B A is that of the parameter as it lies: as (out, in), or as (in, out)
where it is the weight of an embedding or of GPT-2's `Conv1D`, whose factors are therefore turned round here.
"""

from __future__ import annotations

from .. import errors
from .delta import Delta
from .module import Module, scaling

# Options that PEFT does not define here, and raises at.
_UNDEFINED = ("lora_bias", "use_dora", "kasa_config", "use_bdlora", "velora_config", "fan_in_fan_out", "lora_dropout")


def parameter_delta(module: Module) -> Delta:
    """The delta of one parameter: as many rank rows for each expert, those of the first expert first."""
    config, base, experts = module.config, module.base, module.base.experts or 1
    if option := next((option for option in _UNDEFINED if config.get(option)), None):
        raise errors.UnsupportedAdapterError(
            f"{module.where}: option {option}={config[option]!r} is not served with target_parameters, for which PEFT "
            f"does not define it"
        )
    if unserved := sorted(module.parts.keys() - {"lora_A", "lora_B"}):
        raise errors.AdapterError(f"{module.where}: a parameter has lora_A and lora_B; the file has {unserved[0]}")
    if base.aliases and module.parameter:
        raise errors.UnsupportedAdapterError(
            f"{module.where}: it is one module with {', '.join(base.aliases)}, which PEFT changes at one place only; "
            f"it is not served"
        )
    inputs, outputs = (base.out_features, base.in_features) if base.turned else (base.in_features, base.out_features)
    rank = module.integer("r", 8, "rank_pattern")
    a = module.part("lora_A", experts * rank, inputs)
    b = module.part("lora_B", outputs, rank * experts)
    scale = scaling(module, rank, "lora_alpha", rslora=bool(config.get("use_rslora")))
    if base.turned:
        return Delta(b.t(), a, scale if base.embed_scale is None else scale * base.embed_scale)
    return Delta(a, b.unflatten(1, (rank, experts)).permute(2, 1, 0).flatten(0, 1), scale)
