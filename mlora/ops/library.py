"""The operators of namespace `mlora`: schemas, shapes for tracing, and the reference for every device.

The C++ library registers its kernels for the CPU dispatch key and takes over there. CUDA tensors go to the CUDA
library where it is built, and otherwise, and for what it lacks, to the Triton kernels; but attention and the two phases
of `apply_` have kernels for the CPU only. Each operator also exists as `reference_<name>`, which is the reference
whatever is built, and the others as `triton_<name>`, which is the Triton kernels, on CPU tensors in Triton's
interpreter.

For tests, `MLORA_BACKEND=emulation` registers the CUDA kernels for the CPU instead, from the library built out of
csrc/emulation that `MLORA_EMULATION_LIBRARY` names.
"""

from __future__ import annotations

import importlib.util
import os
import re
from typing import Any

import torch
from torch import Tensor

from . import attention, dropout, norms, phases, reference, training

_SCHEMAS = {
    "apply_": "(Tensor(a!) y, Tensor? base, Tensor x, Tensor arena, Tensor table, Tensor plan) -> ()",
    "apply_keep_": (
        "(Tensor(a!) y, Tensor(b!) v, Tensor? base, Tensor x, Tensor arena, Tensor table, Tensor plan) -> ()"
    ),
    "shrink_": "(Tensor(a!) v, Tensor x, Tensor arena, Tensor table, Tensor plan) -> ()",
    "expand_": "(Tensor(a!) y, Tensor v, Tensor arena, Tensor table, Tensor plan) -> ()",
    "linear": "(Tensor x, Tensor weight, Tensor? bias, Tensor arena, Tensor table, Tensor plan, int kblock) -> Tensor",
    "linear_keep": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) v, Tensor arena, Tensor table, Tensor plan, int kblock) "
        "-> Tensor"
    ),
    "rank_gradients_": (
        "(Tensor(a!) to, Tensor v, Tensor rows, Tensor offsets, Tensor arena, Tensor table, Tensor plan) -> ()"
    ),
    "column_sums": "(Tensor left, Tensor? right, Tensor? tokens) -> Tensor",
    "row_norms": "(Tensor weight, Tensor b, Tensor a, float scale) -> Tensor",
    "drop": "(Tensor x, Tensor places, Tensor odds) -> Tensor",
    "scale_input": "(Tensor x, Tensor arena, Tensor table, Tensor plan) -> Tensor",
    "turn_output": "(Tensor y, Tensor? base, Tensor arena, Tensor table, Tensor plan) -> Tensor",
    "apply_group_": "(Tensor(a!)[] y, Tensor x, Tensor arena, Tensor[] tables, Tensor plan) -> ()",
    "embed_": "(Tensor(a!) y, Tensor ids, Tensor arena, Tensor table, Tensor plan, int vocab) -> ()",
    "merge_": "(Tensor(a!) weight, Tensor? source, Tensor arena, Tensor table, Tensor plan) -> ()",
    "attend_": "(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor read, Tensor write, "
    "Tensor q_starts, Tensor k_starts, float scale, float softcap, int window) -> Tensor",
    "attend_step": "(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor",
}


def _fake_apply_(y: Tensor, base: Tensor | None, x: Tensor, arena: Tensor, table: Tensor, plan: Tensor) -> None:
    return None


def _fake_apply_keep_(
    y: Tensor, v: Tensor, base: Tensor | None, x: Tensor, arena: Tensor, table: Tensor, plan: Tensor
) -> None:
    return None


def _fake_phase_(to: Tensor, of: Tensor, arena: Tensor, table: Tensor, plan: Tensor) -> None:
    return None


