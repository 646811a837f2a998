"""LoRA of token embeddings, per row of a batch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BUILDERS, _causal, assert_close, build, inputs_for, logits, make_adapter, peft_alone, row_of
from torch import Tensor, nn

import mlora
from mlora import errors
from mlora.layers import EmbeddingLayer, find_layers
from mlora.ops import reference

TARGETS = {
    "llama": ["embed_tokens", "q_proj"], "tied": ["embed_tokens", "v_proj"], "gemma3": ["embed_tokens", "v_proj"],
    "gpt2": ["wte", "c_attn"], "bert": ["word_embeddings", "query"],
}  # fmt: skip
FAMILIES = {
    **BUILDERS,
    "tied": lambda: _causal("LlamaConfig", tie_word_embeddings=True),
    "gemma3": lambda: _causal("Gemma3TextConfig", query_pre_attn_scalar=8),  # scales what it looks up
}


@pytest.fixture(autouse=True)
def families(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, builder in FAMILIES.items():
        monkeypatch.setitem(BUILDERS, kind, builder)


def adapters(root: Path, base: Any, kind: str) -> dict[str, Path]:
    targets, fan = TARGETS[kind], {"fan_in_fan_out": kind == "gpt2"}
    return {
        "both": make_adapter(root / "both", base, 1, strength=2.0, r=3, lora_alpha=7, target_modules=targets, **fan),
        "rs": make_adapter(root / "rs", base, 2, strength=2.0, r=5, use_rslora=True, target_modules=targets[:1], **fan),
        "linear": make_adapter(root / "linear", base, 3, r=2, target_modules=targets[1:], **fan),
    }


@pytest.mark.parametrize("kind", TARGETS)
def test_rows_are_those_of_peft_alone(tmp_path: Path, kind: str) -> None:
    base = build(kind)
    folders = adapters(tmp_path, base, kind)
    model = copy.deepcopy(base)
    runtime = mlora.patch(model)
    for name, folder in folders.items():
        runtime.load_adapter(folder, name)
    batch = inputs_for(kind, 5)
    entries = ["rs", None, "both", "linear", "both"]
    got = logits(model, batch, adapter_names=entries)
    for row, name in enumerate(entries):
        oracle = base if name is None else peft_alone(base, folders[name])
        assert_close(got[row : row + 1], logits(oracle, row_of(batch, row)))
        bare = logits(base, row_of(batch, row))
        assert name is None or (got[row] - bare[0]).abs().max() > 1e-3 * bare.abs().max()
    mixed = logits(model, batch, adapter_names={"both": 0.6, "rs": -0.5})
    assert_close(mixed, logits(peft_alone(base, folders["both"], folders["rs"], weights=(0.6, -0.5)), batch))
    runtime.add_weighted_adapter(["both", "rs"], [0.6, -0.5], "sum")
    assert_close(logits(model, batch, adapter_names="sum"), mixed)
    runtime.save_adapter("sum", tmp_path / "sum")
    assert_close(logits(peft_alone(base, tmp_path / "sum"), batch), mixed)
    assert mlora.unpatch(model) is model and type(model.get_input_embeddings()) is type(base.get_input_embeddings())
    assert torch.equal(logits(model, batch), logits(base, batch))


@pytest.mark.parametrize("options", ({"num_beams": 3}, {"num_return_sequences": 2, "do_sample": False, "num_beams": 2}))
def test_beams(tmp_path: Path, llama: Any, options: dict[str, Any]) -> None:
    folders = adapters(tmp_path, llama, "llama")
    model = copy.deepcopy(llama)
    runtime = mlora.patch(model)
    for name, folder in folders.items():
        runtime.load_adapter(folder, name)
    ids = torch.randint(2, 60, (3, 5), generator=torch.Generator().manual_seed(3))
    entries = ["both", None, "rs"]
    got = model.generate(ids, max_new_tokens=4, adapter_names=entries, **options)
    each = options.get("num_return_sequences", 1)
    for row, name in enumerate(entries):
        oracle = llama if name is None else peft_alone(llama, folders[name])
        want = oracle.generate(input_ids=ids[row : row + 1], max_new_tokens=4, **options)
        assert torch.equal(got[row * each : (row + 1) * each], want)


def embedding(rows: int, dtype: torch.dtype = torch.float32) -> tuple[Any, Tensor]:
    """A patched Llama with embedding adapters a and b in it, and a layer's own ids."""
    model = build("llama", dtype)
    runtime = mlora.patch(model, memory=1 << 20)  # opcheck copies all of it
    generator = torch.Generator().manual_seed(4)
    for name, rank in (("a", 3), ("b", 20)):
        tensors = {
            "model.embed_tokens.lora_embedding_A": torch.randn(rank, 67, generator=generator),
            "model.embed_tokens.lora_embedding_B": torch.randn(32, rank, generator=generator),
        }
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["embed_tokens"]}
        runtime.add_adapter(name, mlora.Adapter(config, tensors))
    return model, torch.randint(0, 67, (rows, 9), generator=generator)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    model, ids = embedding(6, dtype)
    layer = model.model.embed_tokens
    entries = ["a", "b", None, {"a": 0.5, "b": 2.0}, "b", "a"]
    with model.mlora.use_adapters(entries):
        got = layer(ids)
    for row, entry in enumerate(entries):
        with model.mlora.use_adapters([entry]):
            assert torch.equal(layer(ids[row : row + 1])[0], got[row])
    assert torch.equal(got[2], layer(ids)[2])


