"""The dropout of adapters that are being trained (`lora_dropout`): whose turn it is, and which numbers decide.

PEFT draws the masks of a whole batch from one global generator, so that a row's depends on the others. Here each
adapter counts for itself: an element of the input of its A is dropped by its seed, its optimizer steps so far, the
number of its row among those of this step, the module, and the element's token and column (`ops/dropout.py`). So a row
has the mask that it would have alone, and a run whose counts are saved and restored goes on as if never interrupted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from .. import errors
from ..ops import dropout
from ..plan.plan import Plan, Recipe, to_device


class Dropout:
    """Of one adapter.

    Args:
        p: the chance of a zero, below 1; 0 for none. `seed`: of its masks. `paths`: of the modules whose LoRA reads a
            masked input, by their numbers.

    `step` counts the optimizer's steps, and `rows` the rows that were computed since the last one.
    """

    def __init__(self, p: float, seed: int, paths: Mapping[int, str]) -> None:
        self.p, self.seed, self.step, self.rows = p, seed, 0, 0
        self.paths = paths

    @property
    def state(self) -> dict[str, int]:
        """Where it is; what `restore` takes."""
        return {"seed": self.seed, "step": self.step, "rows": self.rows}

    def restore(self, state: Mapping[str, int]) -> None:
        self.seed, self.step, self.rows = (int(state[name]) for name in ("seed", "step", "rows"))

    def stepped(self) -> None:
        """An optimizer has made a step of the adapter's parameters."""
        self.step, self.rows = self.step + 1, 0

    def taken(self, rows: int) -> tuple[int, int]:
        """The step, and the number of the first of so many further rows."""
        first, self.rows = self.rows, self.rows + rows
        return self.step, first

    def odds(self, modules: int) -> np.ndarray:
        """As the operator reads it, of each module (modules, 3); where the adapter changes nothing, nothing is zero."""
        found = np.zeros((modules, dropout.ODDS_WIDTH), dtype=np.uint32)
        seed = (self.seed % 2**64).to_bytes(8, "little")
        for index, path in self.paths.items():
            key = hashlib.blake2b(path.encode(), digest_size=8, key=seed).digest()
            found[index] = *np.frombuffer(key, dtype="<u4"), min(round(self.p * 2**32), 2**32 - 1)
        return found.view(np.int32)


class Drops:
    """Of one call of the model: which rows take which adapter's dropout. Rows are counted when the first layer in
    training mode asks, and are the same whenever what is checkpointed is computed again.

    Args:
        plan: of the call, in which layers that drop something are marked. `rows`: of its batch.
        adapters: by name, those of the plan that have dropout.
        odds: (modules, adapters, 3) of these, in order, on each device.
    """

    def __init__(
        self, plan: Plan, rows: int, adapters: Mapping[str, Dropout], odds: Mapping[torch.device, Tensor]
    ) -> None:
        self.plan, self._rows, self._adapters, self._odds = plan, rows, adapters, odds
        self._counts: np.ndarray | None = None
        self._places: dict[torch.device, Tensor] = {}

    def of(self, x: Tensor, index: int, module: str) -> tuple[Tensor, Tensor]:
        """The places and the odds of a module's input, (..., in).

        Raises:
            UnsupportedAdapterError: a row mixes adapters of which one has dropout.
            AttributionError: x does not have the tokens of the call's rows.
        """
        places = self._places.get(x.device)
        if places is None:
            if self._counts is None:
                self._counts = self._counted()
            places = self._places[x.device] = to_device(self._counts, x.device)
        tokens = x.numel() // x.shape[-1]
        if tokens % len(places) or (self.plan.lengths and tokens != len(places)):
            raise errors.AttributionError(
                f"{module} got an input of shape {tuple(x.shape)}, which are not the tokens of {self._rows} rows, so "
                f"that it cannot be told which of them an adapter's lora_dropout is for; train it with lora_dropout=0"
            )
        return places, self._odds[x.device][index]

    def _counted(self) -> np.ndarray:
        """The rows' places, in order; of packed sequences those of each token."""
        recipes, order = self.plan.recipes, list(self._adapters)
        lengths = self.plan.lengths
        rows = len(lengths) or self._rows
        own = [recipes[row * len(recipes) // rows] for row in range(rows)]
        who = [self._one(recipe) for recipe in own]
        found = np.full((rows, dropout.PLACE_WIDTH), -1, dtype=np.int64)
        found[:, dropout.POSITION] = 0
        for number, name in enumerate(order):
            mine = [row for row, other in enumerate(who) if other == name]
            step, first = self._adapters[name].taken(len(mine))
            for count, row in enumerate(mine):
                found[row, [dropout.WHO, dropout.STEP, dropout.ROW]] = number, step, first + count
        if lengths:
            found = found.repeat(lengths, 0)
            found[:, dropout.POSITION] = np.concatenate([np.arange(length) for length in lengths])
        return found.astype(np.int32)

    def _one(self, recipe: Recipe) -> str | None:
        """The adapter of a row's recipe whose dropout it takes."""
        names = [name for name, _ in recipe if name in self._adapters]
        if names and len(recipe) > 1:
            raise errors.UnsupportedAdapterError(
                f"a row mixes {', '.join(repr(name) for name, _ in recipe)}, and {names[0]!r} is trained with "
                f"lora_dropout={self._adapters[names[0]].p}, which is for rows of one adapter; train it with "
                f"lora_dropout=0, or call model.eval()"
            )
        return names[0] if names else None
