"""What a lowering gets: one module of an adapter, its tensors and options checked against the base.

Every type is a `Format`, which lists the keys and the options that its files may have, and a function of
one `Module`. Whatever is not listed is refused here, by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import errors
from .delta import BaseLinear, Delta, Dense
from .names import Names
from .targets import pattern_value

# Beside a type's own tensors, files may hold the base's: PEFT adds the weight of a targeted lm_head, with
# `bias` the trained biases, with `modules_to_save` whole modules that were trained, and with `save_embedding_layers`,
# which it sets itself where a vocabulary was resized, the embedding and the head; loading puts them into the base.
BASE_PARTS = {
    "base_layer.weight": "copy",
    "base_layer.bias": "base bias",
    "bias": "base bias",
    "weight": "saved weight",
}

BASE_NAMES = frozenset(BASE_PARTS.values())

# What PEFT calls the modules that it saves with `save_embedding_layers`, in most models.
EMBEDDING_LAYER_NAMES = ("embed_tokens", "lm_head")

# The part that holds replaced rows of an embedding, in whichever type.
TOKENS = "trained tokens"


FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Format:
    """How one PEFT type is saved.

    Args:
        parts: suffix of a key -> the part's name.
        honoured: options that the lowering reads. `neutral`: options that do not change the result of
            a trained adapter: training and initialisation. Any other option must be null, false or empty.
        shared: key of a tensor that belongs to the whole adapter -> the part's name. `families`: start of the keys of
            several such -> what takes its place in their names.
        integers: parts that hold whole numbers. `numbers`: those that hold one number, of whichever kind. `empty`:
            those that may hold none.
        notes: option -> why it is refused, if not just for want of an implementation.
        convs: the numbers of spatial dimensions of the convolutions that PEFT has such a layer for.
        grouped: whether grouped ones are served as well.
    """

    parts: Mapping[str, str]
    honoured: Set[str] = frozenset()
    neutral: Set[str] = frozenset()
    shared: Mapping[str, str] = field(default_factory=dict)
    families: Mapping[str, str] = field(default_factory=dict)
    integers: Set[str] = frozenset()
    numbers: Set[str] = frozenset()
    empty: Set[str] = frozenset()
    notes: Mapping[str, str] = field(default_factory=dict)
    convs: Set[int] = frozenset()
    grouped: bool = False


@dataclass(frozen=True)
class Module:
    """One module of an adapter.

    Args:
        config: the adapter's config. `parts`: its tensors. `shared`: the adapter's own tensors.
        base: the linear that it changes. `peers`: those of the whole adapter.
        targets: of a type that is `ordered`, all that the config targets, in the model's order; of others none.
        source: of the adapter, for messages.
        file: what the adapter's files call it, which is what the patterns of its config match.
        parameter: the path of its weight where it is that which `target_parameters` names, else "".
        swapped: of experts' parameters, whether `lora_A` is as wide as its outputs and `lora_B` as its inputs.
        saved: whether `modules_to_save` names it, or one that it is in.
    """

    config: Mapping[str, Any]
    parts: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]
    base: BaseLinear
    peers: tuple[BaseLinear, ...]
    source: str
    file: str
    parameter: str = ""
    swapped: bool = False
    targets: tuple[BaseLinear, ...] = ()
    saved: bool = False

    @property
    def where(self) -> str:
        return f"adapter from {self.source}, module {self.base.name}"

    def part(self, name: str, *shape: int | None) -> Tensor:
        """A tensor of the module, in fp32 if it is floating-point; `None` in `shape` takes any size but 0."""
        self.check(name, *shape)
        tensor = self.parts[name]
        return tensor.float() if tensor.is_floating_point() else tensor

    def check(self, name: str, *shape: int | None) -> None:
        """Refuse a part that is not there, or of another shape; `shape` as in `part`."""
        if name not in self.parts:
            raise errors.AdapterError(f"{self.where}: {name} is missing")
        _check_shape(self.parts[name], f"{self.where}: {name}", shape)

    def matrix(self, name: str, rows: int | None, columns: int | None, kernel: tuple[int, ...] | None = None) -> Tensor:
        """A part that a convolution's file has as (rows, columns, *kernel), flattened; a linear's is a matrix. The
        kernel is that of a 1x1 convolution unless it is given."""
        kernel = (1,) * len(self.base.kernel) if kernel is None else kernel
        return self.part(name, rows, columns, *kernel).flatten(1)

    def whole(self, name: str, *shape: int | None) -> Tensor:
        """A tensor of the whole adapter, checked as `part` does."""
        if name not in self.shared:
            raise errors.AdapterError(f"adapter from {self.source}: {name} is missing")
        tensor = self.shared[name]
        _check_shape(tensor, f"adapter from {self.source}: {name}", shape)
        return tensor.float() if tensor.is_floating_point() else tensor

    def integer(self, option: str, default: int, patterns: str = "", least: int = 1) -> int:
        """A whole-number option, by the module's pattern where `patterns` names an option that has some."""
        value = self._option(option, default, patterns)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 1 << 31:
            wanted = "a positive integer" if least == 1 else f"an integer of at least {least}"
            raise errors.AdapterError(f"adapter from {self.source}: {option} is {value!r}; it must be {wanted}")
        return value

    def number(self, option: str, default: float, patterns: str = "") -> float:
        """A real-number option, as `integer` reads whole ones."""
        value = self._option(option, default, patterns)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= FLOAT32_MAX:
            raise errors.AdapterError(
                f"{self.where}: {option.removeprefix('lora_')} is {value!r}; it must be a finite number of fp32's range"
            )
        return value

    def _option(self, option: str, default: Any, patterns: str) -> Any:
        value = self.config.get(option, default)
        if not patterns:
            return value
        table = self.config.get(patterns) or {}
        if not isinstance(table, dict):
            raise errors.AdapterError(f"adapter from {self.source}: {patterns} must be an object")
        return pattern_value(table, self.parameter or self.file, value) if table else value

    def expect(self, what: str, seen: int, wanted: int) -> None:
        """Refuse a tensor whose size is not what the config says."""
        if seen != wanted:
            raise errors.AdapterError(f"{self.where}: {what} {seen}, its config says {wanted}")

    def plain_conv(self) -> None:
        """Refuse convolutions that PEFT computes otherwise than the base does: its layers that rotate the weight take
        one number for kernel, stride and padding each, no dilation, and zeros around the input."""
        conv = self.base.conv
        if conv is not None and not (conv.even and conv.zero_padded and not conv.dilated):
            raise errors.UnsupportedAdapterError(
                f"{self.where}: {self.config.get('peft_type')} is served on convolutions with square kernels, strides "
                f"and paddings, no dilation, and zeros around the input; PEFT computes others as if they were such"
            )

    def fits(self, outputs: int, inputs: int) -> None:
        """Refuse factors that make a matrix of another shape than the module's."""
        if (outputs, inputs) != (self.base.out_features, self.base.in_features):
            raise errors.AdapterError(
                f"{self.where}: its factors make a ({outputs}, {inputs}) matrix, the module's is "
                f"({self.base.out_features}, {self.base.in_features})"
            )

    def covers(self, what: str, seen: int, wanted: int) -> None:
        """Refuse a shared tensor that is too small for the adapter's modules."""
        if seen < wanted:
            raise errors.AdapterError(f"adapter from {self.source}: {what} has width {seen}; its modules need {wanted}")

    def divides(self, option: str, value: int, *widths: int) -> None:
        """Refuse an option that cuts the module's widths into unequal parts."""
        for width in widths:
            if width % value:
                raise errors.AdapterError(f"{self.where}: {option} is {value}, which does not divide {width}")


