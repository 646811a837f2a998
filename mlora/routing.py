"""What a user writes for each row -> the `Plan` that the layers and kernels read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from . import errors
from .merge import Merge, is_weight

if TYPE_CHECKING:
    from .activation import Activation, Prompt
    from .late import Late
    from .modality import Others

BASE = "__base__"

Entry: TypeAlias = str | Mapping[str, float] | Merge | None
Entries: TypeAlias = Entry | Sequence[Entry]
Recipe: TypeAlias = tuple[tuple[str, float], ...]
"""A resolved entry: (adapter name, weight), sorted by name, without zero weights; `()` is base."""
Terms: TypeAlias = tuple[tuple[int, float], ...]
"""A recipe as kernels read it: (slot, weight)."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The routing of one forward.

    Args:
        tensor: int32, the layout of `mlora.ops.layout`, on the device.
        header: the first of its words, on the host.
        touches: one byte a module, what the plan's adapters do to it (`store.LORA`, ...).
        names: the adapters that it pins.
        rows: batch rows, or 1 if one recipe serves every row of any batch.
        row_counts: the leading sizes that a module's input may have: `rows`, and `rows` times the
            expansion of `generate` (beams, returned sequences), entries repeated in place.
        heads: module number -> which rows heads or token embeddings of another size answer (`layers.head.Heads`).
        routes: of each recipe, where one changes parameters: its rows, and the terms (`layers.route.Route`).
        recipes: of each row. `invocations`: aLoRAs among its adapters -> the tokens from which on each applies; see
            `mlora.activation`.
        raw: the words of `tensor`, where that is on the CPU.
    """

    tensor: Tensor
    header: Tensor
    touches: bytes
    names: tuple[str, ...]
    rows: int
    row_counts: tuple[int, ...]
    heads: Mapping[int, Any] = field(default_factory=dict)
    routes: tuple[Any, ...] = ()
    recipes: tuple[Recipe, ...] = ()
    invocations: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    raw: bytes = field(init=False, repr=False, default=b"")

    def __post_init__(self) -> None:
        if self.tensor.device.type == "cpu" and type(self.tensor) is Tensor:
            object.__setattr__(self, "raw", self.tensor.numpy().tobytes())

    @property
    def uniform(self) -> bool:
        return self.rows == 1


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


def resolve_entry(entry: Any, exists: Callable[[str], bool]) -> Recipe:
    """Read one entry.

    Raises:
        EntryError: it is not a name, None or a mapping name -> finite number.
        UnknownAdapterError: it names an adapter that is not loaded.
    """
    if entry is None or entry == BASE:
        return ()
    if isinstance(entry, str):
        entry = {entry: 1.0}
    if not isinstance(entry, Mapping):
        raise errors.EntryError(
            f"an entry of adapter_names is {entry!r} ({type(entry).__name__}); it must be an adapter's name, None, "
            f"{BASE!r}, a mapping name -> weight or an mlora.Merge"
        )
    recipe = []
    for name, weight in entry.items():
        if not isinstance(name, str) or not exists(name):
            raise errors.UnknownAdapterError(name)
        if not is_weight(weight):
            raise errors.EntryError(f"the weight of adapter {name!r} is {weight!r}; it must be a finite number")
        if weight != 0:
            recipe.append((name, float(weight)))
    return tuple(sorted(recipe))


def is_single(entries: Any) -> bool:
    """Whether `entries` is one entry for all rows, not one a row."""
    return entries is None or isinstance(entries, (str, Mapping, Merge))


def resolve(entries: Any, exists: Callable[[str], bool]) -> list[Recipe]:
    """One recipe a row; a single entry gives one recipe."""
    if is_single(entries):
        return [resolve_entry(entries, exists)]
    if not isinstance(entries, Sequence):
        raise errors.EntryError(
            f"adapter_names is {entries!r} ({type(entries).__name__}); it must be one entry or a list of one a row"
        )
    return [resolve_entry(entry, exists) for entry in entries]


def plan_words(
    recipes: Sequence[Terms],
    expansion: int = 1,
    heads: bool = False,
    experts: bool = False,
    tails: bool = False,
    foreign: bool = False,
    runs: Sequence[int] | None = None,
) -> np.ndarray:
    """The plan of `recipes` as int32 words in the layout of `mlora.ops.layout`; each is that of the next row, or of as
    many of the next rows as `runs` says."""
    routes: dict[Terms, list[int]] = {}
    base: list[int] = []
    rows = 0
    for recipe, run in zip(recipes, [1] * len(recipes) if runs is None else runs, strict=True):
        (routes.setdefault(recipe, []) if recipe else base).extend(range(rows, rows + run))
        rows += run
    terms = [term for recipe in routes for term in recipe]
    header = [rows, len(routes), len(terms), expansion, int(heads), int(experts), int(tails), int(foreign)]
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
