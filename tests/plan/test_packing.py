"""Packed calls: sequences one behind another in one row. The oracle is each sequence alone, in a call of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCAB, assert_close, build, logits, make_adapter, peft_alone, refused, served
from torch import Tensor, nn
from transformers import PhiConfig, PhiForCausalLM

import mlora
from mlora import errors

INVOCATION = [5, 9]
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 3, "target_modules": ["q_proj", "down_proj", "lm_head"]},
    "dora": {"r": 2, "target_modules": ["v_proj", "up_proj"], "use_dora": True, "modules_to_save": ["norm"]},
    "tail": {
        "r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "alora_invocation_tokens": INVOCATION
    },
}  # fmt: skip


class World:
    def __init__(self, root: Path) -> None:
        self.base = build("llama")
        self.folders = {name: make_adapter(root / name, self.base, 7, **how) for name, how in CONFIGS.items()}
        self.model = served(self.base, self.folders)
        self.runtime: mlora.Runtime = self.model.mlora
        self.alone = {name: peft_alone(self.base, folder) for name, folder in self.folders.items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("packing"))


ENTRIES = ["plain", None, "dora", "plain", "tail"]
LENGTHS = [4, 1, 6, 2, 7]


def sequences(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randint(10, VOCAB, (length,), generator=generator) for length in lengths]
    if len(parts[-1]) > 5:
        parts[-1][3:5] = torch.tensor(INVOCATION)
    return parts


def packed(parts: Sequence[Tensor]) -> dict[str, Any]:
    positions = torch.cat([torch.arange(len(part)) for part in parts])
    return {"input_ids": torch.cat(list(parts))[None], "position_ids": positions[None], "use_cache": False}


def alone(world: World, parts: Sequence[Tensor], entries: Sequence[Any] = ENTRIES) -> list[Tensor]:
    """Of each sequence under PEFT, (tokens, vocab)."""
    return [
        logits(world.base if entry is None else world.alone[entry], {"input_ids": part[None]})[0]
        for part, entry in zip(parts, entries, strict=True)
    ]


@torch.no_grad()
def test_each_sequence_gets_what_its_adapter_gives_alone(world: World) -> None:
    parts = sequences()
    with world.runtime.use_adapters(ENTRIES, lengths=LENGTHS):
        got = world.model(**packed(parts)).logits[0]
    assert_close(got, torch.cat(alone(world, parts)))


@pytest.mark.parametrize("keep", (0, 1, 3, 20, [0], [19, 0, 3, 3, 12], [*range(20)], [*range(19, -1, -1)], [-1, -20]))
@torch.no_grad()
def test_picked_tokens(world: World, keep: Any) -> None:
    """As many as there are tokens, in another order, too: then only the order tells the head's rows."""
    parts = sequences()
    want = torch.cat(alone(world, parts))
    picks = torch.tensor(keep) if isinstance(keep, list) else keep
    with world.runtime.use_adapters(ENTRIES, lengths=LENGTHS):
        got = world.model(**packed(parts), logits_to_keep=picks).logits[0]
    assert_close(got, want[picks] if isinstance(keep, list) else want[-keep:])


@torch.no_grad()
def test_inputs_in_other_forms(world: World) -> None:
    parts = sequences()
    batch, want = packed(parts), torch.cat(alone(world, parts))
    embeds = world.base.get_input_embeddings()(batch.pop("input_ids"))
    entries = [None if entry == "tail" else entry for entry in ENTRIES]
    want[-LENGTHS[-1] :] = alone(world, parts[-1:], [None])[0]
    with world.runtime.use_adapters(entries, lengths=LENGTHS):
        assert_close(world.model(**batch, inputs_embeds=embeds).logits[0], want)
        hidden = world.model.model(**batch, inputs_embeds=embeds).last_hidden_state
        assert_close(world.model.lm_head(hidden[0]), want)  # as code that flattens tokens calls it


