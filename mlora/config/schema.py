"""What a config may say: Ludwig's schema of a model with several adapters, and where to load these from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from .. import errors
from ..merge import ALIASES, Merge
from ..routing.entries import BASE
from .check import check_keys, given, is_number, mapping, nearest
from .read import read

# What a fresh adapter is made of, and what of its training says nothing of one that is served.
FRESH = ("r", "alpha", "target_modules", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "layer_replication")
TRAINING = (
    "dropout", "bias_type", "init_lora_weights", "eva_config", "loftq_config", "corda_config", "loraplus_lr_ratio",
    "postprocessor",
)  # fmt: skip
WEIGHTS = ("path", "hub_id", "pretrained_adapter_weights")
LOADING = ("revision", "token", "allow_pickle", "approximate", "dense")
_MERGE = ("name", *(name for name in Merge.__dataclass_fields__), *ALIASES)

# Keys of whole files of Ludwig's: those that do not concern serving, and those that say how the model is loaded.
TRAINING_SECTIONS = ("dataset", "trainer", "prompt", "input_features", "output_features", "preprocessing")
_ELSEWHERE = (
    "model_type", "output_directory", *TRAINING_SECTIONS, "defaults", "hyperopt", "generation", "backend",
    "ludwig_version",
)  # fmt: skip
_OUTPUT = "results"  # Ludwig's folder for what it trains
_OF_THE_MODEL = ("quantization", "model_parameters", "trust_remote_code", "is_multimodal")

# Initialisations that leave the base's weights alone, so that a fresh adapter is one that does nothing.
_PLAIN_INITS = ("default", "gaussian", "eva", "orthogonal", True)

_DENSITY = 0.5  # Ludwig's, of merges that prune


@dataclass(frozen=True)
class Config:
    """A checked config.

    Args:
        base_model: as it was given, unchecked. `adapters`: name -> its entry. `merges`: (name, merge), in order.
        active: the name of an adapter or merge, or None. `folder`: that relative paths start from.
        ignored: what it says beside, which does not concern serving.
        loading: what it says of how its model is loaded, which `model_source` refuses.
        shared, sections: what it says of the training of all adapters, and of each, for `training_of` to read.
        output: the folder of what `mlora train` made of it.
    """

    base_model: Any
    adapters: Mapping[str, Mapping[str, Any]]
    merges: Sequence[tuple[str, Merge]]
    active: str | None
    folder: Path
    ignored: Sequence[str] = ()
    loading: Mapping[str, Any] | None = None
    shared: Mapping[str, Any] = field(default_factory=dict)
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    output: Path = Path(_OUTPUT)

    def source(self, name: str) -> str | Path | None:
        """Where an adapter is loaded from, a folder or a hub id; None for a fresh one."""
        if (trained := self.trained(name)) is not None:
            return trained
        return self.weights(name)

    def weights(self, name: str) -> str | Path | None:
        """Where the weights are that its entry names; None where it names none."""
        entry = self.adapters[name]
        if "path" in entry:
            return self.folder / entry["path"]
        given = entry.get("hub_id", entry.get("pretrained_adapter_weights"))
        return None if given is None else here if (here := self.folder / given).is_dir() else str(given)

    def trained(self, name: str) -> Path | None:
        """The folder of an adapter that `mlora train` has trained; None where it has not, or is not to."""
        folder = self.output / name
        wanted = self.is_trained(name) and ("dataset" in self.shared or "dataset" in self.sections[name])
        return folder if wanted and (folder / "adapter_config.json").is_file() else None

    def is_trained(self, name: str) -> bool:
        """Whether it is for `mlora train` to train: not where it has weights to be served as they are."""
        return not {"path", "hub_id"} & self.adapters[name].keys()

    @property
    def names(self) -> list[str]:
        return [*self.adapters, *(name for name, _ in self.merges)]

    def model_source(self) -> str:
        """`base_model`; raises ConfigError if it is no folder or hub id, or is to be loaded in a way of its own."""
        for key, value in (self.loading or {}).items():
            raise errors.ConfigError(
                f"the config has {key}: {value!r}, which changes how the model is loaded; load it so, and give it as "
                f"from_config(..., model=)"
            )
        if not isinstance(self.base_model, str) or not self.base_model:
            raise errors.ConfigError(
                f"base_model is {self.base_model!r}; it must be a folder or a hub id, in quotes where YAML reads none, "
                f"or a model be given"
            )
        return self.base_model


def parse(config: str | Path | Mapping[str, Any]) -> Config:
    """Read and check what `from_config` takes, without loading anything. Raises ConfigError and MergeError."""
    folder = Path()
    if not isinstance(config, Mapping):
        folder = Path(config).parent
        config = mapping(read(Path(config)), str(config))
    check_keys(config, ("base_model", "adapter", "adapters", *_ELSEWHERE, *_OF_THE_MODEL), "the config")
    config = given(config)
    if config.get("model_type", "llm") != "llm":
        raise errors.ConfigError(f"model_type is {config['model_type']!r}; mlora serves 'llm'")
    if "adapter" in config and "adapters" in config:
        raise errors.ConfigError("the config has both 'adapter' and 'adapters'; it may have one of them")
    ignored = [key for key in _ELSEWHERE if key in config and key not in ("model_type", "output_directory")]
    if "adapter" in config:
        adapters: Mapping[Any, Any] = {"default": config["adapter"]}
        merges: Sequence[Any] = []
        active: Any = "default"
    else:
        section = given(mapping(config.get("adapters", {}), "adapters"))
        check_keys(section, ("adapters", "merge", "active"), "'adapters'")
        adapters = mapping(section.get("adapters", {}), "adapters.adapters")
        merge = section.get("merge", [])
        merges = merge if isinstance(merge, (list, tuple)) else [merge]
        active = section.get("active", next(iter(adapters), None))  # Ludwig's default
    entries, sections = {}, {}
    for key, entry in adapters.items():
        name = _name(key, "adapters.adapters has an adapter")
        entries[name] = _entry(name, entry, ignored)
        sections[name] = _sections(entry)
    wanted = [_merge(mapping(merge, "adapters.merge"), f"{i}" if i else "", ignored) for i, merge in enumerate(merges)]
    known = [*entries, *(name for name, _ in wanted)]
    if twice := next((name for at, name in enumerate(known) if name in known[:at]), None):
        raise errors.ConfigError(f"the config has the name {twice!r} twice, as an adapter and a merge, or two merges")
    if active is not None:
        active = _name(active, "adapters.active is")
    for name in ([active] if active is not None else []) + [n for _, how in wanted for n in how.adapters]:
        if name not in known:
            raise errors.ConfigError(f"the config names an adapter {name!r}{nearest(name, known)}; it has: {known}")
    for at, (name, how) in enumerate(wanted):
        if later := [source for source in how.adapters if source in known[len(entries) + at :]]:
            raise errors.ConfigError(f"merge {name!r} has the source {later[0]!r}, which is made no earlier than it")
    output = config.get("output_directory", _OUTPUT)
    if not isinstance(output, str) or not output:
        raise errors.ConfigError(f"output_directory is {output!r}; it must be a folder's name, {_QUOTED}")
    return Config(
        base_model=config.get("base_model"),
        adapters=entries,
        merges=wanted,
        active=active,
        folder=folder,
        ignored=ignored,
        loading=_loading(config, ignored),
        shared=_sections(config),
        sections=sections,
        output=folder / Path(output).expanduser(),
    )


def _sections(section: Any) -> dict[str, Any]:
    """What of it is about training."""
    keys = (*TRAINING_SECTIONS, *TRAINING)
    return {key: section[key] for key in keys if key in section} if isinstance(section, Mapping) else {}


def _loading(config: Mapping[str, Any], ignored: list[str]) -> dict[str, Any]:
    """What changes how the model is loaded; of `model_parameters` that is `rope_scaling`, the rest is training's."""
    found = {key: config[key] for key in _OF_THE_MODEL if config.get(key)}
    if "model_parameters" in found:
        scaling = mapping(found.pop("model_parameters"), "model_parameters").get("rope_scaling") or {}
        if any(mapping(scaling, "rope_scaling").values()):
            found["model_parameters"] = {"rope_scaling": scaling}
        else:
            ignored.append("model_parameters")
    return found


