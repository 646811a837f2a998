"""Checks that every section of a config takes; each raises ConfigError and names what it saw."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from .. import errors

# Names of PEFT's and transformers', which have another name in Ludwig's schema.
_ELSEWHERE = {
    "lora_alpha": "alpha", "lora_dropout": "dropout", "rank": "r", "bias": "bias_type", "lr": "learning_rate",
    "max_steps": "train_steps", "num_train_epochs": "epochs", "per_device_train_batch_size": "batch_size",
    "lr_scheduler_type": "learning_rate_scheduler", "max_grad_norm": "gradient_clipping", "merges": "merge",
    "warmup_ratio": "learning_rate_scheduler", "max_length": "global_max_sequence_length",
}  # fmt: skip


def given(section: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is null, which says as much as what is missing."""
    return {key: value for key, value in section.items() if value is not None}


def mapping(value: Any, what: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise errors.ConfigError(f"{what} is {value!r}; it must be a mapping")
    return value


def check_keys(section: Mapping[Any, Any], allowed: Sequence[str], what: str) -> None:
    for key in section:
        if key not in allowed:
            raise errors.ConfigError(
                f"{what} has no key {key!r}{nearest(key, allowed)}; it takes {', '.join(sorted(allowed))}"
            )


def nearest(name: Any, names: Sequence[str]) -> str:
    other = _ELSEWHERE.get(str(name))
    close = [other] if other in names else difflib.get_close_matches(str(name), names, 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
