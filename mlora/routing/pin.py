"""Pins: an entry whose adapters stay on the device, and mean the same, until it is released."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

from ..plan.plan import Recipe


@dataclass(frozen=True, slots=True)
class Pinned:
    """An entry of pinned contents, whatever becomes of the names; as long as its pin is held.

    Args:
        recipe: what it routes, beside what is folded in.
        content: equal only where the same adapters, as they were loaded, are summed with the same weights, on weights
            with the same recipe folded in: what a cache of a prompt's keys and values holds for.
    """

    recipe: Recipe
    content: Hashable


class Pin:
    """Made by `Runtime.pin`; held until `release`, or the end of its `with`. It counts as a reader of the weights, so
    that nothing is folded in or out meanwhile.

    Args:
        entry: for `use_adapters` and `adapter_names`. `invocations`: aLoRA among its adapters, as `starts` of
            `use_adapters` names it -> the tokens that activate it.
        widths: dotted path -> how many tokens or outputs its own embedding or head there has, where it brings one of
            another size than the model's.
    """

    def __init__(
        self,
        entry: Pinned,
        invocations: Mapping[str, tuple[int, ...]],
        widths: Mapping[str, int],
        release: Callable[[], None],
    ) -> None:
        self.entry = entry
        self.invocations = invocations
        self.widths = widths
        self._release: Callable[[], None] | None = release
        self._lock = threading.Lock()

    @property
    def content(self) -> Hashable:
        """See `Pinned`."""
        return self.entry.content

    def release(self) -> None:
        """Let go; from then on its entry must not be used. A second time does nothing."""
        with self._lock:
            release, self._release = self._release, None
        if release is not None:
            release()

    def __enter__(self) -> Pin:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
