"""An adapter's files -> its modules: options, keys and targets checked, and each tensor given to its module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor

from .. import errors
from ..adapters.adapter import Adapter
from .delta import BaseLinear
from .module import (
    BASE_NAMES,
    BASE_PARTS,
    EMBEDDING_LAYER_NAMES,
    TOKENS,
    Format,
    Lowering,
    Module,
)
from .parameters import swapped_in
from .targets import parameters_of, some, targets_of
from .tied import follow, tied_targets

# Options of every type that say which modules are changed, or how a base weight lies.
_HONOURED = {
    "peft_type", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias",
    "fan_in_fan_out", "modules_to_save",
}  # fmt: skip

# Options of every type that do not change what a trained adapter computes.
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "task_type", "inference_mode",
}  # fmt: skip

_TEXTS = (str, "a pattern or a list of names")
_SHAPES: dict[str, tuple[type, str]] = {
    "target_modules": _TEXTS,
    "exclude_modules": _TEXTS,
    "layers_pattern": _TEXTS,
    "feedforward_modules": _TEXTS,
    "layers_to_transform": (int, "an index or a list of them"),
    "bias": (str, "a word"),
    "modules_to_save": _TEXTS,
}


class Gathered(NamedTuple):
    """`modules` of an adapter, and the paths of those of the model that its config targets and its files have nothing
    for, `missing`."""

    modules: Iterator[Module]
    missing: list[str]


def gather(adapter: Adapter, lowering: Lowering, bases: Mapping[str, BaseLinear]) -> Gathered:
    """The modules of `adapter`, after checks of its options, keys and targets.

    Raises:
        UnsupportedAdapterError: an option or a tensor that the type does not serve.
        AdapterError: it does not fit the model.
    """
    check_options(adapter, lowering.format)
    vocabulary = {name for name, base in bases.items() if base.embed_scale is not None or base.head}
    modules, shared = _group(adapter, lowering.format, vocabulary)
    if not modules:
        raise errors.AdapterError(f"adapter from {adapter.source}: it has no weights of any module")
    if lowering.names is not None:
        named = lowering.names(modules, bases)
        if len(set(named.values())) != len(modules):
            raise errors.AdapterError(f"adapter from {adapter.source}: several of its modules are one of this model's")
        modules = {named[name]: parts for name, parts in modules.items()}
    modules, weights, missing = _with_parameters(adapter, modules, bases)
    beside = BASE_NAMES if lowering.tied else BASE_NAMES | {TOKENS}
    targeted = {name for name, parts in modules.items() if not parts.keys() <= beside}
    if unsaved := [name for name in bases if _is_saved(adapter, name) and "saved weight" not in modules.get(name, ())]:
        raise errors.AdapterError(
            f"adapter from {adapter.source}: its modules_to_save {adapter.config['modules_to_save']!r} name "
            f"{some(unsaved)}, for which it has no weights"
        )
    missing += _check_targets(adapter, modules, targeted, weights.keys(), bases, lowering)
    follow(adapter, modules, bases, lambda name: _is_saved(adapter, name))
    missing = [name for name in missing if name not in modules]
    if missing and not lowering.starts(adapter.config):
        raise errors.AdapterError(
            f"adapter from {adapter.source}: it has no weights for {some(missing)}, which its config targets, and "
            f"where PEFT would put new ones that change the result"
        )
    if adapter.config.get("trainable_token_indices") and not any(TOKENS in parts for parts in modules.values()):
        raise errors.AdapterError(
            f"adapter from {adapter.source}: its trainable_token_indices name tokens, for which it has no weights"
        )
    peers = tuple(bases[name] for name in sorted(targeted))
    swapped = swapped_in(adapter, modules, bases)
    found = (
        Module(
            adapter.config, parts, shared, bases[name], peers, adapter.source, weights.get(name, ""), name in swapped
        )
        for name, parts in modules.items()
    )
    return Gathered(found, missing)


def _with_parameters(
    adapter: Adapter, modules: dict[str, dict[str, Tensor]], bases: Mapping[str, BaseLinear]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, str], list[str]]:
    """What `target_parameters` names.

    Returns:
        `modules` with the layers that PEFT puts around fused experts, routers and their like under the paths of their
        parameters; the modules of which the weight is named: path -> that of the weight; and the paths of those that
        are named and not in the files.
    """
    if named := [name for name in modules if name in bases and bases[name].experts]:
        raise errors.AdapterError(
            f"adapter from {adapter.source}: it has weights for {some(named)} as if it were a module; it is a "
            f"parameter of this model, which target_parameters name"
        )
    targets = adapter.config.get("target_parameters")
    if not targets:
        return modules, {}, []
    if isinstance(targets, str) or not all(isinstance(target, str) for target in targets):
        raise errors.AdapterError(
            f"adapter from {adapter.source}: target_parameters is {targets!r}; it must be a list of names"
        )
    held = {name if base.experts else f"{name}.weight": name for name, base in bases.items()}
    wrapped, unknown = parameters_of(targets, held)
    found = {path: bases[held[path]] for path in wrapped.values()}
    unknown += [path for path, base in found.items() if not base.experts and base.turned is None]
    if unknown:
        raise errors.UnsupportedAdapterError(
            f"adapter from {adapter.source}: its target_parameters name {some(unknown)}; served are the weights of "
            f"plain linears and token embeddings, and the matrices, or experts' stacks of them, that other modules "
            f"hold themselves, and this model has none of that name"
        )
    weights = {base.name: path for path, base in found.items() if not base.experts}
    renamed = {held.get(wrapped.get(name, ""), name): parts for name, parts in modules.items()}
    return renamed, weights, [path for name, path in wrapped.items() if name not in modules]


def module_names(adapter: Adapter, lowering: Lowering) -> list[str]:
    """The modules that the files of `adapter` change, as they name them; raises as `modules_of` does."""
    check_options(adapter, lowering.format)
    return sorted(_group(adapter, lowering.format, None)[0])


def check_options(adapter: Adapter, format: Format) -> None:
    """Refuse every option that may change the result and is not served, and those of every type that say
    nothing about modules."""
    for option, (kind, wanted) in _SHAPES.items():
        value = adapter.config.get(option)
        many = isinstance(value, (list, tuple, set, frozenset)) and all(type(item) is kind for item in value)
        if value is not None and type(value) is not kind and not (many and option != "bias"):
            raise errors.AdapterError(f"adapter from {adapter.source}: {option} is {value!r}; it must be {wanted}")
    honoured = _HONOURED | format.honoured
    for option, value in adapter.config.items():
        if option in honoured or option in _NEUTRAL or option in format.neutral or value in (None, False, {}, []):
            continue
        why = format.notes.get(option, "it may change what the adapter computes and mlora does not implement it")
        raise errors.UnsupportedAdapterError(
            f"adapter from {adapter.source}: option {option}={value!r} is not served: {why}"
        )


def _group(
    adapter: Adapter, format: Format, vocabulary: Set[str] | None
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Module path -> its tensors by part, and the adapter's own tensors; every key must be understood. `vocabulary` are
    the embeddings of tokens and the heads; where no model tells, those that have the usual names."""
    modules: dict[str, dict[str, Tensor]] = {}
    shared: dict[str, Tensor] = {}
    suffixes = {**format.parts, **BASE_PARTS}
    endings = frozenset(suffixes)
    # What is tied to a module to save is saved with it, unnamed.
    tied = adapter.config.get("modules_to_save") and adapter.config.get("ensure_weight_tying")
    for key, tensor in adapter.tensors.items():
        if key in format.shared:
            part = format.shared[key]
            shared[part] = tensor
        else:
            suffix = _suffix(key, endings)
            name = "" if suffix is None else key[: -len(suffix) - 1]
            known = name in vocabulary if vocabulary is not None else name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES
            if suffix is None or (suffix == "weight" and not (tied or known or _is_saved(adapter, name))):
                raise errors.UnsupportedAdapterError(
                    f"adapter from {adapter.source}: tensor {key!r} is left over ({_guess(key)}); it is not served"
                )
            part = suffixes[suffix]
            parts = modules.setdefault(name, {})
            if part in parts:
                raise errors.AdapterError(f"adapter from {adapter.source}: {key} is there under two names")
            parts[part] = tensor
        if tensor.is_floating_point() == (part in format.integers):
            kind = "whole numbers" if part in format.integers else "floating-point"
            raise errors.AdapterError(f"adapter from {adapter.source}: {key} is {tensor.dtype}; it must be {kind}")
    return modules, shared


