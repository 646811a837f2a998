"""Names that changed since a file was written: transformers' own conversions of checkpoints, for an adapter's modules.

transformers renames what older checkpoints hold as it loads them (`conversion_mapping`, `PrefixChange`, the
`base_model_prefix` between a model and the same with a head, `_checkpoint_conversion_mapping` of models with code of
their own), and lists what they may hold and no model has any more (`_keys_to_ignore_on_load_unexpected`). Files of
adapters are read by the same rules, so that what is renamed next comes with the next release.

What torch.compile, DataParallel or checkpoint wrappers put around modules of the model is in its paths and in no name.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from torch import nn

from ..adapters.keys import unwrapped
from .delta import BaseLinear

_AROUND_ALL = ("module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class Names:
    """How files may name the modules of one adapter's model.

    Args:
        model: a transformers model; of others there is nothing to know.
        bases: dotted path -> what adapters can change.
    """

    def __init__(self, model: nn.Module | None, bases: Mapping[str, BaseLinear]) -> None:
        self.bases = bases
        self._given, self._around = _inside(model)
        self._found: dict[str, str] = {}

    @cached_property
    def model(self) -> Any:
        """The transformers model; None where there is none."""
        module = sys.modules.get("transformers.modeling_utils")  # imported, if one was made
        return self._given if module is not None and isinstance(self._given, module.PreTrainedModel) else None

    def find(self, name: str) -> str:
        """The model's name of what a file calls `name`, which it may be itself; `name` where the model has none."""
        if name in self.bases:
            return name
        if name not in self._found:
            candidates = [name]
            if self.model is not None:
                renamed, pattern = self._renamed(name)
                candidates += [] if pattern else [renamed, *self._prefixed(renamed), *self._prefixed(name)]
            self._found[name] = next(filter(None, map(self._at, candidates)), name)
        return self._found[name]

    def converted(self, name: str) -> tuple[str, str] | None:
        """Where the weight of a module went that is no module any more: the name of the first tensor that was made of
        it, and which of the conversion's patterns it is; None of others."""
        if self.model is None:
            return None
        key, pattern = self._renamed(name)
        if pattern is None:
            return None
        for candidate in (key, *self._prefixed(key)):
            if found := self._at(candidate):
                return found, pattern
            if found := self._at(candidate.removesuffix(".weight")):
                return f"{found}.weight", pattern
        return key, pattern

    def converter(self, pattern: str) -> Any:
        """The conversion that has the pattern among its sources."""
        return next(converter for converter in self._transforms[1] if pattern in converter.source_patterns)

    def unused(self, strange: Iterable[str], names: Iterable[str]) -> set[str]:
        """Those of a file's `names` that the model does not have, `strange`, and does without: what transformers drops
        from checkpoints, and, in a base model, what lies outside of it in the model with a head that the file was made
        for."""
        if self.model is None:
            return set()
        dropped = [re.compile(p) for p in self.model._keys_to_ignore_on_load_unexpected or ()]
        prefix = f"{self.model.base_model_prefix}."
        whole = self.model.base_model is self.model and any(name.startswith(prefix) for name in names)
        return {
            name
            for name in strange
            if (whole and not name.startswith(prefix))
            or any(p.search(f"{n}.weight") for p in dropped for n in (name, self._renamed(name)[0]))
        }

    def former(self, name: str) -> list[str]:
        """What a file may call a module of the model, beside its path."""
        plain = self._plain(name)
        found = [plain]
        if self.model is not None:
            key = f"{plain}.weight"
            for renaming in self._reversed:
                key, _ = renaming.rename_source_key(key)
            old = key.removesuffix(".weight")
            found += [old, *self._prefixed(old), *self._prefixed(plain)]
        return [n for n in dict.fromkeys(found) if n != name]

    def _renamed(self, name: str) -> tuple[str, str | None]:
        """The name after all renamings; that of a tensor, and the pattern that matched, where a converter does."""
        from transformers.core_model_loading import rename_source_key

        key, pattern = rename_source_key(f"{name}.weight", *self._transforms)
        return (key if pattern else key.removesuffix(".weight")), pattern

    def _prefixed(self, name: str) -> list[str]:
        """The name in a model with a head, or without one."""
        prefix = f"{self.model.base_model_prefix}."
        return [name.removeprefix(prefix) if name.startswith(prefix) else prefix + name] if prefix != "." else []

    def _at(self, name: str) -> str:
        """The path of a module or parameter, or of a layer that PEFT puts around a parameter; "" if there is none."""
        if (path := self._paths.get(name)) is not None:
            return path
        holder = name
        while holder.endswith(".base_layer"):
            holder = holder.removesuffix(".base_layer")
        path = self._holders.get(holder, "")
        return path and path + name[len(holder) :]

    @cached_property
    def _paths(self) -> dict[str, str]:
        return {self._plain(path): path for path in self.bases} | {path: path for path in self.bases}

    def _plain(self, path: str) -> str:
        return unwrapped(path.removeprefix(self._around))

    @cached_property
    def _holders(self) -> dict[str, str]:
        holders = {name.rpartition(".")[0] for name, base in self.bases.items() if base.experts}
        return {self._plain(path): path for path in holders} | {path: path for path in holders}

    @cached_property
    def _transforms(self) -> tuple[list[Any], list[Any]]:
        """What transformers renames when it loads a checkpoint of the model, and what it computes."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        found = get_model_conversion_mapping(self.model, getattr(self.model, "_checkpoint_conversion_mapping", None))
        renamings = [transform for transform in found if isinstance(transform, WeightRenaming)]
        return renamings, [transform for transform in found if not isinstance(transform, WeightRenaming)]

    @cached_property
    def _reversed(self) -> list[Any]:
        return [renaming.reverse_transform() for renaming in reversed(self._transforms[0])]


def _inside(model: nn.Module | None) -> tuple[nn.Module | None, str]:
    """The model in what is wrapped around all of it, and the path there, with a dot behind."""
    path = ""
    while model is not None and len(model._modules) == 1 and (name := next(iter(model._modules))) in _AROUND_ALL:
        model, path = model._modules[name], f"{path}{name}."
    return model, path
