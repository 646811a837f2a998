"""The layer of a convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arena.bits import LORA
from ..gradients.recorded import Site
from ..ops import dispatch, reference
from ..ops.checks import check_rows
from ..plan.plan import Plan
from .linear import LoraLayer

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# Bytes of patches that are laid out at a time, in eager code: on the CPU as many as stay in a cache until they are
# read again, elsewhere as many as are worth a launch.
PATCH_BYTES = 1 << 20
DEVICE_PATCH_BYTES = 1 << 26


def is_conv(module: nn.Module) -> bool:
    """Whether `module` is a convolution that does nothing beside: subclasses that standardize their weights or pad in a
    way of their own are left out, since their patches are not known. Transposed ones are of another class."""
    own: Any = type(module)
    return any(
        issubclass(own, cls) and own.forward is cls.forward and own._conv_forward is cls._conv_forward for cls in CONVS
    )


class ConvLayer(LoraLayer):
    """Mixed in before a convolution's class: the delta is that of a linear whose tokens are output positions and whose
    inputs are the patches under the kernel, so that it is the same operator, with its gains, mixes and order of sums.

    A patch lies in memory as (*kernel, channels), so that it is copied in runs of neighbours, and A's columns do too
    (`kernel_major`). A grouped convolution's patches are of all its channels: PEFT's A reads them all, and the weight
    of a group is that of a linear with zeros. Patches are padded with zeros whatever the `padding_mode`, as the
    convolutions that PEFT puts beside the base are.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    in_channels: int
    _reversed_padding_repeated_twice: list[int]

    def _check_rows(self, x: Tensor, plan: Plan) -> None:
        super()._check_rows(self._batched(x), plan)

    def _in_front(self, x: Tensor, counts: Sequence[int]) -> bool:
        return True  # by what a convolution is

    def _batched(self, x: Tensor) -> Tensor:
        return x if x.dim() == len(self.kernel_size) + 2 else x[None]

    def _compiled(self, x: Tensor) -> Tensor:
        check_rows(self._mlora.words, self._batched(x).shape[0])
        return super()._compiled(x)

    def _with_siblings(self, x: Tensor, plan: Plan) -> Tensor:
        """Siblings share an input; of convolutions they would have to share kernels and strides too."""
        return self._routed(x, plan.tensors[self._mlora.home], plan.touches[self._mlora.index])

    def _given(self, x: Tensor) -> Tensor:
        return self._base(x)

    def _trained(self, x: Tensor, site: Site, touches: int, plain: bool) -> Tensor:
        return self._routed(x, site.words, touches)  # no adapter has parameters here

    def _routed(self, x: Tensor, words: Tensor, touches: int) -> Tensor:
        if x.dim() == len(self.kernel_size) + 1:
            return self._routed(x[None], words, touches)[0]
        state = self._mlora
        arena, table = state.arena, state.table
        y, source = self._bases(x, words, touches)
        # (rows, positions, out): y itself where its memory format is channels_last, else a copy. One for all pieces:
        # turning a few lines at a time costs several times as much.
        tokens = _tokens(y).contiguous()
        before = None if source is None else _tokens(source).contiguous()
        if y.requires_grad or (x.requires_grad and torch.is_grad_enabled()):
            tokens = reference.apply(tokens, before, self._patches(self._windows(x)), arena, table, words)
        elif touches & LORA:
            windows = self._windows(x)
            lines, each = windows.shape[1], math.prod(y.shape[3:])  # an output's first dimension, positions a line
            step = lines
            if not torch.compiler.is_compiling():
                room = PATCH_BYTES if x.device.type == "cpu" else DEVICE_PATCH_BYTES
                step = max(1, room * lines // max(1, windows.numel() * windows.element_size()))
            for start in range(0, lines, step):
                part = slice(start * each, (start + step) * each)
                patches = self._patches(windows[:, start : start + step])
                base = None if before is None else before[:, part]
                dispatch.apply_(tokens[:, part], base, patches, arena, table, words)
        else:  # no term reads patches
            dispatch.apply_(tokens, before, tokens, arena, table, words)
        return _like(y, tokens)

    def _windows(self, x: Tensor) -> Tensor:
        """(rows, *positions, *kernel, in_channels): a view of the input, padded and with its channels last."""
        x = x.movedim(1, -1)
        if any(self._reversed_padding_repeated_twice):
            x = F.pad(x, [0, 0, *self._reversed_padding_repeated_twice])
        x = x.contiguous()  # no copy of what was padded, or is in channels_last
        spatial = len(self.kernel_size)
        for dim in range(spatial):
            span = self.dilation[dim] * (self.kernel_size[dim] - 1) + 1
            x = x.unfold(dim + 1, span, self.stride[dim])[..., :: self.dilation[dim]]
        return x.movedim(spatial + 1, -1)

    def _patches(self, windows: Tensor) -> Tensor:
        """(rows, positions, kernel * in_channels)."""
        return windows.flatten(len(self.kernel_size) + 1).flatten(1, -2)

    def _scaled(self, x: Tensor, words: Tensor) -> Tensor:
        """U x. Input gains are kept for each place of a patch, as the algebra has them; those of a channel are equal,
        so the first place's do. Turns there are of 1x1 kernels only."""
        state, taps = self._mlora, math.prod(self.kernel_size)
        if taps == 1:
            return _like(x, super()._scaled(_tokens(x), words))
        wide = torch.promote_types(x.dtype, torch.float32)
        ones = x.new_ones((x.shape[0], self.in_channels * taps), dtype=wide)
        factor = dispatch.scale_input(ones, state.arena, state.table, words)[:, : self.in_channels]
        return (x * factor.reshape(*x.shape[:2], *[1] * len(self.kernel_size))).to(x.dtype)

    def _turned(self, y: Tensor, base: Tensor | None, words: Tensor) -> Tensor:
        return _like(y, super()._turned(_tokens(y), None if base is None else _tokens(base), words))


def _tokens(x: Tensor) -> Tensor:
    """(rows, channels, *positions) as (rows, positions, channels)."""
    return x.flatten(2).transpose(1, 2)


def _like(x: Tensor, tokens: Tensor) -> Tensor:
    """Undo `_tokens`, in x's memory format."""
    out = tokens.transpose(1, 2).reshape(x.shape)
    return out.contiguous() if x.is_contiguous() else out