def test_ids_of_other_rows_are_refused() -> None:
    model, ids = embedding(3)
    with model.mlora.use_adapters(["a", "b"]), pytest.raises(errors.AttributionError, match="embed_tokens"):
        model.model.embed_tokens(ids)


def test_against_fp64() -> None:
    model, ids = embedding(2)
    delta = {n: model.mlora._registry[n].adapter.tensors for n in "ab"}
    with model.mlora.use_adapters([{"a": 0.5, "b": -2.0}, "b"]):
        got = model.model.embed_tokens(ids)
    for row, mix in enumerate(({"a": 0.5, "b": -2.0}, {"b": 1.0})):
        want = model.model.embed_tokens.weight.detach().double()[ids[row]]
        for name, weight in mix.items():
            a, b = (delta[name][f"model.embed_tokens.lora_embedding_{part}"].double() for part in "AB")
            want = want + weight * (b @ a)[:, ids[row]].t()
        assert_close(got[row], want, 1e-6)


def test_gradients_reach_the_base_weight() -> None:
    model, ids = embedding(2)
    layer = model.model.embed_tokens
    with model.mlora.use_adapters(["a", None]):
        layer(ids).sum().backward()
    counts = torch.bincount(ids.flatten(), minlength=67).float()
    counts[layer.padding_idx] = 0
    assert torch.equal(layer.weight.grad, counts[:, None].expand(67, 32))


def test_only_the_embedding_end_of_tied_weights_moves(tmp_path: Path) -> None:
    base = build("tied")
    folder = make_adapter(tmp_path / "e", base, 1, strength=2.0, r=3, target_modules=["embed_tokens"])
    model = copy.deepcopy(base)
    mlora.patch(model).load_adapter(folder, "e")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    states = torch.randn(1, 2, 32)
    with model.mlora.use_adapters("e"):
        assert torch.equal(model.lm_head(states), base.lm_head(states))
    with pytest.raises(errors.MergeError, match=r"model.embed_tokens.*tied"):
        model.mlora.merge_adapter("e")


