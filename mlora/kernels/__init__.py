"""The Triton kernels. Importing this imports Triton; `ops.library` does so at the first call that needs it."""

from .launch import Launch
from .operators import (
    apply_,
    apply_group_,
    apply_keep_,
    drop,
    embed_,
    linear,
    linear_keep,
    merge_,
    rank_gradients_,
    scale_input,
    turn_output,
)

__all__ = [
    "Launch",
    "apply_",
    "apply_group_",
    "apply_keep_",
    "drop",
    "embed_",
    "linear",
    "linear_keep",
    "merge_",
    "rank_gradients_",
    "scale_input",
    "turn_output",
]
