"""What `generate` does to rows: followed, or refused by name before anything is generated."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import HIDDEN, build, inputs_for, refused
from torch import Tensor
from transformers import LlamaForCausalLM, WhisperConfig, WhisperForConditionalGeneration
from transformers.generation import GenerationMixin

import mlora
from mlora import errors
from mlora.routing.fallbacks import Fallbacks
from mlora.routing.loops import _KEPT

# Whisper: it drops audios that are done, and decodes again what it does not trust.

EOS, FRAMES = 50, 60  # a segment of the tiny model is 60 frames long
NAMES = ["a", None, None, "b"]


def whisper() -> Any:
    torch.manual_seed(0)
    sizes = dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32) | {"d_model": 16, "vocab_size": 1557}
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), EOS) | {"decoder_start_token_id": 51}
    config = WhisperConfig(
        encoder_layers=1, decoder_layers=1, max_source_positions=30, max_target_positions=64, **sizes, **heads, **ids
    )
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    vars(model.generation_config).update(
        no_timestamps_token_id=55, prev_sot_token_id=54, lang_to_id={"<|en|>": 52}, task_to_id={"transcribe": 53},
        is_multilingual=True, suppress_tokens=None, begin_suppress_tokens=None, max_initial_timestamp_index=50,
        max_length=None, **ids,
    )  # fmt: skip
    return model


@pytest.fixture(scope="module")
def speech() -> Iterator[tuple[Any, dict[str | None, Any]]]:
    """A patched Whisper, and for each entry the bare model with that adapter in its weights."""
    base, draw = whisper(), torch.Generator().manual_seed(1)
    alone: dict[str | None, Any] = {None: base}
    model = copy.deepcopy(base)
    runtime = mlora.patch(model)
    for name in "ab":
        tensors, alone[name] = {}, copy.deepcopy(base)
        for module, width in (("self_attn.v_proj", 16), ("encoder_attn.v_proj", 16), ("fc1", 32)):
            path = f"model.decoder.layers.0.{module}"
            a, b = torch.randn(4, 16, generator=draw), torch.randn(width, 4, generator=draw) * 0.7
            tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
            alone[name].get_submodule(path).weight.data += b @ a
        runtime.add_adapter(name, mlora.Adapter({"peft_type": "LORA", "r": 4, "lora_alpha": 4}, tensors))
    yield model, alone


def audio(lengths: list[int]) -> dict[str, Tensor]:
    features = torch.randn(len(lengths), 80, 2 * FRAMES, generator=torch.Generator().manual_seed(6))
    mask = torch.zeros(len(lengths), 2 * FRAMES, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, : length * FRAMES] = 1
    return {"input_features": features, "attention_mask": mask}


def transcribed(model: Any, batch: dict[str, Tensor], **options: Any) -> list[list[int]]:
    settings = {"language": "<|en|>", "task": "transcribe", "max_new_tokens": 6, "do_sample": False}
    out = model.generate(**batch, **settings, return_timestamps=True, return_segments=True, **options)
    return [[token for segment in row for token in segment["tokens"].tolist()] for row in out["segments"]]


# Temperatures of 0 decode again what was decoded before, with no draw that depends on the rows beside.
AGAIN = {"temperature": (0.0, 0.0), "logprob_threshold": -2.7, "compression_ratio_threshold": 5.0}


@pytest.mark.parametrize(
    ("options", "returned"),
    (
        ({"num_beams": 2, "num_return_sequences": 2}, 2),
        ({**AGAIN, "num_beams": 2, "no_speech_threshold": 0.9}, 1),
        ({"cache_implementation": "static"}, 1),
    ),
    ids=("returned", "again", "static"),
)
def test_whispers_rows_keep_their_adapters(
    speech: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], returned: int
) -> None:
    model, alone = speech
    batch, counts, heard = audio([2, 1, 1, 2]), [], []
    real = Fallbacks._routed

    def routed(self: Fallbacks, rows: list[Any]) -> Any:
        counts.append((self, len(rows)))
        return real(self, rows)

    monkeypatch.setattr(Fallbacks, "_routed", routed)

    def listen(_: Any, __: Any, given: dict[str, Any]) -> None:
        if "input_features" in given:  # the whole segment, to find silence
            heard.append((len(given["input_features"]), model.mlora._shared.local.plan.entries))

    hook = model.register_forward_pre_hook(listen, with_kwargs=True)
    got = transcribed(model, batch, adapter_names=NAMES, **options)
    hook.remove()
    assert len({rows for _, rows in counts}) > 1, "rows were dropped"
    if "temperature" in options:
        first = {rows for segment, rows in counts if segment is counts[0][0]}
        assert first == {4, 2}, "some rows were decoded again"
        assert (4, 4) in heard and all(rows == entries for rows, entries in heard)
    want = {name: transcribed(alone[name], batch, **options) for name in ("a", "b", None)}
    for row in range(len(NAMES) * returned):
        assert got[row] == want[NAMES[row // returned]][row]
    assert all(want["a"][row] != want["b"][row] != want[None][row] for row in (0, -1))
    assert model.mlora._readers.count == 0


def test_whispers_rows_under_use_adapters(speech: Any) -> None:
    model, _ = speech
    batch = audio([2, 1, 1, 2])
    with model.mlora.use_adapters(NAMES):
        got = transcribed(model, batch)
    assert got == transcribed(model, batch, adapter_names=NAMES)
    with refused(model, errors.EntryError, "3 entries", "4 rows"):
        transcribed(model, batch, adapter_names=NAMES[:3])


def test_a_whisper_inside_of_a_model_is_not_followed() -> None:
    class Around(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = whisper()

    model = Around()
    runtime = mlora.patch(model)
    path = "inner.model.decoder.layers.0.fc1"
    tensors = {f"{path}.lora_A.weight": torch.randn(1, 16), f"{path}.lora_B.weight": torch.randn(32, 1)}
    runtime.add_adapter("a", mlora.Adapter({"peft_type": "LORA", "r": 1, "lora_alpha": 1}, tensors))
    with runtime.use_adapters(["a", None]), pytest.raises(errors.AttributionError, match="WhisperGenerationMixin"):
        transcribed(model.inner, audio([1, 1]))


# Loops that nobody has read.


class Sorted(LlamaForCausalLM):
    """Gives back what it was given, in another order on the way."""

    def generate(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        order = input_ids[:, 0].argsort()
        return super().generate(input_ids[order], **kwargs)[order.argsort()]


class Sampled(LlamaForCausalLM):
    def _sample(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super()._sample(input_ids.flip(0), *args, **kwargs)


class Expanded(LlamaForCausalLM):
    def _expand_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        ids, others = super()._expand_inputs_for_generation(*args, **kwargs)
        return ids.flip(0), others


@pytest.mark.parametrize("own", (Sorted, Sampled, Expanded))
@pytest.mark.parametrize("how", ("argument", "context"))
def test_unknown_loops_are_refused_by_name(own: type, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = build("llama")
    model = own(base.config).eval()
    model.load_state_dict(base.state_dict())
    model.generation_config = base.generation_config
    runtime = mlora.patch(model)
    path = "model.layers.0.mlp.down_proj"
    tensors = {f"{path}.lora_A.weight": torch.randn(2, 48), f"{path}.lora_B.weight": torch.randn(HIDDEN, 2)}
    runtime.add_adapter("a", mlora.Adapter({"peft_type": "LORA", "r": 2, "lora_alpha": 2}, tensors))
    ids = inputs_for("llama", 3, length=5)["input_ids"]
    for one in ("a", ["a"] * 3):
        assert model.generate(ids, max_new_tokens=2, adapter_names=one).shape == (3, 7)
    calls: list[Any] = []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    with refused(model, errors.AttributionError, own.__name__, "several entries", "one call a row"):
        if how == "argument":
            model.generate(ids, max_new_tokens=2, adapter_names=["a", None, None])
        else:
            with runtime.use_adapters(["a", None, None]):
                model.generate(ids, max_new_tokens=2)
    assert not calls
    with runtime.use_adapters(["a"]):
        model.generate(ids[:1], max_new_tokens=2)


def test_given_loops_are_refused_by_name(patched: Any, batch: dict[str, Tensor]) -> None:
    def own(model: Any, input_ids: Tensor, **_: Any) -> Tensor:
        return input_ids

    names = ["r3", None, None, None]
    with refused(patched, errors.AttributionError, "custom_generate", "own"):
        patched.generate(**batch, adapter_names=names, custom_generate=own)
    assert torch.equal(patched.generate(**batch, adapter_names="r3", custom_generate=own), batch["input_ids"])
    for options in ({"custom_generate": "somebody/loop"}, {"penalty_alpha": 0.6, "top_k": 4}):
        with refused(patched, errors.AttributionError, "several entries"):
            patched.generate(**batch, adapter_names=names, trust_remote_code=True, **options)


def test_musicgen_is_refused(tmp_path: Any) -> None:
    """Its rows are the batch's times the codebooks, and twice that under guidance."""
    from transformers import MusicgenDecoderConfig, MusicgenForCausalLM

    sizes = {"vocab_size": 20, "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MusicgenForCausalLM(MusicgenDecoderConfig(num_codebooks=2, pad_token_id=19, **sizes)).eval()
    path = "model.decoder.layers.0.fc1"
    tensors = {f"{path}.lora_A.weight": torch.randn(1, 16), f"{path}.lora_B.weight": torch.randn(16, 1)}
    mlora.patch(model).add_adapter("a", mlora.Adapter({"peft_type": "LORA", "r": 1, "lora_alpha": 1}, tensors))
    with refused(model, errors.AttributionError, "MusicgenForCausalLM", "several entries"):
        model.generate(torch.zeros(4, 1, dtype=torch.long), adapter_names=["a", None, "a", None], max_new_tokens=2)


def test_the_loops_that_were_read_are_there() -> None:
    for path in _KEPT:
        module, owner, name = path.rsplit(".", 2)
        function = getattr(getattr(importlib.import_module(module), owner), name)
        assert f"{function.__module__}.{function.__qualname__}" == path


# An assistant, and guidance: more calls of the model in a step.


def test_guidance_and_prompt_lookup(patched: Any, batch: dict[str, Tensor]) -> None:
    names = ["r3", None, "rs16", "dora1"]
    options = {"max_new_tokens": 4, "do_sample": False}
    together = patched.generate(**batch, **options, guidance_scale=2.0, num_beams=2, adapter_names=names)
    for row, name in enumerate(names):
        alone = patched.generate(**batch, **options, guidance_scale=2.0, num_beams=2, adapter_names=name)
        assert torch.equal(together[row], alone[row])
    ids = batch["input_ids"][:1]
    want = patched.generate(ids, **options, adapter_names="r3")
    assistant = build("llama", seed=3)
    mlora.patch(assistant)
    for extra in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": assistant}):
        assert torch.equal(patched.generate(ids, **options, **extra, adapter_names=["r3"]), want)


def test_a_replaced_mixin_is_not_the_one_that_was_read(patched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(self: Any, inputs: Tensor, **_: Any) -> Tensor:
        return inputs

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    ids = inputs_for("llama", 2)["input_ids"]
    assert patched.generate(ids, adapter_names="r3") is ids
    with refused(patched, errors.AttributionError, "several entries", "generate"):
        patched.generate(ids, adapter_names=["r3", None])
