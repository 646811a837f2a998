"""Modules that were trained whole, and trained tokens: norms, embeddings, tied heads, heads of another size."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from conftest import (
    BUILDERS,
    HIDDEN,
    VOCAB,
    _causal,
    assert_close,
    build,
    identity,
    inputs_for,
    logits,
    peft_alone,
    refused,
    resized,
    rewrite,
    row_of,
)
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

import mlora
from mlora import errors
from mlora.layers import NormLayer, find_layers, norm_offset

SIZES = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


def classifier(kind: str, labels: int) -> Any:
    if kind == "bert":
        return BertForSequenceClassification(BertConfig(**SIZES, num_labels=labels))
    return LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=labels))


FAMILIES = {
    "tied": lambda: _causal("LlamaConfig", tie_word_embeddings=True),
    "gemma3": lambda: _causal("Gemma3TextConfig", query_pre_attn_scalar=8),
    **{f"{kind}-{n}": lambda kind=kind, n=n: classifier(kind, n) for kind in ("bert", "score") for n in (2, 5, 7)},
}


@pytest.fixture(autouse=True)
def families(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, builder in FAMILIES.items():
        monkeypatch.setitem(BUILDERS, kind, builder)


def saved(folder: Path, base: Any, seed: int, config: Any) -> Path:
    """A PEFT adapter in which every trainable tensor is random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(copy.deepcopy(base), config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(0.3 * noise + (1 if "norm" in name.lower() and "weight" in name else 0))
        wrapped.save_pretrained(folder)
    return folder


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 3, "target_modules": ["q_proj"], **options})


CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"norm": {"modules_to_save": ["norm"]}, "embeddings": {"modules_to_save": ["embed_tokens"]}},
    "tied": {
        "tokens": {"trainable_token_indices": [3, 9, 40]},
        "embeddings": {"modules_to_save": ["embed_tokens"]},
        "both": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        "apart": {"trainable_token_indices": {"embed_tokens": [3, 9], "lm_head": [5]}},
        "head": {"trainable_token_indices": {"lm_head": [5, 6]}},
    },
    "gemma3": {
        "tokens": {"trainable_token_indices": [3, 9, 40], "modules_to_save": ["q_norm", "input_layernorm"]},
        "norm": {"modules_to_save": ["k_norm", "norm"], "target_modules": ["v_proj"]},
        "dora": {"target_modules": ["embed_tokens"], "use_dora": True},
    },
    "qwen3": {"norm": {"modules_to_save": ["q_norm", "k_norm"]}},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_rows_are_those_of_peft_alone(tmp_path: Path, kind: str) -> None:
    base = build(kind)
    folders = {
        name: saved(tmp_path / name, base, seed, lora(**options))
        for seed, (name, options) in enumerate(CONFIGS[kind].items())
    }
    model = copy.deepcopy(base)
    before = identity(model)
    runtime = mlora.patch(model)
    for name, folder in folders.items():
        runtime.load_adapter(folder, name)
    entries = [*folders, None, *list(folders)[::-1]]
    batch = inputs_for(kind, len(entries))
    batch["input_ids"][:, 1], batch["input_ids"][:, 3] = 3, 9
    got = logits(model, batch, adapter_names=entries)
    for row, name in enumerate(entries):
        oracle = base if name is None else peft_alone(base, folders[name])
        assert_close(got[row : row + 1], logits(oracle, row_of(batch, row)))
    name = entries[0]
    runtime.save_adapter(name, tmp_path / "again")
    assert_close(logits(model, batch, adapter_names=name), logits(peft_alone(base, tmp_path / "again"), batch))
    assert f"{name} " in runtime.status() and runtime.adapters[name].bytes > 0

    # A merge is the weighted entry; taken over from PEFT it is the same adapter.
    mix = {entries[0]: 0.6, entries[-2]: -0.5} if len(folders) > 1 else {entries[0]: 0.6}
    want = logits(model, batch, adapter_names=mix)
    runtime.add_weighted_adapter(list(mix), list(mix.values()), "sum")
    assert_close(logits(model, batch, adapter_names="sum"), want)
    live = peft_alone(base, folders[name])
    want = logits(live, batch)
    assert_close(logits(mlora.patch(live).model, batch), want)

    mlora.unpatch(model)
    assert identity(model) == before and torch.equal(logits(model, batch), logits(base, batch))


