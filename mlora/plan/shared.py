"""What the layers of one patched model share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from .. import layout
from ..ops import dispatch
from .plan import Plan
from .scope import Scope, Scopes

Fused: TypeAlias = bool | Literal["always"]
"""See `patch`."""


class Shared:
    """What all layers of one patched model share. Tensors here keep their addresses for good.

    Args:
        arenas, words: of each device, the arena and the plan buffer that compiled code reads there. `header`: of that
            plan, on the host.
        number: by which `ops.checks` knows who fills these buffers.
        scopes: what is routed where. `active` is theirs: the scope whose plan eager code reads.
        default: the plan of `Runtime.set_adapter`, for code in no scope.
        blank: the plan that routes nothing.
        fused: whether the base product may be computed by mlora's own kernel; "always": in an order of its own, too.
        placeholders: the tokens that stand for inputs of other modalities than text; see `modality.py`.
        foreign: the numbers of the modules that read those inputs.
        choices: whether the model is one of multiple choice; see `layers.order`.
        moves: whether a hook moves modules to the device of their calls.
        unpacked: number of a module -> why it cannot be told which of its inputs are of which token of a packed call.
        body, axes: as `Packing` has them.
        kblocks: (in, out, whether there is a bias, dtype) of a layer -> tokens and threads -> the `kblock` of
            `dispatch.linear` with which that kernel runs, 0 where it does not; filled as they occur.
        groups: first layer's number -> the layers that read the same input after it (q, k, v; gate, up), learned as
            calls come; None where serving several modules in one call gains nothing.
        shares: `layers.sharded.Shares`, of a model whose processes share linears' rank rows out; else None.
        training: `gradients.recorded.Training`, once there is an adapter with parameters.
        recorded: whether adapters were ever routed while autograd was on.
        inputs, turns, norms, embeddings, experts: whether an adapter was ever loaded that changes what a base reads,
            turns outputs, or changes norms, embeddings or parameters; `heads`: numbers of the modules for which one
            brought another size; `tails`: of those that an aLoRA changes. Until then compiled code leaves their ops
            out.
    """

    def __init__(
        self,
        arenas: Sequence[Tensor],
        words: Sequence[Tensor],
        fused: Fused,
        placeholders: Iterable[int],
        foreign: Iterable[int],
        choices: bool,
    ) -> None:
        self.arenas = tuple(arenas)
        self.words = tuple(words)
        self.header = torch.zeros(layout.PLAN_HEADER, dtype=torch.int32)
        self.number = -1
        self.scopes = Scopes()
        self.active = self.scopes.active
        self.default: Plan | None = None
        blank = tuple(own.new_zeros(layout.PLAN_HEADER) for own in self.words)
        self.blank = Plan(blank, self.header.clone(), b"", (), 1, (1,))
        self.fused = fused
        self.kblocks: dict[tuple[int, int, bool, torch.dtype], dict[tuple[int, int], int]] = {}
        self.placeholders = tuple(placeholders)
        self.foreign = frozenset(foreign)
        self.choices = choices
        self.moves = False
        self.unpacked: dict[int, str] = {}
        self.body = ""
        self.axes: dict[str, int] = {}
        self.shares: Any = None
        self.training: Any = None
        self.recorded = False
        self.inputs = self.turns = self.norms = self.embeddings = self.experts = False
        self.heads: frozenset[int] = frozenset()
        self.tails: frozenset[int] = frozenset()
        grouped = any(dispatch.backend(arena.device, arena.dtype) in dispatch.GROUPING for arena in self.arenas)
        self.groups: dict[int, tuple[Any, ...]] | None = {} if grouped else None

    @property
    def local(self) -> Scope:
        """What code runs in here; raises as `Scopes.current`. Layers read `active`, which takes less."""
        return self.scopes.current()
