"""Training in packed calls: each sequence's gradients are those of PEFT on that sequence alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCAB, build, make_adapter, peft_alone
from gradients import LINEARS, error, folder_of, gradients_of, in_a_thread, loss_of, of_peft, trained
from torch import Tensor

import mlora
from mlora import errors

LENGTHS = [5, 1, 3, 8, 2]
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "dora": {"use_dora": True},
}
MODELS = {"qwen2": "sdpa", "qwen2, eager": "eager", "gpt2": "sdpa"}
CASES = [("qwen2", "lora"), ("qwen2", "dora"), ("qwen2, eager", "lora"), ("gpt2", "lora_bias"), ("gpt2", "dora")]


def model_of(how: str, dtype: torch.dtype) -> tuple[str, Any, dict[str, Any]]:
    """Its kind, itself, and the options of its adapters, which change the head too where it has one of its own."""
    kind = how.partition(",")[0]
    base = build(kind, dtype)
    base.set_attn_implementation(MODELS[how])
    return kind, base, {"target_modules": [*LINEARS[kind], *["lm_head"] * (kind == "qwen2")]}


def sequences(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=draw) for length in lengths]


def packed(parts: Sequence[Tensor]) -> dict[str, Any]:
    """In one row, their positions from 0 each: by these transformers masks its attention."""
    positions = torch.cat([torch.arange(len(part)) for part in parts])
    return {"input_ids": torch.cat(list(parts))[None], "position_ids": positions[None], "use_cache": False}


def padded(parts: Sequence[Tensor]) -> dict[str, Any]:
    ids = torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(part) for part in parts], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}


def loss(rows: Sequence[Tensor]) -> Tensor:
    """Of (tokens, vocabulary) of each sequence."""
    return sum(loss_of(row[None], number) for number, row in enumerate(rows))


def backward(
    model: Any, parts: Sequence[Tensor], entries: Any, how: Callable[[Tensor], None] = Tensor.backward, **call: Any
) -> dict[str, Tensor]:
    """The gradients of `a` and `b` after a packed call."""
    clear(model)
    with model.mlora.use_adapters(entries, lengths=list(map(len, parts))):
        logits = model(**packed(parts), **call).logits[0]
    how(loss(logits.split(list(map(len, parts)))) if not call else loss_of(logits[None]))
    return both(model)


def both(model: Any) -> dict[str, Tensor]:
    return {f"{name} {k}": g for name in "ab" for k, g in gradients_of(model.mlora, name).items()}


def clear(model: Any) -> None:
    for name in "ab":
        for _, parameter in model.mlora.named_parameters(name):
            parameter.grad = None


def alone(base: Any, part: Tensor, number: int, folders: list[Path], weights: list[float]) -> dict[str, Tensor]:
    model = peft_alone(base, *folders, weights=weights)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("oracle-0" in key)
    loss_of(model(input_ids=part[None]).logits, number).backward()
    return of_peft(model)


@pytest.mark.parametrize(("how", "options"), CASES, ids=[f"{how}-{options}" for how, options in CASES])
def test_gradients_are_those_of_peft_on_each_sequence(how, options, tmp_path):
    """fp64. Sequences of two adapters, of the base, and of a mix with a frozen one; and the same rows, padded."""
    kind, base, targets = model_of(how, torch.float64)
    folders = {
        name: folder_of(tmp_path, base, kind, name, seed, **targets, **OPTIONS[options] if name != "z" else {})
        for seed, name in enumerate("abz")
    }
    model, parts = trained(base, folders, frozen=("z",)), sequences()
    within = 1e-6 if "eager" in how else 1e-10  # its softmax is in fp32 whatever the dtype
    weight = 1.0 if options == "dora" else 0.5  # PEFT has no other for DoRA
    entries = ["b", None, "a", {"a": weight, "z": -1.5}, "a"]
    mine = backward(model, parts, entries)
    a, z = folders["a"], folders["z"]
    own = [alone(base, parts[2], 2, [a], [1.0]), alone(base, parts[3], 3, [a, z], [weight, -1.5])]
    own.append(alone(base, parts[4], 4, [a], [1.0]))
    want = {f"a {key}": sum(one[key] for one in own) for key in own[0]}
    want |= {f"b {key}": one for key, one in alone(base, parts[0], 0, [folders["b"]], [1.0]).items()}
    for name in "ab":
        keys = [key for key in want if key.startswith(name)]
        assert error({key: mine[key] for key in keys}, {key: want[key] for key in keys}) < within
    clear(model)
    logits = model(**padded(parts), adapter_names=entries).logits
    loss([row[: len(part)] for row, part in zip(logits, parts, strict=True)]).backward()
    assert error(mine, both(model)) < within


@pytest.fixture
def world(tmp_path) -> Any:
    base = build("qwen2")
    targets = {"target_modules": [*LINEARS["qwen2"], "lm_head"]}
    folders = {name: folder_of(tmp_path, base, "qwen2", name, seed, **targets) for seed, name in enumerate("ab")}
    folders["c"] = folder_of(tmp_path, base, "qwen2", "c", 2, **targets)
    return base, folders


ENTRIES = ["b", None, "a", {"a": 0.5, "b": -1.5}, "a"]
PICKS = torch.tensor([18, 4, 0, 8, 16])


@pytest.mark.parametrize("call", [{}, {"logits_to_keep": PICKS}], ids=["all tokens", "picked tokens"])
def test_checkpoints_threads_and_eviction_change_no_bit(world, call):
    base, folders = world
    model, parts = trained(base, folders, max_adapters=2), sequences()
    want = backward(model, parts, ENTRIES, **call)
    assert all(gradient.any() for gradient in want.values())

    def evicted(loss: Tensor) -> None:
        with torch.no_grad():
            for name in "cbca":
                model(input_ids=parts[0][None], adapter_names=name)
        loss.backward()

    ways = (Tensor.backward, in_a_thread, evicted)
    placements = model.mlora._store.placements
    for mode in (None, False, True):
        if mode is not None:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": mode})
        for how in ways:
            got = backward(model, parts, ENTRIES, how, **call)
            assert all(torch.equal(got[key], want[key]) for key in want), (mode, how)
    assert model.mlora._store.placements > placements, "nothing was evicted"


def test_a_sequence_does_not_see_the_others(world):
    """To the bit. (Not of NaN: a mask of attention multiplies with zeros.)"""
    base, folders = world
    parts = sequences([5, 3, 8])
    found = []
    for others, entries in ((parts, ["a", "b", "a"]), (sequences([5, 3, 8], 1), [{"a": 1.0}, None, "a"])):
        model = trained(base, folders)
        embeds = torch.stack([base.get_input_embeddings().weight[torch.cat(list(others))]]).detach()
        embeds[0, :5], embeds[0, 8:] = (base.get_input_embeddings().weight[parts[i]].detach() for i in (0, 2))
        batch = packed(others)
        del batch["input_ids"]
        with model.mlora.use_adapters(entries, lengths=[5, 3, 8]):
            logits = model(inputs_embeds=embeds, **batch).logits
        labels = torch.cat(parts)[None]
        losses = mlora.losses(logits, labels, ["a", "b", "a"], lengths=[5, 3, 8])
        losses["a"].backward()
        found.append([losses["a"].detach(), *gradients_of(model.mlora, "a").values()])
    assert all(map(torch.equal, *found))


def test_losses_are_those_of_each_sequence(world):
    """A sequence's last token does not predict the next one's first; with the logits, or through the head in chunks."""
    base, folders = world
    model, parts = trained(base, folders), sequences()
    batch, ids = packed(parts), torch.cat(sequences())[None]
    labels = ids.clone()
    labels[0, 10:12] = -100
    clear(model)
    with model.mlora.use_adapters(ENTRIES, lengths=LENGTHS):
        whole = mlora.losses(model(**batch).logits, labels, ENTRIES, lengths=LENGTHS)
    mix = (("a", 0.5), ("b", -1.5))
    assert list(whole) == ["b", None, "a", mix] and whole[None] == 0
    for entry, sums in {"b": [0], "a": [2, 4], mix: [3]}.items():
        total, count = 0.0, 0
        for number in sums:
            own = labels[0].split(LENGTHS)[number][None]
            named = dict(entry) if isinstance(entry, tuple) else entry
            logits = model(input_ids=parts[number][None], adapter_names=named).logits
            targets = int((own[:, 1:] != -100).sum())
            total, count = total + mlora.losses(logits, own, named)[entry] * targets, count + targets
        torch.testing.assert_close(whole[entry], total / count)
    sum(whole.values()).backward()
    want = both(model)
    for chunk in (1, 4, 100):
        clear(model)
        seen: list[int] = []
        hook = model.lm_head.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out.shape[1]))
        with model.mlora.use_adapters(ENTRIES, lengths=LENGTHS):
            hidden = model.model(**batch).last_hidden_state
            parted = mlora.losses(hidden, labels, ENTRIES, lengths=LENGTHS, head=model.lm_head, chunk=chunk)
        hook.remove()
        sum(parted.values()).backward()
        assert max(seen) == min(chunk, 19)
        for entry, one in parted.items():
            torch.testing.assert_close(one, whole[entry])
        got = both(model)
        assert got.keys() == want.keys() and error(got, want) < 1e-5


def test_losses_that_do_not_fit_are_refused():
    logits, labels = torch.zeros(1, 6, 5), torch.zeros(1, 6, dtype=torch.int64)
    with pytest.raises(errors.EntryError, match="3 entries for 2 packed sequences"):
        mlora.losses(logits, labels, ["a", "b", None], lengths=[2, 4])
    with pytest.raises(errors.EntryError, match="at least 1"):
        mlora.losses(logits, labels, ["a", "b"], lengths=[6, 0])
    with pytest.raises(ValueError, match="packed sequences of 5 tokens"):
        mlora.losses(logits, labels, ["a", "b"], lengths=[2, 3])
    with pytest.raises(ValueError, match="packed sequences of 12 tokens"):
        mlora.losses(logits.expand(2, 6, 5), labels.expand(2, 6), ["a", "b"], lengths=[6, 6])
    with pytest.raises(errors.EntryError, match="lengths= is of packed ones"):
        mlora.losses(logits, labels, ["a", "b"])


def test_other_adapters_beside(tmp_path):
    """An aLoRA, of which some tokens of a sequence are, and a larger head, beside a trained one: the aLoRA's rows are
    in no gradient, and a head of another size is refused where the trained one changes it."""
    base = build("llama", torch.float64)
    linears = {"target_modules": LINEARS["qwen2"]}
    folders = {"a": folder_of(tmp_path, base, "qwen2", "a", 0), "b": folder_of(tmp_path, base, "qwen2", "b", 1)}
    folders["tail"] = make_adapter(
        tmp_path / "tail", base, 3, r=2, task_type="CAUSAL_LM", alora_invocation_tokens=[5, 9], **linears
    )
    model, parts = trained(base, folders, frozen=("tail",)), sequences()
    parts[3][2:4] = torch.tensor([5, 9])
    mine = backward(model, parts, ["a", "b", None, "tail", "a"])
    own = [alone(base, parts[number], number, [folders["a"]], [1.0]) for number in (0, 4)]
    want = {f"a {key}": own[0][key] + own[1][key] for key in own[0]}
    assert error({key: mine[key] for key in want}, want) < 1e-10
    tail = peft_alone(base, folders["tail"])(input_ids=parts[3][None]).logits
    with model.mlora.use_adapters(["a", "tail"], lengths=[5, 8]):
        logits = model(**packed([parts[0], parts[3]])).logits[0, 5:]
    assert (logits - tail[0]).norm() < 1e-10 * tail.norm()


def test_one_adapter_for_all_sequences(world):
    """Its plan is of one row."""
    base, folders = world
    model, parts = trained(base, folders), sequences()
    mine = backward(model, parts, "a")
    want = [backward(model, parts, ["a" if row == own else None for row in range(5)]) for own in range(5)]
    total = {key: sum(one[key] for one in want) for key in mine if key.startswith("a")}
    assert error({key: mine[key] for key in total}, total) < 1e-5
    assert all(gradient is None for key, gradient in mine.items() if key.startswith("b"))
