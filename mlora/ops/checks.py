"""What compiled code asks on the host when it runs: operators that fetch the plan of who runs it, or read its header
and raise.

They are declared to write what they read, so that no compiler drops the calls as ones without an effect.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .. import errors, layout

LIBRARY = torch.library.Library("mlora", "FRAGMENT")


class Publisher(Protocol):
    def publish(self, plan: Tensor, header: Tensor) -> None:
        """Put what is routed here into `plan` and `header`; raises `RoutingError` where that cannot be told."""

    def touched(self) -> Sequence[int]:
        """What that does to each module (`Plan.touches`); raises as `publish`."""


_publishers: WeakValueDictionary[int, Publisher] = WeakValueDictionary()
_numbers = itertools.count()


def add_publisher(publisher: Publisher) -> int:
    """Its number, for `fetch_plan`."""
    number = next(_numbers)
    _publishers[number] = publisher
    return number


def _define(schema: str, check: Callable[..., None]) -> Any:
    name = schema.partition("(")[0]
    LIBRARY.define(f"{schema} -> ()")
    LIBRARY.impl(name, check, "CPU")
    torch.library.register_fake(f"mlora::{name}", lambda *args: None, lib=LIBRARY)
    return getattr(torch.ops.mlora, name).default


def _fetch_plan(plan: Tensor, header: Tensor, number: int) -> None:
    _publishers[number].publish(plan, header)


def _check_rows(plan: Tensor, rows: int) -> None:
    planned, routes, _, expansion, entries = plan[:5].tolist()
    equal = planned == 1 and rows == 0
    if routes and entries != 1 and not equal and rows not in (entries, entries * expansion):
        raise errors.AttributionError(
            f"the active routing has {entries} entries; compiled code got a batch of {rows} rows"
        )


def _check_front(plan: Tensor, rows: int, others: list[int]) -> None:
    planned, routes, _, expansion, entries = plan[:5].tolist()
    counts = (entries, entries * expansion)
    if routes and planned != 1 and (rows not in counts or any(size in counts for size in others)):
        raise errors.AttributionError(
            f"the active routing has {entries} entries; a module in compiled code got an input of sizes "
            f"{(rows, *others)}, whose rows may lie in another dimension than the first"
        )


def _check_heads(header: Tensor) -> None:
    if int(header[5]) & layout.HEADS:
        raise errors.UnsupportedAdapterError(
            "the active routing has an adapter with a head or a token embedding of another size than the model's; "
            "under torch.compile, where sizes are fixed, it is not served"
        )


def _check_experts(header: Tensor) -> None:
    if int(header[5]) & layout.EXPERTS:
        raise errors.UnsupportedAdapterError(
            "the active routing has an adapter with target_parameters, whose modules run once for each recipe of the "
            "batch; under torch.compile, where what is run is fixed, it is not served"
        )


def _check_tails(header: Tensor) -> None:
    if int(header[5]) & layout.TAILS:
        raise errors.UnsupportedAdapterError(
            "the active routing has an aLoRA (alora_invocation_tokens), whose tokens are looked for in each batch; "
            "under torch.compile it is not served"
        )


def _check_foreign(header: Tensor) -> None:
    if int(header[5]) & layout.FOREIGN:
        raise errors.AttributionError(
            "the active routing has several entries, and adapters of modules that read another modality than text, "
            "whose inputs are attributed to rows by token ids; under torch.compile, where those are not looked at, use "
            "one adapter for all rows"
        )


def _check_reads(header: Tensor, number: int, index: int, bits: int, name: str) -> None:
    if _publishers[number].touched()[index] & bits:
        refuse_read(name, "the active routing")


_fetch = _define("fetch_plan_(Tensor(a!) plan, Tensor(b!) header, int number)", _fetch_plan)
check_front = _define("check_front_(Tensor(a!) plan, SymInt rows, SymInt[] others)", _check_front)
_rows = _define("check_rows_(Tensor(a!) plan, SymInt rows)", _check_rows)

# Layers call these only once an adapter was loaded that needs them, the last one foreign modules at all times.
# `header`: `Shared.header`.
check_heads = _define("check_heads_(Tensor(a!) header)", _check_heads)
check_experts = _define("check_experts_(Tensor(a!) header)", _check_experts)
check_tails = _define("check_tails_(Tensor(a!) header)", _check_tails)
check_foreign = _define("check_foreign_(Tensor(a!) header)", _check_foreign)
check_reads = _define("check_reads_(Tensor(a!) header, int number, int index, int bits, str name)", _check_reads)


def refuse_read(name: str, adapters: str) -> NoReturn:
    """Of a parameter: somebody takes its values while what `adapters` tells of changes them for some rows."""
    raise errors.AttributionError(
        f"{name} is read by code that does not call its module, which gives all rows the base's, and {adapters} "
        f"changes it. Use adapters that do not target it, or fold one in (merge_adapter), which changes the weight"
    )


def fetch_plan(plan: Tensor, header: Tensor, number: int) -> None:
    """Have the buffers of compiled code filled for the task or thread that runs it. In host memory only; elsewhere a
    call to the host would keep compilers from capturing graphs, and they have what began or ended last."""
    if plan.device.type == "cpu":
        _fetch(plan, header, number)


def check_rows(plan: Tensor, rows: int) -> None:
    """Raise `AttributionError` unless `plan` routes batches of `rows` rows; one entry for all routes any. 0 stands for
    tokens of any rows, which several entries route only if they are equal.

    The plan is read on the host, so this is for plans in host memory; on other devices the caller's own
    check of the batch has to do.
    """
    if plan.device.type == "cpu":
        _rows(plan, rows)