@pytest.mark.parametrize("side", ("left", "right"))
@pytest.mark.parametrize("beams", (1, 3))
def test_generate(tmp_path: Path, side: str, beams: int) -> None:
    base = build("tied")
    folders = {
        "tokens": saved(tmp_path / "tokens", base, 1, lora(trainable_token_indices=list(range(2, 60, 3)))),
        "norm": saved(tmp_path / "norm", base, 2, lora(modules_to_save=["norm"])),
    }
    model = copy.deepcopy(base)
    runtime = mlora.patch(model)
    for name, folder in folders.items():
        runtime.load_adapter(folder, name)
    ids = torch.randint(2, VOCAB, (3, 6), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    at = slice(0, 2) if side == "left" else slice(4, 6)
    ids[0, at] = mask[0, at] = 0
    batch, options = {"input_ids": ids, "attention_mask": mask}, {"max_new_tokens": 4, "num_beams": beams}
    entries = ["tokens", None, "norm"]
    got = model.generate(**batch, **options, do_sample=False, adapter_names=entries)
    for row, name in enumerate(entries):
        oracle = base if name is None else peft_alone(base, folders[name])
        assert torch.equal(got[row : row + 1], oracle.generate(**row_of(batch, row), **options, do_sample=False))


# Heads of another size


def heads(root: Path, kind: str) -> tuple[Any, dict[str, Any], dict[str, Path]]:
    """A base of 5 labels, and for each adapter the model that it was made on and its folder."""
    bases = {n: build(f"{kind}-{n}") for n in (2, 5, 7)}
    head = "classifier" if kind == "bert" else "score"
    for n in (2, 7):  # the same model but for the head
        state = {key: value for key, value in bases[5].state_dict().items() if not key.startswith(head)}
        bases[n].load_state_dict(state, strict=False)
    targets = ["query"] if kind == "bert" else ["q_proj"]
    made = {"two": 2, "five": 5, "seven": 7, "other seven": 7}
    folders = {
        name: saved(root / name, bases[n], seed, lora(target_modules=targets, modules_to_save=[head]))
        for seed, (name, n) in enumerate(made.items())
    }
    return bases[5], {name: bases[n] for name, n in made.items()}, folders


@pytest.mark.parametrize("kind", ("bert", "score"))
def test_heads_of_several_sizes_in_one_batch(tmp_path: Path, kind: str) -> None:
    base, made, folders = heads(tmp_path, kind)
    model = copy.deepcopy(base)
    runtime = mlora.patch(model)
    for name, folder in folders.items():
        runtime.load_adapter(folder, name)
    batch = inputs_for("llama", 6)

    def check(entries: list[Any], width: int) -> None:
        got = logits(model, {k: v[: len(entries)] for k, v in batch.items()}, adapter_names=entries)
        assert got.shape == (len(entries), width)
        for row, entry in enumerate(entries):
            want = logits(base if entry is None else peft_alone(made[entry], folders[entry]), row_of(batch, row))
            assert_close(got[row : row + 1, : want.shape[1]], want)
            assert (got[row, want.shape[1] :] == -torch.inf).all()

    check(["two", None, "seven", "five", "other seven", "two"], 7)
    check(["two", "two"], 2)
    check(["seven", "other seven", "seven"], 7)
    check(["two", "five", None], 5)
    check([None, "five"], 5)
    for name, n in (("two", 2), ("seven", 7)):  # one entry for all rows
        got = logits(model, batch, adapter_names=name)
        assert got.shape == (6, n)
        assert_close(got, logits(peft_alone(made[name], folders[name]), batch))
    runtime.save_adapter("two", tmp_path / "again")
    assert_close(logits(model, batch, adapter_names="two"), logits(peft_alone(made["two"], tmp_path / "again"), batch))
    head = "classifier" if kind == "bert" else "score"
    for entry in ({"two": 0.5}, {"two": 1.0, "seven": 1.0}, {"two": 1.0, "five": 0.1}):
        with refused(model, errors.EntryError, "'two'", "another size", head):
            model(**batch, adapter_names=entry)
    with refused(model, errors.MergeError, "two", "another size", head):
        runtime.merge_adapter("two")
    with refused(model, errors.MergeError, "another size", head):
        runtime.add_weighted_adapter(["two", "five"], [1.0, 1.0], "sum")
    for name in folders:
        runtime.delete_adapter(name)
    mlora.unpatch(model)
    assert torch.equal(logits(model, batch), logits(base, batch))


def test_a_head_beside_adapters_that_leave_it_alone(tmp_path: Path) -> None:
    base, made, folders = heads(tmp_path, "bert")
    plain = saved(tmp_path / "plain", base, 9, lora(target_modules=["value"]))
    model = copy.deepcopy(base)
    runtime = mlora.patch(model)
    runtime.load_adapter(folders["seven"], "seven")
    runtime.load_adapter(plain, "plain")
    batch = inputs_for("bert", 2)
    got = logits(model, batch, adapter_names={"seven": 1.0, "plain": 0.5})
    want = logits(peft_alone(made["seven"], folders["seven"], plain, weights=(1.0, 0.5)), batch)
    assert got.shape == (2, 7) and want.shape == (2, 7)
    assert_close(got, want)


def test_a_vocabulary_of_another_size(tmp_path: Path, llama: Any) -> None:
    """Beams and a cache; new tokens get no probability in the other rows."""
    wide = copy.deepcopy(llama)
    wide.lm_head = nn.Linear(HIDDEN, VOCAB + 3, bias=False)
    wide.config.vocab_size = VOCAB  # of the embedding, which stays as it is
    folder = saved(tmp_path / "wide", wide, 1, lora(modules_to_save=["lm_head"]))
    model = copy.deepcopy(llama)
    mlora.patch(model).load_adapter(folder, "wide")
    batch = inputs_for("llama", 3)
    got = logits(model, batch, adapter_names=["wide", None, "wide"])
    want = logits(peft_alone(wide, folder), batch)
    mask = batch["attention_mask"][0].bool()
    assert_close(got[0][mask], want[0][mask])
    assert_close(got[1, 0, :VOCAB], logits(llama, row_of(batch, 1))[0, 0])
    assert (got[1, 0, VOCAB:] == -torch.inf).all()
    ids = batch["input_ids"][:2]
    out = model.generate(ids, max_new_tokens=3, num_beams=2, do_sample=False, adapter_names=[None, "wide"])
    assert torch.equal(out[:1], llama.generate(ids[:1], max_new_tokens=3, num_beams=2, do_sample=False))
    alone = peft_alone(wide, folder).generate(input_ids=ids[1:], max_new_tokens=1, num_beams=2, do_sample=False)
    assert torch.equal(out[1:, : alone.shape[1]], alone)


def grown(base: Any, tokens: int) -> Any:
    """`resized` of the vocabulary, also where it is a classifier that gives the answer."""
    model = copy.deepcopy(base)
    model.resize_token_embeddings(tokens, mean_resizing=False)
    return model if hasattr(model, "classifier") else resized(base, tokens)


VOCABULARIES = {"wide": VOCAB + 5, "other": VOCAB + 2, "narrow": VOCAB - 4, "same": VOCAB}


@pytest.mark.parametrize("kind", ("llama", "tied", "gemma3", "bert"))
def test_vocabularies_of_several_sizes_in_one_batch(tmp_path: Path, kind: str) -> None:
    base = build(kind)
    options = {
        "llama": {"modules_to_save": ["embed_tokens", "lm_head"]},
        "bert": {"modules_to_save": ["word_embeddings"], "target_modules": ["query"]},
    }.get(kind, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True})
    made = {name: grown(base, tokens) for name, tokens in VOCABULARIES.items()}
    folders = {
        name: saved(tmp_path / name, made[name], seed, lora(**options)) for seed, name in enumerate(VOCABULARIES)
    }
    embedding = "word_embeddings" if kind == "bert" else "embed_tokens"
    plain = {"target_modules": [*options.get("target_modules", ["q_proj"]), embedding]}
    made["plain"], folders["plain"] = base, saved(tmp_path / "plain", base, 7, lora(**plain))
    model = copy.deepcopy(base)
    runtime = mlora.patch(model)
    for name, folder in folders.items():
        runtime.load_adapter(folder, name)
    entries = ["wide", None, "narrow", "plain", "other", "same", "wide", "plain"]
    batch = inputs_for(kind, len(entries))
    ids = batch["input_ids"] = torch.randint(
        2, VOCAB - 4, (len(entries), 7), generator=torch.Generator().manual_seed(3)
    )
    batch.pop("attention_mask")
    ids[0, 2], ids[6, 5], ids[4, 1], ids[1, 1], ids[3, 3] = VOCAB + 4, VOCAB, VOCAB + 1, VOCAB - 1, VOCAB - 2

    def check(entries: list[Any], rows: list[int]) -> None:
        part = {key: value[rows] for key, value in batch.items()}
        got = logits(model, part, adapter_names=[entries[row] for row in rows])
        for at, row in enumerate(rows):
            name = entries[row]
            want = logits(base if name is None else peft_alone(made[name], folders[name]), row_of(batch, row))
            assert_close(got[at : at + 1, ..., : want.shape[-1]], want)
            assert (got[at, ..., want.shape[-1] :] == -torch.inf).all()

    check(entries, list(range(len(entries))))
    check(entries, [0, 6])
    got = logits(model, row_of(batch, 0), adapter_names="wide")  # one entry for all rows
    assert_close(got, logits(peft_alone(made["wide"], folders["wide"]), row_of(batch, 0)))
    name = "model.embed_tokens" if kind != "bert" else "word_embeddings"
    for names, wanted in (
        (["wide", "wide", "wide", "wide", None], ("row 4", str(VOCAB + 1), name, f"{VOCAB} tokens in the model")),
        (["wide", "narrow"], ("row 1", str(VOCAB - 1), name, f"{VOCAB - 4} tokens in the adapter of that row")),
        (["other", None], ("row 0", str(VOCAB + 4), f"{VOCAB + 2} tokens in the adapter of that row")),
    ):
        with refused(model, errors.TokenError, *wanted):
            model(**{key: value[: len(names)] for key, value in batch.items()}, adapter_names=names)
    with refused(model, errors.EntryError, "'wide'", "another size"):
        model(**row_of(batch, 0), adapter_names={"wide": 0.5})
    with refused(model, errors.MergeError, "'wide'", "another size"):
        runtime.merge_adapter("wide")
    with refused(model, errors.MergeError, "another size"):
        runtime.add_weighted_adapter(["wide", "plain"], [1.0, 1.0], "sum")
    runtime.save_adapter("wide", tmp_path / "again")
    assert_close(got, logits(peft_alone(made["wide"], tmp_path / "again"), row_of(batch, 0)))
    for name in folders:
        runtime.delete_adapter(name)
    mlora.unpatch(model)


