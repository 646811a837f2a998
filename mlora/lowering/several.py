"""Files that hold adapters of several models, as of a diffusion pipeline's UNet and text encoders: each model takes its
own part, that of which it has all modules."""

from __future__ import annotations

from collections.abc import Iterable

from .. import errors
from ..adapters.adapter import Adapter
from ..adapters.bare import METADATA
from . import lora, lycoris
from .gather import suffix_of
from .names import Names


def part_of(adapter: Adapter, names: Names) -> Adapter:
    """The part of `adapter` that is for the model of `names`; itself where it is for one model. The
    names of the other parts are among its `ignored`.

    Raises:
        AdapterError: several parts fit the model, or none does of those that a header tells apart.
    """
    told = adapter.config.get(METADATA)
    if not told and adapter.peft_type != "LYCORIS":
        return adapter
    parts: dict[str, list[str]] = {f"{key.partition('.')[0]}.": [] for key in told or ()}
    for key in adapter.tensors:
        parts.setdefault(f"{key.partition('.')[0]}." if told else lycoris.component(key), []).append(key)
    if len(parts) < 2 and not told:
        return adapter
    own = [part for part, keys in parts.items() if keys and _fits(adapter, keys, names)]
    if len(own) > 1:
        raise errors.AdapterError(
            f"adapter from {adapter.source}: it holds adapters of several models ({_listed(parts)}), of which "
            f"{_listed(own)} fit this one; ignore=[{own[-1] + '*'!r}] leaves one of them out"
        )
    if not own and told:
        raise errors.AdapterError(
            f"adapter from {adapter.source}: it holds adapters of several models ({_listed(parts)}), and this model "
            f"has the modules of none of them"
        )
    if not own:
        return adapter
    (part,) = own
    others = tuple(f"{other}*" for other in parts if other != part)
    tensors = {key.removeprefix(part) if told else key: adapter.tensors[key] for key in parts[part]}
    config = dict(adapter.config)
    if told:
        fields = {key.removeprefix(part): value for key, value in told.items() if key.startswith(part)}
        config = {"peft_type": "LORA", **fields} if fields else {"peft_type": "LYCORIS"}
    return Adapter(config, tensors, adapter.source, (*adapter.ignored, *others))


def check_one(adapter: Adapter) -> None:
    """Raise `AdapterError` if the adapter is of several models with a config each, which only a model tells apart."""
    if told := adapter.config.get(METADATA):
        parts = {f"{key.partition('.')[0]}." for key in (*told, *adapter.tensors)}
        raise errors.AdapterError(
            f"adapter from {adapter.source}: it holds adapters of several models ({_listed(parts)}); the model that it "
            f"is loaded into takes its own"
        )


def _fits(adapter: Adapter, keys: Iterable[str], names: Names) -> bool:
    """Whether the model has every module of these tensors, as wide as their first factors."""
    modules = {key: key.removesuffix(suffix_of(key, _ENDINGS) or "").removesuffix(".") for key in keys}
    own = lycoris.names(modules.values(), names)
    found = {key: names.bases.get(own[module]) for key, module in modules.items()}
    return all(base is not None for base in found.values()) and all(
        adapter.tensors[key].dim() < 2 or adapter.tensors[key].shape[1] == base.channels
        for key, base in found.items()
        if base is not None and lycoris.FORMAT.parts.get(suffix_of(key, _ENDINGS) or "") == "lora_A"
    )


_ENDINGS = frozenset(lycoris.FORMAT.parts) | frozenset(lora.FORMAT.parts)


def _listed(parts: Iterable[str]) -> str:
    return ", ".join(sorted(part.strip("._") or "no prefix" for part in parts))
