"""Trained tokens: rows of an embedding that are replaced, by themselves or beside LoRA (`trainable_token_indices`).

    embedding  y = embed_scale W'[ids]   A one-hot (k, vocab), B = embed_scale (w'_i - w_i)
    tied head  y = W' x                  A = w'_i - w_i,       B one-hot (k, vocab)

One-hot factors are kept dense: k * vocab numbers beside the k * width that were trained, in exchange for every mix,
merge and fold being that of any other delta. Looking up skips the rank rows of tokens that do not occur.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .. import errors
from .delta import Delta
from .module import TOKENS, Format, Lowering, Module


def trained_tokens(module: Module, indices: Any) -> Delta:
    """The delta of an embedding, or of a linear that holds the same weight, whose tokens `indices` were trained."""
    base = module.base
    embeds = base.embed_scale is not None
    vocab, width = (base.in_features, base.out_features) if embeds else (base.out_features, base.in_features)
    if not isinstance(indices, (list, tuple)) or not all(type(index) is int for index in indices):
        raise errors.AdapterError(f"{module.where}: its trained tokens are {indices!r}; they must be a list of indices")
    if len(set(indices)) != len(indices) or not all(0 <= index < vocab for index in indices):
        raise errors.AdapterError(
            f"{module.where}: its trained tokens {_short(indices)} must be different indices below {vocab}, the number "
            f"of this model's tokens"
        )
    if not embeds and (base.offset is not None or base.bias() is not None):
        raise errors.UnsupportedAdapterError(
            f"{module.where}: tokens are trained there, and it is neither an embedding nor a head without a bias, "
            f"which PEFT would drop"
        )
    trained = module.part(TOKENS, len(indices), width).double()
    at = torch.tensor(indices)
    one_hot = torch.zeros(len(indices), vocab)
    one_hot[torch.arange(len(indices)), at] = 1
    if embeds:
        change = trained * (base.embed_scale or 1.0) - base.weight().double()[:, at].t()
        return Delta(one_hot, change.float(), trained=True)
    return Delta((trained - base.weight().double()[at]).float(), one_hot)


def indices_of(module: Module) -> Any:
    """What `trainable_token_indices` says of the module, or else of what it is tied to: a list for the embedding, or
    one for each ending of a name."""
    indices = module.config.get("trainable_token_indices")
    if not isinstance(indices, Mapping):
        return indices
    names = (module.file, module.base.name, *module.base.aliases, *module.base.tied)
    return next((value for name in names for key, value in indices.items() if name.endswith(key)), None)


def _short(indices: Any) -> str:
    return str(indices) if len(indices) <= 8 else f"{str(indices[:8])[:-1]}, ...]"


TRAINABLE_TOKENS = Lowering(
    Format(parts={"trainable_tokens_delta": TOKENS}, honoured={"token_indices"}, neutral={"init_weights"}),
    lambda module: trained_tokens(module, module.config.get("token_indices")),
    tied=True,
)
