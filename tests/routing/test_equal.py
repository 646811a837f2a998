"""A list of equal entries is one entry for all rows, whose number is still counted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    HIDDEN,
    VOCAB,
    assert_close,
    build,
    inputs_for,
    logits,
    make_adapter,
    peft_alone,
    refused,
    resized,
    row_of,
    served,
)
from torch import Tensor, nn

import mlora
from mlora import errors


class Gathering(nn.Module):
    """Experts that get tokens of any rows, and a table that belongs to none."""

    def __init__(self) -> None:
        super().__init__()
        self.distances = nn.Parameter(torch.randn(1, 6, HIDDEN))
        self.relative = nn.Linear(HIDDEN, HIDDEN)
        self.gate = nn.Linear(HIDDEN, 3)
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        flat = (x + self.relative(self.distances).sum(1)).reshape(-1, HIDDEN)
        chosen = self.gate(flat).argmax(-1)
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            out[chosen == index] = expert(flat[chosen == index])
        return out.view_as(x)


@pytest.fixture
def gathering(tmp_path: Path) -> tuple[Any, Any, Any]:
    """Bare, with PEFT's adapter, and patched."""
    torch.manual_seed(0)
    bare = Gathering().eval()
    config = {"r": 2, "lora_alpha": 2, "strength": 3.0, "target_modules": r"(experts\.\d|relative|gate)"}
    folder = make_adapter(tmp_path / "a", bare, 1, **config)
    return bare, peft_alone(bare, folder), served(bare, {"a": folder})


@torch.no_grad()
def test_they_go_wherever_one_entry_goes(gathering: tuple[Any, Any, Any]) -> None:
    _, oracle, model = gathering
    x = torch.randn(3, 4, HIDDEN)
    want = model(x, adapter_names="a")
    assert_close(want, oracle(x))
    for names in (["a"] * 3, ("a", {"a": 1.0}, "a")):
        assert torch.equal(model(x, adapter_names=names), want)
    with model.mlora.use_adapters(["a"] * 3):
        assert torch.equal(model(x), want)
    for names in (["a", "a", None], ["a", "a", {"a": 0.5}]):
        with refused(model, errors.AttributionError, "3 rows"):
            model(x, adapter_names=names)


@torch.no_grad()
def test_they_are_counted(gathering: tuple[Any, Any, Any], patched: Any, batch: dict[str, Tensor]) -> None:
    model, x = gathering[2], torch.randn(3, 4, HIDDEN)
    with refused(model, errors.EntryError, "2 entries", "3 rows"):
        model(x, adapter_names=["a", "a"])
    with model.mlora.use_adapters(["a", "a"]):
        with refused(model, errors.EntryError, "2 entries", "3 rows"):
            model(x)
        with refused(model, errors.EntryError, "2 entries", "3 rows"):
            model.forward(x)
    with patched.mlora.use_adapters(["r3", "r3"]):
        with refused(patched, errors.AttributionError, "2 rows", "(4, 7, 32)"):
            patched.model(**batch)
        with refused(patched, errors.EntryError, "2 entries"):
            patched.generate(**batch, max_new_tokens=2)
    with refused(patched, errors.EntryError, "2 entries", "4 rows"):
        patched.generate(**batch, max_new_tokens=2, adapter_names=["r3", "r3"])


@torch.no_grad()
def test_they_have_the_bits_of_rows_beside_others(patched: Any, batch: dict[str, Tensor]) -> None:
    for entry, other in (("r3", "rs16"), ("dora1", None), ({"rs16": 0.5, "bias8": -1.0}, "dora1"), (None, "r3")):
        beside = logits(patched, batch, adapter_names=[entry, other, entry, entry])
        equal = logits(patched, batch, adapter_names=[entry] * 4)
        assert torch.equal(beside[[0, 2, 3]], equal[[0, 2, 3]])
        assert torch.equal(equal, logits(patched, batch, adapter_names=entry))
    got = patched.generate(**batch, max_new_tokens=3, num_beams=3, adapter_names=["r3"] * 4)
    assert torch.equal(got, patched.generate(**batch, max_new_tokens=3, num_beams=3, adapter_names="r3"))


