"""A PeftModel that stays one: what mlora computes in it, against PEFT's own forward."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build, inputs_for
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import mlora
import mlora.attached as attached
from mlora import errors

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "dropout": {"lora_dropout": 0.3},
    "dora": {"use_dora": True},  # PEFT's own forward
    "trained biases": {"bias": "all"},
}


def peft_model(base: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    given = {"r": 4, "lora_alpha": 8, "target_modules": LINEARS, "init_lora_weights": False, **options}
    return get_peft_model(copy.deepcopy(base), LoraConfig(**given)).train()


def gradients(model: Any, batch: dict[str, Tensor], seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check(mine: Any, theirs: Any, batch: dict[str, Tensor], relative: float) -> None:
    got, wanted = gradients(mine, batch), gradients(theirs, batch)
    torch.testing.assert_close(got[0], wanted[0], rtol=relative, atol=relative)
    assert got[1].keys() == wanted[1].keys()
    for name, tensor in wanted[1].items():
        assert got[1][name].dtype == tensor.dtype
        distance = (got[1][name] - tensor).norm() / tensor.norm().clamp(min=1e-30)
        assert float(distance) < 10 * relative, (name, float(distance))


@pytest.fixture
def batch(llama: Any) -> dict[str, Tensor]:
    return dict(inputs_for("llama", 3))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradients_are_pefts(llama: Any, batch: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    base = copy.deepcopy(llama).to(dtype)
    mine, theirs = peft_model(base, **options), peft_model(base, **options)
    assert mlora.attach(mine) == 14
    check(mine, theirs, batch, 1e-9 if dtype is torch.float64 else 2e-5)


def test_mlora_computes_them(llama: Any, batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not PEFT's forward, which would pass every comparison."""
    calls = []
    for function in ("linear_keep", "apply_keep_", "rank_gradients_"):
        own = getattr(attached.dispatch, function)
        monkeypatch.setattr(
            attached.dispatch, function, lambda *given, own=own, name=function: (calls.append(name), own(*given))[1]
        )
    model = peft_model(llama)
    mlora.attach(model)
    gradients(model, batch)
    assert {name: calls.count(name) for name in set(calls)} == {
        "linear_keep": 14, "apply_keep_": 14, "rank_gradients_": 28,
    }  # fmt: skip


def test_bf16_is_as_near_as_pefts(llama: Any, batch: Any) -> None:
    wide = peft_model(copy.deepcopy(llama))
    narrow = {
        "mine": peft_model(copy.deepcopy(llama).bfloat16()),
        "theirs": peft_model(copy.deepcopy(llama).bfloat16()),
    }
    with torch.no_grad():
        for model in narrow.values():
            for (_, exact), (_, rounded) in zip(wide.named_parameters(), model.named_parameters(), strict=True):
                exact.copy_(exact.bfloat16())
                rounded.copy_(exact)
    mlora.attach(narrow["mine"])
    exact = gradients(wide, batch)[1]
    distance = {}
    for name, model in narrow.items():
        got = gradients(model, batch)[1]
        distance[name] = sum(float((got[key].float() - exact[key]).square().sum()) for key in exact) ** 0.5
    assert distance["mine"] < 1.5 * distance["theirs"]


def test_switching_disabling_and_several(llama: Any, batch: Any) -> None:
    models = [peft_model(llama), peft_model(llama)]
    for model in models:
        torch.manual_seed(1)
        model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    mine, theirs = models
    mlora.attach(mine)
    for name in ("other", "default"):
        for model in models:
            model.set_adapter(name)
        check(mine, theirs, batch, 2e-5)
    for model in models:
        model.base_model.set_adapter(["default", "other"])
    check(mine, theirs, batch, 2e-5)
    with torch.no_grad(), mine.disable_adapter():
        assert torch.equal(mine(**batch).logits, llama(**batch).logits)
    for model in models:
        model.set_adapter("default")
        model.merge_adapter()
    with torch.no_grad():
        assert torch.equal(mine(**batch).logits, theirs(**batch).logits)
    for model in models:
        model.unmerge_adapter()
    check(mine, theirs, batch, 2e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_show_at_once_and_are_saved(llama: Any, batch: Any, tmp_path: Path, fused: bool) -> None:
    model = peft_model(llama)
    mlora.attach(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=fused)
    before = gradients(model, batch)[0]
    optimizer.step()
    with torch.no_grad():
        after = model.eval()(**batch, labels=batch["input_ids"])
    assert after.loss < before
    model.save_pretrained(tmp_path)
    alone = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(alone(**batch).logits, after.logits, rtol=1e-4, atol=1e-4)


def test_backward_after_a_step_is_refused(llama: Any, batch: Any) -> None:
    model = peft_model(llama)
    mlora.attach(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(llama: Any, batch: Any, reentrant: bool) -> None:
    model = peft_model(llama)
    mlora.attach(model)
    wanted = gradients(model, batch)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = gradients(model, batch)
    assert torch.equal(got[0], wanted[0])
    assert all(torch.equal(got[1][name], tensor) for name, tensor in wanted[1].items())


def test_detaching_leaves_no_trace(llama: Any, batch: Any) -> None:
    model = peft_model(llama)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    keys = list(model.state_dict())
    mlora.attach(model)
    assert list(model.state_dict()) == keys
    gradients(copy.deepcopy(model), batch)
    with pytest.raises(errors.PatchError, match="already"):
        mlora.attach(model)
    mlora.detach(model)
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    with pytest.raises(errors.PatchError, match="not attached"):
        mlora.detach(model)
    with pytest.raises(errors.PatchError, match="no LoRA layer"):
        mlora.attach(llama)


def test_a_copy_is_attached_by_itself(llama: Any, batch: Any) -> None:
    model = peft_model(llama)
    mlora.attach(model)
    gradients(model, batch)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
        out = copied.eval()(**batch).logits
        torch.testing.assert_close(out, llama(**batch).logits, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(model.eval()(**batch).logits, out)


def test_gpt2_has_its_linears_turned(batch: Any) -> None:
    base = build("gpt2")
    own = dict(inputs_for("gpt2", 3))
    options = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
    mine, theirs = peft_model(base, **options), peft_model(base, **options)
    mlora.attach(mine)
    check(mine, theirs, own, 2e-5)
