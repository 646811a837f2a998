"""Adapters that other trainers save without a config: kohya-ss, LyCORIS, and diffusers before it wrote one.

Each module is a LoRA, a LoHa or a LoKr by its keys, with scale alpha / r from a tensor `alpha`, or 1 where there
is none. A convolution's LoRA may have a core between its factors, `lora_mid` of (r, r, *kernel); those are 1x1 then.
kohya and LyCORIS name a module `lora_unet_down_blocks_0_...`: its path with underscores for dots.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from .. import errors
from . import loha, lokr
from .delta import Delta, Dense
from .module import Format, Lowering, Module
from .names import Names

PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_transformer_", "lycoris_")
COMPONENTS = (
    "unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3.",  # diffusers
    "diffusion_model.", "model.diffusion_model.",  # ComfyUI
    *(f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl")),
)  # fmt: skip

_UNTOLD = (
    "the header of the file tells it and no tensor does; some programs scale by alpha / r then and some do not. Add a "
    "tensor '<module>.alpha' to each module, or take a scale of 1"
)

FORMAT = Format(
    parts={
        "lora_down.weight": "lora_A",
        "lora_up.weight": "lora_B",
        "lora.down.weight": "lora_A",
        "lora.up.weight": "lora_B",
        "lora_mid.weight": "lora_mid",
        "lora_linear_layer.down.weight": "lora_A",
        "lora_linear_layer.up.weight": "lora_B",
        "lora_A.weight": "lora_A",
        "lora_B.weight": "lora_B",
        "alpha": "alpha",
        **loha.FORMAT.parts,
        **lokr.FORMAT.parts,
    },
    numbers={"alpha"},
    notes=dict.fromkeys(("ss_network_alpha", "alpha", "lora_alpha"), _UNTOLD),
    convs={1, 2, 3},
)


def component(key: str) -> str:
    """Which model of a pipeline a tensor or module is of, by the start of its name; "" where that does not say."""
    return next((start for start in (*PREFIXES, *COMPONENTS) if key.startswith(start)), "")


def names(saved: Iterable[str], model: Names) -> dict[str, str]:
    """The model's name of each module, where there is one."""
    known = sorted(model.bases)
    flat = _flat({base: base for base in known})
    former: dict[str, str] | None = None
    found = {}
    for name in saved:
        dotted = next((name[len(c) :] for c in COMPONENTS if name.startswith(c)), name)
        bare = next((name[len(p) :] for p in PREFIXES if name.startswith(p)), name).replace("_orig_mod_", "")
        here = next((n for n in (name, dotted, flat.get(bare), model.find(dotted)) if n in model.bases), None)
        if here is None:  # its names may have changed
            former = _flat({old: base for base in known for old in model.former(base)}) if former is None else former
            here = former.get(bare)
        found[name] = here or name
    return found


def _flat(names: Mapping[str, str]) -> dict[str, str]:
    """Each name with underscores for dots -> what it names; "" for those that several have, which no file can tell
    apart."""
    flat: dict[str, str] = {}
    for name, base in names.items():
        if flat.setdefault(name.replace(".", "_"), base) != base:
            flat[name.replace(".", "_")] = ""
    return flat


def delta(module: Module) -> Delta | Dense:
    """The delta of one module."""
    parts = module.parts
    if {"lora_A", "lora_B", "lora_mid"} & parts.keys():
        return _lora(module)
    if any(part.startswith("hada") for part in parts):
        rank = module.part("hada_w1_b", None, None).shape[0]
        return loha.hadamard(module, rank, _scale(module, rank))
    if any(part.startswith("lokr") for part in parts):
        factor = next((part for part in ("lokr_w1_b", "lokr_w2_b") if part in parts), None)
        # LyCORIS leaves two full factors unscaled, whatever alpha says.
        return lokr.kronecker(
            module, 1.0 if factor is None else _scale(module, module.part(factor, None, None).shape[0])
        )
    raise errors.AdapterError(f"{module.where}: it has an alpha and no weights")


def _lora(module: Module) -> Delta:
    base, point = module.base, (1,) * len(module.base.kernel)
    if "lora_mid" in module.parts:
        if base.conv is None:
            raise errors.AdapterError(
                f"{module.where}: it has lora_mid, a convolution's, and is a linear in this model"
            )
        down = module.matrix("lora_A", None, base.channels)
        core = module.part("lora_mid", None, down.shape[0], *base.kernel).flatten(2)
        a = torch.einsum("ijk,jc->ick", core.double(), down.double()).flatten(1).float()
    else:
        a = _pointwise(module, "lora_A", base.kernel).matrix("lora_A", None, base.channels, base.kernel)
    b = _pointwise(module, "lora_B", point).matrix("lora_B", base.out_features, a.shape[0])
    return Delta(a, b.t(), _scale(module, a.shape[0]))


def _pointwise(module: Module, part: str, kernel: tuple[int, ...]) -> Module:
    """The module with a part that has no more than a matrix in it laid out as its base's kernel is: files made for a
    1x1 convolution fit the linear that is in its place in another version of a model, and the other way round."""
    tensor = module.parts.get(part)
    if tensor is None or tensor.dim() < 2 or math.prod((*kernel, *tensor.shape[2:])) != 1:
        return module
    return replace(module, parts={**module.parts, part: tensor.reshape(*tensor.shape[:2], *kernel)})


def _scale(module: Module, rank: int) -> float:
    if "alpha" not in module.parts:
        return 1.0
    alpha = module.parts["alpha"]
    if alpha.numel() != 1:
        raise errors.AdapterError(f"{module.where}: alpha has shape {tuple(alpha.shape)}; it must be one number")
    return float(alpha) / rank


LYCORIS = Lowering(FORMAT, delta, names)
