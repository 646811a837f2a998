"""How transformers has split a model over processes by its tensor parallel plan (`tp_plan`), module by module.

A split parameter is a `DTensor`: it tells the shape of the whole, and holds this process's part. Around the forward of
each module of the plan transformers puts one of its own, set on the instance. It exchanges what must be, before and
after, and in between lends the module its parts as plain tensors. Layers of linears and of fused experts stand inside
of it, where inputs and outputs are this process's, and where partial sums are still to be added up. Those of embeddings
and sequence-parallel norms, whose inside computes on `DTensor`s, stand around it.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .. import errors
from ..lowering import Cut
from .dense import is_split, own_part
from .swap import style_of

# The styles that split a module's outputs, and those that split its inputs.
_OUTPUTS = ("ColwiseParallel", "PackedColwiseParallel")
_INPUTS = ("RowwiseParallel",)

# Those that change what a module gives, or what it gets, where its weight is not split.
_ALTERING = (*_OUTPUTS, *_INPUTS, "AllReduceParallel", "MoeIdentityParallel")


def cut_of(module: nn.Module, parameter: str = "weight") -> Cut | None:
    """How `module`, or the parameter of fused experts that it holds, is split; None where this process has all that its
    layer sees."""
    held: Any = module._parameters.get(parameter)
    style = style_of(module)
    if not is_split(held):
        return _unknown(style) if style in _ALTERING else None
    if isinstance(module, nn.Embedding) or held.dim() == 1:  # served around what transformers does
        return None if style in ("EmbeddingParallel", "SequenceParallel") else _unknown(style)
    (placement,), mesh = held.placements, held.device_mesh
    if placement.is_replicate():
        return None
    rank, world = mesh.get_local_rank(), mesh.size()
    dim = getattr(placement, "dim", None)
    if dim is None:
        return _unknown(style)
    dim %= held.dim()
    fused = held.dim() == 3
    if fused and dim == 0 and style == "EpDispatchExpertsParallel":
        return Cut("experts", _spans(held.shape[0], 1, rank, world), rank, world)
    if (fused and style != "MoeExpertsParallel") or (not fused and style not in (*_OUTPUTS, *_INPUTS)):
        return _unknown(style)
    if fused and getattr(module, "is_transposed", False):
        dim = {1: 2, 2: 1}.get(dim, dim)
    axis = {held.dim() - 2: "outputs", held.dim() - 1: "inputs"}.get(dim, "")
    if not axis or (not fused and (axis == "outputs") != (style in _OUTPUTS)):
        return _unknown(style)
    groups = getattr(placement, "split_factor", 1)
    spans = _spans(held.shape[placement.dim], groups, rank, world)
    cut = Cut(axis, spans, rank, world)
    if cut.width != own_part(held).shape[placement.dim] or not cut.width:
        return Cut("", why=f"process {rank} of {world} has {own_part(held).shape[placement.dim]} of its {axis}")
    return cut


def _unknown(style: str) -> Cut:
    return Cut("", why=f"it is split over processes in a way that is not served ({style or 'without a style'})")


def _spans(size: int, groups: int, rank: int, world: int) -> tuple[tuple[int, int], ...]:
    """Of each of `groups` equal parts of `size`, the part that `rank` has, as torch.chunk divides."""
    spans = []
    whole = -(-size // groups)
    for first in range(0, size, whole):
        length = min(whole, size - first)
        each = -(-length // world)
        start, end = min(rank * each, length), min((rank + 1) * each, length)
        if end > start:
            spans.append((first + start, first + end))
    return tuple(spans)


def group_of(model: nn.Module) -> list[int]:
    """The ranks of the processes that the model is split over, all there are; [] where it is not split.

    Raises:
        PatchError: it is split otherwise than by tensor (or expert) parallelism over all processes.
    """
    meshes = {id(mesh): mesh for p in model.parameters() if is_split(p) for mesh in (p.device_mesh,)}  # type: ignore[attr-defined]
    if not meshes:
        if (getattr(model, "_tp_size", None) or 1) > 1:
            raise errors.PatchError(
                f"this transformers splits {type(model).__name__} over {model._tp_size} processes otherwise than mlora "
                f"knows; tensor parallelism is served with transformers 5.24 and later"
            )
        return []
    world = torch.distributed.get_world_size()
    for mesh in meshes.values():
        if mesh.ndim != 1 or mesh.size() != world:
            raise errors.PatchError(
                f"{type(model).__name__} is split over a mesh of shape {tuple(mesh.shape)} beside others, of {world} "
                f"processes; served is tensor parallelism over all of them (tp_plan='auto'), without data, pipeline or "
                f"fully sharded parallelism beside it"
            )
    return list(range(world))


def check_local(x: Tensor, name: str) -> None:
    """Raise unless `x`, which a layer inside of what transformers does gets, is this process's own tensor."""
    if is_split(x) or torch.is_grad_enabled():
        raise errors.UnsupportedModelError(
            f"{name} is split over processes, and autograd would record what adapters add there, which is not served; "
            f"call the model under torch.inference_mode() or torch.no_grad()"
        )


def refuse_compiled(name: str) -> NoReturn:
    raise errors.UnsupportedModelError(
        f"{name} is split over processes, which compiled code does not serve; call the model without torch.compile"
    )