def _fake_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, arena: Tensor, table: Tensor, plan: Tensor, kblock: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_linear_keep(
    x: Tensor, weight: Tensor, bias: Tensor | None, v: Tensor, arena: Tensor, table: Tensor, plan: Tensor, kblock: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_rank_gradients_(
    to: Tensor, v: Tensor, rows: Tensor, offsets: Tensor, arena: Tensor, table: Tensor, plan: Tensor
) -> None:
    return None


def _fake_column_sums(left: Tensor, right: Tensor | None, tokens: Tensor | None) -> Tensor:
    return left.new_empty(left.shape[-1], dtype=torch.promote_types(left.dtype, torch.float32))


def _fake_row_norms(weight: Tensor, b: Tensor, a: Tensor, scale: float) -> Tensor:
    return a.new_empty(weight.shape[0])


def _fake_drop(x: Tensor, places: Tensor, odds: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _fake_scale_input(x: Tensor, arena: Tensor, table: Tensor, plan: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _fake_turn_output(y: Tensor, base: Tensor | None, arena: Tensor, table: Tensor, plan: Tensor) -> Tensor:
    return y.new_empty(y.shape)


def _fake_apply_group_(y: list[Tensor], x: Tensor, arena: Tensor, tables: list[Tensor], plan: Tensor) -> None:
    return None


def _fake_embed_(y: Tensor, ids: Tensor, arena: Tensor, table: Tensor, plan: Tensor, vocab: int) -> None:
    return None


def _fake_merge_(weight: Tensor, source: Tensor | None, arena: Tensor, table: Tensor, plan: Tensor) -> None:
    return None


def _fake_attend_(q: Tensor, *args: Any) -> Tensor:
    return q.new_empty((1, q.shape[2], q.shape[1], q.shape[3]))


def _fake_attend_step(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return q.new_empty((q.shape[0], 1, q.shape[1], q.shape[3]))


_FAKES: dict[str, Any] = {
    "apply_": _fake_apply_,
    "apply_keep_": _fake_apply_keep_,
    "shrink_": _fake_phase_,
    "expand_": _fake_phase_,
    "linear": _fake_linear,
    "linear_keep": _fake_linear_keep,
    "rank_gradients_": _fake_rank_gradients_,
    "column_sums": _fake_column_sums,
    "row_norms": _fake_row_norms,
    "drop": _fake_drop,
    "scale_input": _fake_scale_input,
    "turn_output": _fake_turn_output,
    "apply_group_": _fake_apply_group_,
    "embed_": _fake_embed_,
    "merge_": _fake_merge_,
    "attend_": _fake_attend_,
    "attend_step": _fake_attend_step,
}
_REFERENCES: dict[str, Any] = {
    "apply_": reference.apply_,
    "apply_keep_": training.apply_keep_,
    "shrink_": phases.shrink_,
    "expand_": phases.expand_,
    "linear": reference.linear,
    "linear_keep": training.linear_keep,
    "rank_gradients_": training.rank_gradients_,
    "column_sums": training.column_sums,
    "row_norms": norms.row_norms,
    "drop": dropout.drop,
    "scale_input": reference.scale_input,
    "turn_output": reference.turn_output,
    "apply_group_": reference.apply_group_,
    "embed_": reference.embed_,
    "merge_": reference.merge_,
    "attend_": attention.attend_,
    "attend_step": attention.attend_step,
}


def _triton(name: str) -> Any:
    """The Triton implementation of an operator. Triton is imported when it is first called: that takes a second."""

    def run(*args: Any) -> Any:
        from .. import kernels

        return getattr(kernels, name)(*args)

    return run


# Models on GPUs have FlashAttention. The phases of `apply_` are the reference's there, and so is what takes little of a
# step.
_CPU_ONLY = ("attend_", "attend_step", "column_sums", "row_norms", "shrink_", "expand_")
_NOT_IN_CUDA = (
    "embed_",
    "linear",
    "apply_keep_",
    "linear_keep",
    "rank_gradients_",
    "drop",
)  # what the CUDA library lacks
_CUDA = "mlora._C_cuda"
HAS_TRITON = importlib.util.find_spec("triton") is not None


def _load(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return False
    if module == _CUDA:
        _check_cuda(spec.origin)
    torch.ops.load_library(spec.origin)
    return True


def _check_cuda(path: str) -> None:
    """Raise `OSError` where a library was built with another major release of CUDA than torch. It would load where that
    one's libraries happen to be found, and fail in its first call."""
    with open(path, "rb") as file:
        found = re.search(rb"libcudart\.so\.(\d+)", file.read())
    if found is not None and (own := found[1].decode()) != (torch.version.cuda or "").split(".")[0]:
        raise OSError(f"they are built with CUDA {own}, torch with {torch.version.cuda or 'none'}")


LIBRARY = torch.library.Library("mlora", "DEF")
for _name, _schema in _SCHEMAS.items():
    for _prefix in ("", "reference_", "triton_") if HAS_TRITON and _name not in _CPU_ONLY else ("", "reference_"):
        LIBRARY.define(_prefix + _name + _schema, tags=(torch.Tag.needs_exact_strides,))
        _default = _triton(_name) if _prefix == "triton_" else _REFERENCES[_name]
        LIBRARY.impl(_prefix + _name, _default, "CompositeExplicitAutograd")
        torch.library.register_fake(f"mlora::{_prefix}{_name}", _FAKES[_name], lib=LIBRARY)
LIBRARY.define("isa() -> int")

EMULATED = os.environ.get("MLORA_BACKEND") == "emulation"
if EMULATED:
    torch.ops.load_library(os.environ["MLORA_EMULATION_LIBRARY"])
HAS_CPU = not EMULATED and _load("mlora._C")
HAS_CUDA, CUDA_ERROR = False, ""
if torch.backends.cuda.is_built():
    try:
        HAS_CUDA = _load(_CUDA)
    except OSError as error:  # it was built with another CUDA, or the libraries of that are not there
        CUDA_ERROR = str(error.__cause__ or error)  # torch says which file, its cause why
if HAS_TRITON:
    for _name in _SCHEMAS.keys() - _CPU_ONLY:
        if not HAS_CUDA or _name in _NOT_IN_CUDA:
            LIBRARY.impl(_name, _triton(_name), "CUDA")