@torch.no_grad()
def test_a_sequence_is_the_same_to_the_bit_whatever_is_packed_beside_it(world: World) -> None:
    """Of one module's delta, since the base's products round by the number of tokens."""
    layer = world.model.model.layers[0].mlp.down_proj
    x = torch.randn(9, layer.in_features, generator=torch.Generator().manual_seed(3))
    outputs = []
    for entries, others in ((["plain", "dora"], 1.0), (["plain", None], -3.0), (["plain", "plain"], 0.5)):
        beside = torch.cat([x[:4], others * x[4:]])
        with world.runtime.use_adapters(entries, lengths=[4, 5]):
            outputs.append(layer(beside[None])[0, :4])
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@torch.no_grad()
def test_calls_that_go_on_behind_a_cache_need_starts(world: World) -> None:
    ids = sequences([7])[0]
    want = alone(world, [ids], ["tail"])[0]
    with world.runtime.use_adapters(["tail", None], lengths=[3, 2], starts=[{"tail": 3}, {}]):
        first = world.model(input_ids=torch.cat([ids[:3], ids[:2]])[None], **positions(3, 2)).logits[0]
    assert_close(first[:3], want[:3])
    cache = world.model(input_ids=ids[None, :3], adapter_names=[None], use_cache=True).past_key_values
    with world.runtime.use_adapters(["tail"], lengths=[4], starts=[{"tail": 0}]):
        later = world.model(input_ids=ids[None, 3:], past_key_values=cache).logits[0]
    assert_close(later, want[3:])
    with (
        world.runtime.use_adapters(["tail", "plain"], lengths=[2, 2]),
        refused(world.model, errors.AttributionError, "starts", "tail"),
    ):
        world.model(input_ids=ids[None, 3:], past_key_values=cache)


def positions(*lengths: int) -> dict[str, Any]:
    return {"position_ids": torch.cat([torch.arange(length) for length in lengths])[None], "use_cache": False}


@torch.no_grad()
def test_invocations_are_looked_for_in_each_sequence(world: World) -> None:
    """One that spans two sequences is none; each has its own, and one of them none."""
    parts = [torch.tensor(row) for row in ([11, 5], [9, 12, 13], [5, 9, 14, 5, 9, 15], [16])]
    entries = ["tail"] * 4
    with world.runtime.use_adapters(entries, lengths=[2, 3, 6, 1]):
        got = world.model(**packed(parts)).logits[0]
    want = [logits(world.base, {"input_ids": part[None]})[0] for part in (parts[0], parts[1])]
    want += [logits(world.alone["tail"], {"input_ids": parts[2][None]})[0]]
    want += [logits(world.base, {"input_ids": parts[3][None]})[0]]
    assert_close(got, torch.cat(want))


@pytest.mark.parametrize("heads", (4, 3))
@torch.no_grad()
def test_norms_behind_the_heads(tmp_path: Path, heads: int) -> None:
    """Phi normalizes (1, heads, tokens, width): with as many tokens as heads, only an earlier call tells which is
    which."""
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=VOCAB, hidden_size=8 * heads, intermediate_size=32, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=heads, qk_layernorm=True,
    )  # fmt: skip
    base = PhiForCausalLM(config).eval()
    how = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["q_layernorm", "k_layernorm"]}
    folder = make_adapter(tmp_path / "norms", base, 3, **how)
    oracle, model = peft_alone(base, folder), served(base, {"norms": folder})
    lengths = [1, heads - 1]
    parts = sequences(lengths)
    want = [logits(oracle, {"input_ids": parts[0][None]})[0], logits(base, {"input_ids": parts[1][None]})[0]]
    if heads == 3:
        model.mlora.check_packed("norms")  # which asks the model
        assert set(model.mlora._shared.axes.values()) == {2}
    else:
        with (
            model.mlora.use_adapters(["norms", None], lengths=lengths),
            refused(model, errors.AttributionError, "layernorm", "(1, 4, 4, 8)"),
        ):
            model(**packed(parts))
        longer = sequences([2, 3])
        with model.mlora.use_adapters(["norms", None], lengths=[2, 3]):
            model(**packed(longer))
    with model.mlora.use_adapters(["norms", None], lengths=lengths):
        assert_close(model(**packed(parts)).logits[0], torch.cat(want))


