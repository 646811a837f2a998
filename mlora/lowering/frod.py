"""FRoD: W' = U (S + diag(l)) V^T   (doi.org/10.1609/aaai.v40i31.39813), S sparse and l the lengths of U's columns
before training, so that U diag(l) V^T was W.

V, and the places of S's values, are shared by all modules of one role and are in the file. U is computed from V and W
in fp64 and kept in fp32, as PEFT does it. All of l is trained, so the delta has full rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import errors
from .delta import Dense
from .module import Format, Lowering, Module

FORMAT = Format(
    parts={"frod_lambda_l": "frod_lambda_l", "frod_lambda_s_values": "frod_lambda_s_values"},
    honoured={"save_projection"},
    neutral={
        "frod_dropout", "projection_prng_key", "sparse_rate", "regularization_alpha", "progressbar",
        "runtime_offload_base_weight", "init_weights",
    },
    families={f"base_model.{part}.": f"{part}." for part in ("frod_V", "frod_s_indices", "frod_s_size")},
    integers={"frod_s_indices.", "frod_s_size."},
)  # fmt: skip


def delta(module: Module) -> Dense:
    """The delta of one module."""
    if not module.config.get("save_projection", True):
        raise errors.UnsupportedAdapterError(
            f"adapter from {module.source}: option save_projection=False is not served: V is not in the file, and what "
            f"PEFT decomposes the base weights to depends on the machine; save the adapter with save_projection=True"
        )
    base, role = module.base, _role(module.file)
    width = base.in_features
    lengths, values = module.part("frod_lambda_l", width), module.parts["frod_lambda_s_values"].float()
    basis = module.whole(f"frod_V.{role}", width, width)
    places = module.shared.get(f"frod_s_indices.{role}", torch.zeros(2, 0, dtype=torch.long)).long()
    if tuple(places.shape) != (2, *values.shape) or (places.numel() and not 0 <= places.min() <= places.max() < width):
        raise errors.AdapterError(
            f"{module.where}: frod_s_indices have shape {tuple(places.shape)}; they must be {values.numel()} places in "
            f"a ({width}, {width}) matrix"
        )

    def weight() -> Tensor:
        before = base.weight().double()
        turned = _solved(basis.double(), before)
        size = turned.norm(dim=0)
        unit = torch.where(size > 1e-12, turned / size, torch.zeros_like(turned)).float().double()
        middle = torch.diag(lengths.double()).index_put((places[0], places[1]), values.double(), accumulate=True)
        return unit @ middle @ basis.double().t() - before

    return Dense(weight, "it makes the weight anew in a basis of all its inputs")


def _solved(basis: Tensor, weight: Tensor) -> Tensor:
    """W V^-T."""
    try:
        return torch.linalg.solve(basis, weight.t()).t()
    except RuntimeError:
        return weight @ torch.linalg.pinv(basis, rtol=1e-6).t()


def _role(name: str) -> str:
    """What PEFT calls the modules that share a basis (`_category_from_key`)."""
    steps = name.split(".")
    if len(steps) == 1 or steps[-2].isdigit():
        return steps[-1]
    if steps[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{steps[-2]}_{steps[-1]}"


FROD = Lowering(FORMAT, delta, starts=lambda config: bool(config.get("init_weights", True)))
