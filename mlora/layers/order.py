"""Where the rows of the batch lie in a module's input, as the code around the module tells.

A first dimension that is as long as the batch need not be the batch: some models put the length first, and for a batch
of as many rows as tokens that looks the same. So modules inside of code that exchanges the first two dimensions are
believed only where no other dimension could be the rows.
"""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any, NamedTuple

from torch import nn

_FIRST_TWO = r"(0,\s*1|1,\s*0|0,\s*-2|-2,\s*0)"
_EXCHANGED = re.compile(
    rf"\b(transpose|swapaxes|swapdims|movedim|moveaxis)\((dim0=|\w+,\s*)?{_FIRST_TWO}\s*\)"
    r"|\bpermute\(\s*(\w+,\s*)?[(\[]?\s*(1,\s*0\b|(2,\s*0,\s*1|1,\s*2,\s*0)\s*[)\]])"  # of more dimensions, heads'
)
_WINDOWS = ("window_partition(", "self.unfolding(")
_CHOICES = "num_choices"
_PICKED = re.compile(r"\w\[\s*~?[\w.]*mask\w*\s*\](?!\s*[-+*]?=[^=])|\bmasked_select\(")  # not what is put there


class Order(NamedTuple):
    """Of a module: whether code around it exchanges the first two dimensions, and whether it cuts each row into
    windows, as Swin, SAM and MobileViT do, which lie row by row in the first dimension, or picks tokens by a mask."""

    exchanged: bool
    windows: bool
    picked: bool


IN_FRONT = Order(False, False, False)


def order_of(model: nn.Module, path: str) -> Order:
    """Of the module of a dotted path, by the forwards of the modules around it."""
    parts = path.split(".")[:-1]
    around = [model.get_submodule(".".join(parts[:end])) for end in range(len(parts) + 1)]
    told = [_told_by(type(module).forward) for module in around]
    return Order(*(any(marks) for marks in zip(*told, strict=True)))


def cuts_choices(model: nn.Module) -> bool:
    """Whether a row of the model is a question of several choices, (rows, choices, length), which it flattens in order,
    as transformers' heads for multiple choice do."""
    return _CHOICES in _source(type(model).forward)


@functools.cache
def _told_by(forward: Any) -> Order:
    code = _source(forward)
    return Order(bool(_EXCHANGED.search(code)), any(mark in code for mark in _WINDOWS), bool(_PICKED.search(code)))


@functools.cache
def _source(forward: Any) -> str:
    try:
        return inspect.getsource(forward)
    except (OSError, TypeError):  # typed in, or no function
        return ""