@pytest.mark.parametrize(
    ("entries", "options", "said"),
    [
        (["plain"], {"lengths": [2, 3]}, "1 entries for 2 packed"),
        (["plain", None], {"lengths": []}, "lengths is []"),
        (["plain", None], {"lengths": [2, 0]}, "at least 1"),
        (["plain", None], {"lengths": [2, True]}, "at least 1"),
        (["plain", None], {"lengths": 5}, "lengths is 5"),
        (["plain", None], {"starts": [{}, {}]}, "lengths="),
        (["tail", None], {"lengths": [2, 3], "starts": [{}]}, "for each of 2"),
        (["tail", None], {"lengths": [2, 3], "starts": [{"tail": "x"}, {}]}, "index or None"),
        (["tail", None], {"lengths": [2, 3], "starts": [{}, {}]}, "'tail' (aLoRA)"),
        (["tail", "tail"], {"lengths": [2, 3], "starts": [{"tail": 0}, {}]}, "'tail' (aLoRA)"),
    ],
)
def test_what_does_not_fit_is_refused_when_it_begins(
    world: World, entries: list[Any], options: Mapping[str, Any], said: str
) -> None:
    with refused(world.model, errors.EntryError, said), world.runtime.use_adapters(entries, **options):
        pass


def test_calls_of_another_size_and_generate_are_refused(world: World) -> None:
    ids = sequences([9])[0]
    with world.runtime.use_adapters(["plain", None], lengths=[4, 5]):
        for wrong in (ids[None, :8], ids[:8].reshape(2, 4), torch.stack([ids, ids])):
            with refused(world.model, errors.EntryError, "2 packed sequences, 9 tokens"):
                world.model(input_ids=wrong)
        with refused(world.model, errors.EntryError, "generate"):
            world.model.generate(input_ids=ids[None], max_new_tokens=2)
        whole = world.model.generate(input_ids=ids[None], max_new_tokens=2, adapter_names=["plain"])  # its own
    assert torch.equal(whole, world.alone["plain"].generate(input_ids=ids[None], max_new_tokens=2))


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.linear(y) + self.experts[0](y) + self.experts[1](y)


@pytest.mark.parametrize("target", ("conv", "experts.1"))
@torch.no_grad()
def test_modules_whose_tokens_cannot_be_told_apart(target: str) -> None:
    torch.manual_seed(0)
    model = Convolved().eval()
    runtime = mlora.patch(model, memory=1 << 20)
    shape = (2, 6, 3) if target == "conv" else (2, 6)
    weights = {f"{target}.lora_A.weight": torch.randn(shape), f"{target}.lora_B.weight": torch.randn(6, 2)}
    if target == "conv":
        weights[f"{target}.lora_B.weight"] = torch.randn(6, 2, 1)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [target]}
    runtime.add_adapter("a", mlora.Adapter(config, {f"base_model.model.{k}": v for k, v in weights.items()}))
    x = torch.randn(1, 7, 6)
    with refused(model, errors.AttributionError, target, "'a'"), runtime.use_adapters(["a", None], lengths=[3, 4]):
        pass
    with runtime.use_adapters(["a", "a"], lengths=[3, 4]):  # all alike: no token needs to be told from others
        got = model(x)
    assert torch.equal(got, model(x, adapter_names=["a"]))


@pytest.mark.parametrize("use_reentrant", (False, True))
def test_gradients_where_the_forward_pass_is_computed_again(world: World, use_reentrant: bool) -> None:
    parts = sequences()
    batch = packed(parts)
    ids, entries = batch.pop("input_ids"), [None if entry == "tail" else entry for entry in ENTRIES]
    embeds = world.base.get_input_embeddings()(ids).detach()
    grads = []
    for again in (False, True):
        x = embeds.clone().requires_grad_()
        if again:
            world.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            world.model.train()
        try:
            with world.runtime.use_adapters(entries, lengths=LENGTHS):
                loss = world.model(**batch, inputs_embeds=x).logits.square().sum()
            loss.backward()
        finally:
            world.model.gradient_checkpointing_disable()
            world.model.eval()
        grads.append(x.grad)
    assert grads[0] is not None and grads[1] is not None
    assert_close(grads[1], grads[0], 1e-6)


@torch.no_grad()
def test_compiled_code_refuses_them(world: World) -> None:
    parts = sequences([4, 5])
    compiled = torch.compile(world.model, backend="eager")
    compiled(**packed(parts))
    with (
        world.runtime.use_adapters(["plain", None], lengths=[4, 5]),
        refused(world.model, errors.AttributionError, "packed", "torch.compile"),
    ):
        compiled(**packed(parts))
    with world.runtime.use_adapters(["plain", "plain"], lengths=[4, 5]):
        assert_close(compiled(**packed(parts)).logits[0, :4], alone(world, parts[:1], ["plain"])[0])
