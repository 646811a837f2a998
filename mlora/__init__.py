"""mlora: a multi-LoRA runtime for PyTorch and Hugging Face models."""

from . import errors
from .adapters.adapter import Adapter
from .config import from_config
from .merge import Merge
from .patch import patch
from .patched import unpatch
from .routing.entries import BASE
from .routing.registry import AdapterInfo
from .runtime import Runtime

__version__ = "0.1.0"

__all__ = ["BASE", "Adapter", "AdapterInfo", "Merge", "Runtime", "errors", "from_config", "patch", "unpatch"]
