"""The names of transformers' continuous batching that are not public and that `batching.py` uses."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import transformers

from .. import errors

ROOM = "transformers.generation.continuous_batching"
KNOWN = "5.19 to 5.24"
# module -> class -> method -> its arguments, or None for a plain attribute
NAMES: dict[str, dict[str, dict[str, tuple[str, ...] | None]]] = {
    "continuous_api": {
        "ContinuousBatchingManager": {
            "_generation_step": ("self",),
            "_create_batch_processor": ("self",),
            "switch_to_cb_friendly_attn": ("self", "model", "auto_switch_to_flash"),
            "start": ("self",),
            "stop": ("self", "block", "timeout", "keep_for_next_session", "hard_stop"),
            "add_request": (
                "self", "input_ids", "request_id", "max_new_tokens", "streaming", "record_timestamps", "eos_token_id",
                "logit_processor_kwargs",
            ),
            "cancel_request": ("self", "request_id"),
        },
        "OutputRouter": {"deliver": ("self", "output"), "deliver_batch": ("self", "outputs")},
    },
    "scheduler": {
        "FIFOScheduler": {
            "add_waiting_request": ("self", "state"),
            "clear_cancelled_requests": ("self",),
            "set_request_cancellation": ("self", "request_id"),
        }
    },
    "cache": {
        "PagedAttentionCache": {
            "search_prefix_match": ("self", "request_id", "prompt_ids"),
            "mark_complete_blocks": ("self", "state", "complete_blocks"),
        }
    },
    "input_outputs": {"ContinuousBatchingIOs": {"get_model_kwargs": ("self", "use_padding")}},
    "model_runner": {
        "ModelRunner": {"_sample": ("self", "scores", "output_ids")},
        "infer_max_single_request_tokens": {},
    },
    "requests": {
        "FutureRequestState": {"state": None, "has_new_token": None, "query_length": None},
        "RequestState": {"request_id": None, "initial_tokens": None, "generated_tokens": None, "position_offset": None},
    },
}  # fmt: skip


def check_names() -> None:
    """Raise `ServeError` that says which of `NAMES` has changed."""
    for module, classes in NAMES.items():
        for name, members in classes.items():
            try:
                found = getattr(importlib.import_module(f"{ROOM}.{module}"), name)
            except (ImportError, AttributeError):
                raise changed(f"has no {ROOM}.{module}.{name}") from None
            for member, arguments in members.items():
                if not hasattr(found, member) and member not in getattr(found, "__dataclass_fields__", ()):
                    raise changed(f"has no {name}.{member}")
                if arguments is not None:
                    now = tuple(inspect.signature(getattr(found, member)).parameters)
                    if now != arguments:
                        raise changed(f"has {name}.{member}{now} in place of {arguments}")


def changed(what: str) -> errors.ServeError:
    return errors.ServeError(
        f"mlora.serve knows the continuous batching of transformers {KNOWN}; version {transformers.__version__} {what}"
    )


def has(thing: Any, *names: str) -> Any:
    """`thing`, which has attributes `names`."""
    for name in names:
        if not hasattr(thing, name):
            raise changed(f"has {type(thing).__name__} objects without {name}")
    return thing