@pytest.mark.parametrize("beams", (1, 3))
def test_generating_with_a_larger_vocabulary(tmp_path: Path, llama: Any, beams: int) -> None:
    """New tokens are read, written, and read again."""
    wide = resized(llama, VOCAB + 5)
    folder = saved(tmp_path / "wide", wide, 1, lora(modules_to_save=["embed_tokens", "lm_head"]))
    model = copy.deepcopy(llama)
    mlora.patch(model).load_adapter(folder, "wide")
    ids = inputs_for("llama", 4, 5)["input_ids"].clamp(2)
    ids[0, 3], ids[3, 1] = VOCAB + 4, VOCAB
    names = ["wide", None, None, "wide"]

    def prefer(_: Tensor, scores: Tensor) -> Tensor:  # the tokens that only one of them has
        bonus = torch.zeros_like(scores)
        bonus[:, VOCAB:] = 2.0
        return scores + bonus

    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "logits_processor": [prefer]}
    got = model.generate(ids, **options, adapter_names=names)
    for row, name in enumerate(names):
        oracle = llama if name is None else peft_alone(wide, folder)
        assert torch.equal(got[row : row + 1], oracle.generate(input_ids=ids[row : row + 1], **options))
    assert (got[[0, 3], ids.shape[1] :] >= VOCAB).any()


