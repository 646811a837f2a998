"""The counters by which `shrink` knows its last program of a tile: zeros that no two launches use at once.

Each launch leaves them as it found them, so launches that a stream orders share some. The launches of a captured graph
may run beside any others, so each has its own, out of memory that was cleared before; when that is used up, the graph
clears some itself.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

POOL = 1 << 20  # counters for captured launches, on each device

_lock = threading.Lock()
_streams: dict[tuple[int, int], Tensor] = {}
_pools: dict[int, Tensor] = {}  # what is left


def counters(device: torch.device, tokens: int) -> Tensor:
    """int32 zeros, (at least tokens,)."""
    if device.type != "cuda":
        return torch.zeros(tokens, dtype=torch.int32, device=device)
    index = torch.cuda.current_device() if device.index is None else device.index
    if torch.cuda.is_current_stream_capturing():
        with _lock:
            pool = _pools.get(index)
            if pool is not None and pool.numel() >= tokens:
                _pools[index] = pool[-(-tokens // 32) * 32 :]
                return pool[:tokens]
        return torch.zeros(tokens, dtype=torch.int32, device=device)
    key = index, torch.cuda.current_stream(index).cuda_stream
    found = _streams.get(key)
    if found is None or found.numel() < tokens:
        with _lock:
            if index not in _pools:
                _pools[index] = torch.zeros(POOL, dtype=torch.int32, device=device)
                torch.cuda.current_stream(index).synchronize()  # once: other streams will read it
            _streams[key] = found = torch.zeros(max(tokens, 1024), dtype=torch.int32, device=device)
    return found
