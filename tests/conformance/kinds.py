"""What the conformance suite runs beside types and options: files, calls and models as they occur, each with the
verdict of its rows, in fp32 and in bf16.

An adapter is made by PEFT, and `file` is what was made of it: another spelling, layout or place of the same numbers. So
PEFT with the adapter alone is the oracle of each.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from conftest import HIDDEN, VOCAB, build, inputs_for, logits, rewrite
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mlora import errors

EXACT, REFUSED = "exact", "refused"
WEIGHTS = "adapter_model.safetensors"
MIXED = ("a", None, "a")
EXPERTS = 4
LORA = {"target_modules": ["q_proj", "up_proj"]}

Files = Callable[[Path, Path], Path]  # (an adapter's folder, a path that is free) -> what is loaded in its place
Call = Callable[..., Tensor]  # (model, batch, adapter_names=...) -> one row for each of the batch's


@dataclass(frozen=True, eq=False)
class Kind:
    """Something that a batch meets.

    Args:
        name: how the table lists it. `base`: the model. `options`: of PEFT's `LoraConfig`.
        file: what is loaded. `loading`: options of `load_adapter`. `entries`: one a row.
        call: how rows are asked for. `inputs`: rows -> a batch.
        verdict: EXACT or REFUSED. `error`, `words`: of a refusal.
        changes: whether the adapter changes the answer.
        once: whether fp32 says all.
    """

    name: str
    base: Callable[[], Any] = lambda: build("llama")
    options: Mapping[str, Any] = field(default_factory=lambda: LORA)
    file: Files = lambda folder, _: folder
    loading: Mapping[str, Any] = field(default_factory=dict)
    entries: tuple[Any, ...] = MIXED
    call: Call = logits
    inputs: Callable[[int], dict[str, Tensor]] = lambda rows: inputs_for("llama", rows)
    verdict: str = EXACT
    error: type[BaseException] = errors.MloraError
    words: tuple[str, ...] = ()
    changes: bool = True
    once: bool = False


def randomized(model: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model.eval()


# Models.

TEXT = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 4}


def qwen2moe() -> Any:
    """With square experts."""
    config = tf.Qwen2MoeConfig(
        **TEXT, num_key_value_heads=2, num_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=HIDDEN,
        shared_expert_intermediate_size=24, pad_token_id=0,
    )  # fmt: skip
    return randomized(tf.Qwen2MoeForCausalLM(config))


def mamba() -> Any:
    return randomized(tf.MambaForCausalLM(tf.MambaConfig(vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=1)))


def deberta() -> Any:
    config = tf.DebertaV2Config(
        **TEXT, intermediate_size=48, relative_attention=True, position_biased_input=False,
        pos_att_type=["p2c", "c2p"], share_att_key=True,
    )  # fmt: skip
    return randomized(tf.DebertaV2ForSequenceClassification(config))


def swin() -> Any:
    sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]}
    return randomized(tf.SwinForImageClassification(tf.SwinConfig(**sizes, window_size=4, num_labels=3)))


def choices() -> Any:
    return randomized(tf.BertForMultipleChoice(tf.BertConfig(**TEXT, intermediate_size=48)))


def xlnet() -> Any:
    config = tf.XLNetConfig(vocab_size=VOCAB, d_model=HIDDEN, n_layer=1, n_head=4, d_inner=48)
    return randomized(tf.XLNetForSequenceClassification(config))


class Reader(nn.Module):
    """Computes with a weight that its module would."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.up(x), self.down.weight)


def reader() -> Any:
    torch.manual_seed(0)
    return Reader().eval()


# Files.


def tensors(change: Callable[[dict[str, Tensor]], dict[str, Tensor]], **config: Any) -> Files:
    """The same folder with its tensors passed through `change`, and values put into its config."""
    return lambda folder, to: rewrite(folder, to, config, change)


def keys(change: Callable[[str], str]) -> Files:
    return tensors(lambda state: {change(key): tensor for key, tensor in state.items()})


