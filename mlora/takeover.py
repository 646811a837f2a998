"""PEFT's live models -> a bare model and its adapters, so that `patch` can go on with them.

PEFT keeps an adapted linear inside a layer of its own, `...q_proj.base_layer`. Taking a model over means
copying the adapters' tensors out and putting the linears back in their places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import nn

from . import errors
from .adapters.adapter import Adapter
from .layers import base_linears, find_layers, inner_module, inside_peft
from .lowering import is_rewriting, lower


def has_peft(model: nn.Module) -> bool:
    """Whether PEFT layers are in `model`, put there by PEFT or by transformers' `load_adapter`."""
    return hasattr(model, "peft_config") or bool(_tuner_layers(model))


@contextmanager
def taken_over(model: nn.Module) -> Iterator[tuple[nn.Module, dict[str, Adapter], str | None]]:
    """Remove PEFT from `model`, a `PeftModel` or a transformers model with adapters, unless the block fails.

    Yields:
        The bare model with the very same weights, the adapters by name, and the name of the active one
        or None. A `PeftModel` is left as a shell that refuses calls.

    Raises:
        PatchError: adapters are merged, or several are active at once.
        AdapterError, UnsupportedAdapterError: one of them cannot be served.
        After any of them the model is as it was.
    """
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict) or not hasattr(model, "state_dict"):
        raise errors.PatchError(
            f"this {type(model).__name__} has PEFT layers but no peft_config that says what they are; remove them first"
        )
    layers = _tuner_layers(model)
    if merged := sorted({name for layer in layers.values() for name in getattr(layer, "merged_adapters", ())}):
        raise errors.PatchError(
            f"adapters are merged into this model's weights: {', '.join(merged)}; unmerge them first"
        )
    active = _active(layers)
    if parameters := sorted(name for name, config in configs.items() if getattr(config, "target_parameters", None)):
        raise errors.UnsupportedAdapterError(
            f"adapters of this model have target_parameters: {', '.join(parameters)}; they are not taken over from a "
            f"live model. Save them, patch the model without PEFT, and load them"
        )
    if rewriting := sorted(name for name, config in configs.items() if is_rewriting(config.to_dict())):
        raise errors.UnsupportedAdapterError(
            f"adapters of this model have rewritten its base weights (init_lora_weights): {', '.join(rewriting)}; they "
            f"are not taken over from a live model. Save them, load the base anew, patch it and load them"
        )
    adapters = {name: Adapter.from_peft(model, name) for name in configs}
    base: nn.Module = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model  # type: ignore[operator]
    inside = _tuner_layers(base)
    paths = {}
    for path, module in find_layers(base).items():
        owner = next((name for name in inside if path.startswith(f"{name}.")), None)
        if owner is not None:
            own = inner_module(inside[owner])
            rest = next((name for name, child in own.named_modules() if child is module), None)
            if rest is None:
                continue  # a module of PEFT's own
            path = f"{owner}.{rest}" if rest else owner
        paths[path] = module
    bases = base_linears(base, paths)
    for adapter in adapters.values():
        lower(adapter, bases, strict=True)

    _put(base, {path: inner_module(layer) for path, layer in inside.items()})
    attributes = ("peft_config", "_hf_peft_config_loaded")
    told = {name: base.__dict__.pop(name) for name in attributes if name in base.__dict__}
    if base is not model:
        model.__dict__["forward"] = model.__dict__["generate"] = _shell
    try:
        yield base, adapters, active
    except BaseException:
        _put(base, inside)
        base.__dict__.update(told)
        if base is not model:
            del model.__dict__["forward"], model.__dict__["generate"]
        raise


def _put(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for path, module in modules.items():
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


def _tuner_layers(model: nn.Module) -> dict[str, Any]:
    """Dotted path -> every layer of PEFT's that wraps a module of the model's."""
    found = {name: module for name, module in model.named_modules() if inside_peft(module) is not None}
    return {name: layer for name, layer in found.items() if not any(name.startswith(f"{o}.") for o in found)}


def _active(layers: dict[str, Any]) -> str | None:
    if any(layer.disable_adapters for layer in layers.values()):
        return None
    names = sorted({name for layer in layers.values() for name in layer.active_adapters})
    if len(names) > 1:
        raise errors.PatchError(
            f"several adapters are active in this model at once: {', '.join(names)}; activate one with set_adapter, "
            "and name mixes in adapter_names afterwards"
        )
    return names[0] if names else None


def _shell(*_: Any, **__: Any) -> NoReturn:
    raise errors.PatchError("mlora took this PeftModel's adapters over; call the patched model, runtime.model, instead")
