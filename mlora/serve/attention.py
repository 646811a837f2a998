"""Attention on the CPU for transformers' continuous batching, whose cost grows with the tokens that sequences have, not
with how many sequences there are: each sequence's keys and values are read where they lie in the cache
(`mlora::attend_`), without a mask over all tokens and without a copy of all caches in each layer.

An engine, once for a model and once for each cache:

    name = attention.register()
    attention.check(model)                   # refuses by name what could not be served exactly
    model.set_attn_implementation(name)      # plain calls and `generate` of the model run as with "sdpa" meanwhile
    manager = Manager(model, ...)            # whose switch_to_cb_friendly_attn must leave the implementation alone
    attention.read_in_place(processor.cache) # of what its _create_batch_processor returns; before the first step

It knows these names of transformers, 5.19 to 5.24: of `PagedAttentionCache` `layer_to_allocator`,
`max_blocks_per_request` and `update(key_states, value_states, layer_idx, kwargs)`, which layers call (before 5.24 the
attention function does) with the step's `read_index`, `write_index`, `cu_seq_lens_q` and `cu_seq_lens_k` in `kwargs`;
of an allocator `index`, `layer_type`, `_kv_token_views` and `sliding_window`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .. import errors
from ..ops import dispatch

NAME = "mlora_paged"
_LAYER = "mlora_layer"  # among a layer's keyword arguments: what its attention reads
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_KINDS = ("full_attention", "sliding_attention")
_STEP = ("read_index", "write_index", "cu_seq_lens_q", "cu_seq_lens_k")  # of a step, in layers' keyword arguments
# Of attention functions: what `_forward` honours, and what changes nothing in it.
_KNOWN = {"dropout", "scaling", "softcap", "sliding_window", "is_causal", "position_ids", _LAYER}


def register() -> str:
    """Makes the attention known to transformers; its name, for `set_attn_implementation`."""
    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


class _Step(NamedTuple):
    """What a layer's attention reads in a step."""

    k_cache: Tensor  # (rows, kv heads, dim)
    v_cache: Tensor
    window: int  # 0: all keys
    read: Tensor
    write: Tensor
    q_starts: Tensor
    k_starts: Tensor


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers' attention functions. Shapes: query (1, heads, tokens, dim), key and value (1, kv heads, tokens,
    dim) of a step's new tokens; returns (1, tokens, heads, dim). Outside of continuous batching as "sdpa"."""
    cache = kwargs.get("cache")
    if isinstance(cache, PagedAttentionCache):  # before 5.24
        key, value = cache.update(key, value, module.layer_idx, kwargs)
    step = kwargs.get(_LAYER)
    if step is None:
        if kwargs.get("read_index") is not None:
            raise RuntimeError(f"{NAME} reads caches that mlora.serve.attention.read_in_place was given; this was not")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if isinstance(step, _Seen):
        return step.attend(module, query, key, value, dropout, kwargs), None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap = kwargs.get("softcap") or 0.0
    k_cache, v_cache, window, *tensors = step
    return dispatch.attend_(query, key, value, k_cache, v_cache, *tensors, scale, softcap, window), None


def read_in_place(cache: Any) -> None:
    """Have this `PagedAttentionCache` of a manager read where it lies, by the attention that `register` registers. Its
    `update` then only tells the attention where that is; keys and values are written after they were used.

    Raises `RuntimeError` where the cache is not as those of the transformers that this was written for, or reads by
    block tables (`max_blocks_per_request`).
    """
    layers: dict[int, tuple[Tensor, Tensor, int, int, str]] = {}
    try:
        if cache.max_blocks_per_request:
            raise RuntimeError(
                f"max_blocks_per_request is {cache.max_blocks_per_request}, wanted 0: {NAME} reads no block tables"
            )
        for index, allocator in cache.layer_to_allocator.items():
            keys, values = allocator._kv_token_views[index]
            window = allocator.sliding_window if allocator.layer_type == "sliding_attention" else 0
            layers[index] = (keys, values, window, allocator.index, allocator.layer_type)
    except (AttributeError, KeyError) as error:
        raise RuntimeError(f"transformers' cache has changed, {NAME} cannot read it in place: {error!r}") from error

    def update(key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any]) -> Any:
        keys, values, window, index, kind = layers[layer_idx]
        kwargs[_LAYER] = _Step(
            keys,
            values,
            window,
            kwargs["read_index"][index],
            kwargs["write_index"][index],
            kwargs["cu_seq_lens_q"],
            kwargs["cu_seq_lens_k"][kind],
        )
        return key_states, value_states

    cache.update = update