def wrapped(key: str) -> str:
    """As torch.compile, DDP and FSDP leave names."""
    return "_orig_mod.module." + key.replace(".self_attn", "._fsdp_wrapped_module.self_attn")


def beside(**more: Tensor) -> Files:
    return tensors(lambda state: {**state, **{key.replace("__", "."): tensor for key, tensor in more.items()}})


def without(part: str) -> Files:
    """The adapter itself without some of its tensors."""

    def write(folder: Path, to: Path) -> Path:
        state = {key: tensor for key, tensor in load_file(folder / WEIGHTS).items() if part not in key}
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        return folder

    return write


def before_0_19_1(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Factors of experts' (out, in) as PEFT laid them out then: each as wide as the other is now."""
    (a,) = (tensor for key, tensor in state.items() if "lora_A" in key)
    (b,) = (tensor for key, tensor in state.items() if "lora_B" in key)
    turned = {
        "lora_A": b.reshape(len(b), -1, EXPERTS).permute(2, 1, 0).reshape(-1, len(b)),
        "lora_B": a.reshape(EXPERTS, -1, a.shape[1]).permute(2, 1, 0).reshape(a.shape[1], -1),
    }
    return {key: next(turned[part] for part in turned if part in key) for key in state}


def in_eight_bits(folder: Path, to: Path) -> Path:
    """The very values in 8-bit floats; the adapter itself is rounded to them."""
    state = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in load_file(folder / WEIGHTS).items()}
    save_file({key: tensor.float() for key, tensor in state.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    return rewrite(folder, to, tensors=lambda _: state)


def kohya(alpha: Tensor | None, **metadata: str) -> Files:
    """One file without a config: its alpha in tensors, or in the header."""

    def write(folder: Path, to: Path) -> Path:
        state = {}
        for key, tensor in load_file(folder / WEIGHTS).items():
            name, _, part = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
            name = "lora_te_" + name.replace(".", "_")
            state[f"{name}.{'lora_down' if part == 'lora_A' else 'lora_up'}.weight"] = tensor
            if alpha is not None:
                state[f"{name}.alpha"] = alpha.clone()
        save_file(state, file := to.with_suffix(".safetensors"), metadata=metadata)
        return file

    return write


def fresh(folder: Path, to: Path) -> Path:
    """As PEFT starts it; so is the adapter itself."""
    state = {key: tensor * ("lora_A" in key) for key, tensor in load_file(folder / WEIGHTS).items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def without_scale(folder: Path, to: Path) -> Path:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 0}))
    return folder


# Calls.


def checkpointed(reentrant: bool) -> Call:
    """Gradients with respect to embeddings, through layers that are computed again when the routing has ended."""

    def gradients(model: Any, batch: Mapping[str, Tensor], **options: Any) -> Tensor:
        x = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        body = next(module for module in model.modules() if hasattr(module, "layers"))
        forwards = [layer.forward for layer in body.layers]
        for layer, own in zip(body.layers, forwards, strict=True):
            layer.forward = lambda x, own=own, **more: checkpoint(partial(own, **more), x, use_reentrant=reentrant)
        try:
            out = model(inputs_embeds=x, use_cache=False, **options).logits
        finally:
            for layer in body.layers:
                del layer.forward
        out.float().square().sum().backward()
        assert x.grad is not None
        return x.grad

    return gradients


def guided(model: Any, batch: Mapping[str, Tensor], **options: Any) -> Tensor:
    """The scores of a first token under guidance, for which `generate` calls the model twice."""
    how = {"max_new_tokens": 1, "do_sample": False, "guidance_scale": 1.5, "pad_token_id": 0}
    return model.generate(**batch, **how, output_scores=True, return_dict_in_generate=True, **options).scores[0]


def own_loop(model: Any, batch: Mapping[str, Tensor], **options: Any) -> Tensor:
    return model.generate(**batch, custom_generate=lambda model, input_ids, **_: input_ids, **options)


def inner(model: Any, batch: Mapping[str, Tensor], **options: Any) -> Tensor:
    return model.model(**batch, **options).last_hidden_state


def pictures(rows: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(1))}