class OnGpu(Tensor):
    """Host memory that says it lies on a GPU; what operators make of it does not."""

    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What a GPU was asked; whether a graph is being captured."""
    seen = SimpleNamespace(waits=0, capturing=False)

    def wait() -> None:
        seen.waits += 1

    event = SimpleNamespace(synchronize=wait)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(record_event=lambda: event))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: seen.capturing)
    return seen


def test_ids_on_a_gpu_are_looked_at_when_the_call_ends(tmp_path: Path, llama: Any, gpu: SimpleNamespace) -> None:
    wide = resized(llama, VOCAB + 5)
    folder = saved(tmp_path / "wide", wide, 1, lora(modules_to_save=["embed_tokens", "lm_head"]))
    model = copy.deepcopy(llama)
    runtime = mlora.patch(model)
    runtime.load_adapter(folder, "wide")
    ids = inputs_for("llama", 3, 5)["input_ids"].clamp(2)
    ids[0, 3] = VOCAB + 4
    names, there = ["wide", None, "wide"], ids.as_subclass(OnGpu)
    layers: list[int] = []
    model.lm_head.register_forward_hook(lambda *_: layers.append(gpu.waits))

    got = logits(model, {"input_ids": there}, adapter_names=names)
    assert gpu.waits == 1 and layers == [0], "once, and not before the last layer has run"
    assert torch.equal(got, logits(model, {"input_ids": ids}, adapter_names=names)) and gpu.waits == 1

    ids[1, 2], ids[2, 1] = VOCAB, -1  # the one has no such token, the other never
    with refused(model, errors.TokenError, "row 1", str(VOCAB), "model.embed_tokens", f"{VOCAB} tokens in the model"):
        model(input_ids=there, adapter_names=names)
    assert runtime._shared.local.late is None

    embed = model.get_input_embeddings()
    with runtime.use_adapters(names), pytest.raises(errors.TokenError):  # nothing else would raise
        embed(there)
    gpu.capturing, gpu.waits = True, 0
    got = logits(model, {"input_ids": there}, adapter_names=names)
    with runtime.use_adapters(names):
        missing = embed(there).isnan()
    assert gpu.waits == 0 and torch.equal(missing.any(-1), missing.all(-1))
    assert missing.all(-1).nonzero().tolist() == [[1, 2], [2, 1]]
    assert got[1, 2:, :VOCAB].isnan().all() and got[2, 1:].isnan().all(), "no token that has seen it is answered"
    assert not got[0].isnan().any()


@pytest.mark.parametrize("kind", ("llama", "tied"))
@pytest.mark.parametrize("tokens", (VOCAB + 5, VOCAB - 3, VOCAB))
def test_embedding_layers_that_are_saved_along(tmp_path: Path, kind: str, tokens: int) -> None:
    """As PEFT does of itself where the vocabulary was resized: it puts them into the base."""
    base = build(kind)
    made = resized(base, tokens)
    with torch.no_grad():
        for module in (made.model.embed_tokens, made.lm_head):
            module.weight[2] += 1.0
    config = lora(target_modules=["q_proj"])
    folder = saved(tmp_path / "plain", made, 1, config)
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(made), folder)
    wrapped.save_pretrained(tmp_path / "along", save_embedding_layers=True)
    along = tmp_path / "along"
    if kind == "tied":  # one of the two is enough
        along = rewrite(
            along, tmp_path / "one", {}, lambda state: {k: t for k, t in state.items() if "lm_head" not in k}
        )
    model = copy.deepcopy(base)
    runtime = mlora.patch(model)
    info = runtime.load_adapter(along, "along")
    assert {"model.embed_tokens", "lm_head"} <= set(info.modules)
    batch = inputs_for(kind, 3)
    batch["input_ids"] = batch["input_ids"].clamp(max=min(tokens, VOCAB) - 1)
    batch["input_ids"][1:, 2] = torch.tensor([2, tokens - 1])
    batch.pop("attention_mask")
    entries = ["along", None, "along"]
    got = logits(model, batch, adapter_names=entries)
    alone = peft_alone(made, along)
    for row, name in enumerate(entries):
        want = logits(base if name is None else alone, row_of(batch, row))
        assert_close(got[row : row + 1, :, : want.shape[-1]], want)


def test_an_embedding_that_was_saved_untrained_costs_nothing(tmp_path: Path, llama: Any) -> None:
    wrapped = peft.get_peft_model(copy.deepcopy(llama), lora(target_modules=["q_proj"]))
    wrapped.save_pretrained(tmp_path / "plain")
    wrapped.save_pretrained(tmp_path / "along", save_embedding_layers=True)
    model = copy.deepcopy(llama)
    mlora.patch(model)
    sizes = [model.mlora.load_adapter(tmp_path / name, name).bytes for name in ("plain", "along")]
    assert sizes[0] == sizes[1]


def test_an_embedding_of_another_size_needs_a_head_of_it(tmp_path: Path, llama: Any) -> None:
    wide = resized(llama, VOCAB + 5)
    folder = saved(tmp_path / "wide", wide, 1, lora(modules_to_save=["embed_tokens"]))
    model = copy.deepcopy(llama)
    mlora.patch(model)
    with refused(model, errors.UnsupportedAdapterError, f"{VOCAB + 5} tokens", "lm_head", "embed_tokens"):
        model.mlora.load_adapter(folder, "wide")


def test_compiled_vocabularies_are_refused(tmp_path: Path, llama: Any) -> None:
    torch._dynamo.reset()
    folder = saved(tmp_path / "w", resized(llama, VOCAB + 5), 1, lora(modules_to_save=["embed_tokens", "lm_head"]))
    model, batch = copy.deepcopy(llama), inputs_for("llama", 2)
    mlora.patch(model).load_adapter(folder, "wide")
    compiled = torch.compile(model.model.embed_tokens, fullgraph=True, backend="aot_eager")
    refusal = pytest.raises(errors.UnsupportedAdapterError, match=r"another size.*torch\.compile")
    with torch.no_grad(), model.mlora.use_adapters(["wide", None]), refusal:
        compiled(batch["input_ids"])
    torch._dynamo.reset()


def test_compiled_heads_are_refused(tmp_path: Path) -> None:
    base, _, folders = heads(tmp_path, "bert")
    model = copy.deepcopy(base)
    runtime = mlora.patch(model)
    batch = inputs_for("bert", 2)
    for name in ("two", "five"):
        runtime.load_adapter(folders[name], name)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with runtime.use_adapters(["five", None]):
            assert_close(compiled(**batch).logits, model(**batch).logits)
        with (
            runtime.use_adapters(["two", "five"]),
            pytest.raises(errors.UnsupportedAdapterError, match=r"another size.*torch\.compile"),
        ):
            compiled(**batch)


# Norms


class Gated(nn.Module):
    """A norm with a second input, of which the layer could not tell what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return x * self.weight if gate is None else x * self.weight * gate