def _name(value: Any, where: str) -> str:
    """`value` if it can name an adapter. YAML reads 1, yes, null and 2024-01-01 as no strings."""
    if value in ("", BASE):
        raise errors.ConfigError(f"{where} {value!r}; it must have another name")
    if not isinstance(value, str):
        raise errors.ConfigError(
            f'{where} {value!r}, which is no string but of type {type(value).__name__}; quote the name, as "1" or "yes"'
        )
    return value


def _entry(name: str, value: Any, ignored: list[str]) -> Mapping[str, Any]:
    """The checked fields of an adapter that are used; the names of others are added to `ignored`."""
    where = f"adapter {name!r}"
    said = mapping({"type": value} if isinstance(value, str) else value, where)  # Ludwig takes `adapter: lora` too
    check_keys(said, ("type", *FRESH, *TRAINING, *WEIGHTS, *LOADING, *TRAINING_SECTIONS), where)
    entry = {key: one for key, one in given(said).items() if key not in TRAINING_SECTIONS}
    _check_values(where, entry)
    sources = [key for key in WEIGHTS if key in entry]
    if len(sources) > 1:
        raise errors.ConfigError(f"{where} has {' and '.join(sources)}; it may have one of them")
    unused = [key for key in (*(FRESH if sources else ()), *TRAINING) if key in entry]
    if unused:
        ignored.append(f"{', '.join(unused)} of {where}")
    if not sources:
        _check_fresh(where, entry)
    return {key: value for key, value in entry.items() if key not in unused}