def questions(rows: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, VOCAB, (rows, 2, 5), generator=torch.Generator().manual_seed(1))}


def as_long_as_many(rows: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, VOCAB, (rows, rows), generator=torch.Generator().manual_seed(1))}


def vectors(rows: int) -> dict[str, Tensor]:
    return {"x": torch.randn(rows, 5, HIDDEN, generator=torch.Generator().manual_seed(1))}


def ids(rows: int) -> dict[str, Tensor]:
    return {"input_ids": inputs_for("llama", rows)["input_ids"]}


def _refused(name: str, error: type[BaseException], *words: str, **how: Any) -> Kind:
    return Kind(name, verdict=REFUSED, error=error, words=words, **{"once": True, **how})


_HEAD = beside(v_head__summary__weight=torch.ones(1, HIDDEN))
_ALL = {"target_modules": "all-linear"}
_EXPERTS = {"target_modules": [], "target_parameters": ["experts.down_proj"]}

KINDS: tuple[Kind, ...] = (
    # Files.
    Kind("experts' factors of PEFT 0.18", qwen2moe, _EXPERTS, tensors(before_0_19_1, peft_version="0.18.1")),
    _refused(
        "square experts of no known version", errors.AdapterError, "square", "peft_version",
        base=qwen2moe, options=_EXPERTS, file=tensors(dict, peft_version=None),
    ),
    Kind("an adapter of the model without its head", file=keys(lambda key: key.replace("model.model.", "model.", 1))),
    Kind("names of a compiled, wrapped model", file=keys(wrapped)),
    Kind("tensors that say nothing, ignored", file=_HEAD, loading={"ignore": ["v_head.*"]}),
    _refused("tensors that say nothing", errors.UnsupportedAdapterError, "v_head", "ignore=", file=_HEAD),
    Kind("a target without weights", file=without("up_proj")),
    _refused(
        "a target without weights, strict", errors.AdapterError, "strict=True", "up_proj",
        file=without("up_proj"), loading={"strict": True},
    ),
    Kind("alpha as a vector of whole numbers", options={**LORA, "lora_alpha": 4}, file=kohya(torch.tensor([4]))),
    _refused(
        "alpha in the header alone", errors.UnsupportedAdapterError, "ss_network_alpha", "ignore=",
        file=kohya(None, ss_network_alpha="4"),
    ),
    Kind("tensors in 8-bit floats", file=in_eight_bits),
    Kind("an adapter that was never trained", file=fresh, changes=False),
    Kind("alpha 0", file=without_scale, changes=False),
    # Calls.
    Kind("gradient checkpointing", call=checkpointed(False)),
    Kind("gradient checkpointing, reentrant", call=checkpointed(True)),
    Kind("guidance in generate", call=guided),
    _refused("a decoding loop of another's", errors.AttributionError, "custom_generate", call=own_loop),
    _refused("names given to an inner model", errors.EntryError, "LlamaModel", call=inner),
    # Models.
    Kind("several choices a row", choices, {"target_modules": ["query", "dense"]}, inputs=questions),
    Kind("windows of rows", swin, {"target_modules": ["q_proj", "fc1"]}, inputs=pictures),
    _refused(
        "the length before the rows", errors.AttributionError, "the length before the rows",
        base=xlnet, options=_ALL, inputs=as_long_as_many,
    ),
    Kind("one table for all rows, equal entries", deberta, _ALL, inputs=ids, entries=("a", "a", "a")),
    _refused(
        "one table for all rows, several entries", errors.AttributionError, "query_proj",
        base=deberta, options=_ALL, inputs=ids,
    ),
    _refused(
        "weights that Mamba's kernels read", errors.UnsupportedAdapterError, "dt_proj", "never calls it",
        base=mamba, options={"target_modules": ["dt_proj", "in_proj"]}, inputs=ids, once=False,
    ),
    _refused(
        "weights read in place of calling their module", errors.AttributionError, "down.weight",
        base=reader, options={"target_modules": ["up", "down"]}, inputs=vectors, once=False,
    ),
)  # fmt: skip