class Squared(Gated):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x * self.weight**2


def test_which_modules_are_norms() -> None:
    offsets = {"llama": 0.0, "gemma": 1.0, "gpt2": 0.0, "t5": 0.0, "vit": 0.0}
    for kind, offset in offsets.items():
        found = [m for m in find_layers(build(kind)).values() if getattr(m, "weight", torch.ones(1, 1)).dim() == 1]
        assert found and {norm_offset(module) for module in found} == {offset}
    others = (
        nn.BatchNorm1d(8), nn.GroupNorm(2, 8), nn.PReLU(8), nn.InstanceNorm1d(8, affine=True), Gated(), Squared(),
        nn.LayerNorm(8, elementwise_affine=False), nn.LayerNorm((2, 8)), nn.Linear(3, 8), nn.Embedding(3, 8),
    )  # fmt: skip
    assert [norm_offset(module.eval()) for module in others] == [None] * len(others)
    assert norm_offset(nn.LayerNorm(8, bias=False)) == 0 and norm_offset(nn.RMSNorm(3)) == 0


def norm_adapter(weight: Tensor, bias: Tensor, name: str = "bert.embeddings.LayerNorm") -> mlora.Adapter:
    return mlora.Adapter(
        {"peft_type": "LN_TUNING", "target_modules": [name]},
        {f"{name}.ln_tuning_layers.weight": weight, f"{name}.ln_tuning_layers.bias": bias},
    )


