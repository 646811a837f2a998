"""Folding a recipe into the base weights in place, and taking it out again to the bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import errors, layout
from ..arena.store import Store
from ..layers import ParametersLayer, moves
from ..ops import reference
from ..plan.plan import Recipe, plan_words, to_device
from .originals import Checkpoint, Copies, Keeper, Plans, Target, keeper_of, matrix_of, shared_storages, target_of


class Folded:
    """What is folded into a patched model's weights: one recipe, or none.

    Args:
        store: of the adapters. `modules`: number in the store -> (dotted path, module).

    `recipe` is `()` where nothing is. Not thread-safe.
    """

    def __init__(self, model: nn.Module, store: Store, modules: Mapping[int, tuple[str, nn.Module]]) -> None:
        self.recipe: Recipe = ()
        self._fold: Fold | None = None
        self._model = model
        self._store = store
        self._modules = modules

    def replace(self, recipe: Recipe, keep: str, checkpoint: str | Path | None, safe: bool) -> None:
        """Fold `recipe` in, in place of what is there; the arguments are those of `Runtime.merge_adapter`.

        Raises:
            MergeError: as there; nothing has changed then. CapacityError: its adapters do not fit on the device.
        """
        before, folded = self._fold, self.recipe
        if before is not None and keep == "copy" and isinstance(before.keeper, Copies):
            keeper: Keeper = before.keeper  # the new recipe is put in from the originals: one pass
        else:
            keeper = keeper_of(keep, checkpoint, self._model)
            self.take_out()
        try:
            self._put_in(recipe, keeper, safe)
            if before is not None and keeper is before.keeper:
                kept = {target.name for target in self._fold.targets} if self._fold else set()
                left = [target for target in before.targets if target.name not in kept]
                self._with_plan(folded, Fold(left, keeper).take_out)
        except BaseException:
            if before is not None:
                self._put_in(folded, before.keeper, safe=False)
            raise

    def take_out(self) -> None:
        """Restore every byte. Raises MergeError if the checkpoint's files have changed; nothing has changed then."""
        if self._fold is not None:
            self._with_plan(self.recipe, self._fold.take_out)
            self._fold, self.recipe = None, ()

    def forget(self) -> None:
        """Leave the weights as they are, for good."""
        self._fold, self.recipe = None, ()

    def originals(self, index: int) -> dict[str, Tensor]:
        """The tensors of a module as they were before something was folded in, by the parameter's own name; none where
        they are in place. Lowerings read the base, not what is folded into it."""
        target = next((t for t in self._fold.targets if t.index == index), None) if self._fold is not None else None
        found: dict[str, Tensor] = {}
        if target is not None and self._fold is not None:
            keeper = self._fold.keeper
            self._with_plan(self.recipe, lambda plans: found.update(keeper.original(target, plans)))
        return {name.rpartition(".")[2]: tensor for name, tensor in found.items()}

    def _put_in(self, recipe: Recipe, keeper: Keeper, safe: bool) -> None:
        shared = shared_storages(self._model)
        if recipe and moves(self._model):
            raise errors.MergeError(
                "this model's weights are offloaded: a hook (accelerate's CpuOffload) moves them for its calls, so "
                "that nothing can be folded in; serve the adapters unmerged"
            )
        for name, _ in recipe:
            for index in self._store[name].heads:
                raise errors.MergeError(
                    f"module {self._modules[index][0]}: adapter {name!r} has weights of another size there, "
                    f"which cannot be folded into the model's; serve it unmerged"
                )
            if self._store[name].invocation:
                raise errors.MergeError(
                    f"adapter {name!r} is an aLoRA, which applies to a part of the tokens (alora_invocation_tokens): "
                    f"it cannot be folded into the weights; serve it unmerged"
                )
        touched = {index for name, _ in recipe for index in np.flatnonzero(self._store[name].touches).tolist()}
        for path, module in (self._modules[index] for index in sorted(touched)):
            if isinstance(module, ParametersLayer):
                raise errors.MergeError(
                    f"{path}: nothing is folded into experts' weights and other parameters (target_parameters); serve "
                    f"it unmerged"
                )
        targets = [target_of(*self._modules[index], index, self._store, shared) for index in sorted(touched)]
        fold = Fold(targets, keeper)
        self._with_plan(recipe, fold.put_in, safe)
        self._fold, self.recipe = (fold, recipe) if recipe else (None, ())

    def _with_plan(self, recipe: Recipe, use: Callable[..., None], *args: Any) -> None:
        """use(plan of `recipe` on each device, *args) with the recipe's adapters on the devices."""
        names = tuple(name for name, _ in recipe)
        self._store.acquire(names)
        try:
            words = plan_words([self._store.terms(recipe)])
            use([to_device(words, device) for device in self._store.devices], *args)
        finally:
            self._store.release(names)


