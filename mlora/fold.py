"""Folding a recipe into the base weights in place, and taking it out again to the bit."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import errors
from .layers import base_linear, is_dense, norm_offset
from .ops import dispatch, layout, reference

KEEPS = ("copy", "checkpoint", "corrections")


@dataclass(frozen=True)
class Target:
    """A module whose weight is folded.

    Args:
        name: its dotted path. `index`: its number in the store.
        weight: (out, in), or (in, out) if `transposed`, as an embedding's is, or (out, channels, *kernel), or (out, 1)
            of a norm. `bias`: (out,) or None.
        table: its rows of the store's tables, int64 (slots, TABLE_WIDTH).
    """

    name: str
    index: int
    weight: Tensor
    bias: Tensor | None
    table: Tensor
    transposed: bool

    @property
    def matrix(self) -> Tensor:
        """The weight in two dimensions, as the arena's parts go with it: itself, or a copy where it has a kernel."""
        return _matrix(self.weight)

    def write(self, matrix: Tensor) -> None:
        """Put a changed `matrix` into the weight, if it is a copy."""
        if matrix.data_ptr() != self.weight.data_ptr():
            self.weight.copy_(_weight(matrix, self.weight))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What may change, by the name of the parameter."""
        found = {f"{self.name}.weight": self.weight}
        if self.bias is not None:
            found[f"{self.name}.bias"] = self.bias
        return found


def target_of(name: str, module: nn.Module, index: int, table: Tensor, shared: set[int]) -> Target:
    """Raises MergeError if the weight cannot be changed without changing more than this module's output.

    Args:
        shared: `storage_of` every tensor that several modules hold.
    """
    weight, bias = cast(Tensor, getattr(module, "weight", None)), getattr(module, "bias", None)
    if not is_dense(weight) or weight.is_meta:
        kind = f"{type(module).__name__}, {getattr(weight, 'dtype', type(weight))}"
        raise errors.MergeError(
            f"module {name}: its weight is quantized or offloaded ({kind}); nothing can be folded in"
        )
    for tensor in (weight, bias):
        if isinstance(tensor, Tensor) and storage_of(tensor) in shared:
            raise errors.MergeError(
                f"module {name}: another module has the same weight (they are tied), which folding would change too; "
                f"serve the adapter unmerged"
            )
    if not weight.is_contiguous():
        raise errors.MergeError(f"module {name}: its weight is not contiguous; nothing can be folded in")
    if "weight" not in module._parameters:
        raise errors.MergeError(f"module {name}: its weight is computed from others; serve the adapter unmerged")
    conv = base_linear(name, module).conv
    if conv is not None and (conv.groups > 1 or not conv.zero_padded):
        what = "has several groups" if conv.groups > 1 else "does not pad with zeros"
        raise errors.MergeError(
            f"module {name}: it is a convolution that {what}, and adapters of it are no change of its weight; serve "
            f"them unmerged"
        )
    if getattr(module, "embed_scale", 1.0) != 1.0:
        raise errors.MergeError(f"module {name}: it scales what it looks up; serve the adapter unmerged")
    weight = weight.detach()
    if weight.dim() == 1:  # a norm: a column whose rows have gains
        if norm_offset(module) != 0:
            raise errors.MergeError(
                f"module {name}: it multiplies by its weight + 1, which no gain of the weight changes; serve the "
                f"adapter unmerged"
            )
        weight = weight[:, None]
    transposed = isinstance(module, (Conv1D, nn.Embedding))
    if transposed:  # W^T <- W^T + A^T B: the same with the parts' roles exchanged
        table = table.clone()
        pairs = ((layout.A, layout.B), (layout.GAIN, layout.IN_GAIN))
        for one, other in pairs:
            table[:, [one, other]] = table[:, [other, one]]
    return Target(name, index, weight, bias.detach() if isinstance(bias, Tensor) else None, table, transposed)


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def shared_storages(model: nn.Module) -> set[int]:
    """`storage_of` every parameter that several modules hold."""
    holders: dict[int, int] = {}
    for module in model.modules():
        for storage in {storage_of(p) for p in module.parameters(recurse=False) if is_dense(p) and not p.is_meta}:
            holders[storage] = holders.get(storage, 0) + 1
    return {storage for storage, count in holders.items() if count > 1}


def _matrix(weight: Tensor) -> Tensor:
    """(out, kernel * channels) of a convolution's weight; of another, the weight itself."""
    return weight if weight.dim() == 2 else weight.movedim(1, -1).flatten(1).contiguous()


def _weight(matrix: Tensor, like: Tensor) -> Tensor:
    """Undo `_matrix`."""
    return matrix if like.dim() == 2 else matrix.view(len(like), *like.shape[2:], like.shape[1]).movedim(-1, 1)