def check(model: PreTrainedModel) -> None:
    """Raises `UnsupportedModelError` unless the attention of every layer is one that `mlora_paged` computes exactly:
    causal, over all keys or a sliding window, with a scale and at most a softcap. The message names the layer and what
    it has: sinks, biases, choices of keys, keys that it shares with another layer, another mixer than attention, and
    whatever else it hands to its attention that is not known here.

    It runs the model once, on three tokens, as continuous batching does; nothing of the model changes.
    """
    config = model.config.get_text_config()
    if model.device.type != "cpu" or model.dtype not in _DTYPES:
        raise errors.UnsupportedModelError(
            f"{NAME} serves float32, float16 and bfloat16 models on the CPU, this is {model.dtype} on {model.device}"
        )
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    count = config.num_hidden_layers
    if kinds is None:
        kinds = [_KINDS[window is not None]] * count
    for index, kind in enumerate(kinds):
        if kind not in _KINDS:
            raise errors.UnsupportedModelError(f"layer {index} is of type {kind!r}, {NAME} knows {', '.join(_KINDS)}")
    given: dict[str, Any] = {
        "input_ids": torch.zeros(1, 3, dtype=torch.int64),
        "position_ids": torch.tensor([[0, 1, 0]]),
        "attention_mask": None,
        "cu_seq_lens_q": torch.tensor([0, 2, 3], dtype=torch.int32),
        "cu_seq_lens_k": dict.fromkeys(_KINDS, torch.tensor([0, 2, 3], dtype=torch.int32)),
        "max_length_q": 2,
        "max_length_k": dict.fromkeys(_KINDS, 2),
        "read_index": [],
        "write_index": [],
        "use_cache": False,
        "is_causal": True,
    }
    seen = _Seen(
        names={id(module): name for name, module in model.named_modules()},
        windows=[window if kind == "sliding_attention" else None for kind in kinds],
        known=_KNOWN | given.keys() | {"cache"},
    )
    before = model.config._attn_implementation
    training = model.training
    model.set_attn_implementation(register())
    model.eval()
    try:
        with torch.no_grad():
            model(**given, cache=_Probe(seen))
    except errors.UnsupportedModelError:
        raise
    except Exception as error:  # whatever a model does that does not know such calls
        what = f"{type(model).__name__} does not run as continuous batching runs models"
        raise errors.UnsupportedModelError(f"{what}: {error!r}") from error
    finally:
        model.train(training)
        model.set_attn_implementation(before)
    missing = sorted(set(range(count)) - seen.done)
    if missing:
        raise errors.UnsupportedModelError(f"layers {missing} do not call the attention that {NAME} takes the place of")


@dataclass
class _Seen:
    """What layers hand to their attention, in `check`."""

    names: dict[int, str]
    windows: list[int | None]
    known: set[str]

    def __post_init__(self) -> None:
        self.done: set[int] = set()
        self.waiting: tuple[int, Tensor, Tensor] | None = None

    def update(self, key: Tensor, value: Tensor, index: int, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if index in self.done or index >= len(self.windows):
            self.refuse(f"layer {index}", "fills the cache more often than once")
        if lost := [name for name in _STEP if name not in kwargs]:
            self.refuse(f"layer {index}", f"does not hand {', '.join(lost)} to its cache")
        self.waiting = (index, key, value)
        kwargs[_LAYER] = self
        return key, value

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, dropout: float, kwargs: dict[str, Any]
    ) -> Tensor:
        name = self.names.get(id(module), type(module).__name__)
        if self.waiting is None or self.waiting[1] is not key or self.waiting[2] is not value:
            self.refuse(name, "reads other keys and values than it has put into the cache")
        index = self.waiting[0]  # type: ignore[index]
        if key.shape[-1] != value.shape[-1] or query.shape[-1] != key.shape[-1]:
            self.refuse(name, f"has keys of {key.shape[-1]} dimensions and values of {value.shape[-1]}")
        for what, setting in kwargs.items():
            if what not in self.known and setting is not None and not what.startswith("output_"):
                self.refuse(name, f"hands {what} to its attention")
        if hasattr(module, "sinks"):
            self.refuse(name, "has sinks")
        if not getattr(module, "is_causal", True) or not kwargs.get("is_causal", True):
            self.refuse(name, "is not causal")
        if dropout:
            self.refuse(name, f"has a dropout of {dropout}")
        window = kwargs.get("sliding_window")
        if window is not None and window != self.windows[index]:
            self.refuse(name, f"has a sliding window of {window}, its cache one of {self.windows[index]}")
        self.done.add(index)
        self.waiting = None
        return query.transpose(1, 2)

    def refuse(self, name: str, what: str) -> None:
        raise errors.UnsupportedModelError(f"{name} {what}, which {NAME} does not serve")


class _Probe(PagedAttentionCache):
    """In `check`: no cache, but the kind of object that models look for."""

    def __init__(self, seen: _Seen) -> None:
        self._seen = seen

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any]) -> Any:
        return self._seen.update(key_states, value_states, layer_idx, kwargs)
