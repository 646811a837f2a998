"""`check_rows`: refuses, inside compiled code, a batch that the plan was not made for."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import errors

LIBRARY = torch.library.Library("mlora", "FRAGMENT")
# Declared to write the plan so that no compiler drops the call as one without an effect.
LIBRARY.define("check_rows_(Tensor(a!) plan, SymInt rows) -> ()")


def _check(plan: Tensor, rows: int) -> None:
    planned, routes, _, expansion = plan[:4].tolist()
    if routes and planned != 1 and rows not in (planned, planned * expansion):
        raise errors.AttributionError(
            f"the active routing has {planned} entries; compiled code got a batch of {rows} rows"
        )


def _fake(plan: Tensor, rows: int) -> None:
    return None


LIBRARY.impl("check_rows_", _check, "CPU")
torch.library.register_fake("mlora::check_rows_", _fake, lib=LIBRARY)
_op = torch.ops.mlora.check_rows_.default


def check_rows(plan: Tensor, rows: int) -> None:
    """Raise `AttributionError` unless `plan` routes batches of `rows` rows; one entry for all routes any.

    The plan is read on the host, so this is for plans in host memory; on other devices the caller's own
    check of the batch has to do.
    """
    if plan.device.type == "cpu":
        _op(plan, rows)
