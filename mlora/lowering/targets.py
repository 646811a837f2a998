"""Which modules a PEFT config targets: the rules of PEFT 0.21 (`check_target_module_exists`)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import regex

from .. import errors
from .delta import BaseLinear

_OPTIONS = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")

_SECONDS = 0.2  # for one match; those of real configs take microseconds


def pattern_value(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first key, in the file's order, that matches the end of `name` (PEFT's
    `rank_pattern` and `alpha_pattern`), or `default`."""
    for key, value in (patterns or {}).items():
        if full_match(rf"(.*\.)?({key})$", name):
            return value
    return default


def targets_of(config: Mapping[str, Any], bases: Mapping[str, BaseLinear]) -> frozenset[str]:
    """Those of `bases` that `config` targets. Adapters of one model have the same targets again and again."""
    options = {option: config[option] for option in _OPTIONS if option in config}
    if is_all_linear(config.get("target_modules")):
        options["target_modules"] = [name for name, base in bases.items() if base.linear and not base.answers]
    names = tuple(name for name, base in bases.items() if not base.experts)
    return _targets_of(json.dumps(options, default=sorted), names)  # PEFT's config objects hold sets


@lru_cache(maxsize=64)
def _targets_of(options: str, names: tuple[str, ...]) -> frozenset[str]:
    config = json.loads(options)
    return frozenset(name for name in names if is_target(config, name))


def is_all_linear(targets: Any) -> bool:
    """Whether `target_modules` is PEFT's word for all linears but the model's output embedding."""
    return isinstance(targets, str) and targets.lower() == "all-linear"


def is_target(config: Mapping[str, Any], name: str) -> bool:
    """Whether `config` targets the module at `name`."""
    exclude = config.get("exclude_modules")
    if exclude and _matches(exclude, name):
        return False
    if any(full_match(rf"(?:(^|.*\.){saved}($|\..*)).*", name) for saved in config.get("modules_to_save") or ()):
        return False  # what is saved whole, or lies in such a module, has no adapter
    targets = config.get("target_modules")
    if not targets or not _matches(targets, name):
        return False
    if isinstance(targets, str) or name in targets:
        return True  # a regex or a full path names its layers itself
    return _in_layers(config, name)


def saved_by(config: Mapping[str, Any], name: str) -> str | None:
    """The module that `modules_to_save` names: the one at `name`, or the outermost that it is in; None where there is
    none. PEFT takes any ending of a name."""
    saved = config.get("modules_to_save")
    if not saved:
        return None
    steps = name.split(".")
    paths = (".".join(steps[:n]) for n in range(1, len(steps) + 1))
    return next((path for path in paths if any(path.endswith(s) for s in saved if isinstance(s, str))), None)


def _matches(targets: str | Iterable[str], name: str) -> bool:
    if isinstance(targets, str):
        return full_match(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _in_layers(config: Mapping[str, Any], name: str) -> bool:
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    named = config.get("layers_pattern") or []
    named = [named] if isinstance(named, str) else named
    for pattern in [rf"(?:^|.*?\.){p}" for p in named] or [r".*?\.[^.]*"]:
        if match := full_match(rf"{pattern}\.(?P<index>\d+)\..*", name):
            return int(match["index"]) in ([layers] if isinstance(layers, int) else layers)
    return False


def parameters_of(targets: Iterable[str], paths: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """The layers that PEFT puts around modules for `target_parameters`, as files name them.

    It wraps a module once for each of its targeted parameters, in the order in which they are registered
    (`BaseTuner._inject_parameters`), so that the first has the innermost layer: `experts.base_layer` and `experts`.

    Args:
        paths: of the model's parameters, those of a module in that order.

    Returns:
        Path of a layer -> path of its parameter; and the targets that name none of `paths`.
    """
    modules: dict[str, list[str]] = {}
    used = set()
    for path in paths:
        naming = [target for target in targets if path == target or path.endswith(f".{target}")]
        used.update(naming)
        if naming:
            modules.setdefault(path.rpartition(".")[0], []).append(path)
    wrapped = {
        module + ".base_layer" * (len(own) - 1 - depth): path
        for module, own in modules.items()
        for depth, path in enumerate(own)
    }
    return wrapped, sorted(set(targets) - used)


def full_match(pattern: str, name: str) -> Any:
    """The match of all of `name`, or None. A file's pattern may not take longer than `_SECONDS`."""
    try:
        return regex.fullmatch(pattern, name, timeout=_SECONDS)
    except (regex.error, RecursionError, OverflowError) as error:
        raise errors.AdapterError(f"{pattern!r} is not a valid module pattern: {error}") from error
    except TimeoutError as error:
        raise errors.AdapterError(f"the module pattern {pattern!r} takes too long to match {name!r}") from error


def some(names: Sequence[str]) -> str:
    """The first names, for a message."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
