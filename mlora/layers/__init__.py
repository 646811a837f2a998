"""The layers: a patched module is an instance of a generated subclass of its own class.

Swapping the class, as `torch.nn.utils.parametrize` does, leaves parameters, hooks, quantized storage
and `state_dict` keys exactly as they are, and swapping it back leaves no trace.
"""

from ..plan.shared import Shared
from .base import base_linear, base_linears
from .conv import CONVS, ConvLayer
from .cuts import group_of
from .dense import DENSE, compute_dtype, is_dense, model_dtype, own_part
from .embedding import EmbeddingLayer
from .find import find_layers, find_stacks, inner_module, inside_peft, mixin_of
from .head import Head, group_heads
from .linear import LoraLayer
from .norm import NormLayer, is_norm_like, norm_offset
from .order import Order, cuts_choices, order_of
from .parameters import ParametersLayer, ParametersState, Stack
from .placed import devices_of, moves
from .pointwise import gated, is_gated, with_kernels
from .route import Route, group_routes
from .sharded import Shard, ShardedLayer, Shares, sharded_cut
from .state import LayerState
from .swap import guard_moves, refuse_copy, refuse_move, restore_class, swap_class, swap_forward
from .trained import refuse_training
from .unpacked import unpacked

__all__ = [
    "CONVS",
    "DENSE",
    "ConvLayer",
    "EmbeddingLayer",
    "Head",
    "LayerState",
    "LoraLayer",
    "NormLayer",
    "Order",
    "ParametersLayer",
    "ParametersState",
    "Route",
    "Shard",
    "ShardedLayer",
    "Shared",
    "Shares",
    "Stack",
    "base_linear",
    "base_linears",
    "compute_dtype",
    "cuts_choices",
    "devices_of",
    "find_layers",
    "find_stacks",
    "gated",
    "group_heads",
    "group_of",
    "group_routes",
    "guard_moves",
    "inner_module",
    "inside_peft",
    "is_dense",
    "is_gated",
    "is_norm_like",
    "mixin_of",
    "model_dtype",
    "moves",
    "norm_offset",
    "order_of",
    "own_part",
    "refuse_copy",
    "refuse_move",
    "refuse_training",
    "restore_class",
    "sharded_cut",
    "swap_class",
    "swap_forward",
    "unpacked",
    "with_kernels",
]
