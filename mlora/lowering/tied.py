"""What modules that hold one weight, as an embedding and its head, have of one another in PEFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import errors
from ..adapters.adapter import Adapter
from .delta import BaseLinear
from .module import EMBEDDING_LAYER_NAMES, TOKENS
from .targets import full_match

# Of an embedding and of the head that is tied to it: each is the other's, transposed (`LoraModel._create_and_replace`).
_TURNED = {"lora_embedding_A": "lora_B", "lora_embedding_B": "lora_A"}


def tied_targets(config: Mapping[str, Any], bases: Mapping[str, BaseLinear]) -> set[str]:
    """What `ensure_weight_tying` adds to the targets: the embedding and what is tied to it, where they name one of them
    by its usual name (`BaseTuner._check_tied_modules`)."""
    if not config.get("ensure_weight_tying"):
        return set()
    saved, targets = config.get("modules_to_save") or (), config.get("target_modules") or ()
    if any(name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for name in saved):
        return set()
    if isinstance(targets, str):
        named = any(full_match(targets, name) for name in EMBEDDING_LAYER_NAMES)
    else:
        named = any(name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for name in targets)
    return {n for pair in _pairs(bases) for n in pair} if named else set()


def follow(
    adapter: Adapter,
    modules: dict[str, dict[str, Tensor]],
    bases: Mapping[str, BaseLinear],
    is_saved: Callable[[str], bool],
) -> None:
    """Trained tokens of an embedding are those of all that holds its weight and has none of its own; and so is a weight
    that was saved along, which no `modules_to_save` names. With `ensure_weight_tying` an embedding and a head have one
    LoRA."""
    for name, parts in list(modules.items()):
        if "saved weight" in parts and not is_saved(name):
            for other in bases[name].tied:
                modules.setdefault(other, {}).setdefault("saved weight", parts["saved weight"])
        if TOKENS in parts and bases[name].embed_scale is not None:
            for other in (*bases[name].aliases, *bases[name].tied):
                modules.setdefault(other, {}).setdefault(TOKENS, parts[TOKENS])
    tied = tied_targets(adapter.config, bases)
    for embedding, head in _pairs(bases):
        if embedding in tied:
            _share(adapter, embedding, head, modules)


def _share(adapter: Adapter, embedding: str, head: str, modules: dict[str, dict[str, Tensor]]) -> None:
    """Give each of the two the other's factors where it has none."""
    one, other = modules.setdefault(embedding, {}), modules.setdefault(head, {})
    for part, turned in _TURNED.items():
        if part in one:
            other.setdefault(turned, one[part].t())
        elif turned in other:
            one[part] = other[turned].t()
        if part in one and not torch.equal(one[part].t(), other[turned]):
            raise errors.AdapterError(
                f"adapter from {adapter.source}: ensure_weight_tying ties {embedding} and {head}, for which it has "
                f"different weights"
            )


def _pairs(bases: Mapping[str, BaseLinear]) -> list[tuple[str, str]]:
    """The embeddings of tokens and, with each, the linears that hold its weight."""
    return [
        (name, other)
        for name, base in bases.items()
        if base.embed_scale is not None
        for other in base.tied
        if bases[other].linear
    ]
