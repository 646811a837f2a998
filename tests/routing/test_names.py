"""Names that reach a forward by another way than the patched model's call: routed, or refused, never ignored."""

from __future__ import annotations

import copy
import functools
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from conftest import (
    HIDDEN,
    VOCAB,
    assert_close,
    build,
    identity,
    inputs_for,
    logits,
    make_adapter,
    peft_alone,
    refused,
    served,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerFast, pipeline

import mlora
from mlora import errors

NAMES = ["r3", None, "rs16", "r3"]


@pytest.fixture
def wanted(patched: Any, batch: dict[str, Tensor]) -> Tensor:
    return logits(patched, batch, adapter_names=NAMES)


def test_forward_routes_like_a_call(patched: Any, batch: dict[str, Tensor], wanted: Tensor) -> None:
    mask = batch["attention_mask"][..., None]
    with torch.no_grad():
        assert torch.equal(patched.forward(**batch, adapter_names=NAMES).logits * mask, wanted)
        wrapped = nn.DataParallel(patched)
        assert torch.equal(wrapped(**batch, adapter_names=NAMES).logits * mask, wanted)
    with refused(patched, errors.EntryError, "3 entries", "4 rows"):
        patched.forward(**batch, adapter_names=["r3"] * 3)
    assert not torch.equal(logits(patched, batch), wanted), "nothing is left behind"


@pytest.mark.parametrize("when", ("before", "after"))
def test_a_hooked_forward(
    llama: Any, folders: dict[str, Path], batch: dict[str, Tensor], wanted: Tensor, when: str
) -> None:
    model = copy.deepcopy(llama)

    def hook() -> None:
        for module in (model, model.model):
            add_hook_to_module(module, ModelHook())

    if when == "before":
        hook()
    before = identity(model)
    runtime = mlora.patch(model)
    if when == "after":
        hook()
    for name in ("r3", "rs16"):
        runtime.load_adapter(folders[name], name)
    mask = batch["attention_mask"][..., None]
    with torch.no_grad():
        assert torch.equal(model(**batch, adapter_names=NAMES).logits * mask, wanted)
        assert torch.equal(model.forward(**batch, adapter_names=NAMES).logits * mask, wanted)
    with refused(model, errors.EntryError, "adapter_names", "LlamaModel"):
        model.model(**batch, adapter_names=NAMES)
    mlora.unpatch(model)
    if when == "before":
        assert identity(model) == before
    with torch.no_grad():
        assert torch.equal(logits(model, batch), logits(llama, batch))


def test_what_was_compiled_before_the_patch(
    llama: Any, folders: dict[str, Path], batch: dict[str, Tensor], wanted: Tensor
) -> None:
    model = copy.deepcopy(llama)
    compiled = torch.compile(model, backend="eager")
    runtime = mlora.patch(model)
    for name in ("r3", "rs16"):
        runtime.load_adapter(folders[name], name)
    with torch.no_grad(), runtime.use_adapters(NAMES):
        got = compiled(**batch).logits * batch["attention_mask"][..., None]
    assert (got - wanted).abs().max() < 1e-5
    with torch.no_grad(), runtime.use_adapters(["r3", "rs16"]), pytest.raises(errors.AttributionError, match="4 rows"):
        compiled(**batch)
    with torch.no_grad(), runtime.use_adapters(["r3", "r3"]), pytest.raises(errors.AttributionError, match="4 rows"):
        compiled(**batch)
    with torch.no_grad():
        for _ in range(2):  # what raises while it is compiled is run as it is
            with pytest.raises(errors.EntryError, match=r"adapter_names= cannot be given inside torch\.compile"):
                compiled(**batch, adapter_names=NAMES)
        with runtime.use_adapters(["r3", "rs16"]), pytest.raises(errors.MloraError, match="4 rows"):
            compiled(**batch)


def test_a_method_that_was_taken_before_the_patch(llama: Any, batch: dict[str, Tensor]) -> None:
    model = copy.deepcopy(llama)
    taken = model.forward
    mlora.patch(model)
    with refused(model, errors.EntryError, "adapter_names", "LlamaModel"):
        taken(**batch, adapter_names=["r3"] * 4)


@pytest.mark.parametrize("part", ("model", "model.layers.0", "model.layers.1.self_attn"))
@pytest.mark.parametrize("name", ("adapter_names", "adapter_name", "adapters", "lora_request"))
@pytest.mark.parametrize("how", ("call", "forward"))
def test_parts_refuse_names(patched: Any, part: str, name: str, how: str) -> None:
    module = patched.get_submodule(part)
    call = module if how == "call" else module.forward
    with refused(patched, errors.EntryError, name, type(module).__name__):
        call(torch.zeros(1, 2, HIDDEN), **{name: "r3"})


@pytest.mark.parametrize("name", ("adapter_name", "adapter", "adapters", "lora", "lora_request", "active_adapter"))
@pytest.mark.parametrize("how", ("call", "forward", "generate"))
def test_other_words_for_adapter_names(patched: Any, batch: dict[str, Tensor], name: str, how: str) -> None:
    call = {"call": patched, "forward": patched.forward, "generate": patched.generate}[how]
    with refused(patched, errors.EntryError, name, "adapter_names"):
        call(**batch, **{name: "r3"})


def test_a_models_own_keyword_is_its_own() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(HIDDEN, HIDDEN)

        def forward(self, x: Tensor, adapter: float = 1.0, **kwargs: Any) -> Tensor:
            return self.linear(x) * adapter + sum(kwargs.values())

    model, x = Own(), torch.randn(2, HIDDEN)
    want = model(x, adapter=3.0, lift=1.0)
    mlora.patch(model)
    assert torch.equal(model(x, adapter=3.0, lift=1.0), want)
    with pytest.raises(errors.EntryError, match="lora is given to Own"):
        model(x, lora=1.0)


def test_signatures_and_hooks_stay(llama: Any, batch: dict[str, Tensor]) -> None:
    """transformers looks at them: which arguments a model takes, which class a module is of."""
    model = copy.deepcopy(llama)
    before, want = identity(model), llama(**batch, output_hidden_states=True, output_attentions=True)
    mlora.patch(model)
    for name, module in llama.named_modules():
        mine = model.get_submodule(name)
        assert isinstance(mine, type(module)) and type(mine).__name__ == type(module).__name__
        if not isinstance(module, nn.Linear | nn.Embedding) and "Norm" not in type(module).__name__:
            assert inspect.signature(mine.forward) == inspect.signature(module.forward)
    got = model(**batch, output_hidden_states=True, output_attentions=True)
    assert len(got.hidden_states) == len(want.hidden_states) and len(got.attentions or ()) == len(want.attentions or ())
    assert all(torch.equal(mine, its) for mine, its in zip(got.hidden_states, want.hidden_states, strict=True))
    mlora.unpatch(model)
    assert [(name, key, cls) for name, key, cls, _ in identity(model)] == [
        (name, key, cls) for name, key, cls, _ in before
    ]


@pytest.mark.parametrize("name", ("adapter_names", "adapter_name"))
@pytest.mark.parametrize("whose", ("given", "model's"))
def test_a_generation_config_with_names(
    patched: Any, batch: dict[str, Tensor], name: str, whose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers keeps what it does not know, and nobody reads it."""
    config = GenerationConfig(max_new_tokens=2, pad_token_id=0, **{name: ["r3"] * 4})
    if whose == "model's":
        monkeypatch.setattr(patched, "generation_config", config)
    with refused(patched, errors.EntryError, name, "GenerationConfig"):
        patched.generate(**batch, **({} if whose == "model's" else {"generation_config": config}))


def test_a_generate_that_was_put_on_the_model(llama: Any, folders: dict[str, Path], batch: dict[str, Tensor]) -> None:
    """As from_pretrained does with a repository's custom_generate."""
    model = copy.deepcopy(llama)

    def own(input_ids: Tensor, model: Any, **kwargs: Any) -> Tensor:
        return model(input_ids, **kwargs).logits

    model.generate = functools.partial(own, model=model)
    mlora.patch(model).load_adapter(folders["r3"], "r3")
    with torch.no_grad():
        got = model.generate(batch["input_ids"], adapter_names="r3")
        assert torch.equal(got, model(batch["input_ids"], adapter_names="r3").logits)
    with refused(model, errors.AttributionError, "LlamaForCausalLM", "own", "one call a row"):
        model.generate(batch["input_ids"], adapter_names=["r3", None, None, None])
    mlora.unpatch(model)
    assert model.generate.func is own


def test_a_part_that_generates(tmp_path: Path) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build("llama")

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.inner(input_ids).logits

    model = Around()
    runtime = mlora.patch(model)
    ids = inputs_for("llama", 2)["input_ids"]
    with refused(model, errors.EntryError, "adapter_names", "generate of LlamaForCausalLM"):
        model.inner.generate(ids, adapter_names=["r3", None])
    with refused(model, errors.EntryError, "adapter_name ", "generate of LlamaForCausalLM"):
        model.inner.generate(ids, adapter_name="r3")
    with runtime.use_adapters([None, None]):
        assert model.inner.generate(ids, max_new_tokens=2).shape == (2, 9)


@pytest.mark.parametrize("task, kind", [("text-classification", "bert"), ("feature-extraction", "llama")])
@torch.no_grad()
def test_pipelines_that_swallow_keywords(task: str, kind: str, tmp_path: Path) -> None:
    """Those that generate hand names to `generate`."""
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    make = functools.partial(pipeline, tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0"))
    base, text = build(kind), "w3 w4 w5"
    folder = make_adapter(tmp_path / "a", base, 1, target_modules=["query" if kind == "bert" else "q_proj"])
    model, alone = served(base, {"a": folder}), peft_alone(base, folder).get_base_model()
    pipe = make(task, model=model)
    for call in (pipe, functools.partial(make, task, model=model)):
        with refused(model, errors.EntryError, "adapter_names is given to", "Pipeline", "use_adapters"):
            call(*([text] if call is pipe else []), adapter_names=["a"])
    with refused(model, errors.EntryError, "adapter_name is given to", "Pipeline"):
        pipe(text, adapter_name="a")
    with model.mlora.use_adapters("a"):
        routed = pipe(text)
    assert_close(torch.tensor(values(routed)), torch.tensor(values(make(task, model=alone)(text))))
    assert values(pipe(text)) == values(make(task, model=base)(text)) != values(routed)
    if kind == "llama":
        how = {"max_new_tokens": 4, "do_sample": False}
        named = make("text-generation", model=model)(text, adapter_names=["a"], **how)
        assert (
            named
            == make("text-generation", model=alone)(text, **how)
            != make("text-generation", model=base)(text, **how)
        )


def values(answer: Any) -> list[float]:
    return [answer[0]["score"]] if isinstance(answer[0], dict) else torch.tensor(answer).flatten().tolist()


def test_pipelines_that_are_imported_later() -> None:
    """In a process of its own, since this one has them."""
    script = """
import sys, torch, mlora
mlora.patch(torch.nn.Sequential(torch.nn.Linear(4, 4)), memory=1 << 20)
mlora.patch(torch.nn.Sequential(torch.nn.Linear(4, 4)), memory=1 << 20)
assert "transformers.pipelines.base" not in sys.modules
from transformers.pipelines import Pipeline
print(Pipeline.__call__.__wrapped__.__qualname__, hasattr(Pipeline.__call__.__wrapped__, "__wrapped__"))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["Pipeline.__call__", "False"]