class Keeper(Protocol):
    """How the originals come back. `arena` and `plan` are those of the recipe that is folded in."""

    def keep(self, target: Target, arena: Tensor, plan: Tensor) -> None:
        """Called before the target is changed; raises MergeError if it could not be restored."""

    def original(self, target: Target, arena: Tensor, plan: Tensor) -> dict[str, Tensor]:
        """The target's tensors as they were, to the bit."""


class Copies:
    """Keeps a copy on the host: as many bytes as the folded weights have."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def keep(self, target: Target, arena: Tensor, plan: Tensor) -> None:
        for name, tensor in target.tensors.items():
            if name not in self._kept:  # when recipes are switched, the original is there already
                self._kept[name] = tensor.to("cpu", copy=True)

    def kept(self, target: Target) -> dict[str, Tensor]:
        """What it holds of the target."""
        return {name: self._kept[name] for name in target.tensors if name in self._kept}

    def original(self, target: Target, arena: Tensor, plan: Tensor) -> dict[str, Tensor]:
        return self.kept(target)


class Checkpoint:
    """Keeps a checksum, and reads the tensors again from the safetensors files that the model was loaded from."""

    def __init__(self, folder: str | Path) -> None:
        self._sums: dict[str, int] = {}
        self._files: dict[str, Path] = {}
        for path in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                self._files.update(dict.fromkeys(file.keys(), path))
        if not self._files:
            raise errors.MergeError(f"keep='checkpoint': there are no safetensors files in {str(folder)!r}")

    def keep(self, target: Target, arena: Tensor, plan: Tensor) -> None:
        for name, tensor in target.tensors.items():
            if not torch.equal(self._read(name, tensor), tensor.cpu()):
                raise errors.MergeError(f"keep='checkpoint': {name} is not what its file holds; use keep='copy'")
            self._sums[name] = _checksum(tensor)

    def original(self, target: Target, arena: Tensor, plan: Tensor) -> dict[str, Tensor]:
        found = {name: self._read(name, tensor) for name, tensor in target.tensors.items()}
        for name, tensor in found.items():
            if _checksum(tensor) != self._sums[name]:
                raise errors.MergeError(f"{name} has changed on disk since the merge and cannot be restored from there")
        return found

    def _read(self, name: str, like: Tensor) -> Tensor:
        # transformers leaves the base model's own name out of some files
        key = next((key for key in (name, name.partition(".")[2]) if key in self._files), None)
        if key is None:
            raise errors.MergeError(f"keep='checkpoint': no file has {name}; use keep='copy'")
        with safe_open(self._files[key], "pt") as file:
            tensor = file.get_tensor(key)
        if tensor.shape != like.shape[: tensor.dim()] or tensor.numel() != like.numel():
            raise errors.MergeError(f"keep='checkpoint': {name} has another shape in its file; use keep='copy'")
        return tensor.to(like.dtype).view(like.shape)


class Corrections:
    """Keeps one byte a weight: how far it is, in units of its last place, from what is left when the recipe is
    subtracted again. The few that a byte does not hold are kept whole."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._biases: dict[str, Tensor] = {}

    def keep(self, target: Target, arena: Tensor, plan: Tensor) -> None:
        if any(t.gain >= 0 or t.in_gain >= 0 for route in reference.routes(plan, target.table, 1) for t in route.terms):
            raise errors.MergeError(
                f"module {target.name}: keep='corrections' takes recipes that only add to the weight; this one scales "
                f"it (DoRA, IA3). Use keep='copy'"
            )
        merged = torch.empty_like(target.matrix)
        dispatch.merge_(merged, target.matrix, arena, target.table, plan)
        distance = _ordered(target.matrix) - _ordered(self._subtracted(merged, target, arena, plan))
        far = (distance.abs() > 127).flatten().nonzero()[:, 0]
        byte = distance.clamp(-127, 127).to(torch.int8)
        self._kept[target.name] = byte.cpu(), far.cpu(), target.matrix.flatten()[far].cpu()
        if target.bias is not None:
            self._biases[target.name] = target.bias.to("cpu", copy=True)

    def original(self, target: Target, arena: Tensor, plan: Tensor) -> dict[str, Tensor]:
        byte, far, whole = self._kept[target.name]
        back = self._subtracted(target.matrix, target, arena, plan)
        weight = _unordered(_ordered(back) + byte.to(back.device), back.dtype)
        weight.view(-1)[far.to(back.device)] = whole.to(back.device)
        found = {f"{target.name}.weight": _weight(weight, target.weight)}
        if target.bias is not None:
            found[f"{target.name}.bias"] = self._biases[target.name]
        return found

    @staticmethod
    def _subtracted(merged: Tensor, target: Target, arena: Tensor, plan: Tensor) -> Tensor:
        negative = plan.clone()
        terms = int(plan[2])
        negative[plan.numel() - terms :] ^= -(2**31)  # the sign bits of the weights
        back = torch.empty_like(merged)
        dispatch.merge_(back, merged, arena, target.table, negative)
        return back


