"""AdaMSS: dW[s_i] = B_i A_i V^T for each group s_i of outputs   (Adaptive Multi-Subspace, NeurIPS 2025).

V holds W's leading right singular vectors, with the bias as one more column of W, so the last column of V^T shifts the
output. It is in the file. The groups are not: PEFT finds them when it loads one, by K-means over the left singular
vectors, seeded. So does this, by PEFT's own functions, which take scikit-learn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import errors
from .delta import Delta, compact
from .module import Format, Lowering, Module
from .projections import seeded

_MOST = 256  # groups of one module

FORMAT = Format(
    parts={
        "adamss_newB": "adamss_newB",
        **{f"adamss_{side}.{i}": f"adamss_{side}.{i}" for side in "AB" for i in range(_MOST)},
    },
    honoured={"r", "num_subspaces", "random_seed"},
    neutral={
        "subspace_rank", "init_weights", "use_asa", "asa_target_subspaces", "init_warmup", "final_warmup",
        "mask_interval", "asa_importance_beta", "asa_uncertainty_beta", "asa_schedule_exponent", "use_dynamic_rank",
        "svd_threshold",
    },
)  # fmt: skip


def delta(module: Module) -> Delta:
    """The delta of one module."""
    base, bias = module.base, module.base.bias()
    width = base.in_features + (bias is not None)
    rank = min(module.integer("r", 100), base.out_features, width)
    vectors = module.part("adamss_newB", rank, width).double()
    rows, columns = [], []
    for i, group in enumerate(_groups(module, bias, rank)):
        a = module.part(f"adamss_A.{i}", None, rank).double()
        b = module.part(f"adamss_B.{i}", None, len(a))
        if len(b) != len(group):
            raise errors.AdapterError(
                f"{module.where}: its group {i} has {len(b)} outputs, and PEFT finds {len(group)} of this base's "
                f"weight; was it made for another base?"
            )
        spread = torch.zeros(len(a), base.out_features)
        spread[:, group] = b.t()
        rows.append(a @ vectors)
        columns.append(spread)
    reads, b = torch.cat(rows), torch.cat(columns)
    shift = None if bias is None else (reads[:, -1] @ b.double()).float()
    found = compact(reads[:, : base.in_features].float().contiguous(), b)
    return found if shift is None else found.shifted(shift)


def _groups(module: Module, bias: Tensor | None, rank: int) -> list[Tensor]:
    """The outputs of each group."""
    base, count = module.base, module.integer("num_subspaces", 5)
    try:
        import sklearn.cluster  # noqa: F401
        from peft.tuners.adamss.utils import clustering_Z, seg_locations
    except ImportError as error:
        raise errors.UnsupportedAdapterError(
            f"adapter from {module.source}: AdaMSS needs the packages peft and scikit-learn, to find the groups of "
            f"outputs that are not in its file ({error})"
        ) from error
    weight = base.weight()
    weight = weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)
    with seeded(module):
        u, _, _ = torch.svd_lowrank(weight.to(base.device), q=rank, niter=2)
    found, _ = clustering_Z(u, count, 10)
    return list(seg_locations(found).values())


ADAMSS = Lowering(FORMAT, delta, starts=lambda config: config.get("init_weights", "orthogonal") == "orthogonal")