@torch.no_grad()
def test_a_kept_plan_is_of_as_many_rows(llama: Any, folders: dict[str, Path]) -> None:
    model = served(llama, {"x": folders["r3"]})
    two, three = inputs_for("llama", 2), inputs_for("llama", 3)
    for batch, names in ((two, ["x", "x"]), (three, ["x"] * 3), (three, "x"), (two, ["x", "x"]), (two, ["x", None])):
        want = [logits(model, row_of(batch, row), adapter_names=one) for row, one in enumerate(names[: len(batch)])]
        assert_close(logits(model, batch, adapter_names=names)[: len(want)], torch.cat(want), 1e-5)
    with refused(model, errors.EntryError, "2 entries", "3 rows"):
        model(**three, adapter_names=["x", "x"])
    model.mlora.delete_adapter("x")
    model.mlora.load_adapter(folders["rs16"], "x")
    got = logits(model, two, adapter_names=["x", "x"])
    assert_close(got[:1], logits(peft_alone(llama, folders["rs16"]), row_of(two, 0)))


@torch.no_grad()
def test_heads_and_tokens_of_another_size(tmp_path: Path) -> None:
    base = build("llama")
    wide = resized(base, VOCAB + 5)
    config = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    folder = make_adapter(tmp_path / "wide", wide, 1, **config)
    model, batch = served(base, {"wide": folder}), inputs_for("llama", 3)
    batch["input_ids"][2, 1] = VOCAB + 1
    got = logits(model, batch, adapter_names=["wide"] * 3)
    assert_close(got, logits(peft_alone(wide, folder), batch))
    batch["input_ids"][1, 2] = VOCAB + 9
    with refused(model, errors.TokenError, f"row 1 has token {VOCAB + 9}"):
        model(**batch, adapter_names=["wide"] * 3)


@torch.no_grad()
def test_debertas_table_of_distances(tmp_path: Path) -> None:
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    torch.manual_seed(0)
    base = DebertaV2ForSequenceClassification(
        DebertaV2Config(
            vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            relative_attention=True, position_biased_input=False, pos_att_type=["p2c", "c2p"], share_att_key=True,
        )
    ).eval()  # fmt: skip
    folder = make_adapter(tmp_path / "a", base, 1, r=2, target_modules="all-linear")
    model, batch = served(base, {"a": folder}), inputs_for("bert", 3)
    assert_close(logits(model, batch, adapter_names=["a"] * 3), logits(peft_alone(base, folder), batch))
    with refused(model, errors.AttributionError, "query_proj", "3 rows"):
        model(**batch, adapter_names=["a", "a", None])


@torch.no_grad()
def test_an_encoder_with_experts_generates(tmp_path: Path) -> None:
    """An encoder runs inside of generate, outside of a call of the model."""
    base = build("t5")
    gate = nn.Linear(HIDDEN, HIDDEN)
    base.encoder.block[0].layer[0].layer_norm.register_forward_hook(lambda _, __, out: out + gate(out[:1, :1]))
    base.encoder.block[0].layer[0].gate = gate
    model = copy.deepcopy(base)
    model.encoder.block[0].layer[0].layer_norm._forward_hooks.clear()
    own = model.encoder.block[0].layer[0].gate
    model.encoder.block[0].layer[0].layer_norm.register_forward_hook(lambda _, __, out: out + own(out[:1, :1]))
    tensors = {
        "encoder.block.0.layer.0.gate.lora_A.weight": torch.randn(2, HIDDEN),
        "encoder.block.0.layer.0.gate.lora_B.weight": torch.randn(HIDDEN, 2),
    }
    mlora.patch(model).add_adapter("a", mlora.Adapter({"peft_type": "LORA", "r": 2, "lora_alpha": 2}, tensors))
    ids = inputs_for("t5", 3)["input_ids"]
    want = model.generate(ids, max_new_tokens=3, adapter_names="a")
    assert torch.equal(model.generate(ids, max_new_tokens=3, adapter_names=["a"] * 3), want)
    with refused(model, errors.AttributionError, "gate"):
        model.generate(ids, max_new_tokens=3, adapter_names=["a", "a", None])
