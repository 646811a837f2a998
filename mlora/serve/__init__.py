"""Serving: requests that come when they come, each with its own adapter, on transformers' continuous batching.

Names are imported when they are first used, as those of `mlora` are.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .answers import Answer, Token, Usage
    from .engine import Engine, Stats
    from .sampling import Sampling
    from .together import follow

__all__ = ["Answer", "Engine", "Sampling", "Stats", "Token", "Usage", "follow"]

_HOMES = {
    "Answer": "answers",
    "Engine": "engine",
    "Sampling": "sampling",
    "Stats": "engine",
    "Token": "answers",
    "Usage": "answers",
    "follow": "together",
}


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name in ("Engine", "follow"):  # before anything that needs what it checks
            import_module(f"{__name__}.versions").check_names()
        value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