@pytest.mark.parametrize(("value", "reason"), ((0.0, f"zeros among its weights (1 of {HIDDEN})"), (1e-4, "so small")))
def test_a_norm_that_no_gain_leads_to_is_refused(value: float, reason: str) -> None:
    model = build("bert")
    norm = model.bert.embeddings.LayerNorm
    with torch.no_grad():
        norm.weight[3], norm.bias[3] = value, 1.0
    mlora.patch(model)
    with refused(model, errors.UnsupportedAdapterError, "bert.embeddings.LayerNorm", reason):
        model.mlora.add_adapter("n", norm_adapter(torch.ones(HIDDEN), torch.zeros(HIDDEN)))


def test_a_norm_folds_and_comes_out_to_the_bit(tmp_path: Path) -> None:
    base = build("bert")
    folder = saved(tmp_path / "ln", base, 1, peft.LNTuningConfig(target_modules=["LayerNorm"]))
    model, batch = copy.deepcopy(base), inputs_for("bert", 3)
    runtime = mlora.patch(model)
    runtime.load_adapter(folder, "ln")
    runtime.merge_adapter("ln")
    assert_close(logits(model, batch), logits(peft_alone(base, folder), batch))
    assert_close(logits(model, batch, adapter_names=[None] * 3), logits(base, batch), 1e-4)
    runtime.unmerge_adapter()
    assert torch.equal(logits(model, batch), logits(base, batch))


