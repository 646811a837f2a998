"""What each layer knows about itself."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..ops import direct, dispatch, fastest
from ..plan.shared import Shared
from .cuts import cut_of
from .dense import is_cast, is_dense, own_part
from .order import IN_FRONT, Order
from .pointwise import eps_of
from .swap import alias_of, bound_forwards

# What is in a list of this name is an expert, whose inputs are tokens gathered from any rows in any order. A router
# right in it, as JetMoe's, sees them before.
_EXPERTS, _ROUTER = "experts", "router"


class LayerState:
    """What one layer knows beside its module's own parameters.

    Args:
        name: its dotted path. `index`: its number in the store. `home`: that of the device on which it is called.
        table: this module's rows of the store's tables, int64 (slots, TABLE_WIDTH).
        arena, words: of its device, as `Shared` has them.
        dtype: of its activations.
        plain: whether the module is a linear of its dense `weight` and `bias` and nothing more, called on the CPU.
        fused: whether, of a plain one, the base product may be computed by `dispatch.linear`.
        gathered, foreign: whether it is an expert, or reads another modality than text.
        order: where the rows lie in its input. `in_front`: whether they were once seen to be its first dimension.
            `loose`: whether that dimension alone does not tell that it is theirs.
        cast: whether hooks cast it for each call: its weight rests in a dtype that nothing multiplies in, or one has.
        cut: how tensor parallelism has split it, if it has; `shape` is that of this process's part then.
        shape: of a plain one's weight. `direct`: what `ops.direct` takes for it, or None.
        own: the module under the class that it had, for what reads its parameters as the base does.
        shard: this process's share of its rank rows, where they are shared out; else None.
        embeds: whether it is an embedding. `eps`: of an RMS norm that `pointwise.normalized` computes, the attribute of
            the module that holds its epsilon; else "".
        outer: the `forward` that somebody put on the instance, called for the base, or None. Not one that
            keeps the module's own in another attribute, as accelerate's hooks do: there `swap_forward`
            exchanges what it wraps.
    """

    __slots__ = (
        "_asked", "_kblocks", "_probe", "arena", "cast", "cut", "device", "device_type", "direct", "dtype", "embeds",
        "eps", "foreign", "fused", "gathered", "home", "in_front", "index", "loose", "name", "order", "outer", "own",
        "plain", "shape", "shard", "shared", "table", "words",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        index: int,
        home: int,
        shared: Shared,
        table: Tensor,
        module: nn.Module,
        dtype: torch.dtype,
        order: Order = IN_FRONT,
    ) -> None:
        self.name = name
        self.index = index
        self.home = home
        self.shared = shared
        self.arena, self.words = shared.arenas[home], shared.words[home]
        self.table = table
        self.dtype, self.device, self.device_type = dtype, self.arena.device, self.arena.device.type
        wraps = bound_forwards(module, type(module).forward)
        self.outer: Callable[..., Tensor] | None = None if wraps else module.__dict__.get("forward")
        self.own = alias_of(module)
        self.embeds = isinstance(module, nn.Embedding)
        steps = name.split(".")
        self.gathered = any(at == _EXPERTS and next != _ROUTER for at, next in pairwise(steps))
        self.foreign = index in shared.foreign
        self.order, self.in_front = order, not order.exchanged
        self.loose = self.gathered or self.foreign or order.exchanged or order.picked
        weight = own_part(module._parameters.get("weight"))
        self.cut = cut_of(module)
        self.shard: Any = None
        self.cast = is_cast(module)
        self.plain = (
            self.outer is None
            and type(module).forward is nn.Linear.forward
            and {"weight", "bias"} <= module._parameters.keys()
            and is_dense(weight)  # not a quantized tensor that acts as one of bf16
            and dispatch.kernels_take(self.dtype, self.arena.dtype)
            and dispatch.backend(self.device, self.dtype) == "cpu"
        )
        self.fused = self.plain and shared.fused and cast(Tensor, weight).is_contiguous() and module.in_features != 0
        self.eps = eps_of(module) if shared.fused and self.device_type == "cpu" and self.outer is None else ""
        self.direct: Any = None
        if self.plain:
            self.shape = cast(Tensor, weight).shape
            outputs, inputs = self.shape
            self.direct = direct.layer_of(self.arena, table, inputs, outputs, self.dtype)
            summed = self.cut is not None and self.cut.axis == "inputs"  # whose bias is added after the sum
            self._asked = inputs, outputs, module.bias is not None and not summed
            self._kblocks = shared.kblocks.setdefault((*self._asked, dtype), {})
            self._probe = fastest.probe if shared.fused == "always" else dispatch.probe_kblock

    def numbers_of(self, parameter: str) -> tuple[int, ...]:
        """Under which plans tell what they do to a parameter of the module; none of one that no adapter changes."""
        if parameter not in ("weight", "bias"):
            return ()
        return (self.index,) if self.shard is None else (self.index, self.shard.number)

    def kblock(self, x: Tensor) -> int:
        """The `kblock` with which `dispatch.linear` gives the library's bits for `x`, 0 if none does, or if the library
        is as fast (`dispatch.probe_kblock`); where bits do not matter, the one that is fastest (`fastest.probe`). Of a
        fused layer."""
        if x.dtype is not self.dtype or torch.is_autocast_enabled("cpu"):  # the library would compute in another dtype
            return 0
        if not x.is_contiguous() and not self._in_rows(x):
            return 0
        tokens = x.numel() // x.shape[-1]
        like = tokens if tokens <= dispatch.FEW_TOKENS else dispatch.tokens_like(tokens)
        key = like, torch.get_num_threads()
        kblock = self._kblocks.get(key)
        if kblock is None:
            kblock = self._kblocks[key] = self._probe(*self._asked, tokens, self.dtype)
        return kblock

    def _in_rows(self, x: Tensor) -> bool:
        """Whether the library multiplies an `x` in pieces as one matrix of tokens, in rows, and adds a bias before it
        rounds. Else it may do it batch by batch, in columns, or the bias afterwards. As in csrc/cpu/linear.cpp."""
        bias = self._asked[2]
        return x.stride(-1) == 1 and (x.dim() == 2 or (not bias and x.dim() == 3 and x.shape[1] == 1))
