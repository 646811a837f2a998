"""Which dimension of a norm's input is the tokens', for packed calls: asked of the model before there is one."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..plan.shared import Shared


def learn_axes(model: nn.Module, shared: Shared, paths: Iterable[str]) -> None:
    """Call the model once if one of these modules is a norm of heads and it is not known whether it gets (1, tokens,
    heads, width) or (1, heads, tokens, width), which look alike where there are as many tokens as heads."""
    sizes = getattr(getattr(model, "config", None), "__dict__", {})
    norms = {path: model.get_submodule(path) for path in paths if path not in shared.axes}
    norms = {path: norm for path, norm in norms.items() if _width(norm) not in (None, sizes.get("hidden_size"))}
    if not norms:
        return
    tokens = next(count for count in (3, 5, 7, 11, 13) if count not in sizes.values())
    here = threading.get_ident()

    def note(path: str, x: Tensor) -> None:
        fits = [axis for axis, size in enumerate(x.shape[:-1]) if size == tokens]
        if threading.get_ident() == here and len(fits) == 1:
            shared.axes[path] = fits[0]

    handles = [
        norm.register_forward_pre_hook(lambda _, args, path=path: note(path, args[0])) for path, norm in norms.items()
    ]
    try:
        ids = torch.zeros((1, tokens), dtype=torch.long, device=shared.arenas[0].device)
        with torch.inference_mode():
            cast(Any, model)(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def _width(module: nn.Module) -> int | None:
    """Of a norm; None of another module."""
    weight = module._parameters.get("weight")
    return len(weight) if weight is not None and weight.dim() == 1 else None
