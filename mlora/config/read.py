"""YAML and JSON files -> plain values, in which nothing that was written is lost."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from .. import errors


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but a key that comes twice is an error, not its last value, and 1e-3 a number, as in JSON
    and YAML 1.2, not a string."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} comes twice", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def read(path: Path) -> Any:
    """The contents of a file; raises ConfigError if it cannot be read."""
    try:
        return yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except OSError as error:
        raise errors.ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: a date of month 13
        raise errors.ConfigError(f"{path} cannot be read as YAML: {error}") from error
