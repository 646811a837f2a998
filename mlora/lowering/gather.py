"""An adapter's files -> its modules: options, keys and targets checked, and each tensor given to its module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
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
from .names import Names
from .parameters import swapped_in
from .places import Places, place
from .targets import is_all_linear, is_target, saved_by, some, targets_of
from .tied import follow, tied_targets

# Options of every type that say which modules are changed, or how a base weight lies.
_HONOURED = {
    "peft_type", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias",
    "fan_in_fan_out", "modules_to_save",
}  # fmt: skip

# Options of every type that do not change what a trained adapter computes.
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "task_type", "inference_mode",
    "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr",  # ms-swift's, of training
    "merge_weights",  # loralib's: whether evaluation folds the adapter in
}  # fmt: skip

# Options of other trainers, and those of their values that say what is done here anyway.
_AS_HERE = {"swift_type": ("LORA", "ADALORA", "VERA", "BOFT"), "lora_B_layout": ("rank_major",)}

# Honoured options of which one value or another is refused that may be harmless on a model that fits.
_MAY_BE_IGNORED = {"init_lora_weights", "modules_to_save"}

_EMPTY: tuple[Any, ...] = (None, False, {}, [], "")

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
    """`modules` of an adapter; the paths of those of the model that its config targets and its files have nothing for,
    `missing`; and what its files call those that the model does without, `unused`."""

    modules: Iterator[Module]
    missing: list[str]
    unused: list[str]


def gather(adapter: Adapter, lowering: Lowering, names: Names) -> Gathered:
    """The modules of `adapter`, after checks of its options, keys and targets.

    Raises:
        UnsupportedAdapterError: an option or a tensor that the type does not serve.
        AdapterError: it does not fit the model.
    """
    bases = names.bases
    check_options(adapter, lowering.format)
    vocabulary = {name for name, base in bases.items() if base.embed_scale is not None or base.head}
    grouped, shared = _group(
        adapter, lowering.format, lambda name: names.find(name) in vocabulary, lambda name: names.find(name) in bases
    )
    targets = _in_order(adapter, bases) if lowering.ordered else ()
    if lowering.everywhere in shared:
        for base in targets:
            grouped.setdefault(base.name, {})[lowering.everywhere] = shared[lowering.everywhere]
    if not grouped:
        raise errors.AdapterError(f"adapter from {adapter.source}: it has no weights of any module")
    placed = place(adapter, grouped, shared, lowering, names)
    modules, weights = placed.modules, placed.weights
    beside = BASE_NAMES if lowering.tied else BASE_NAMES | {TOKENS}
    targeted = {name for name, parts in modules.items() if not parts.keys() <= beside}
    if unsaved := [name for name in bases if _is_saved(adapter, name) and "saved weight" not in modules.get(name, ())]:
        raise errors.AdapterError(
            f"adapter from {adapter.source}: its modules_to_save {adapter.config['modules_to_save']!r} name "
            f"{some(unsaved)}, for which it has no weights; ignore=['modules_to_save'] serves the model's own"
        )
    missing = placed.missing + _check_targets(adapter, placed, targeted, bases, lowering)

    def is_saved(name: str) -> bool:
        return any(_is_saved(adapter, file) for file in placed.files.get(name, (name,)))

    follow(adapter, modules, bases, is_saved)
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
    swapped = swapped_in(adapter, {n: parts for n, parts in modules.items() if n not in placed.configs}, bases)
    found = (
        Module(
            placed.configs.get(name, adapter.config),
            parts,
            shared,
            bases[name],
            peers,
            adapter.source,
            placed.files.get(name, (name,))[0],
            weights.get(name, ""),
            name in swapped,
            targets,
            is_saved(name),
        )
        for name, parts in modules.items()
    )
    return Gathered(found, missing, placed.unused)


def module_names(adapter: Adapter, lowering: Lowering) -> list[str]:
    """The modules that the files of `adapter` change, as they name them; raises as `modules_of` does."""
    check_options(adapter, lowering.format)
    usual = _group(
        adapter, lowering.format, lambda name: name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES, lambda name: False
    )
    return sorted(usual[0])


def _in_order(adapter: Adapter, bases: Mapping[str, BaseLinear]) -> tuple[BaseLinear, ...]:
    """What the config targets, in the order in which PEFT visits it: a module of several names once, at the first."""
    wanted, seen, found = targets_of(adapter.config, bases), set[str](), []
    for name, base in bases.items():
        if name in wanted and not seen & {*base.aliases} and (base.linear or base.embed_scale is not None):
            found.append(base)
        seen.add(name)
    return tuple(found)


_COPIES = {suffix for suffix in BASE_PARTS if suffix.startswith("base_layer.")}


def check_options(adapter: Adapter, format: Format) -> None:
    """Refuse every option that may change the result and is not served, and those of every type that say
    nothing about modules."""
    for option, (kind, wanted) in _SHAPES.items():
        value = adapter.config.get(option)
        many = isinstance(value, (list, tuple, set, frozenset)) and all(type(item) is kind for item in value)
        if value is not None and type(value) is not kind and not (many and option != "bias"):
            raise errors.AdapterError(f"adapter from {adapter.source}: {option} is {value!r}; it must be {wanted}")
    honoured = _HONOURED | format.honoured
    if kept := [option for option in adapter.ignored if option in honoured - _MAY_BE_IGNORED]:
        raise errors.UnsupportedAdapterError(
            f"adapter from {adapter.source}: ignore names {kept[0]!r}, by which mlora computes; it may name options "
            f"that are not served"
        )
    for option, value in adapter.config.items():
        if option in honoured or option in _NEUTRAL or option in format.neutral or value in _EMPTY:
            continue
        if value in _AS_HERE.get(option, ()):
            continue
        why = format.notes.get(option, "it may change what the adapter computes and mlora does not implement it")
        raise errors.UnsupportedAdapterError(
            f"adapter from {adapter.source}: option {option}={value!r} is not served: {why}; ignore=[{option!r}] "
            f"serves the adapter as if it were not there"
        )


def _group(
    adapter: Adapter, format: Format, is_vocabulary: Callable[[str], bool], is_module: Callable[[str], bool]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Module path -> its tensors by part, and the adapter's own tensors; every key must be understood.
    `is_vocabulary`: whether a module is an embedding of tokens or a head. `is_module`: whether the model has it."""
    modules: dict[str, dict[str, Tensor]] = {}
    shared: dict[str, Tensor] = {}
    suffixes = {**format.parts, **BASE_PARTS}
    endings = frozenset(suffixes)
    # What is tied to a module to save is saved with it, unnamed.
    tied = adapter.config.get("modules_to_save") and adapter.config.get("ensure_weight_tying")
    for key, stored in adapter.tensors.items():
        # 8-bit floats are a format of storage, which torch computes little with.
        tensor = stored.float() if stored.itemsize == 1 and stored.is_floating_point() else stored
        family = next((start for start in format.families if key.startswith(start)), None)
        if key in format.shared:
            part = format.shared[key]
            shared[part] = tensor
        elif family is not None:
            part = format.families[family]
            shared[part + key.removeprefix(family)] = tensor
        else:
            suffix = suffix_of(key, endings)
            name = "" if suffix is None else key[: -len(suffix) - 1]
            if suffix in _COPIES and not is_module(name) and is_module(f"{name}.base_layer"):
                name, suffix = f"{name}.base_layer", suffix.removeprefix("base_layer.")  # a module's own name
            if suffix is None or (suffix == "weight" and not (tied or _is_saved(adapter, name) or is_vocabulary(name))):
                raise errors.UnsupportedAdapterError(
                    f"adapter from {adapter.source}: tensor {key!r} is left over ({_guess(key)}); it is not served; "
                    f"ignore=[{key!r}] serves the adapter without it, and takes patterns (v_head.*)"
                )
            part = suffixes[suffix]
            parts = modules.setdefault(name, {})
            if part in parts:
                raise errors.AdapterError(f"adapter from {adapter.source}: {key} is there under two names")
            if tensor.dim() < 2 and ((not tensor.numel() and part not in format.empty) or _is_matrix(part, name)):
                wanted = "a matrix" if _is_matrix(part, name) else "whole"
                raise errors.AdapterError(
                    f"adapter from {adapter.source}, module {name}: {part} has shape {tuple(tensor.shape)}; it must be "
                    f"{wanted} (ZeRO-3 and FSDP leave such shards in files that were saved without gathering them)"
                )
            parts[part] = tensor
        if part not in format.numbers and tensor.is_floating_point() == (part in format.integers):
            kind = "whole numbers" if part in format.integers else "floating-point"
            raise errors.AdapterError(f"adapter from {adapter.source}: {key} is {tensor.dtype}; it must be {kind}")
    return modules, shared


