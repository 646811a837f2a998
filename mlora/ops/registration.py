"""`torch.ops.mlora` is there after `import mlora`, which does not import torch: programs that `torch.export` saved need
no more than the operators. They are registered at once if torch is there, else as soon as it is."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def register_operators() -> None:
    if "torch" in sys.modules:
        from . import library  # noqa: F401
    else:
        sys.meta_path.insert(0, _AfterTorch())


class _AfterTorch(MetaPathFinder):
    """Finds torch as the other finders do, and has the operators registered when it has been imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torch":
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            # Only now: others look for the spec without importing it.
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            from . import library  # noqa: F401

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
