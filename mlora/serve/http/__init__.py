"""The HTTP server around an engine: OpenAI's, LoRAX's, vLLM's and SGLang's dialects in one app.

It needs the packages of the extra `serve`: `pip install 'mlora-runtime[serve]'`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .app import create_app
    from .server import Access, Limits

__all__ = ["Access", "Limits", "create_app"]

_HOMES = {"Access": "server", "Limits": "server", "create_app": "app"}


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            home = import_module(f"{__name__}.{_HOMES[name]}")
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in ("fastapi", "starlette", "prometheus_client", "pydantic"):
                raise
            raise ImportError(f"the server needs {error.name}; pip install 'mlora-runtime[serve]'") from error
        value = globals()[name] = getattr(home, name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
