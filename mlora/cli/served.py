"""What `mlora generate` serves: a base model with adapters, from options or from a YAML file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .adapters import find, parse_adapters
from .errors import InputError
from .lines import names_in
from .models import check_model
from .options import check_full_rank
from .progress import Progress


@dataclass(frozen=True)
class Source:
    """Where an adapter comes from, and where that lies now. `loading`: options of `Adapter.from_pretrained`."""

    source: str
    folder: Path
    loading: Mapping[str, Any]


@dataclass
class Served:
    """`merges`: name -> the Merge that it stands for. `active` is the entry of lines that have none. `config` is the
    YAML file, if there is one."""

    model: str | None
    sources: Mapping[str, Source]
    names: Sequence[str]
    merges: Mapping[str, Any]
    active: str | None
    config: Path | None
    approximate: int | None = None
    dense: bool = False
    strict: bool = False

    def members(self, entry: Any) -> list[str]:
        """The adapters that `entry` uses."""
        return names_in(entry, self.merges)

    def check_entries(self, entries: Iterable[Any], most: int, progress: Progress) -> None:
        """Raise InputError for an entry that needs more than `most` adapters at once, and say which adapters none
        needs."""
        used = {name for entry in [*entries, self.active, *self.merges] for name in self.members(entry)}
        if unused := [name for name in self.sources if name not in used]:
            progress.note(f"no line uses {', '.join(unused)}")
        for entry in entries:
            if isinstance(entry, dict) and len(entry) > most and len(self.members(entry)) > most:
                raise InputError(f"the entry {entry!r} needs {len(entry)} adapters at once; --max-adapters is {most}")

    def read(self) -> None:
        """Raises AdapterError where an adapter cannot be read, before the model is loaded."""
        from mlora import Adapter

        if self.config is None:
            for source in self.sources.values():
                Adapter.from_pretrained(source.source, **source.loading)

    def load(self, device: str | None, dtype: str, split: bool = False) -> Any:
        from . import models

        return models.load_model(self.model, device, dtype, split)

    def patch(self, model: Any, **options: Any) -> None:
        """Raises as `mlora.patch` and `load_adapter` do."""
        import mlora

        if self.config is not None:
            # The active one would keep its place on the device; lines name theirs.
            mlora.from_config(self.config, model=model, **options).set_adapter(None)
            return
        runtime = mlora.patch(model, **options)
        options = {"approximate": self.approximate, "dense": self.dense, "strict": self.strict}
        for name, source in self.sources.items():
            runtime.load_adapter(source.source, name, **options, **source.loading)


def choose(
    config: Path | None,
    model: str | None,
    model_option: str,
    adapters: Sequence[str] | None,
    approximate: int | None,
    dense: bool,
    strict: bool,
    ignore: Sequence[str] | None,
    allow_pickle: bool,
) -> Served:
    """What a command serves: of its YAML file if there is one, in place of all other options; else of these.
    `model_option`: what the command calls `model`. Raises InputError as `from_yaml` and `from_options` do."""
    if config is None:
        loading = {"allow_pickle": allow_pickle, "ignore": ignore or ()}
        return from_options(check_model(model), adapters or [], approximate, dense, strict, **loading)
    given = {
        model_option: model,
        "--adapter": adapters,
        "--approximate": approximate,
        "--dense": dense,
        "--strict": strict,
        "--ignore": ignore,
        "--allow-pickle": allow_pickle,
    }
    return from_yaml(config.expanduser(), [option for option, value in given.items() if value])


def from_options(
    model: str | None,
    options: Sequence[str],
    approximate: int | None,
    dense: bool,
    strict: bool,
    **loading: Any,
) -> Served:
    """`loading`: options of `Adapter.from_pretrained`. Raises InputError where there is no such adapter, or where both
    `approximate` and `dense` are asked for."""
    check_full_rank(approximate, dense)
    sources: dict[str, Source] = {}
    for given in parse_adapters(options):
        if given.weight is not None:
            raise InputError(
                f"--adapter {given.option!r}: weights are for lines to give, as in "
                f'"adapter": {{"{given.name}": {given.weight:g}}}'
            )
        sources[given.name] = Source(given.source, find(given), loading)
    return Served(model, sources, list(sources), {}, None, None, approximate, dense, strict)


def from_yaml(file: Path, excluded: Sequence[str]) -> Served:
    """Nothing is loaded. `excluded`: options that were given beside it, which the file is in place of."""
    from mlora.adapters.sources import local_path
    from mlora.config import parse
    from mlora.errors import MloraError

    if excluded:
        raise InputError(f"--config excludes {excluded[0]}: the file says it")
    try:
        parsed = parse(file)
        sources = {}
        for name, entry in parsed.adapters.items():
            if source := str(parsed.source(name) or ""):
                loading = {key: entry[key] for key in ("revision", "token") if key in entry}
                folder = local_path(source, loading.get("revision"), loading.get("token"))
                sources[name] = Source(source, folder, loading)
        return Served(
            check_model(parsed.model_source()), sources, parsed.names, dict(parsed.merges), parsed.active, file
        )
    except MloraError as error:
        raise InputError(f"--config: {error}") from None
