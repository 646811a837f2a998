"""What users are told of an adapter, and of host memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache


@dataclass(frozen=True)
class AdapterInfo:
    """What `Runtime.adapters` tells of an adapter.

    Args:
        name: as given to `load_adapter`. `source`: folder, hub id or "memory".
        peft_type: PEFT's type, e.g. "LORA". `variant`: "DoRA", "rsLoRA", ..., or "".
        rank: the largest rank of any module; `ranks`: all ranks, sorted.
        modules: dotted paths of the modules that it changes.
        bytes: its size on the device.
        location: "device", "host", or "files" of one that is read when it is needed. Of one that never was, only its
            name and source are known; the rest is empty.
        errors: module -> |D - D'| / |D| (Frobenius), for each whose delta D is approximated by D'; empty
            where all is exact.
        dense: module -> bytes on the device, for each whose delta is a whole matrix, as large as the weight.
        missing: dotted paths of what its config targets and its files have nothing for: the base there, as in PEFT.
        unused: what its files call modules that the model does not have and does without.
        zero: whether its delta is zero, so that it changes nothing: never trained, scaled by 0, or a merge to nothing.
        ignored: what its files hold beside: config fields and tensors that `ignore` named, and parts of other models
            (`lora_te_*`).
        made_of: of one that a request's merge made, or what is folded in: the adapters, with any of which it goes.
    """

    name: str
    source: str
    peft_type: str
    variant: str
    rank: int
    ranks: tuple[int, ...]
    modules: tuple[str, ...]
    bytes: int
    location: str
    errors: Mapping[str, float] = field(default_factory=dict)
    dense: Mapping[str, int] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    zero: bool = False
    ignored: tuple[str, ...] = ()
    made_of: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """The largest of `errors`; 0 where all is exact."""
        return max(self.errors.values(), default=0.0)


@dataclass(frozen=True)
class HostUse:
    """What adapters take on the host, `Runtime.host`.

    Args:
        used: bytes of those that are there: their blobs and tables, and tensors that are kept beside them.
        most: `patch(host_memory=)`; None for no bound.
        registered: adapters that there are, by name. `loaded`: those of them that are on the host.
        loads: how often files were read for one that was registered. `drops`: how often one was dropped.
    """

    used: int
    most: int | None
    registered: int
    loaded: int
    loads: int
    drops: int


@lru_cache(maxsize=64)
def same_tuple(value: tuple[str, ...]) -> tuple[str, ...]:
    """One object for equal tuples: thousands of adapters change the same modules."""
    return value
