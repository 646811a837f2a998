"""Gradient checkpointing: what the backward pass computes again is routed as it was in the forward pass.

By then the call has ended, another one may be open, and on a GPU it runs in a thread of autograd's. So both kinds of
`torch.utils.checkpoint` are wrapped where they keep the function for later; whoever calls them, and by whatever name,
ends there. A recomputation that is not theirs is refused (`Scope.check_told`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol
from weakref import WeakSet

from torch.utils import checkpoint


class Remembering(Protocol):
    def remember(self) -> Callable[[], AbstractContextManager[Any]] | None:
        """What makes a context of what is routed now; None where that cannot be told, so that no layer runs."""


_live: WeakSet[Remembering] = WeakSet()


def follow(one: Remembering) -> None:
    """Ask it of all that is checkpointed from now on."""
    _live.add(one)
    _wrap()


@functools.cache
def _wrap() -> None:
    function: Any = checkpoint.CheckpointFunction
    frame: Any = checkpoint._CheckpointFrame
    forward, init = function.forward, frame.__init__

    @functools.wraps(forward)
    def reentrant(ctx: Any, run_function: Callable[..., Any], *args: Any) -> Any:
        again = _again(run_function)
        outputs = forward(ctx, run_function, *args)
        ctx.run_function = again
        return outputs

    @functools.wraps(init)
    def not_reentrant(self: Any, recompute_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        init(self, _again(recompute_fn), *args, **kwargs)

    function.forward, frame.__init__ = staticmethod(reentrant), not_reentrant


def _again(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, when it is run later, under what is routed now."""
    contexts = [context for one in tuple(_live) if (context := one.remember()) is not None]

    def run(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            return function(*args, **kwargs)

    return run
