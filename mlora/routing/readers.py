"""Who reads the base's weights, while which nothing is folded into them or out."""

from __future__ import annotations

import threading
from typing import Any

from .. import errors


class Readers:
    """Calls and `use_adapters` that are running: `with readers:` begins when another thread's folding has ended, and
    keeps others from beginning.

    Args:
        lock: what a thread holds from `refuse` on until it has changed the weights; reentrant.

    A plan holds for the weights as they are, so it is made inside.
    """

    def __init__(self, lock: threading.RLock) -> None:
        self.count = 0
        self._lock = lock

    def __enter__(self) -> None:
        with self._lock:
            self.count += 1

    def __exit__(self, *_: Any) -> None:
        with self._lock:
            self.count -= 1

    def refuse(self, what: str) -> None:
        """Raise `AdapterInUseError` where `what`, which changes the weights, would do so under a reader."""
        if self.count:
            raise errors.AdapterInUseError(f"{what} changes the weights, while a call or use_adapters is using them")
