"""Adapter -> one `Delta` a module. One file a PEFT type; each is a pure function."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .. import errors
from ..adapter import Adapter
from .delta import BaseLinear, Delta
from .lora import lower_lora

Lowering = Callable[[Adapter, Mapping[str, BaseLinear]], dict[str, Delta]]

LOWERINGS: dict[str, Lowering] = {"LORA": lower_lora}


def lower(adapter: Adapter, bases: Mapping[str, BaseLinear]) -> dict[str, Delta]:
    """Lower `adapter` for a model whose linears are `bases` (dotted path -> linear).

    Raises:
        UnsupportedAdapterError: the type or one of its options is not served.
        AdapterError: it does not fit the model.
    """
    lowering = LOWERINGS.get(adapter.peft_type)
    if lowering is None:
        raise errors.UnsupportedAdapterError(
            f"adapter from {adapter.source}: peft_type {adapter.peft_type!r} is not served; "
            f"served types: {', '.join(sorted(LOWERINGS))}"
        )
    return lowering(adapter, bases)


__all__ = ["LOWERINGS", "BaseLinear", "Delta", "lower"]
