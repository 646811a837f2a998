"""The HTTP server around an engine: OpenAI's, LoRAX's, vLLM's and SGLang's dialects in one app.

It needs the packages of the extra `serve`: `pip install 'mlora-runtime[serve]'`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .app import create_app
    from .server import Access, Limits

__all__ = ["Access", "Limits", "create_app", "require"]

_HOMES = {"Access": "server", "Limits": "server", "create_app": "app"}


def require(*packages: str) -> None:
    """Import `packages` of the extra.

    Raises:
        ImportError: one is not installed; it says what to do.
    """
    for package in packages:
        try:
            import_module(package)
        except ModuleNotFoundError as error:
            raise ImportError(f"the server needs {error.name}: pip install 'mlora-runtime[serve]'") from error


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        require("fastapi", "prometheus_client")
        value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
