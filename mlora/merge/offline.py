"""Merging adapters without their base model, whose linears' widths the adapters' own tensors tell."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import errors
from ..adapters.adapter import Adapter
from ..lowering import LOWERINGS, Conv, Names, is_rewriting, lower, module_names, to_adapter, untouched
from ..lowering.delta import BaseLinear, Delta
from . import Merge, kept, merge_adapters

# The ends of the keys that say how wide a module is: (part, the dimension that is `in`, the one that is `out`).
_WIDTHS = {
    "LORA": (("lora_A.weight", 1, None), ("lora_B.weight", None, 0)),
    "DELTA": (
        ("delta_A", 1, None), ("delta_B", None, 1), ("delta_matrix", 1, 0), ("delta_in_gain", 0, None),
        ("delta_gain", None, 0), ("delta_shift", None, 0), ("delta_turn", None, 1), ("delta_in_turn", 1, None),
    ),
}  # fmt: skip

Widths = tuple[int | None, int | None]


def widths_of(adapter: Adapter) -> dict[str, Widths]:
    """Module -> (in, out) as the tensors' shapes tell; None where they do not.

    Raises:
        UnsupportedAdapterError: as `lower`.
    """
    found: dict[str, Widths] = dict.fromkeys(module_names(adapter), (None, None))
    if adapter.config.get("use_bdlora"):  # its factors are stacked blocks
        return found
    for end, at_in, at_out in _WIDTHS.get(adapter.peft_type, ()):
        for key, tensor in adapter.tensors.items():
            name = key.removesuffix("." + end)
            if name != key and name in found:
                seen = [None if at is None or tensor.dim() <= at else _width(tensor, at) for at in (at_in, at_out)]
                old = found[name]
                found[name] = (seen[0] or old[0], seen[1] or old[1])
    return found


def _width(tensor: Tensor, at: int) -> int:
    """The size of a dimension, with the kernel where it is that of a convolution's channels."""
    return math.prod(tensor.shape[1:]) if at == 1 else tensor.shape[at]


