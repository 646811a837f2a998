"""The modules that an adapter's files name -> those of the model, whatever the files call them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .. import errors
from ..adapters.adapter import Adapter
from .delta import BaseLinear
from .fused import convert
from .module import Lowering, Module
from .names import Names
from .targets import parameters_of, some

Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Places:
    """Where an adapter's modules are.

    Args:
        modules: path -> its parts; what the model does not have is under the file's name.
        files: path -> what it was called where the adapter was made, which for some are several; of parameters that
            `target_parameters` names their path.
        configs: path -> the config that its parts follow, where that is not the adapter's.
        weights: of those of which `target_parameters` names the weight: path -> that of the weight.
        missing: the paths of what `target_parameters` names and the files do not have.
        unused: what the files call modules that the model does without.
    """

    modules: dict[str, Parts]
    files: dict[str, tuple[str, ...]]
    configs: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def place(
    adapter: Adapter,
    modules: Mapping[str, Parts],
    shared: Mapping[str, Tensor],
    lowering: Lowering,
    names: Names,
) -> Places:
    """The places of an adapter's `modules`, the file's name -> parts. `shared` are the adapter's own tensors.

    Raises:
        UnsupportedAdapterError, AdapterError: as `gather`.
    """
    bases = names.bases
    found = lowering.names(modules, names) if lowering.names else {name: names.find(name) for name in modules}
    layers, weights, missing = _parameters(adapter, set(found.values()), names)
    found = {name: layers.get(path) or _became(path, bases) for name, path in found.items()}
    strange = {name: _alone(adapter, name, modules[name], shared) for name, path in found.items() if path not in bases}
    converted = convert(strange, names, bases, lowering) if strange else {}
    for made in converted.values():
        for name in made.modules:
            found.pop(name, None)
            strange.pop(name, None)
    unused = sorted(names.unused(strange, modules) | {name for name in strange if _does_nothing(modules[name])})
    found = {name: path for name, path in found.items() if name not in unused}
    if len({*found.values(), *converted}) != len(found) + len(converted):
        raise errors.AdapterError(f"adapter from {adapter.source}: several of its modules are one of this model's")
    if unused and not found and not converted:
        raise errors.AdapterError(f"adapter from {adapter.source}: it has no weights of any module of this model")
    placed = Places(
        {path: modules[name] for name, path in found.items()},
        {path: (path if path in layers.values() and bases[path].experts else name,) for name, path in found.items()},
        {path: made.config for path, made in converted.items()},
        weights,
        missing,
        unused,
    )
    placed.modules.update({path: made.parts for path, made in converted.items()})
    placed.files.update({path: made.modules for path, made in converted.items()})
    return placed


def _parameters(adapter: Adapter, found: set[str], names: Names) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """What `target_parameters` names.

    Returns:
        The layers that PEFT puts around fused experts, routers and their like: path -> that of the parameter, or of the
        module whose weight it is; the modules of which the weight is named: path -> that of the weight; and the paths
        of those that are named and not `found`.
    """
    bases = names.bases
    if named := sorted(name for name in found if name in bases and bases[name].experts):
        raise errors.AdapterError(
            f"adapter from {adapter.source}: it has weights for {some(named)} as if it were a module; it is a "
            f"parameter of this model, which target_parameters name"
        )
    targets = adapter.config.get("target_parameters")
    if not targets:
        return {}, {}, []
    if isinstance(targets, str) or not all(isinstance(target, str) for target in targets):
        raise errors.AdapterError(
            f"adapter from {adapter.source}: target_parameters is {targets!r}; it must be a list of names"
        )
    held = {name if base.experts else f"{name}.weight": name for name, base in bases.items()}
    wrapped, unknown = parameters_of([names.find(target) for target in targets], held)
    plain = [base for path in wrapped.values() if not (base := bases[held[path]]).experts]
    unknown += [f"{base.name}.weight" for base in plain if base.turned is None]
    if unknown:
        raise errors.UnsupportedAdapterError(
            f"adapter from {adapter.source}: its target_parameters name {some(unknown)}; served are the weights of "
            f"plain linears and token embeddings, and the matrices, or experts' stacks of them, that other modules "
            f"hold themselves, and this model has none of that name"
        )
    layers = {name: held[path] for name, path in wrapped.items()}
    weights = {base.name: f"{base.name}.weight" for base in plain}
    return layers, weights, [path for name, path in wrapped.items() if name not in found]


def _became(name: str, bases: Mapping[str, BaseLinear]) -> str:
    """The path of the matrix that a linear became, as routers did, of which only the module's name is left."""
    path = f"{name}.weight"
    return path if name not in bases and path in bases and bases[path].experts == 1 else name


def _alone(adapter: Adapter, name: str, parts: Parts, shared: Mapping[str, Tensor]) -> Module:
    """A module that the model does not have, as wide as its factors are."""
    a, b = parts.get("lora_A"), parts.get("lora_B")
    inputs = a.shape[-1] if a is not None and a.dim() == 2 else 0
    outputs = b.shape[0] if b is not None and b.dim() == 2 else 0

    def weight() -> Tensor:
        raise errors.UnsupportedAdapterError(f"adapter from {adapter.source}: this model has no {name} to read")

    base = BaseLinear(name, inputs, outputs, weight, lambda: None)
    return Module(adapter.config, parts, shared, base, (), adapter.source, name)


def _does_nothing(parts: Parts) -> bool:
    """Whether it is a LoRA as it starts, or was never trained: with B zero it adds nothing wherever it is."""
    return {"lora_A", "lora_B"} <= parts.keys() <= {"lora_A", "lora_B", "alpha"} and not parts["lora_B"].any()
