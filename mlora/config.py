"""A model and its adapters from one YAML file, in Ludwig's schema for several adapters."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from . import errors
from .adapters.adapter import Adapter
from .lowering.targets import targets_of
from .merge import ALIASES, Merge
from .patching import patch, patching
from .runtime import Runtime

# Ludwig's names of an adapter's fields -> PEFT's. Dropout plays no part when an adapter is served.
_FRESH = {
    "r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "target_modules": "target_modules",
    "use_rslora": "use_rslora", "use_dora": "use_dora",
}  # fmt: skip
_WEIGHTS = ("path", "hub_id", "pretrained_adapter_weights")
_LOADING = ("revision", "token", "allow_pickle", "approximate")
_MERGE = ("name", *(name for name in Merge.__dataclass_fields__), *ALIASES)


@dataclass(frozen=True)
class Config:
    """A checked config.

    Args:
        base_model: as it was given, unchecked. `adapters`: name -> its entry. `merges`: (name, merge), in order.
        active: the name of an adapter or merge, or None. `folder`: that relative paths start from.
    """

    base_model: Any
    adapters: Mapping[str, Mapping[str, Any]]
    merges: Sequence[tuple[str, Merge]]
    active: Any
    folder: Path

    @property
    def names(self) -> list[str]:
        return [*self.adapters, *(name for name, _ in self.merges)]

    def model_source(self) -> str:
        """`base_model`; raises ConfigError if it is no folder or hub id."""
        if not isinstance(self.base_model, str) or not self.base_model:
            raise errors.ConfigError(
                f"base_model is {self.base_model!r}; it must be a folder or a hub id, or a model be given"
            )
        return self.base_model


def from_config(config: str | Path | Mapping[str, Any], *, model: nn.Module | None = None, **options: Any) -> Runtime:
    """Load a base model, patch it, load its adapters, merge and activate as a config says.

        base_model: HuggingFaceTB/SmolLM2-135M-Instruct
        adapters:
          adapters:
            sql:  {path: adapters/sql}              # a folder, relative to the file, or hub_id: org/name
            new:  {type: lora, r: 8, alpha: 16, target_modules: [q_proj]}  # no weights: fresh, its delta is 0
          merge:  {name: both, sources: [sql, new], weights: [0.7, 0.3], combination_type: linear}
          active: both

    `adapter: {...}` in place of `adapters` is one adapter named "default", which is active. `merge` may be a list.

    Args:
        config: a YAML or JSON file, or its contents. `model`: a loaded model, in place of `base_model`.
        options: for `mlora.patch`.

    Returns:
        The runtime; the model is `runtime.model`.

    Raises:
        ConfigError: a key is unknown (the nearest valid one is named), missing, or excluded by another.
        Whatever `patch`, `load_adapter` and `add_weighted_adapter` raise; the model is left as it was then.
    """
    parsed = parse(config)
    if model is None:
        model = _load(parsed.model_source())
    patched = inspect.signature(patch).bind(model, **options)
    patched.apply_defaults()
    with patching(*patched.args, **patched.kwargs) as runtime:
        for name, entry in parsed.adapters.items():
            _add(runtime, name, entry, parsed.folder)
        for name, how in parsed.merges:
            runtime.add_merge(name, how)
        if parsed.active is not None:
            runtime.set_adapter(parsed.active)
        return runtime


def parse(config: str | Path | Mapping[str, Any]) -> Config:
    """Read and check what `from_config` takes, without loading anything. Raises ConfigError and MergeError."""
    folder = Path()
    if not isinstance(config, Mapping):
        folder = Path(config).parent
        config = _read(Path(config))
    _check_keys(config, ("base_model", "adapter", "adapters"), "the config")
    if "adapter" in config and "adapters" in config:
        raise errors.ConfigError("the config has both 'adapter' and 'adapters'; it may have one of them")
    if "adapter" in config:
        adapters: Mapping[str, Any] = {"default": _mapping(config["adapter"], "adapter")}
        merges: list[Any] = []
        active: Any = "default"
    else:
        section = _mapping(config.get("adapters") or {}, "adapters")
        _check_keys(section, ("adapters", "merge", "active"), "'adapters'")
        adapters = _mapping(section.get("adapters") or {}, "adapters.adapters")
        merge = section.get("merge") or []
        merges = list(merge) if isinstance(merge, (list, tuple)) else [merge]
        active = section.get("active")
    entries = {str(name): _entry(str(name), _mapping(entry, f"adapter {name!r}")) for name, entry in adapters.items()}
    wanted = [_merge(_mapping(merge, "adapters.merge"), f"{i}" if i else "") for i, merge in enumerate(merges)]
    known = [*entries, *(name for name, _ in wanted)]
    for name in ([active] if active is not None else []) + [n for _, how in wanted for n in how.adapters]:
        if name not in known:
            raise errors.ConfigError(f"the config names an adapter {name!r}{_nearest(name, known)}; it has: {known}")
    return Config(config.get("base_model"), entries, wanted, active, folder)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise errors.ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise errors.ConfigError(f"{path} cannot be read as YAML: {error}") from error
    return _mapping(content, str(path))


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise errors.ConfigError(f"{what} is {value!r}; it must be a mapping")
    return value


def _check_keys(section: Mapping[str, Any], allowed: Sequence[str], what: str) -> None:
    for key in section:
        if key not in allowed:
            raise errors.ConfigError(
                f"{what} has no key {key!r}{_nearest(key, allowed)}; it takes {', '.join(sorted(allowed))}"
            )


def _nearest(name: Any, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(name), names, 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _entry(name: str, entry: Mapping[str, Any]) -> Mapping[str, Any]:
    _check_keys(entry, ("type", *_FRESH, *_WEIGHTS, *_LOADING), f"adapter {name!r}")
    given = [key for key in _WEIGHTS if key in entry]
    if len(given) > 1:
        raise errors.ConfigError(f"adapter {name!r} has {' and '.join(given)}; it may have one of them")
    if given:
        return entry
    if left := [key for key in _LOADING if key in entry]:
        raise errors.ConfigError(f"adapter {name!r} has {left[0]!r} and no weights: give it a path or a hub_id")
    if str(entry.get("type", "lora")).lower() != "lora":
        raise errors.ConfigError(f"adapter {name!r}: a fresh adapter can be of type 'lora' only, not {entry['type']!r}")
    if "target_modules" not in entry:
        raise errors.ConfigError(f"adapter {name!r} has neither weights (path, hub_id) nor target_modules")
    rank = entry.get("r", 8)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise errors.ConfigError(f"adapter {name!r}: r is {rank!r}; it must be a positive integer")
    return entry


def _merge(section: Mapping[str, Any], number: str) -> tuple[str, Merge]:
    _check_keys(section, _MERGE, "a merge")
    values = {key: value for key, value in section.items() if key != "name"}
    return str(section.get("name", f"merged{number}")), Merge.from_dict(values)


def _load(base: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    loaded: nn.Module = AutoModelForCausalLM.from_pretrained(base, dtype="auto").eval()
    return loaded


def _add(runtime: Runtime, name: str, entry: Mapping[str, Any], folder: Path) -> None:
    loading = {key: entry[key] for key in _LOADING if key in entry}
    if "path" in entry:
        runtime.load_adapter(folder / entry["path"], name, **loading)
    elif source := entry.get("hub_id", entry.get("pretrained_adapter_weights")):
        here = folder / source
        runtime.load_adapter(here if here.is_dir() else source, name, **loading)
    else:
        runtime.add_adapter(name, _fresh(runtime, name, entry))


def _fresh(runtime: Runtime, name: str, entry: Mapping[str, Any]) -> Adapter:
    """A LoRA as training starts it: A random (Kaiming uniform with a = sqrt(5)), B zero."""
    config: dict[str, Any] = {"peft_type": "LORA", "r": 8}
    config.update({_FRESH[key]: value for key, value in entry.items() if key in _FRESH})
    tensors = {}
    draw = torch.Generator().manual_seed(0)
    wanted = targets_of(config, runtime.bases)
    for path in (path for path in runtime.bases if path in wanted):
        base = runtime.bases[path]
        if base.embed_scale is not None:  # PEFT starts embeddings the other way round
            tensors[f"{path}.lora_embedding_A"] = torch.zeros(config["r"], base.in_features)
            tensors[f"{path}.lora_embedding_B"] = torch.randn(base.out_features, config["r"], generator=draw)
        else:
            a = torch.empty(config["r"], base.in_features)
            nn.init.kaiming_uniform_(a, math.sqrt(5), generator=draw)
            tensors[f"{path}.lora_A.weight"] = a
            tensors[f"{path}.lora_B.weight"] = torch.zeros(base.out_features, config["r"])
            if config.get("use_dora"):
                tensors[f"{path}.lora_magnitude_vector"] = base.weight().norm(dim=1)
    if not tensors:
        raise errors.ConfigError(f"adapter {name!r}: target_modules {entry['target_modules']!r} name no linear")
    return Adapter(config, tensors, source="config")