@pytest.mark.parametrize("keep", ("copy", "corrections"))
def test_folding_is_pefts_merge_and_restores_every_byte(tmp_path: Path, llama: Any, keep: str) -> None:
    folder = adapters(tmp_path, llama, "llama")["both"]
    model, batch = copy.deepcopy(llama), inputs_for("llama", 3)
    runtime = mlora.patch(model)
    runtime.load_adapter(folder, "e")
    runtime.merge_adapter("e", keep=keep)
    assert_close(logits(model, batch), logits(peft_alone(llama, folder).merge_and_unload(), batch))
    assert_close(logits(model, batch, adapter_names=[None] * 3), logits(llama, batch))
    runtime.unmerge_adapter()
    assert torch.equal(model.model.embed_tokens.weight, llama.model.embed_tokens.weight)


def test_a_scaled_embedding_is_not_folded(tmp_path: Path) -> None:
    model = build("gemma3")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    folder = make_adapter(tmp_path / "e", model, 1, r=3, target_modules=["embed_tokens"])
    mlora.patch(model).load_adapter(folder, "e")
    with pytest.raises(errors.MergeError, match=r"model.embed_tokens.*scales"):
        model.mlora.merge_adapter("e")


def test_a_peft_model_is_taken_over(tmp_path: Path, llama: Any) -> None:
    folder = adapters(tmp_path, llama, "llama")["both"]
    batch = inputs_for("llama", 2)
    wrapped = peft_alone(llama, folder)
    want = logits(wrapped, batch)
    assert_close(logits(mlora.patch(wrapped).model, batch), want)


def test_compiled() -> None:
    model, ids = embedding(3)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for entries in (["a", None, "b"], [None] * 3, [{"a": 0.5, "b": 1.0}, "a", "a"]):
            with model.mlora.use_adapters(entries):
                assert_close(compiled(ids).logits, model(ids).logits)


REFUSED = {
    "ia3": ({"peft_type": "IA3", "r": None}, {"ia3_l": torch.ones(32, 1)}, "LoRA only"),
    "linear keys": ({}, {"lora_A.weight": torch.ones(3, 67), "lora_B.weight": torch.ones(32, 3)}, "lora_A"),
    "vocabulary": (
        {},
        {"lora_embedding_A": torch.ones(3, 68), "lora_embedding_B": torch.ones(32, 3)},
        "(3, 68); it must be (any, 67)",
    ),
    "rank": ({}, {"lora_embedding_A": torch.ones(2, 67), "lora_embedding_B": torch.ones(32, 2)}, "rank 2"),
    "half": ({}, {"lora_embedding_A": torch.ones(3, 67)}, "lora_embedding_B is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    config, parts, reason = REFUSED[case]
    tensors = {f"model.embed_tokens.{key}": tensor for key, tensor in parts.items()}
    adapter = mlora.Adapter({"peft_type": "LORA", "r": 3, "target_modules": ["embed_tokens"], **config}, tensors)
    runtime = mlora.patch(build("llama"))
    with pytest.raises((errors.AdapterError, errors.UnsupportedAdapterError)) as caught:
        runtime.add_adapter("x", adapter)
    assert reason in str(caught.value) and "embed_tokens" in str(caught.value)


def test_which_embeddings_are_served() -> None:
    """Those of tokens: T5's are one module under three names, and its relative positions are none of them."""
    found = {name for name, m in find_layers(build("t5")).items() if isinstance(m, nn.Embedding)}
    assert found == {"shared", "encoder.embed_tokens", "decoder.embed_tokens"}
    gpt2 = build("gpt2")
    mlora.patch(gpt2)
    assert [n for n, m in gpt2.named_modules() if isinstance(m, EmbeddingLayer)] == ["transformer.wte"]


def test_operator() -> None:
    model, ids = embedding(2)
    store = model.mlora._store
    with model.mlora.use_adapters(["a", "b"]):
        plan = model.mlora._shared.local.plan.tensors[0]
        table = model.model.embed_tokens._mlora.table
        args = (torch.randn(2, 9, 32), ids, store.spaces[0].arena, table, plan, 67)
        torch.library.opcheck(torch.ops.mlora.embed_.default, args, test_utils=("test_schema", "test_faketensor"))
        with pytest.raises(RuntimeError, match=r"9 tokens"):
            reference.embed(args[0], ids[:1], *args[2:])
