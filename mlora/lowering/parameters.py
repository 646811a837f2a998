"""LoRA of parameters (`target_parameters`): fused experts', other modules' own matrices, and linears' weights.

A parameter holds a matrix for each of E experts, W_e; the delta of each is s B_e A_e with s = alpha / r, or alpha /
sqrt(r) with rsLoRA. PEFT saves `lora_A.weight` as (E * r, in), expert by expert, and `lora_B.weight` as (out, r * E),
whose columns are strided by E: column j * E + e is B_e's column j (`ParamWrapper.get_delta_factors`). That is so from
PEFT 0.19.1 on. Before, `lora_A` could be as wide as the outputs, and `lora_B` as the inputs, so that the very same W_e
changes by s A_e^T B_e^T, as (out, in):

    parameters that lie as    (E, out, in)   (E, in, out): those of a module that `is_transposed`
    0.17 and 0.18             out            in            as wide as its first dimension, whatever lies there
    0.19.0                    out            out           `update_layer` exchanged the two where it should not
    0.19.1 and later          in             in            is what `lora_A` is as wide as (`ParamWrapper.update_layer`)

A matrix is that of one expert, and the delta s B A is that of the parameter as it lies: as (out, in), or as (in, out)
where it is the weight of an embedding or of GPT-2's `Conv1D`, whose factors are therefore turned round here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from packaging.version import InvalidVersion, Version
from torch import Tensor

from .. import errors
from ..adapters.adapter import Adapter
from .delta import BaseLinear, Delta
from .module import Module, scaling
from .targets import some

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
    if module.swapped:
        inputs, outputs = outputs, inputs
    a = module.part("lora_A", experts * rank, inputs)
    b = module.part("lora_B", outputs, rank * experts)
    scale = scaling(module, rank, "lora_alpha", rslora=bool(config.get("use_rslora")))
    if base.turned:
        return Delta(b.t(), a, scale if base.embed_scale is None else scale * base.embed_scale)
    b = b.unflatten(1, (rank, experts)).permute(2, 1, 0).flatten(0, 1)
    return Delta(b, a, scale) if module.swapped else Delta(a, b, scale)


def swapped_in(
    adapter: Adapter, modules: Mapping[str, Mapping[str, Tensor]], bases: Mapping[str, BaseLinear]
) -> set[str]:
    """The parameters of experts whose factors lie the other way round. Widths tell, of any one of the adapter for all
    that lie alike in the model; where all are square the version of PEFT does.

    Raises:
        AdapterError: they are, and the config does not say which version wrote it.
    """
    swapped = set()
    for transposed in (False, True):
        alike = [n for n in modules if n in bases and bases[n].experts > 1 and bases[n].transposed == transposed]
        if not alike:
            continue
        fitting = {False, True}
        for name in alike:
            fitting &= _fitting(modules[name], bases[name])
        if len(fitting) > 1:
            fitting = _swapped_by(adapter.config.get("peft_version"), transposed)
        if len(fitting) > 1:
            raise errors.AdapterError(
                f"adapter from {adapter.source}: the matrices of {some(alike)} are square, and which way round its "
                f"factors lie there depends on the version of PEFT that wrote them: up to 0.18, 0.19.0, or from 0.19.1 "
                f"on. Its peft_version is {adapter.config.get('peft_version')!r}, which does not tell; put the right "
                f"one into its config (0.17, which target_parameters came with, wrote none)"
            )
        if fitting == {True}:
            swapped.update(alike)
    return swapped


def _fitting(parts: Mapping[str, Tensor], base: BaseLinear) -> set[bool]:
    """Whether the factors can be swapped, by their widths; both where they fit neither way, which is refused later."""
    a, b = parts.get("lora_A"), parts.get("lora_B")
    if a is None or b is None or a.dim() != 2:
        return {False, True}
    seen, widths = (a.shape[1], b.shape[0]), (base.in_features, base.out_features)
    return {swapped for swapped in (False, True) if seen == (widths[::-1] if swapped else widths)} or {False, True}


def _swapped_by(version: Any, transposed: bool) -> set[bool]:
    """Whether that version of PEFT swaps the factors; a development version may be of either side of a change."""
    early, between, late = not transposed, True, False
    try:
        seen = Version(str(version).partition("@")[0])
    except InvalidVersion:
        return {early, between, late}
    if seen.is_devrelease and Version("0.18.0") < seen < Version("0.19.0"):
        return {early, between}
    if seen.is_devrelease and Version("0.19.0") < seen < Version("0.19.1"):
        return {between, late}
    if seen < Version("0.19.0"):
        return {early}
    return {between} if seen < Version("0.19.1") else {late}
