"""A new adapter of a config: the modules that PEFT would choose, and the numbers that PEFT would draw.

PEFT makes a layer around one module after the other, in the order of `named_modules`, and draws for each what
`draws.py` has. So the same seed gives the same start. What is trained whole, and trained tokens, start as the base's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import errors
from ..adapters.adapter import Adapter
from ..lowering import BaseLinear
from ..lowering.targets import is_target, saved_by, some, targets_of
from .draws import drawn
from .eva import eva_start
from .trainable import check_config

_REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga")

# What PEFT adds to `modules_to_save` for a task: the heads of its models (`PeftModelForSequenceClassification`, ...).
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def fresh(
    config: Any,
    model: nn.Module,
    bases: Mapping[str, BaseLinear],
    seed: int | None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
) -> Adapter:
    """The adapter that `peft.get_peft_model(model, config)` has after `torch.manual_seed(seed)`.

    Args:
        config: a `peft.LoraConfig` or `peft.IA3Config`, or its fields as a mapping.
        model: the patched one. `bases`: what adapters can change of it.
        seed: None draws from torch's generator as it is.
        eva_state_dict: of a config with `init_lora_weights="eva"`, see `eva_start`.

    Raises:
        UnsupportedAdapterError: the config has an option that is not trained. AdapterError: it does not fit the model.
    """
    fields = _fields(config, model)
    init = _init_of(fields)
    check_config(fields, "config")
    starts: dict[str, Tensor] = {}
    names = _targets(fields, model, bases)
    if init == "eva":
        fields, starts = eva_start(fields, names, bases, eva_state_dict)
        names = [name for name in names if name in starts]
    elif eva_state_dict is not None:
        raise errors.AdapterError(f"config: init_lora_weights is {init!r}; eva_state_dict is of 'eva'")
    targets, tokens = frozenset(names), _tokens(fields, model, bases)
    if both := [name for name in tokens if name in targets or saved_by(fields, name) is not None]:
        raise errors.AdapterError(
            f"config: trainable_token_indices name tokens of {both[0]}, which is targeted or saved whole as well; PEFT "
            f"does not define both"
        )
    tensors: dict[str, Tensor] = {}
    with _seeded(seed):
        for name, module in model.named_modules():
            if name in targets:
                # Rounded as PEFT does, which moves what it drew to the base's dtype first.
                own = {key: part.to(bases[name].dtype) for key, part in drawn(fields, bases[name], init).items()}
                own |= {"lora_A.weight": starts[name]} if name in starts else {}
            elif name and saved_by(fields, name) is not None:
                own = _copied(name, module, bases)
            elif name in tokens:
                own = {"token_adapter.trainable_tokens_delta": _held(module)["weight"][tokens[name]]}
            else:
                continue
            for part, tensor in own.items():
                wide = torch.promote_types(tensor.dtype, torch.float32)
                tensors[f"{name}.{part}"] = tensor.detach().to("cpu", wide)
    return Adapter(fields, tensors, source="config")


def _fields(config: Any, model: nn.Module) -> dict[str, Any]:
    if not isinstance(config, Mapping) and not hasattr(config, "to_dict"):
        raise errors.AdapterError(
            f"add_adapter takes an mlora.Adapter, a peft.LoraConfig or IA3Config or its fields as a mapping, not "
            f"{config!r}; load_adapter reads files"
        )
    fields = dict(config if isinstance(config, Mapping) else config.to_dict())
    fields["peft_type"] = str(getattr(fields.get("peft_type"), "value", fields.get("peft_type") or ""))
    kind = getattr(getattr(model, "config", None), "model_type", None)
    ia3 = fields["peft_type"].upper() == "IA3"
    for option in ("target_modules", "feedforward_modules") if ia3 else ("target_modules",):
        if fields.get(option) is None:
            fields[option] = _usual(f"{'IA3' if ia3 else 'LORA'}_{option.upper()}", option, kind)
    task = fields.get("task_type")
    if heads := _HEADS.get(str(getattr(task, "value", task))):
        saved = fields.get("modules_to_save") or []
        fields["modules_to_save"] = [*saved, *(head for head in heads if head not in saved)]
    fields["base_model_name_or_path"] = fields.get("base_model_name_or_path") or getattr(model, "name_or_path", None)
    return fields


def _usual(table: str, option: str, kind: Any) -> list[str]:
    try:
        from peft.utils import constants

        usual = getattr(constants, f"TRANSFORMERS_MODELS_TO_{table}_MAPPING")
    except ImportError:
        usual = {}
    if kind not in usual:
        raise errors.AdapterError(f"config: {option} is None, and PEFT has no usual ones for a model {kind!r}")
    return sorted(usual[kind])


def _init_of(fields: Mapping[str, Any]) -> bool | str:
    """How A and B start."""
    init = fields.get("init_lora_weights", True)
    if isinstance(init, bool):
        return init
    name = str(init).lower()
    if name in ("gaussian", "mica") or init in ("orthogonal", "eva"):  # PEFT takes the first two in any case
        return name
    why = "PEFT has none of that name"
    if name.startswith(_REWRITING):
        why = "it rewrites the base weights; make it with PEFT and load what it converts to a LoRA of the base"
    raise errors.UnsupportedAdapterError(f"config: option init_lora_weights={init!r} is not served: {why}")


def _targets(fields: Mapping[str, Any], model: nn.Module, bases: Mapping[str, BaseLinear]) -> list[str]:
    """What the config targets, in the order in which PEFT visits it."""
    paths = [name for name, _ in model.named_modules() if name]
    wanted = targets_of(fields, bases)
    if strange := [name for name in paths if name not in bases and is_target(fields, name)]:
        raise errors.AdapterError(
            f"config: its target_modules {fields.get('target_modules')!r} name {some(strange)}, which adapters cannot "
            f"change"
        )
    kind = fields["peft_type"].upper()
    embeds = kind == "LORA"
    found = [name for name in paths if name in wanted]
    if other := [n for n in found if not bases[n].linear and not (embeds and bases[n].embed_scale is not None)]:
        raise errors.UnsupportedAdapterError(
            f"config: its target_modules {fields.get('target_modules')!r} name {some(other)}; {kind} adapters are "
            f"trained on linears{' and token embeddings' if embeds else ''} only"
        )
    if not found:
        raise errors.AdapterError(
            f"config: its target_modules {fields.get('target_modules')!r} name no module of this model"
        )
    return found


def _copied(name: str, module: nn.Module, bases: Mapping[str, BaseLinear]) -> dict[str, Tensor]:
    """The weights of a module that is trained whole, or lies in one."""
    held = _held(module)
    other = [*(held.keys() - {"weight", "bias"}), *(key for key, tensor in module.named_buffers(recurse=False))]
    if held and (name not in bases or bases[name].conv is not None or other):
        raise errors.UnsupportedAdapterError(
            f"config: modules_to_save names {name} ({type(module).__name__}); trained whole are linears, token "
            f"embeddings and norms"
        )
    return held


def _held(module: nn.Module) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in module._parameters.items() if tensor is not None}


def _tokens(fields: Mapping[str, Any], model: nn.Module, bases: Mapping[str, BaseLinear]) -> dict[str, list[int]]:
    """Path of an embedding, or of a head -> its tokens that are trained; of what is tied to an embedding that has the
    same ones, that alone."""
    given = fields.get("trainable_token_indices")
    if not given:
        return {}
    if not isinstance(given, Mapping):
        embeddings = [name for name, base in bases.items() if base.embed_scale is not None]
        get = getattr(model, "get_input_embeddings", None)
        given = {name: given for name in embeddings if get is None or model.get_submodule(name) is get()}
    found: dict[str, list[int]] = {}
    for key, indices in given.items():
        named = [name for name in bases if name.endswith(key)]
        if not named:
            raise errors.AdapterError(f"config: its trainable_token_indices name {key!r}, which this model has not")
        for name in named:
            vocab = bases[name].in_features if bases[name].embed_scale is not None else bases[name].out_features
            if not all(type(index) is int and 0 <= index < vocab for index in indices):
                raise errors.AdapterError(
                    f"config: trainable_token_indices of {name} are {indices!r}; they must be tokens below {vocab}"
                )
            found[name] = list(indices)
    for name in list(found):
        if any(found.get(other) == found[name] and bases[other].embed_scale is not None for other in bases[name].tied):
            del found[name]
    return found


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Of torch's generator on the CPU, which goes on as if nothing was drawn where a seed is given."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
