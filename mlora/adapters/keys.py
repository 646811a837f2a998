"""The keys of an adapter's tensors, as PEFT writes them, whatever was around the model when it was saved."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, TypeVar

from torch import Tensor

from .. import errors

T = TypeVar("T")

PEFT_PREFIX = "base_model.model."
SHARED_PREFIX = "base_model."  # of tensors that belong to the whole adapter, as VeRA's projections

# What torch.compile, FSDP, activation checkpointing and Lightning Fabric put around modules, and
# DistributedDataParallel and DeepSpeed around a model. The latter may be a module's name too: it is read as a wrapper's
# where PEFT's own prefix follows.
_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
_AROUND_ALL = re.compile(r"^(?:module\.)+(?=base_model\.)")

# What PEFT calls the tensors of its layers. A model holds them by the adapter's name, which files do not have.
_PARTS = (
    r"lora_(?:A|B|E|embedding_A|embedding_B|diag|magnitude_vector)|(?:hada|lokr)_[wt][12](?:_[ab])?|ia3_l|oft_R"
    r"|(?:beft|deft|pvera|supertuning|unilora|vera|vblora|randlora|delora|miss|gralora|hra|road|boft|fourierft|waveft|c3a|shira|hira)_\w+"
    r"|tinylora_[ABP]|ln_tuning_layers|trainable_tokens_delta"
)
_NAMED = re.compile(rf"((?:.*\.)?(?:{_PARTS}))\.(?!(?:weight|bias)$)([^.]+)((?:\.weight|\.bias)?)")
_NAMED_COPY = re.compile(r"(.*)\.modules_to_save\.([^.]+)\.([^.]+)")


def plain_keys(tensors: Mapping[str, T], source: str) -> dict[str, T]:
    """The tensors, or what stands for them, by PEFT's keys, without its prefix `base_model.model.`.

    Raises:
        AdapterError: two keys are one then, or they name several adapters.
    """
    plain = [_plain(key) for key in tensors]
    names = {name for _, name in plain} - {""}
    if len(names) > 1:
        raise errors.AdapterError(
            f"adapter from {source}: its keys name several adapters ({', '.join(sorted(names))}); save one of them by "
            f"itself"
        )
    keys = [key for key, _ in plain]
    found = dict(zip(keys, tensors.values(), strict=True))
    if len(found) != len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise errors.AdapterError(
            f"adapter from {source}: {twice} is there under two keys, both with and without the prefix "
            f"{PEFT_PREFIX!r}, a wrapper's, or the adapter's name"
        )
    return found


@lru_cache(maxsize=1 << 13)  # adapters of one model have the same keys again and again
def _plain(key: str) -> tuple[str, str]:
    """The key, and the adapter's name that was in it, or ""."""
    key = _AROUND_ALL.sub("", _WRAPPERS.sub("", key)).removeprefix(PEFT_PREFIX)
    if named := _NAMED.fullmatch(key):
        return named[1] + named[3], named[2]
    if named := _NAMED_COPY.fullmatch(key):
        return f"{named[1]}.{named[3]}", named[2]
    return key, ""


def unwrapped(path: str) -> str:
    """The path of a module without what is around those that it is in."""
    return _WRAPPERS.sub("", path)


def without(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], ignore: Sequence[str]
) -> tuple[Mapping[str, Any], Mapping[str, Tensor], tuple[str, ...]]:
    """The config and the tensors without what `ignore` names, and the names of that: fields of the config, and keys of
    tensors, or patterns of them (`v_head.*`), with or without PEFT's prefix.

    Raises:
        AdapterError: `ignore` is no list of names.
    """
    check_ignore(ignore)
    if not ignore:
        return config, tensors, ()
    fields = [field for field in config if field in ignore]
    keys = [key for key in tensors if is_ignored(key, ignore)]
    kept = {key: tensor for key, tensor in tensors.items() if key not in keys}
    return {f: value for f, value in config.items() if f not in fields}, kept, (*fields, *keys)


def check_ignore(ignore: Any) -> None:
    """Raise `AdapterError` where `ignore` is no list of names."""
    if isinstance(ignore, str) or not isinstance(ignore, Iterable) or not all(isinstance(name, str) for name in ignore):
        raise errors.AdapterError(
            f"ignore is {ignore!r}; it must be a list of names of config fields and patterns of tensors"
        )


def is_ignored(key: str, ignore: Iterable[str]) -> bool:
    """Whether a pattern names the tensor, by its key in the file or in PEFT's format."""
    return any(fnmatchcase(name, pattern) for pattern in ignore for name in (key, _plain(key)[0]))
