"""Several adapters -> one. `Merge` says how; what is done to tensors are pure functions, in two spaces."""

from .how import ALIASES, COMBINATION_TYPES, Merge, as_merge, is_weight
from .module import kept, merge_adapters, merge_module
from .relative import relative
from .strategies import combine

__all__ = [
    "ALIASES",
    "COMBINATION_TYPES",
    "Merge",
    "as_merge",
    "combine",
    "is_weight",
    "kept",
    "merge_adapters",
    "merge_module",
    "relative",
]