def test_gemmas_norm_is_not_folded(tmp_path: Path) -> None:
    model = build("gemma")
    folder = saved(tmp_path / "n", model, 1, lora(modules_to_save=["norm"]))
    mlora.patch(model).load_adapter(folder, "n")
    with refused(model, errors.MergeError, "layernorm", "weight + 1"):
        model.mlora.merge_adapter("n")


def test_compiled_code_has_no_op_for_norms_until_one_is_trained(tmp_path: Path, llama: Any) -> None:
    folders = {
        "plain": saved(tmp_path / "plain", llama, 1, lora()),
        "norm": saved(tmp_path / "norm", llama, 2, lora(modules_to_save=["norm", "embed_tokens"])),
    }
    model, batch = copy.deepcopy(llama), inputs_for("llama", 2)
    runtime = mlora.patch(model)
    graphs: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph.code)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for name, count in (("plain", 1), ("norm", 2)):
            runtime.load_adapter(folders[name], name)
            for entries in ([name, None], ["plain", "plain"]):
                with runtime.use_adapters(entries):
                    assert_close(compiled(**batch).logits, model(**batch).logits)
            assert len(graphs) == count
    linears = sum(type(module) is not NormLayer and isinstance(module, nn.Linear) for module in model.modules())
    norms = sum(isinstance(module, NormLayer) for module in model.modules())
    assert [graph.count("mlora.linear") for graph in graphs] == [linears, linears]
    assert [graph.count("mlora.apply_") for graph in graphs] == [0, norms]
    assert [graph.count("mlora.embed_") for graph in graphs] == [0, 1]


def test_gradients_pass_norms(tmp_path: Path, llama: Any) -> None:
    folder = saved(tmp_path / "n", llama, 1, lora(modules_to_save=["input_layernorm"]))
    model = copy.deepcopy(llama)
    mlora.patch(model).load_adapter(folder, "n")
    oracle = peft_alone(llama, folder)
    grads = []
    for run in (lambda x: model(inputs_embeds=x, adapter_names="n"), lambda x: oracle(inputs_embeds=x)):
        x = torch.randn(1, 4, HIDDEN, generator=torch.Generator().manual_seed(1)).requires_grad_()
        run(x).logits.square().sum().backward()
        grads.append(x.grad)
    assert_close(grads[0], grads[1])


# Refusals


def altered(folder: Path, target: Path, suffix: str, make: Any, **config: Any) -> Path:
    return rewrite(
        folder, target, config, lambda state: {k: make(t) if k.endswith(suffix) else t for k, t in state.items()}
    )


