"""What is folded: the modules' weights, and how their originals come back."""

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

from .. import errors, layout
from ..arena.store import Store
from ..layers import base_linear, is_dense, norm_offset
from ..ops import dispatch, reference

KEEPS = ("copy", "checkpoint", "corrections")
Plans = Sequence[Tensor]
"""Of what is folded in, the words of its plan on each device."""


@dataclass(frozen=True)
class Target:
    """A module whose weight is folded.

    Args:
        name: its dotted path. `index`: its number in the store.
        weight: (out, in), or (in, out) if `transposed`, as an embedding's is, or (out, channels, *kernel), or (out, 1)
            of a norm. `bias`: (out,) or None.
        table: its rows of the store's tables, int64 (slots, TABLE_WIDTH). `arena`: where they point to. `home`: the
            number of the device of both.
    """

    name: str
    index: int
    weight: Tensor
    bias: Tensor | None
    table: Tensor
    arena: Tensor
    home: int
    transposed: bool

    def merge(self, into: Tensor, source: Tensor | None, plans: Plans) -> None:
        """`ops.reference.merge_` of a matrix as `matrix` gives it. Turns are the reference's."""
        arena, plan = self.arena, plans[self.home]
        terms = [t for route in reference.routes(plan, self.table, 1) for t in route.terms]
        if all(t.turn < 0 and t.in_turn < 0 for t in terms):
            dispatch.merge_(into, source, arena, self.table, plan)
        elif self.transposed:  # turns have a side of their own
            source = None if source is None else source.t()
            reference.merge_(into.t(), source, arena, _exchanged(self.table), plan)
        else:
            reference.merge_(into, source, arena, self.table, plan)

    @property
    def matrix(self) -> Tensor:
        """The weight in two dimensions, as the arena's parts go with it: itself, or a copy where it has a kernel."""
        return matrix_of(self.weight)

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


def target_of(name: str, module: nn.Module, index: int, store: Store, shared: set[int]) -> Target:
    """Raises MergeError if the weight cannot be changed without changing more than this module's output.

    Args:
        store: in which the module has the number `index`.
        shared: `storage_of` every tensor that several modules hold.
    """
    table, home = store.table(index), store.homes[index]
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
        table = _exchanged(table)
    bias = bias.detach() if isinstance(bias, Tensor) else None
    return Target(name, index, weight, bias, table, store.spaces[home].arena, home, transposed)


def _exchanged(table: Tensor) -> Tensor:
    table = table.clone()
    for one, other in ((layout.A, layout.B), (layout.GAIN, layout.IN_GAIN)):
        table[:, [one, other]] = table[:, [other, one]]
    return table


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def shared_storages(model: nn.Module) -> set[int]:
    """`storage_of` every parameter that several modules hold."""
    holders: dict[int, int] = {}
    for module in model.modules():
        for storage in {storage_of(p) for p in module.parameters(recurse=False) if is_dense(p) and not p.is_meta}:
            holders[storage] = holders.get(storage, 0) + 1
    return {storage for storage, count in holders.items() if count > 1}


def matrix_of(weight: Tensor) -> Tensor:
    """(out, kernel * channels) of a convolution's weight; of another, the weight itself."""
    return weight if weight.dim() == 2 else weight.movedim(1, -1).flatten(1).contiguous()


def _weight(matrix: Tensor, like: Tensor) -> Tensor:
    """Undo `_matrix`."""
    return matrix if like.dim() == 2 else matrix.view(len(like), *like.shape[2:], like.shape[1]).movedim(-1, 1)


class Keeper(Protocol):
    """How the originals come back. `plans` are those of the recipe that is folded in."""

    def keep(self, target: Target, plans: Plans) -> None:
        """Called before the target is changed; raises MergeError if it could not be restored."""

    def original(self, target: Target, plans: Plans) -> dict[str, Tensor]:
        """The target's tensors as they were, to the bit."""


class Copies:
    """Keeps a copy on the host: as many bytes as the folded weights have."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def keep(self, target: Target, plans: Plans) -> None:
        for name, tensor in target.tensors.items():
            if name not in self._kept:  # when recipes are switched, the original is there already
                self._kept[name] = tensor.to("cpu", copy=True)

    def kept(self, target: Target) -> dict[str, Tensor]:
        """What it holds of the target."""
        return {name: self._kept[name] for name in target.tensors if name in self._kept}

    def original(self, target: Target, plans: Plans) -> dict[str, Tensor]:
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

    def keep(self, target: Target, plans: Plans) -> None:
        for name, tensor in target.tensors.items():
            if not torch.equal(self._read(name, tensor), tensor.cpu()):
                raise errors.MergeError(f"keep='checkpoint': {name} is not what its file holds; use keep='copy'")
            self._sums[name] = _checksum(tensor)

    def original(self, target: Target, plans: Plans) -> dict[str, Tensor]:
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

    def keep(self, target: Target, plans: Plans) -> None:
        plan = plans[target.home]
        terms = [t for route in reference.routes(plan, target.table, 1) for t in route.terms]
        if any(max(t.gain, t.in_gain, t.turn, t.in_turn) >= 0 for t in terms):
            raise errors.MergeError(
                f"module {target.name}: keep='corrections' takes recipes that only add to the weight; this one scales "
                f"or turns it (DoRA, IA3, OFT, RoAd). Use keep='copy'"
            )
        merged = torch.empty_like(target.matrix)
        target.merge(merged, target.matrix, plans)
        distance = _ordered(target.matrix) - _ordered(self._subtracted(merged, target, plans))
        far = (distance.abs() > 127).flatten().nonzero()[:, 0]
        byte = distance.clamp(-127, 127).to(torch.int8)
        self._kept[target.name] = byte.cpu(), far.cpu(), target.matrix.flatten()[far].cpu()
        if target.bias is not None:
            self._biases[target.name] = target.bias.to("cpu", copy=True)

    def original(self, target: Target, plans: Plans) -> dict[str, Tensor]:
        byte, far, whole = self._kept[target.name]
        back = self._subtracted(target.matrix, target, plans)
        weight = _unordered(_ordered(back) + byte.to(back.device), back.dtype)
        weight.view(-1)[far.to(back.device)] = whole.to(back.device)
        found = {f"{target.name}.weight": _weight(weight, target.weight)}
        if target.bias is not None:
            found[f"{target.name}.bias"] = self._biases[target.name]
        return found

    @staticmethod
    def _subtracted(merged: Tensor, target: Target, plans: Plans) -> Tensor:
        negative = []
        for plan in plans:
            words = plan.clone()
            words[plan.numel() - int(plan[2]) :] ^= -(2**31)  # the sign bits of the weights
            negative.append(words)
        back = torch.empty_like(merged)
        target.merge(back, merged, negative)
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


def keeper_of(keep: str, checkpoint: str | Path | None, model: nn.Module) -> Keeper:
    """A new keeper, of `KEEPS`. `checkpoint`: the folder for "checkpoint"; default: where the model says it is from.

    Raises:
        MergeError: there is no such folder, or nothing in it.
    """
    if keep == "copy":
        return Copies()
    if keep == "corrections":
        return Corrections()
    folder = checkpoint or getattr(getattr(model, "config", None), "_name_or_path", None)
    if not folder or not Path(folder).is_dir():
        raise errors.MergeError(f"keep='checkpoint' needs checkpoint=FOLDER: the model says it is from {folder!r}")
    return Checkpoint(folder)
