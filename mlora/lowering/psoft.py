"""PSOFT: dW = s B (R - I) A   (openreview.net/forum?id=FSHrinMArK), where s B A is W's r largest singular triplets.

    psoft_init  A = V^T, B = U S / s           pissa_init  A = sqrt(S / s) V^T, B = U sqrt(S / s)
    R = diag(b) C diag(a), C = (I + Q)(I - Q)^-1 of a skew-symmetric Q, its Neumann series, or any matrix

Files hold Q, a and b. A and B are computed from W in fp32, as PEFT does it whenever it loads such a file; `lowrank` is
a randomized decomposition with a seed. Where R is no diagonal matrix the signs of the singular vectors matter, which
are the library's: so they are computed where the base's weight is, by what PEFT calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import errors
from .delta import Delta, compact
from .module import Format, Lowering, Module
from .projections import seeded

FORMAT = Format(
    parts={f"psoft_R.{part}": part for part in ("weight", "vector_a", "vector_b")},
    honoured={
        "r", "psoft_alpha", "ab_svd_init", "psoft_svd", "psoft_svd_lowrank_niter", "random_seed", "psoft_orth",
        "psoft_mag_a", "psoft_mag_b", "use_cayley_neumann", "num_cayley_neumann_terms", "cayley_neumann_eps",
    },
    neutral={"psoft_dropout", "init_weights"},
)  # fmt: skip


def delta(module: Module) -> Delta:
    """The delta of one module."""
    config, rank = module.config, module.integer("r", 32)
    scale = module.number("psoft_alpha", 32) / rank
    u, s, vh = _decomposed(module, rank)
    init = config.get("ab_svd_init", "psoft_init")
    if init == "psoft_init":
        a, b = vh, u * (s / scale)
    elif init == "pissa_init":
        a, b = (s / scale).sqrt()[:, None] * vh, u * (s / scale).sqrt()
    else:
        raise errors.AdapterError(f"adapter from {module.source}: ab_svd_init is {init!r}, which PEFT lacks")
    turn = _turn(module, rank).double() - torch.eye(rank, dtype=torch.float64)
    return compact((turn @ a.double()).float(), b.t(), scale)


def _decomposed(module: Module, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular triplets of W: (out, rank), (rank,), (rank, in)."""
    base, method = module.base, module.config.get("psoft_svd", "full")
    if rank > min(base.in_features, base.out_features):
        raise errors.AdapterError(
            f"{module.where}: r is {rank}, its weight has {min(base.in_features, base.out_features)} singular values"
        )
    weight = base.weight().to(base.device)
    if method == "full":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    elif method == "lowrank":
        with seeded(module):
            u, s, v = torch.svd_lowrank(weight, q=rank, niter=module.integer("psoft_svd_lowrank_niter", 10, least=0))
        vh = v.t()
    else:
        raise errors.AdapterError(
            f"adapter from {module.source}: psoft_svd is {method!r}; it must be 'full' or 'lowrank'"
        )
    return u[:, :rank].cpu(), s[:rank].cpu(), vh[:rank].cpu()


def _turn(module: Module, rank: int) -> Tensor:
    """R, (rank, rank), as PEFT's `OrthLayer` computes it."""
    config = module.config
    if config.get("psoft_orth", True):
        skew = torch.zeros(rank, rank, dtype=torch.float64)
        skew[tuple(torch.triu_indices(rank, rank, 1))] = module.part("weight", rank * (rank - 1) // 2).double()
        turn = _cayley(module, skew - skew.t())
    else:
        turn = module.part("weight", rank, rank).double()
    for option, part, shape in (("psoft_mag_b", "vector_b", (rank, 1)), ("psoft_mag_a", "vector_a", (1, rank))):
        if config.get(option, True):
            turn = turn * module.part(part, rank).double().view(shape)
        elif part in module.parts:
            raise errors.AdapterError(f"{module.where}: {option} is {config[option]!r} but it has a {part} tensor")
    return turn


def _cayley(module: Module, skew: Tensor) -> Tensor:
    eye = torch.eye(len(skew), dtype=skew.dtype)
    if not module.config.get("use_cayley_neumann"):
        return torch.linalg.solve(eye - skew, eye + skew, left=False)
    if module.config.get("cayley_neumann_eps") is not None:
        most = module.number("cayley_neumann_eps", 0.9)
        if (norm := skew.norm()) > most:
            skew = skew * (most / (norm + 1e-12))
    terms = module.integer("num_cayley_neumann_terms", 5)
    # PEFT's series: I; I + 2 Q; and from 3 terms on at least to Q^3, the last of which is counted once.
    last = max(3, terms - 1) if terms > 2 else terms - 1
    turn, power = eye.clone(), eye
    for i in range(1, last + 1):
        power = power @ skew
        turn = turn + (1 if terms > 2 and i == last else 2) * power
    return turn


PSOFT = Lowering(FORMAT, delta, starts=lambda config: bool(config.get("init_weights", True)))
