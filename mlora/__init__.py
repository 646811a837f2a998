"""mlora: a multi-LoRA runtime for PyTorch and Hugging Face models.

Names are imported when they are first used: `import mlora`, and so the command line, does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import errors
from .ops.registration import register_operators

if TYPE_CHECKING:
    from . import serve as serve
    from .adapters.adapter import Adapter
    from .attached import attach, detach
    from .config import from_config
    from .evaluation import evaluate
    from .merge import Merge
    from .patched import unpatch
    from .patching import patch
    from .routing.entries import BASE
    from .routing.info import AdapterInfo, HostUse
    from .runtime import Runtime
    from .trainer import Run, Trainer
    from .training.losses import losses

__version__ = "0.1.0"

__all__ = [
    "BASE",
    "Adapter",
    "AdapterInfo",
    "HostUse",
    "Merge",
    "Run",
    "Runtime",
    "Trainer",
    "attach",
    "detach",
    "errors",
    "evaluate",
    "from_config",
    "losses",
    "patch",
    "unpatch",
]

# No module may have the name of something in it: importing the module would put it in that one's place.
_HOMES = {
    "BASE": "routing.entries",
    "Adapter": "adapters.adapter",
    "AdapterInfo": "routing.info",
    "HostUse": "routing.info",
    "Merge": "merge",
    "Run": "trainer",
    "Runtime": "runtime",
    "Trainer": "trainer",
    "attach": "attached",
    "detach": "attached",
    "evaluate": "evaluation",
    "from_config": "config",
    "losses": "training.losses",
    "patch": "patching",
    "unpatch": "patched",
}

register_operators()


if not TYPE_CHECKING:  # checkers take a module that has this function to have every name

    def __getattr__(name: str) -> Any:
        if name == "serve":  # a room of its own
            return import_module(f"{__name__}.serve")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