@pytest.mark.parametrize(
    ("config", "suffix", "make", "options", "error", "wanted"),
    (
        ({"modules_to_save": ["embed_tokens"]}, "embed_tokens.weight", lambda t: t[:-1], {},
         errors.UnsupportedAdapterError, ("66 tokens", "lm_head", "resize_token_embeddings")),
        ({"modules_to_save": ["norm"]}, "model.norm.weight", lambda t: t[:-1], {},
         errors.AdapterError, ("model.norm", "(31,)")),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight", lambda t: t[:, :-1], {},
         errors.AdapterError, ("lm_head", "(67, 31)")),
        ({"trainable_token_indices": [3, 9]}, "delta", lambda t: t, {"trainable_token_indices": [3, 3]},
         errors.AdapterError, ("[3, 3]", "different")),
        ({"trainable_token_indices": [3, 9]}, "delta", lambda t: t, {"trainable_token_indices": [3, 67]},
         errors.AdapterError, ("67", "embed_tokens")),
        ({"trainable_token_indices": [3, 9]}, "delta", lambda t: t, {"trainable_token_indices": [3]},
         errors.AdapterError, ("(2, 32)", "(1, 32)")),
        ({"trainable_token_indices": [3, 9]}, "delta", lambda t: t, {"trainable_token_indices": "ab"},
         errors.AdapterError, ("list of indices",)),
        ({"trainable_token_indices": [3, 9]}, "delta", lambda t: t, {"trainable_token_indices": None},
         errors.AdapterError, ("None",)),
        ({"modules_to_save": ["norm"]}, "model.norm.weight", lambda t: t, {"modules_to_save": ["input_layernorm"]},
         errors.UnsupportedAdapterError, ("left over", "post_attention_layernorm.weight")),
    ),
)  # fmt: skip
def test_refusals(
    tmp_path: Path, llama: Any, config: Any, suffix: str, make: Any, options: Any, error: Any, wanted: Any
) -> None:
    folder = saved(tmp_path / "good", llama, 1, lora(**config))
    model = copy.deepcopy(llama)
    mlora.patch(model)
    with refused(model, error, *wanted):
        model.mlora.load_adapter(altered(folder, tmp_path / "bad", suffix, make, **options), "bad")


class Twice(nn.Module):
    """One module in two places, of which PEFT would train a copy in one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.up(self.first(x)))


def test_what_peft_trains_in_one_place_of_several_is_refused() -> None:
    model = Twice()
    mlora.patch(model, memory=1 << 16)
    with refused(model, errors.UnsupportedAdapterError, "module first: it is one module with second", "one place"):
        model.mlora.add_adapter("n", norm_adapter(torch.ones(HIDDEN), torch.ones(HIDDEN), "first"))


def test_bits_of_a_row_do_not_depend_on_other_rows(tmp_path: Path) -> None:
    base = build("tied", torch.bfloat16)
    model = copy.deepcopy(base)
    runtime = mlora.patch(model)
    for name, options in CONFIGS["tied"].items():
        runtime.load_adapter(saved(tmp_path / name, build("tied"), len(name), lora(**options)), name)
    ids = torch.randint(0, VOCAB, (5, 9), generator=torch.Generator().manual_seed(4))
    entries = ["tokens", "both", None, {"tokens": 0.5, "apart": 1.5}, "embeddings"]
    for layer, x in ((model.model.embed_tokens, ids), (model.model.norm, base.model.embed_tokens(ids).detach())):
        with torch.no_grad(), runtime.use_adapters(entries):
            got = layer(x)
        for row, entry in enumerate(entries):
            with torch.no_grad(), runtime.use_adapters([entry]):
                assert torch.equal(layer(x[row : row + 1])[0], got[row])


def test_lora_of_a_norm_is_refused(llama: Any) -> None:
    model = copy.deepcopy(llama)
    mlora.patch(model)
    tensors = {"model.norm.lora_A.weight": torch.ones(3, HIDDEN), "model.norm.lora_B.weight": torch.ones(HIDDEN, 3)}
    adapter = mlora.Adapter({"peft_type": "LORA", "r": 3, "target_modules": ["model.norm"]}, tensors)
    with refused(model, errors.UnsupportedAdapterError, "model.norm", "it is a norm", "lora_A"):
        model.mlora.add_adapter("n", adapter)