def _is_matrix(part: str, name: str) -> bool:
    """Whether a part of a module is no vector in any type."""
    if part in ("copy", "saved weight"):
        return name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES
    return part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B") or part.startswith(("hada_", "lokr_"))


@lru_cache(maxsize=1 << 13)  # adapters of one model have the same keys again and again
def suffix_of(key: str, suffixes: frozenset[str]) -> str | None:
    """The longest of `suffixes`, which have three steps at most, that ends `key`."""
    found, at = None, len(key)
    for _ in range(3):
        if (at := key.rfind(".", 0, at)) < 0:
            break
        if key[at + 1 :] in suffixes:
            found = key[at + 1 :]
    return found


def _is_saved(adapter: Adapter, name: str) -> bool:
    """Whether `modules_to_save` names the module, or one that it is in."""
    return saved_by(adapter.config, name) is not None


def _guess(key: str) -> str:
    if "_embedding_" in key:
        return "embedding LoRA, which its type does not have"
    if key.startswith("v_head."):
        return "the value head of a TRL trainer, which no answer of the model depends on"
    return "a trained copy of a base weight, or unknown"


def _check_targets(
    adapter: Adapter, placed: Places, targeted: Set[str], bases: Mapping[str, BaseLinear], lowering: Lowering
) -> list[str]:
    """Refuse weights of what the model does not have or the config does not target.

    Returns:
        The modules that it targets and that have none: the base's, as in PEFT.
    """
    config, modules, weights = adapter.config, placed.modules, placed.weights.keys()
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
            + (f"; ignore=[{missing[0] + '.*'!r}] serves it without" if len(missing) < len(modules) else "")
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
    left = targeted - wanted - along - weights
    if is_all_linear(targets):
        left -= experts
    # Targets are told in the names that modules had when the file was made; parameters are none.
    files = {name: placed.files[name] for name in left}
    left = {n for n in left if files[n] != (n,) or n not in experts}
    if left := {n for n in left if not any(is_target(config, file) for file in files[n])}:
        raise errors.AdapterError(
            f"adapter from {adapter.source}: it has weights for {some(sorted(left))}, which its target_modules "
            f"{targets!r} do not name"
        )
    return sorted(wanted - targeted)