def _ordered(tensor: Tensor) -> Tensor:
    """int64 numbers that are neighbours where the floats are, -0 and 0 among them."""
    size = tensor.element_size()
    bits = tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[size]).long()
    low = -(1 << (8 * size - 1))
    return torch.where(bits < 0, low - bits - 1, bits)


def _unordered(ordered: Tensor, dtype: torch.dtype) -> Tensor:
    """The floats of `_ordered`."""
    low = -(1 << (8 * dtype.itemsize - 1))
    bits = torch.where(ordered < 0, low - ordered - 1, ordered)
    return bits.to({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]).view(dtype)


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())


class Fold:
    """The recipe that is folded in, and how to take it out.

    Args:
        targets: the modules it changes. `keeper`: of their originals.
    """

    def __init__(self, targets: Sequence[Target], keeper: Keeper) -> None:
        self.targets = list(targets)
        self.keeper = keeper

    def put_in(self, arena: Tensor, plan: Tensor, safe: bool) -> None:
        """Change the weights in one pass, or none of them. Where the keeper holds an original already, it is read in
        place of the weight: what was folded in before is gone, without drift.

        Raises:
            MergeError: with `safe`, a result would not be finite; or an original could not be kept.
        """
        for target in self.targets:
            if safe:
                _refuse_infinite(target, self._source(target), arena, plan)
            self.keeper.keep(target, arena, plan)
        changed: list[Target] = []
        try:
            for target in self.targets:
                source = self._source(target)
                bias = _folded_bias(target, source, arena, plan)
                original, matrix = source.get(f"{target.name}.weight"), target.matrix
                original = None if original is None else _matrix(original)
                dispatch.merge_(matrix, original, arena, target.table, plan)
                target.write(matrix)
                changed.append(target)
                if bias is not None and target.bias is not None:
                    target.bias.copy_(bias)
        except BaseException:
            self._restore(changed, arena, plan)
            raise

    def take_out(self, arena: Tensor, plan: Tensor) -> None:
        """Restore every byte, or change nothing."""
        if isinstance(self.keeper, Checkpoint):  # the one that can fail: find out first
            for target in self.targets:
                self.keeper.original(target, arena, plan)
        self._restore(self.targets, arena, plan)

    def _restore(self, targets: Sequence[Target], arena: Tensor, plan: Tensor) -> None:
        for target in targets:
            for name, original in self.keeper.original(target, arena, plan).items():
                target.tensors[name].copy_(original)

    def _source(self, target: Target) -> dict[str, Tensor]:
        """The originals that are at hand, on the target's device."""
        kept = self.keeper.kept(target) if isinstance(self.keeper, Copies) else {}
        return {name: tensor.to(target.weight.device) for name, tensor in kept.items()}


def _refuse_infinite(target: Target, source: dict[str, Tensor], arena: Tensor, plan: Tensor) -> None:
    trial = torch.empty_like(target.matrix)
    original = _matrix(source.get(f"{target.name}.weight", target.weight))
    dispatch.merge_(trial, original, arena, target.table, plan)
    bias = _folded_bias(target, source, arena, plan)
    if not torch.isfinite(trial).all() or (bias is not None and not torch.isfinite(bias).all()):
        raise errors.MergeError(
            f"module {target.name}: folding this in gives values that {target.weight.dtype} cannot hold; nothing was "
            f"changed"
        )


def _folded_bias(target: Target, source: dict[str, Tensor], arena: Tensor, plan: Tensor) -> Tensor | None:
    """b * (1 + gains) + shifts, rounded once; None where nothing changes it.

    Raises MergeError if there is something to add and no bias.
    """
    gain, shift = layout.IN_GAIN if target.transposed else layout.GAIN, layout.SHIFT
    width = target.weight.shape[1 if target.transposed else 0]
    bias = source.get(f"{target.name}.bias", target.bias)
    old = None if bias is None else bias.double().cpu()
    total, changed = torch.zeros(width, dtype=torch.float64), False
    for route in reference.routes(plan, target.table, 1):
        for term in route.terms:
            row = target.table[term.slot]
            for column, scale in ((shift, torch.ones(())), (gain, old)):
                offset = int(row[column])
                if offset >= 0 and scale is not None:
                    total += term.weight * arena[offset : offset + width].double().cpu() * scale
                    changed = True
    if not changed and source.get(f"{target.name}.bias") is None:
        return None
    if old is None or target.bias is None:
        raise errors.MergeError(f"module {target.name}: the recipe adds to its bias and it has none; serve it unmerged")
    return (old + total).to(target.bias.dtype)
