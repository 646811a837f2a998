"""What a layer on a GPU wants to know of a tensor: asked while the call runs, answered when it ends, so that no layer
waits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Late:
    """A check of a CUDA tensor's contents. The copy to the host begins here; the host waits for it in `settle` only, by
    when it has long been there, unless the device is as far behind.

    Args:
        check: is given the copy, and raises.
    """

    def __init__(self, tensor: Tensor, check: Callable[[Tensor], None]) -> None:
        self._copy = tensor.to("cpu", non_blocking=True)  # which torch puts into pinned memory
        self._copied = torch.cuda.current_stream(tensor.device).record_event()
        self._check = check

    def settle(self) -> None:
        self._copied.synchronize()
        self._check(self._copy)
