"""What the layers of one patched model share: `Shared`, and in it `Local`, what each thread routes."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import layout
from ..ops import dispatch
from .activation import Activation, Prompt
from .late import Late
from .modality import Others
from .plan import Plan


class Siblings:
    """What the layer with number `first` left for those that read the same input after it.

    Args:
        input, version, plan: of its call. `results`: number of a layer -> its output.
    """

    __slots__ = ("first", "input", "plan", "results", "version")

    def __init__(self, first: int, input: Tensor, plan: Plan, results: dict[int, Tensor]) -> None:
        self.first = first
        self.input = input
        self.version = input._version
        self.plan = plan
        self.results = results


class Local(threading.local):
    """Per thread: the active plan, the entries it came from, the sequence length of the forward that is
    running (0 if none), whether nothing looked at the operators when it began, what its layers left for their siblings,
    to what aLoRAs apply in it, the prompt of the `generate` that is running if it has some, what is asked of the
    forward when it ends (None if none runs), and, of a model that reads more than text, what the call tells of that."""

    plan: Plan | None = None
    entries: Any = None
    length: int = 0
    unobserved: bool = False
    siblings: Siblings | None = None
    activation: Activation | None = None
    prompt: Prompt | None = None
    late: list[Late] | None = None
    others: Others | None = None


class Shared:
    """What all layers of one patched model share. Tensors here keep their addresses for good.

    Args:
        arena, plan: the arena and the plan buffer that compiled code reads. `header`: of that plan, on the host.
        local: per thread, the plan that eager code reads.
        default: the plan of `Runtime.set_adapter`, for threads without one of their own.
        blank: the plan that routes nothing.
        fused: whether the base product may be computed by mlora's own kernel.
        placeholders: the tokens that stand for inputs of other modalities than text; see `modality.py`.
        foreign: the numbers of the modules that read those inputs.
        kblocks: (in, out, whether there is a bias, dtype) of a layer -> tokens and threads -> the block with which that
            kernel gives the library's bits, 0 where none does; filled as they occur.
        groups: first layer's number -> the layers that read the same input after it (q, k, v; gate, up), learned as
            calls come; None where serving several modules in one call gains nothing.
        inputs, turns, norms, embeddings, experts: whether an adapter was ever loaded that changes what a base reads,
            turns outputs, or changes norms, embeddings or parameters; `heads`: numbers of the modules for which one
            brought another size; `tails`: of those that an aLoRA changes. Until then compiled code leaves their ops
            out.
    """

    def __init__(
        self, arena: Tensor, plan: Tensor, fused: bool, placeholders: Iterable[int], foreign: Iterable[int]
    ) -> None:
        self.arena = arena
        self.plan = plan
        self.header = torch.zeros(layout.PLAN_HEADER, dtype=torch.int32)
        self.local = Local()
        self.default: Plan | None = None
        self.blank = Plan(plan.new_zeros(layout.PLAN_HEADER), self.header.clone(), b"", (), 1, (1,))
        self.fused = fused
        self.kblocks: dict[tuple[int, int, bool, torch.dtype], dict[tuple[int, int], int]] = {}
        self.placeholders = tuple(placeholders)
        self.foreign = frozenset(foreign)
        self.inputs = self.turns = self.norms = self.embeddings = self.experts = False
        self.heads: frozenset[int] = frozenset()
        self.tails: frozenset[int] = frozenset()
        grouped = dispatch.backend(arena.device, arena.dtype) in dispatch.GROUPING
        self.groups: dict[int, tuple[Any, ...]] | None = {} if grouped else None