@lru_cache(maxsize=1 << 13)  # adapters of one model have the same keys again and again
def _suffix(key: str, suffixes: frozenset[str]) -> str | None:
    """The longest of `suffixes`, which have three steps at most, that ends `key`."""
    found, at = None, len(key)
    for _ in range(3):
        if (at := key.rfind(".", 0, at)) < 0:
            break
        if key[at + 1 :] in suffixes:
            found = key[at + 1 :]
    return found


def _is_saved(adapter: Adapter, name: str) -> bool:
    """Whether `modules_to_save` names the module, or one that it is in. PEFT takes any ending of a name."""
    saved = adapter.config.get("modules_to_save")
    if not saved:
        return False
    steps = name.split(".")
    return any(".".join(steps[:n]).endswith(s) for n in range(1, len(steps) + 1) for s in saved if isinstance(s, str))


def _guess(key: str) -> str:
    if "_embedding_" in key:
        return "embedding LoRA, which its type does not have"
    if key.startswith("v_head."):
        return "the value head of a TRL trainer, which no answer of the model depends on; save the adapter without it"
    return "a trained copy of a base weight, or unknown"


def _check_targets(
    adapter: Adapter,
    modules: Mapping[str, Any],
    targeted: Set[str],
    weights: Set[str],
    bases: Mapping[str, BaseLinear],
    lowering: Lowering,
) -> list[str]:
    """Refuse weights of what the model does not have or the config does not target.

    Returns:
        The modules that it targets and that have none: the base's, as in PEFT.
    """
    config = adapter.config
    if missing := [name for name in modules if name not in bases]:
        if not targeted & set(missing):
            option = "modules_to_save" if any("saved weight" in modules[name] for name in missing) else "bias"
            raise errors.UnsupportedAdapterError(
                f"adapter from {adapter.source}: it has trained weights of {some(missing)}, which are no linears, "
                f"norms or token embeddings of this model; {option}={config.get(option)!r} is served for those only"
            )
        raise errors.AdapterError(
            f"adapter from {adapter.source}: it has weights for {some(missing)}, which this model has no linear "
            f"or convolution for (transposed ones, and subclasses with a forward of their own, are not served); was it "
            f"made for another base? (its config names {config.get('base_model_name_or_path')!r})"
        )
    targets = config.get("target_modules")
    if targets is None:
        return []
    experts = {name for name, base in bases.items() if base.experts}
    unless = set() if lowering.norms else {name for name, base in bases.items() if base.offset is not None} - targeted
    wanted = (targets_of(config, bases) | tied_targets(config, bases)) - unless
    along = {n for name in wanted for n in (*bases[name].aliases, *bases[name].tied)} if lowering.tied else set()
    if both := sorted(wanted & weights):
        raise errors.AdapterError(
            f"adapter from {adapter.source}: both its target_modules {targets!r} and its target_parameters name "
            f"{some(both)}"
        )
    if left := sorted(targeted - wanted - along - experts - weights):
        raise errors.AdapterError(
            f"adapter from {adapter.source}: it has weights for {some(left)}, which its target_modules "
            f"{targets!r} do not name"
        )
    return sorted(wanted - targeted)
