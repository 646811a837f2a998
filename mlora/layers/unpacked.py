"""Modules in which the tokens of packed sequences cannot be told apart."""

from __future__ import annotations

from torch import nn

from .conv import CONVS
from .state import LayerState


def unpacked(state: LayerState, module: nn.Module) -> str:
    """Why they cannot be in the module of `state`, in words that follow its name; empty where they can."""
    if isinstance(module, CONVS):
        return "a convolution, which reads a token's neighbours"
    if state.gathered:
        return "an expert, which gets tokens gathered from any sequences"
    if state.foreign:
        return "which reads another modality than text"
    if state.order.windows:
        return "whose inputs are windows"
    return ""