class Fold:
    """One recipe's way into the weights and out again.

    Args:
        targets: the modules it changes. `keeper`: of their originals.
    """

    def __init__(self, targets: Sequence[Target], keeper: Keeper) -> None:
        self.targets = list(targets)
        self.keeper = keeper

    def put_in(self, plans: Plans, safe: bool) -> None:
        """Change the weights in one pass, or none of them. Where the keeper holds an original already, it is read in
        place of the weight: what was folded in before is gone, without drift.

        Raises:
            MergeError: with `safe`, a result would not be finite; or an original could not be kept.
        """
        for target in self.targets:
            if safe:
                _refuse_infinite(target, self._source(target), plans)
            self.keeper.keep(target, plans)
        changed: list[Target] = []
        try:
            for target in self.targets:
                source = self._source(target)
                bias = _folded_bias(target, source, plans)
                original, matrix = source.get(f"{target.name}.weight"), target.matrix
                original = None if original is None else matrix_of(original)
                target.merge(matrix, original, plans)
                target.write(matrix)
                changed.append(target)
                if bias is not None and target.bias is not None:
                    target.bias.copy_(bias)
        except BaseException:
            self._restore(changed, plans)
            raise

    def take_out(self, plans: Plans) -> None:
        """Restore every byte, or change nothing."""
        if isinstance(self.keeper, Checkpoint):  # the one that can fail: find out first
            for target in self.targets:
                self.keeper.original(target, plans)
        self._restore(self.targets, plans)

    def _restore(self, targets: Sequence[Target], plans: Plans) -> None:
        for target in targets:
            for name, original in self.keeper.original(target, plans).items():
                target.tensors[name].copy_(original)

    def _source(self, target: Target) -> dict[str, Tensor]:
        """The originals that are at hand, on the target's device."""
        kept = self.keeper.kept(target) if isinstance(self.keeper, Copies) else {}
        return {name: tensor.to(target.weight.device) for name, tensor in kept.items()}


def _refuse_infinite(target: Target, source: dict[str, Tensor], plans: Plans) -> None:
    trial = torch.empty_like(target.matrix)
    original = matrix_of(source.get(f"{target.name}.weight", target.weight))
    target.merge(trial, original, plans)
    bias = _folded_bias(target, source, plans)
    if not torch.isfinite(trial).all() or (bias is not None and not torch.isfinite(bias).all()):
        raise errors.MergeError(
            f"module {target.name}: folding this in gives values that {target.weight.dtype} cannot hold; nothing was "
            f"changed"
        )


def _folded_bias(target: Target, source: dict[str, Tensor], plans: Plans) -> Tensor | None:
    """b * (1 + gains) + shifts, and what turns make of b, rounded once; None where nothing changes it.

    Raises MergeError if there is something to add and no bias.
    """
    gain, shift = layout.IN_GAIN if target.transposed else layout.GAIN, layout.SHIFT
    arena, plan = target.arena, plans[target.home]
    width = target.weight.shape[1 if target.transposed else 0]
    bias = source.get(f"{target.name}.bias", target.bias)
    old = None if bias is None else bias.double().cpu()
    total, changed = torch.zeros(width, dtype=torch.float64), False
    for route in reference.routes(plan, target.table, 1):
        for term in route.terms:
            row = target.table[term.slot]
            for column, scale in ((shift, torch.ones(())), (gain, old)):
                offset = int(row[column])
                if offset >= 0 and scale is not None:
                    total += term.weight * arena[offset : offset + width].double().cpu() * scale
                    changed = True
            if term.turn >= 0 and old is not None:
                size, stride = layout.size_and_stride(term.turn_shape)
                turn = arena[term.turn : term.turn + size * width].double().cpu().view(size, width)
                total += term.weight * reference.turned(old, turn, stride)
                changed = True
    if not changed and source.get(f"{target.name}.bias") is None:
        return None
    if old is None or target.bias is None:
        raise errors.MergeError(f"module {target.name}: the recipe adds to its bias and it has none; serve it unmerged")
    return (old + total).to(target.bias.dtype)
