"""The layers: a patched module is an instance of a generated subclass of its own class.

Swapping the class, as `torch.nn.utils.parametrize` does, leaves parameters, hooks, quantized storage
and `state_dict` keys exactly as they are, and swapping it back leaves no trace.
"""

from .base import base_linear
from .conv import CONVS, ConvLayer
from .dense import compute_dtype, is_dense, model_dtype
from .embedding import EmbeddingLayer
from .find import find_layers, mixin_of
from .linear import LoraLayer
from .state import LayerState, Shared
from .swap import guard_moves, refuse_copy, refuse_move, restore_class, swap_class, swap_forward

__all__ = [
    "CONVS",
    "ConvLayer",
    "EmbeddingLayer",
    "LayerState",
    "LoraLayer",
    "Shared",
    "base_linear",
    "compute_dtype",
    "find_layers",
    "guard_moves",
    "is_dense",
    "mixin_of",
    "model_dtype",
    "refuse_copy",
    "refuse_move",
    "restore_class",
    "swap_class",
    "swap_forward",
]