def conv_of(tensors: Mapping[str, Tensor], name: str) -> Conv | None:
    """What the factors of a LoRA tell of the convolution that they change; None if it is a linear."""
    a, b = (tensors.get(f"{name}.lora_{part}.weight") for part in "AB")
    if a is None or b is None or a.dim() != b.dim() or a.dim() < 3 or not b.shape[1]:
        return None
    return Conv(tuple(a.shape[2:]), groups=max(1, a.shape[0] // b.shape[1]))


def bases_of(adapters: Mapping[str, Adapter]) -> dict[str, BaseLinear]:
    """Stand-ins for the linears that named adapters change, of the widths that all of them tell. Asking one for its
    weight or bias raises a MergeError.

    Raises:
        MergeError: two adapters disagree about a width, or none tells it.
    """
    widths: dict[str, Widths] = {}
    told: dict[tuple[str, int], str] = {}
    for adapter_name, adapter in adapters.items():
        if adapter.config.get("target_parameters"):
            raise errors.MergeError(
                f"adapter {adapter_name!r} changes parameters (target_parameters), which without their base model are "
                f"not known, and served in weighted entries, and not in merges that make a new adapter"
            )
        for name, seen in widths_of(adapter).items():
            known = widths.get(name, (None, None))
            for side, (ours, theirs) in enumerate(zip(seen, known, strict=True)):
                if ours is not None and theirs is not None and ours != theirs:
                    kind = ("inputs", "outputs")[side]
                    raise errors.MergeError(
                        f"adapter {adapter_name!r} takes module {name} to have {ours} {kind}, adapter "
                        f"{told[name, side]!r} {theirs}: they were made for different bases"
                    )
                if ours is not None and theirs is None:
                    told[name, side] = adapter_name
            widths[name] = (seen[0] or known[0], seen[1] or known[1])
    return {name: _stand_in(name, seen, adapters) for name, seen in widths.items()}


def _stand_in(name: str, widths: Widths, adapters: Mapping[str, Adapter]) -> BaseLinear:
    users = ", ".join(repr(n) for n, adapter in adapters.items() if name in module_names(adapter))
    inputs, outputs = widths
    if inputs is None or outputs is None:
        missing = "inputs" if inputs is None else "outputs"
        types = sorted({adapter.peft_type for adapter in adapters.values()})
        raise errors.MergeError(
            f"the files of {users} ({', '.join(types)}) do not tell how many {missing} module {name} has: the base "
            f"model is needed"
        )
    conv = next((conv for adapter in adapters.values() if (conv := conv_of(adapter.tensors, name))), None)
    weight, bias = (_needs(name, part, users) for part in ("weight", "bias"))
    return BaseLinear(name, inputs, outputs, weight, bias, conv=conv)


def _needs(name: str, part: str, users: str) -> Callable[[], Tensor]:
    def refuse() -> Tensor:
        raise errors.MergeError(
            f"merging {users} needs the base model's {part} of module {name} (as DoRA, trained biases, and gains in a "
            f"strategy other than a sum do): the base model is needed"
        )

    return refuse


def _check_apart(adapters: Iterable[Adapter]) -> None:
    """Raise `MergeError` where what an adapter does to a module is not in its files, whatever the widths."""
    for adapter in adapters:
        ordered = adapter.peft_type in LOWERINGS and LOWERINGS[adapter.peft_type].ordered
        if ordered or is_rewriting(adapter.config):
            why = "its numbers go by the order of the model's modules" if ordered else "its start is a part of the base"
            raise errors.MergeError(f"adapter from {adapter.source}: {why}: the base model is needed")


def merge_files(
    adapters: Mapping[str, Adapter],
    how: Merge,
    bases: Mapping[str, BaseLinear] | None = None,
    track: Callable[[Iterable[tuple[str, Delta]], int], Iterable[tuple[str, Delta]]] = lambda modules, total: modules,
) -> tuple[Adapter, dict[str, Delta]]:
    """Merge adapters that no runtime holds.

    Args:
        adapters: by the names that `how` gives them.
        bases: the base model's linears (dotted path -> linear); None makes do with what the adapters' tensors tell.
        track: wraps the modules, of which there are `total`, as they are merged: for a progress bar.

    Returns:
        The merged adapter, a LoRA or a DELTA as `to_adapter` says, and the delta of each of its modules.

    Raises:
        MergeError: the adapters do not fit each other, or what `bases` would tell is needed and there are none.
        AdapterError: as `lower`.
    """
    if bases is None:
        _check_apart([adapters[name] for name in how.adapters])
        known = bases_of(adapters)
        own = [{name: known[name] for name in module_names(adapters[n])} for n in how.adapters]
        bases = known
    else:
        own = [dict(bases)] * len(how.adapters)
        adapters = {name: untouched(adapters[name], Names(None, bases)) for name in how.adapters}
    lowered = [dict(lower(adapters[name], mine).deltas) for name, mine in zip(how.adapters, own, strict=True)]
    total = len({name for deltas in lowered for name in deltas})
    deltas = kept(dict(track(merge_adapters(lowered, how, bases), total)), bases)
    merged = to_adapter(deltas, how.label, bases)
    used = [adapters[name] for name in how.adapters]
    agreed = {key: _agreed(used, key) for key in ("base_model_name_or_path", "task_type")}
    config = {**merged.config, **{key: value for key, value in agreed.items() if value is not None}}
    return replace(merged, config=config), deltas


def _agreed(adapters: Sequence[Adapter], option: str) -> object:
    """The value of an option that all adapters have, else None."""
    first, *rest = (adapter.config.get(option) for adapter in adapters)
    return first if all(value == first for value in rest) else None


def distance(deltas: Mapping[str, Delta]) -> tuple[float, str, float]:
    """The worst relative error of a merge's modules, which module has it, and the mean over the modules."""
    found = {name: delta.error for name, delta in deltas.items()}
    worst = max(found, key=lambda name: found[name])
    return found[worst], worst, float(torch.tensor(list(found.values()), dtype=torch.float64).mean())
