"""The losses of a mixed batch are those of its rows alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import build, inputs_for, make_adapter, row_of
from torch import Tensor

import mlora
from mlora import errors

ENTRIES = ["a", None, "b", {"b": 1.0, "a": 0.5}, "a"]
MIX = (("a", 0.5), ("b", 1.0))
LINEARS = ["q_proj", "down_proj", "lm_head"]


@pytest.fixture
def world(tmp_path) -> tuple[Any, dict[str, Tensor], Tensor]:
    base = build("llama")
    folders = {name: make_adapter(tmp_path / name, base, i, target_modules=LINEARS) for i, name in enumerate("ab")}
    runtime = mlora.patch(base, memory=1 << 24)
    for name, folder in folders.items():
        runtime.load_adapter(folder, name, is_trainable=True)
    batch = inputs_for("llama", 5)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[4, :5] = -100
    return base, batch, labels


def gradients(model: Any) -> list[Tensor]:
    found = [p.grad for name in "ab" for _, p in model.mlora.named_parameters(name)]
    for name in "ab":
        for _, parameter in model.mlora.named_parameters(name):
            parameter.grad = None
    return found


def test_each_is_the_loss_of_its_rows(world):
    model, batch, labels = world
    found = mlora.losses(model(**batch, adapter_names=ENTRIES).logits, labels, ENTRIES)
    assert list(found) == ["a", None, "b", MIX]
    for entry, rows in (("a", [0, 4]), (None, [1]), ("b", [2]), (dict(MIX), [3])):
        own = {key: value[rows] for key, value in batch.items()}
        want = model(**own, labels=labels[rows], adapter_names=entry).loss
        torch.testing.assert_close(found[MIX if isinstance(entry, dict) else entry], want)
    one = mlora.losses(model(**row_of(batch, 0), adapter_names="a").logits, labels[:1], "a")
    assert list(one) == ["a"] and list(mlora.losses(torch.zeros(2, 3, 70), labels[:2, :3], "__base__")) == [None]


def test_chunks_of_hidden_states(world):
    """The same losses and gradients, with an adapter on the head; the logits of few tokens are held."""
    model, batch, labels = world
    whole = mlora.losses(model(**batch, adapter_names=ENTRIES).logits, labels, ENTRIES)
    sum(whole.values()).backward()
    want = gradients(model)
    for chunk in (1, 10, 1000):
        seen: list[int] = []
        hook = model.lm_head.register_forward_hook(
            lambda module, args, out, seen=seen: seen.append(out.shape[:2].numel())
        )
        with model.mlora.use_adapters(ENTRIES):
            hidden = model.model(**batch).last_hidden_state
            parts = mlora.losses(hidden, labels, ENTRIES, head=model.lm_head, chunk=chunk)
        hook.remove()
        assert max(seen) <= max(chunk, 5)
        sum(parts.values()).backward()
        assert list(parts) == list(whole)
        for entry, loss in parts.items():
            torch.testing.assert_close(loss, whole[entry])
        for mine, theirs in zip(gradients(model), want, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_micro_batches_are_one_batch(world):
    model, batch, labels = world
    sum(mlora.losses(model(**batch, adapter_names=ENTRIES).logits, labels, ENTRIES).values()).backward()
    want = gradients(model)
    counts: dict[Any, int] = {}
    for entry, row in zip(["a", None, "b", MIX, "a"], labels, strict=True):
        counts[entry] = counts.get(entry, 0) + int((row[1:] != -100).sum())
    for rows in ([0, 3], [1, 2, 4]):
        own, entries = {key: value[rows] for key, value in batch.items()}, [ENTRIES[row] for row in rows]
        logits = model(**own, adapter_names=entries).logits
        sum(mlora.losses(logits, labels[rows], entries, counts=counts).values()).backward()
    for mine, theirs in zip(gradients(model), want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_loss_that_is_nan_stays_its_own():
    logits = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [-100, -100, -100, -100]])
    bad = logits.detach().clone()
    bad[1] = torch.nan
    bad.requires_grad_()
    clean, found = (mlora.losses(x, labels, ["a", "b", "c"]) for x in (logits, bad))
    assert found["b"].isnan() and found["c"] == 0 and torch.equal(found["a"], clean["a"])
    sum(clean.values()).backward()
    sum(found.values()).backward()
    assert torch.equal(bad.grad[[0, 2]], logits.grad[[0, 2]]) and not logits.grad[2].any()


def test_shapes_that_do_not_fit_are_refused():
    labels = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(errors.EntryError, match="3 entries for labels of 2 rows"):
        mlora.losses(torch.zeros(2, 3, 5), labels, ["a", "b", None])
    with pytest.raises(ValueError, match=r"\(2, 4, 5\) and labels \(2, 3\)"):
        mlora.losses(torch.zeros(2, 4, 5), labels, "a")