@dataclass(frozen=True)
class Lowering:
    """A type.

    Args:
        format: how it is saved.
        delta: the pure function from one of its modules to a delta.
        norms: whether it targets norms too. `tied`: whether what it targets takes along what is tied to it.
        ordered: whether a module's delta depends on its place among those that the config targets.
        everywhere: the part of the whole adapter that is all there is of a module; "" of types of which files have
            tensors for each module.
        starts: config -> whether a layer that PEFT has just made changes nothing, so that a target which the files have
            nothing for is the base.
        names: where files do not use names as PEFT does: (those in the file, what the model knows of names) -> the
            model's name of each.
    """

    format: Format
    delta: Callable[[Module], Delta | Dense]
    names: Callable[[Iterable[str], Names], dict[str, str]] | None = None
    norms: bool = False
    tied: bool = False
    ordered: bool = False
    everywhere: str = ""
    starts: Callable[[Mapping[str, Any]], bool] = lambda config: True


def _check_shape(tensor: Tensor, what: str, shape: tuple[int | None, ...]) -> None:
    seen = tuple(tensor.shape)
    fits = len(seen) == len(shape) and all(s == w if w is not None else s > 0 for s, w in zip(seen, shape, strict=True))
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise errors.AdapterError(f"{what} has shape {seen}; it must be ({wanted}{',' if len(shape) == 1 else ''})")


def scaling(module: Module, rank: int, alpha: str = "alpha", *, rslora: bool = False) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA, by the module's `alpha_pattern`."""
    return module.number(alpha, 8, "alpha_pattern") / (math.sqrt(rank) if rslora else rank)
