"""A model and its adapters from one YAML file, in Ludwig's schema for several adapters."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..patching import patch, patching
from ..runtime import Runtime
from .fresh import fresh_lora, lora_fields
from .schema import LOADING, Config, parse
from .training import Training, training_of

__all__ = ["LOADING", "Config", "Training", "from_config", "lora_fields", "parse", "training_of"]


def from_config(config: str | Path | Mapping[str, Any], *, model: nn.Module | None = None, **options: Any) -> Runtime:
    """Load a base model, patch it, load its adapters, merge and activate as a config says.

        base_model: HuggingFaceTB/SmolLM2-135M-Instruct
        adapters:
          adapters:
            sql:  {path: adapters/sql}              # a folder, relative to the file, or hub_id: org/name
            new:  {type: lora, r: 8, alpha: 16, target_modules: [q_proj]}  # no weights: fresh, its delta is 0
          merge:  {name: both, sources: [sql, new], weights: [0.7, 0.3], combination_type: linear}
          active: both

    `adapter: {...}` in place of `adapters` is one adapter named "default", which is active. `merge` may be a list.
    An adapter with a data set that `mlora train` has trained is loaded from where that has put it.

    Defaults are Ludwig's: r 8, alpha 2 r, PEFT's target_modules for the type of the model, density 0.5, and as active
    the first adapter. A whole file of Ludwig's is taken; a warning names what of it does not concern serving.

    Args:
        config: a YAML or JSON file, or its contents. `model`: a loaded model, in place of `base_model`.
        options: for `mlora.patch`.

    Returns:
        The runtime; the model is `runtime.model`.

    Raises:
        ConfigError: a key is unknown (the nearest valid one is named), missing, or excluded by another, a name is no
            string, or the file loads its model in a way of its own (quantized, say) and no `model` is given.
        Whatever `patch`, `load_adapter` and `add_weighted_adapter` raise; the model is left as it was then.
    """
    parsed = parse(config)
    if model is None:
        model = _load(parsed.model_source())
    if ignored := [*parsed.ignored, *(parsed.loading or ())]:
        warnings.warn(f"the config has what mlora leaves alone: {'; '.join(ignored)}", stacklevel=2)
    patched = inspect.signature(patch).bind(model, **options)
    patched.apply_defaults()
    with patching(*patched.args, **patched.kwargs) as runtime:
        for name, entry in parsed.adapters.items():
            _add(runtime, name, entry, parsed)
        for name, how in parsed.merges:
            runtime.add_merge(name, how)
        if parsed.active is not None:
            runtime.set_adapter(parsed.active)
        return runtime


def _load(base: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    loaded: nn.Module = AutoModelForCausalLM.from_pretrained(base, dtype="auto").eval()
    return loaded


def _add(runtime: Runtime, name: str, entry: Mapping[str, Any], parsed: Config) -> None:
    if (source := parsed.source(name)) is None:
        runtime.add_adapter(name, fresh_lora(runtime, name, entry))
    else:
        runtime.load_adapter(source, name, **{key: entry[key] for key in LOADING if key in entry})
