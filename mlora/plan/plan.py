"""`Plan`: the routing of one forward, as layers and kernels read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .. import layout

Recipe: TypeAlias = tuple[tuple[str, float], ...]
"""A resolved entry: (adapter name, weight), sorted by name, without zero weights; `()` is base."""
Terms: TypeAlias = tuple[tuple[int, float], ...]
"""A recipe as kernels read it: (slot, weight)."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The routing of one forward.

    Args:
        tensors: int32, the layout of `mlora.layout`: the same words on each of the store's devices.
        header: the first of its words, on the host.
        touches: one number a module, what the plan's adapters do to it (`arena.bits.LORA`, ...).
        names: the adapters that it pins.
        rows: batch rows, or 1 if one recipe serves every row of any batch.
        row_counts: the leading sizes that a module's input may have: as many as there are entries, and that times the
            expansion of `generate` (beams, returned sequences), entries repeated in place.
        entries: how many were listed; 1 if one was given for all rows. Equal ones are one recipe for all rows, and
            are counted still.
        lengths: of a packed call, how many tokens each of its sequences has, of which `entries` lists one each; `rows`
            are tokens then, and `entries` is 1, as in one row. `starts`: as given, see `activation.Starts`.
        by_token: whether `rows` are tokens, as many of each of `recipes` as its length; not where one serves them all.
        heads: module number -> which rows heads or token embeddings of another size answer (`layers.head.Heads`).
        routes: of each device, where a recipe changes parameters: of each recipe its rows, and the terms
            (`layers.route.Route`).
        recipes: of each row, or packed sequence. `invocations`: aLoRAs among its adapters -> the tokens from which on
            each applies; see `activation.py`.
        trained: the numbers of the modules whose own weights were trained, so that PEFT shows those to who reads them.
        raw: the words, where one of the devices is the CPU.
    """

    tensors: tuple[Tensor, ...]
    header: Tensor
    touches: Sequence[int]
    names: tuple[str, ...]
    rows: int
    row_counts: tuple[int, ...]
    heads: Mapping[int, Any] = field(default_factory=dict)
    routes: tuple[tuple[Any, ...], ...] = ()
    recipes: tuple[Recipe, ...] = ()
    invocations: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    trained: frozenset[int] = frozenset()
    entries: int = 1
    lengths: tuple[int, ...] = ()
    starts: Sequence[Mapping[str, int | None]] = ()
    by_token: bool = False
    raw: bytes = field(init=False, repr=False, default=b"")

    def __post_init__(self) -> None:
        for tensor in self.tensors:
            if tensor.device.type == "cpu" and type(tensor) is Tensor:
                object.__setattr__(self, "raw", tensor.numpy().tobytes())

    @property
    def words(self) -> np.ndarray:
        """Its words, on the host."""
        return np.frombuffer(self.raw, dtype=np.int32) if self.raw else self.tensors[0].cpu().numpy()

    @property
    def uniform(self) -> bool:
        return self.rows == 1


def plan_words(
    recipes: Sequence[Terms],
    expansion: int = 1,
    heads: bool = False,
    experts: bool = False,
    tails: bool = False,
    foreign: bool = False,
    runs: Sequence[int] | None = None,
    entries: int | None = None,
) -> np.ndarray:
    """The plan of `recipes` as int32 words in the layout of `mlora.layout`; each is that of the next row, or of as
    many of the next rows as `runs` says. `entries`: how many were listed, if not one a row."""
    routes: dict[Terms, list[int]] = {}
    base: list[int] = []
    rows = 0
    for recipe, run in zip(recipes, [1] * len(recipes) if runs is None else runs, strict=True):
        (routes.setdefault(recipe, []) if recipe else base).extend(range(rows, rows + run))
        rows += run
    terms = [term for recipe in routes for term in recipe]
    refused = layout.HEADS * heads | layout.EXPERTS * experts | layout.TAILS * tails | layout.FOREIGN * foreign
    header = [rows, len(routes), len(terms), expansion, rows if entries is None else entries, refused, 0, 0]
    row_start = np.cumsum([0, *map(len, routes.values())])
    row_order = [row for own in [*routes.values(), base] for row in own]
    term_start = np.cumsum([0, *map(len, routes)])
    weights = np.array([weight for _, weight in terms], dtype=np.float32).view(np.int32)
    slots = [slot for slot, _ in terms]
    return np.concatenate([header, row_start, row_order, term_start, slots, weights]).astype(np.int32)


def to_device(words: np.ndarray, device: torch.device) -> Tensor:
    """One host-to-device copy, for which the host does not wait. Within a capture it is the kind that CUDA refuses: a
    replay would read the host's memory again, by when it is another's."""
    host = torch.from_numpy(words)
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