def _check_fresh(where: str, entry: Mapping[str, Any]) -> None:
    if left := [key for key in LOADING if key in entry]:
        raise errors.ConfigError(f"{where} has {left[0]!r} and no weights: give it a path or a hub_id")
    if str(entry.get("type", "lora")).lower() != "lora":
        raise errors.ConfigError(f"{where}: a fresh adapter can be of type 'lora' only, not {entry['type']!r}")
    if not {"type", "target_modules"} & entry.keys():
        raise errors.ConfigError(f"{where} has neither weights (path, hub_id) nor a type or target_modules")
    if (init := entry.get("init_lora_weights", "default")) not in _PLAIN_INITS:
        raise errors.ConfigError(
            f"{where}: init_lora_weights is {init!r}, which rewrites the base's weights as training starts; a fresh "
            f"adapter can have {', '.join(map(repr, _PLAIN_INITS[:-1]))}"
        )


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_names(value: Any) -> bool:
    names = [value] if isinstance(value, str) else value
    return isinstance(names, (list, tuple)) and bool(names) and all(isinstance(one, str) and one for one in names)


def _is_finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


def _is_table_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: isinstance(values, Mapping) and all(isinstance(k, str) and fits(v) for k, v in values.items())


_QUOTED = "a string, in quotes where YAML reads it as none"
_KINDS: tuple[tuple[Any, str, Iterable[str]], ...] = (
    (lambda value: isinstance(value, (str, PathLike)), _QUOTED, WEIGHTS),
    (lambda value: isinstance(value, str), _QUOTED, ("type", "revision", "token", "bias_type")),
    (lambda value: isinstance(value, bool), "true or false", ("allow_pickle", "dense", "use_rslora", "use_dora")),
    (_is_rank, "a positive integer", ("r",)),
    (_is_finite, "a finite number", ("alpha", "dropout")),
    (_is_names, f"a pattern or a list of names, each {_QUOTED}", ("target_modules",)),
    (_is_table_of(_is_rank), f"a mapping of names, each {_QUOTED}, to positive integers", ("rank_pattern",)),
    (_is_table_of(_is_finite), f"a mapping of names, each {_QUOTED}, to finite numbers", ("alpha_pattern",)),
)


def _check_values(where: str, entry: Mapping[str, Any]) -> None:
    for fits, wanted, keys in _KINDS:
        for key in keys:
            if key in entry and not fits(entry[key]):
                raise errors.ConfigError(f"{where}: {key} is {entry[key]!r}; it must be {wanted}")


def _merge(section: Mapping[str, Any], number: str, ignored: list[str]) -> tuple[str, Merge]:
    check_keys(section, _MERGE, "a merge")
    values = given(section)
    name = _name(values.pop("name", f"merged{number}"), "adapters.merge has the name")
    for key in ("adapters", *ALIASES):
        if isinstance(values.get(key), (list, tuple)):
            for source in values[key]:
                _name(source, f"merge {name!r}: {key} has an adapter")
    kind = values.get("combination_type", values.get("merge_strategy", "linear"))
    if kind not in ("linear", "cat", "svd"):
        values.setdefault("density", _DENSITY)
    elif values.pop("density", None) is not None:
        ignored.append(f"density of merge {name!r}")
    return name, Merge.from_dict(values)
