"""Activated LoRA: it applies from the last occurrence of its invocation on. Oracles: PEFT alone, or a sum by hand."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from conftest import (
    HIDDEN,
    VOCAB,
    assert_close,
    build,
    formula,
    inputs_for,
    logits,
    make_adapter,
    peft_alone,
    refused,
    rewrite,
    served,
)
from torch import Tensor, nn
from transformers import GenerationConfig
from typer.testing import CliRunner

import mlora
from mlora import errors
from mlora.cli import app
from mlora.plan import activation

INVOCATIONS = {"a": [5, 9], "b": [11]}
ALL = ["q_proj", "v_proj", "up_proj", "down_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "a": {"r": 3, "lora_alpha": 7, "target_modules": [*ALL, "lm_head"], "lora_bias": True},
    "b": {"r": 2, "target_modules": ["q_proj", "k_proj"], "use_rslora": True, "modules_to_save": ["norm"]},
    "plain": {"r": 2, "target_modules": ["q_proj", "k_proj", "o_proj"]},
    "dora": {"r": 2, "target_modules": ["q_proj"], "use_dora": True},
}


def made(folder: Path, base: Any, name: str, seed: int, **options: Any) -> Path:
    config = {**CONFIGS[name], **options}
    if name in INVOCATIONS:
        config |= {"task_type": "CAUSAL_LM", "alora_invocation_tokens": INVOCATIONS[name]}
    return make_adapter(folder / name, base, seed, **config)


ALONE = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "alora_invocation_tokens": [3]}


class World:
    def __init__(self, root: Path) -> None:
        self.base = build("llama")
        self.folders = {name: made(root, self.base, name, seed) for seed, name in enumerate(CONFIGS, start=3)}
        self.model = served(self.base, self.folders)
        self.alone = {name: peft_alone(self.base, folder) for name, folder in self.folders.items()}

    def oracle(self, name: str | None) -> Any:
        return self.base if name is None else self.alone[name]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("alora"))


LENGTH = 9

# What stands where in a row: in the middle, more than once, at either end, only a part of it, another's, none.
ROWS: list[tuple[str | None, dict[int, list[int]]]] = [
    ("a", {3: [5, 9]}),
    ("a", {1: [5, 9], 6: [5, 9]}),
    (None, {2: [5, 9]}),
    ("a", {0: [5, 9]}),
    ("a", {7: [5, 9]}),
    ("a", {2: [9, 5], 8: [5]}),
    ("b", {4: [11]}),
    ("b", {2: [5, 9]}),
    ("plain", {2: [5, 9]}),
    ("dora", {2: [5, 9]}),
    ("b", {0: [11], 8: [11]}),
]
NAMES = [name for name, _ in ROWS]


def prompts(rows: list[Any], seed: int = 0, length: int = LENGTH) -> Tensor:
    ids = torch.randint(12, VOCAB, (len(rows), length), generator=torch.Generator().manual_seed(seed))
    for row, (_, places) in zip(ids, rows, strict=True):
        for at, tokens in places.items():
            row[at : at + len(tokens)] = torch.tensor(tokens)
    return ids


def padded(ids: Tensor, count: int, side: str) -> dict[str, Tensor]:
    pad = torch.zeros(len(ids), count, dtype=ids.dtype)
    parts, masks = [pad, ids], [pad, torch.ones_like(ids)]
    order = slice(None) if side == "left" else slice(None, None, -1)
    return {"input_ids": torch.cat(parts[order], 1), "attention_mask": torch.cat(masks[order], 1)}


@pytest.mark.parametrize("side", ("none", "left", "right"))
def test_each_row_gets_what_its_adapter_gives_alone(world: World, side: str) -> None:
    batch = padded(prompts(ROWS), 0 if side == "none" else 2, side)
    got = logits(world.model, batch, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        assert_close(got[row : row + 1], logits(world.oracle(name), {k: v[row : row + 1] for k, v in batch.items()}))
    # Rows without an invocation, and tokens before it, are the base's, of those layers that nothing else changes.
    bare = logits(world.base, batch)
    assert torch.equal(got[5], bare[5])
    if side == "none":
        assert torch.equal(got[0, :3], bare[0, :3]) and not torch.equal(got[0, 3], bare[0, 3])
        assert torch.equal(got[1, :6], bare[1, :6]) and not torch.equal(got[1, 6], bare[1, 6])


def test_one_entry_for_all_rows(world: World) -> None:
    batch = padded(prompts(ROWS), 0, "left")
    want = logits(world.alone["a"], batch)
    assert_close(logits(world.model, batch, adapter_names="a"), want)
    world.model.mlora.set_adapter("a")
    assert_close(logits(world.model, batch), want)
    with torch.no_grad():
        assert_close(world.model(batch["input_ids"]).logits, want)  # by its place
    world.model.mlora.set_adapter(None)
    assert torch.equal(logits(world.model, batch), logits(world.base, batch))


def test_bits_of_a_row_do_not_depend_on_other_rows(world: World) -> None:
    ids = prompts(ROWS)
    got = logits(world.model, {"input_ids": ids}, adapter_names=NAMES)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(1)).tolist()
    again = logits(world.model, {"input_ids": ids[order]}, adapter_names=[NAMES[i] for i in order])
    assert_close(again, got[order], 1e-6)
    base = copy.deepcopy(world.base)
    nn.init.zeros_(base.model.layers[0].self_attn.q_proj.weight)  # the library's product depends on the batch
    model = served(base, {name: folder for name, folder in world.folders.items() if name != "dora"})
    names = [None if name == "dora" else name for name in NAMES]
    seen: list[Tensor] = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    logits(model, {"input_ids": ids}, adapter_names=names)
    for row, name in enumerate(names):
        logits(model, {"input_ids": ids[row : row + 1]}, adapter_names=[name])
        assert torch.equal(seen[-1][0], seen[0][row])
    assert seen[0].any()


def by_hand(
    base: Any, folders: Mapping[str, Path], mix: Mapping[str, float], ids: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    """The logits of one row under a mix: each aLoRA's delta is a LoRA's on the last tokens, whose first is
    found by a loop."""
    model = formula(base, {folders[n]: w for n, w in mix.items() if n not in INVOCATIONS}, dtype)
    modules = dict(model.named_modules())
    for name, weight in mix.items():
        if name not in INVOCATIONS:
            continue
        wanted = INVOCATIONS[name]
        found = [i for i in range(ids.shape[1]) if ids[0, i : i + len(wanted)].tolist() == wanted]
        behind = ids.shape[1] - found[-1] if found else 0
        other = formula(base, {folders[name]: weight}, dtype)  # its hooks add a LoRA's delta to all tokens
        for path, module in other.named_modules():
            for hook in module._forward_hooks.values():

                def tail(_: Any, args: Any, out: Tensor, hook: Any = hook, behind: int = behind) -> Tensor:
                    flat = out.view(-1, out.shape[-1]).clone()
                    full = hook(_, args, out).view_as(flat)
                    first = max(len(flat) - behind, 0)
                    flat[first:] = full[first:]
                    return flat.view_as(out)

                modules[path].register_forward_hook(tail)
    return logits(model, {"input_ids": ids})


MIXES: list[Any] = [
    ({"a": 0.7, "plain": -0.4}, {3: [5, 9]}),
    ({"a": 1.2, "plain": 0.5, "dora": 0.6}, {5: [5, 9]}),
    ({"a": 0.5, "c": 2.0, "plain": 1.0}, {2: [5, 9], 6: [11]}),
    ({"a": 0.5, "c": 2.0}, {4: [5, 9], 1: [11]}),
    ({"a": 0.5, "c": 2.0}, {4: [11]}),
    ({"plain": 0.3}, {4: [11]}),
]


def test_weighted_rows_are_sums_of_deltas(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {**world.folders, "c": made(tmp_path, world.base, "b", 9, modules_to_save=None)}
    monkeypatch.setitem(INVOCATIONS, "c", INVOCATIONS["b"])
    model, ids = served(world.base, folders), prompts(MIXES, 3)
    got = logits(model, {"input_ids": ids}, adapter_names=[mix for mix, _ in MIXES])
    for row, (mix, _) in enumerate(MIXES):
        assert_close(got[row : row + 1], by_hand(world.base, folders, mix, ids[row : row + 1]).float())
    for name in ("a", "c"):  # the loop itself
        want = logits(peft_alone(world.base, folders[name]), {"input_ids": ids[2:3]})
        assert_close(by_hand(world.base, folders, {name: 1.0}, ids[2:3]).float(), want)


def test_tokens_in_one_dimension(tmp_path: Path) -> None:
    """Layers whose input is flattened to (rows * tokens, width), which PEFT's aLoRA cannot read."""
    base = build("qwen2moe")
    targets = ["v_proj", "shared_expert.up_proj", "shared_expert_gate"]
    folders = {"a": made(tmp_path, base, "a", 1, target_modules=targets, lora_bias=False)}
    model = served(base, folders)
    rows = [("a", {3: [5, 9]}), (None, {3: [5, 9]}), ("a", {0: [5, 9]}), ("a", {})]
    ids = prompts(rows)
    got = logits(model, {"input_ids": ids}, adapter_names=[name for name, _ in rows])
    for row, (name, _) in enumerate(rows):
        mix = {} if name is None else {name: 1.0}
        want = by_hand(base, folders, mix, ids[row : row + 1], torch.float32)  # experts take no fp64
        assert_close(got[row : row + 1], want)


def test_logits_to_keep(world: World) -> None:
    batch = {"input_ids": prompts(ROWS)}
    want = logits(world.model, batch, adapter_names=NAMES)
    for keep in (1, 4):
        assert_close(logits(world.model, batch, adapter_names=NAMES, logits_to_keep=keep), want[:, -keep:])
    with refused(world.model, errors.AttributionError, "logits_to_keep", "'a'", "aLoRA"):
        world.model(**batch, adapter_names=NAMES, logits_to_keep=torch.tensor([0, 4]))


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "chunks": {"prefill_chunk_size": 2},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "beams": {"num_beams": 3},
    "beams returned": {"num_beams": 4, "num_return_sequences": 2},
    "beams without a cache": {"num_beams": 3, "use_cache": False},
}


def generated_alone(world: World, name: str | None, batch: dict[str, Tensor], **options: Any) -> Tensor:
    """PEFT's, whose aLoRA is told where to start for each beam, and which counts from the end of what it is given, so
    that it takes a cache that is filled in one step."""
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **options}
    for option in ("use_cache", "prefill_chunk_size", "cache_implementation", "disable_compile"):
        options.pop(option, None)
    if name in INVOCATIONS and "num_beams" in options:
        ids = batch["input_ids"][0].tolist()
        wanted = INVOCATIONS[name]
        starts = [i for i in range(len(ids)) if ids[i : i + len(wanted)] == wanted]
        offset = len(ids) - starts[-1] if starts else None
        options = {
            "alora_offsets": [offset] * options["num_beams"],
            "generation_config": GenerationConfig(**options),
        }
    return world.oracle(name).generate(**batch, **options)


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("pad", (0, 3))
def test_generate(world: World, case: str, pad: int) -> None:
    options, batch = OPTIONS[case], padded(prompts(ROWS, 2), pad, "left")
    new = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    got = world.model.generate(**batch, **new, **options, adapter_names=NAMES)
    each = len(got) // len(NAMES)
    for row, name in enumerate(NAMES):
        want = generated_alone(world, name, {k: v[row : row + 1] for k, v in batch.items()}, **options)
        assert torch.equal(got[row * each : (row + 1) * each], want), f"row {row}"


@pytest.mark.parametrize(("case", "calls"), (("greedy", 2), ("chunks", 6), ("no cache", 6)))
def test_how_often_ids_are_read(world: World, monkeypatch: pytest.MonkeyPatch, case: str, calls: int) -> None:
    """On a device each time is a wait: once for the prompt, and once for each call that has some of it."""
    reads: list[str] = []
    find, equal = activation.occurrences, torch.equal
    monkeypatch.setattr(activation, "occurrences", lambda *args: reads.append("searched") or find(*args))
    counted = SimpleNamespace(equal=lambda *args: reads.append("compared") or equal(*args))
    monkeypatch.setattr(activation, "torch", counted)
    new = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    world.model.generate(prompts(ROWS[:2]), **new, **OPTIONS[case], adapter_names=NAMES[:2])
    assert reads == ["searched"] + ["compared"] * (calls - 1)


def test_generate_routed_around_the_call(world: World) -> None:
    model, batch = world.model, padded(prompts(ROWS, 2), 0, "left")
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    want = model.generate(**batch, **options, adapter_names=NAMES)
    with model.mlora.use_adapters(NAMES):
        assert torch.equal(model.generate(batch["input_ids"], **options), want)
        assert torch.equal(logits(model, batch), logits(model, batch, adapter_names=NAMES))
    model.mlora.set_adapter("a")
    assert torch.equal(model.generate(**batch, **options)[:2], want[:2])
    model.mlora.set_adapter(None)


def test_a_generated_invocation_is_none(world: World) -> None:
    """As in PEFT, which looks at the prompt."""
    batch = padded(prompts([("b", {})] * 2, 4), 0, "left")

    def force(_: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([11]), 0.0) + scores * 1e-3

    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "logits_processor": [force]}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    got = world.model.generate(**batch, **options, adapter_names="b")
    assert (got.sequences[:, LENGTH:] == 11).all()
    want = world.alone["b"].generate(**batch, **options)
    for mine, theirs in zip(got.logits, want.logits, strict=True):
        assert_close(mine, theirs)


# What cannot be told


def test_calls_that_do_not_tell_their_tokens(world: World) -> None:
    model, ids = world.model, prompts(ROWS[:2])
    embeds = world.base.get_input_embeddings()(ids).detach()
    with refused(model, errors.AttributionError, "'a'", "input_ids", "aLoRA"):
        model(inputs_embeds=embeds, adapter_names="a")
    with refused(model, errors.AttributionError, "'a'", "input_ids", "aLoRA"):
        model.generate(inputs_embeds=embeds, adapter_names=["a", None], max_new_tokens=1)
    with (
        refused(model, errors.AttributionError, "q_proj", "outside of a call", "aLoRA"),
        model.mlora.use_adapters(["a", None]),
    ):
        model.model(input_ids=ids)
    with torch.no_grad():  # other adapters need no tokens
        assert_close(model(inputs_embeds=embeds, adapter_names="plain").logits, world.alone["plain"](ids).logits)


def kept(output: Any) -> dict[str, Any]:
    """The cache of an output, by the name that this version of transformers gives it."""
    name = next(name for name in ("cache", "past_key_values") if name in output)
    return {name: output[name]}


def test_a_loop_of_ones_own(world: World) -> None:
    model, ids = world.model, prompts([("a", {3: [5, 9]}), ("b", {4: [11]})])
    with torch.no_grad(), model.mlora.use_adapters(["a", "b"]):
        cache = kept(model(ids[:, :2], use_cache=True))
        got = model(ids[:, 2:], **cache).logits  # the invocations are in these
        assert_close(got, model(ids).logits[:, 2:])
        with pytest.raises(errors.AttributionError, match=r"cache.*'a', 'b'.*aLoRA.*generate"):
            model(ids[:, -1:], **cache)
    with torch.no_grad(), model.mlora.use_adapters(["plain", None]):
        model(ids[:, 2:], **kept(model(ids[:, :2], use_cache=True)))


def test_other_tokens_than_the_prompts(world: World) -> None:
    model, ids = world.model, prompts(ROWS[:1])
    options = {"max_new_tokens": 2, "guidance_scale": 1.5, "negative_prompt_ids": torch.full((1, 3), 20)}
    with refused(model, errors.AttributionError, "other tokens than the prompt's"):
        model.generate(ids, **options, adapter_names="a")


class Gathered(nn.Module):
    """Tokens in another order than the batch's."""

    def __init__(self, experts: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.experts = nn.ModuleList([nn.Linear(HIDDEN, HIDDEN)])
        self.up = nn.Linear(HIDDEN, HIDDEN)
        self.expert = experts

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.experts[0](x.flatten(0, 1)) if self.expert else self.up(x.transpose(0, 1))


@pytest.mark.parametrize("experts", (False, True))
def test_tokens_that_are_not_the_rows(experts: bool) -> None:
    model = Gathered(experts)
    mlora.patch(model, memory=1 << 16)
    path = "experts.0" if experts else "up"
    model.mlora.add_adapter("a", adapter_of(path))
    ids = prompts([("a", {3: [5, 9]})])
    with refused(model, errors.AttributionError, path, "aLoRA", "(9," if experts else "(9, 1,"):
        model(ids, adapter_names="a")


def adapter_of(path: str) -> mlora.Adapter:
    config = {"peft_type": "LORA", "r": 2, "task_type": "CAUSAL_LM", "alora_invocation_tokens": [5, 9]}
    tensors = {f"{path}.lora_A.weight": torch.randn(2, HIDDEN), f"{path}.lora_B.weight": torch.randn(HIDDEN, 2)}
    return mlora.Adapter(config, tensors)


# Beside everything else


def test_folding_and_merging_are_refused(world: World, tmp_path: Path) -> None:
    model, runtime = world.model, world.model.mlora
    with refused(model, errors.MergeError, "'a'", "aLoRA", "alora_invocation_tokens"):
        runtime.merge_adapter({"a": 0.5, "plain": 0.5})
    with refused(model, errors.MergeError, "aLoRA", "alora_invocation_tokens"):
        runtime.add_weighted_adapter(["a", "plain"], [0.5, 0.5], "merged")
    with refused(model, errors.MergeError, "aLoRA"):
        logits(
            model,
            {"input_ids": prompts(ROWS[:1])},
            adapter_names=[mlora.Merge(["a", "plain"], [1, 1], "ties", density=1)],
        )
    folder = str(make_adapter(tmp_path / "a", world.base, 1, **ALONE))
    made = CliRunner().invoke(app, ["merge", str(tmp_path / "out"), "--adapter", folder, "--space", "factor"])
    assert made.exit_code and "aLoRA" in made.output


def test_rows_beside_something_folded_in(world: World) -> None:
    model = served(world.base, world.folders)
    runtime, batch = model.mlora, {"input_ids": prompts(ROWS[:3])}
    names = ["a", "a", None]
    runtime.merge_adapter("plain")
    got = logits(model, batch, adapter_names=names)
    for row, name in enumerate(names):
        assert_close(got[row : row + 1], logits(world.oracle(name), {"input_ids": batch["input_ids"][row : row + 1]}))
    runtime.merge_adapter("dora")
    with pytest.raises(errors.MergeError, match=r"aLoRA.*unmerge_adapter"):
        logits(model, batch, adapter_names=names)
    runtime.unmerge_adapter()
    assert torch.equal(logits(model, batch, adapter_names=None), logits(world.base, batch))


def test_saving_inspecting_and_taking_over(world: World, tmp_path: Path) -> None:
    model, batch = copy.deepcopy(world.base), {"input_ids": prompts(ROWS)}
    runtime = mlora.patch(model, max_adapters=1)
    runtime.load_adapter(world.folders["a"], "a")
    runtime.load_adapter(world.folders["b"], "b")
    assert runtime.adapters["a"].variant == "aLoRA" and "aLoRA" in runtime.status()
    runtime.save_adapter("a", tmp_path / "again")
    assert peft.LoraConfig.from_pretrained(tmp_path / "again").alora_invocation_tokens == INVOCATIONS["a"]
    runtime.load_adapter(tmp_path / "again", "again")
    want = logits(world.alone["a"], batch)
    for name in ("a", "b", "again"):
        got = logits(model, batch, adapter_names=name)
        assert name == "b" or torch.equal(got, logits(model, batch, adapter_names="a"))
        assert name == "b" or torch.allclose(got, want, atol=1e-4)
    told = CliRunner().invoke(app, ["inspect", str(world.folders["a"])])
    assert told.exit_code == 0 and "alora_invocation_tokens=[5, 9]" in told.output
    live = peft_alone(world.base, world.folders["a"])
    runtime.add_adapter("copied", mlora.Adapter.from_peft(live, "oracle-0"))
    assert torch.equal(logits(model, batch, adapter_names="copied"), logits(model, batch, adapter_names="a"))
    taken = mlora.patch(live).model
    assert_close(logits(taken, batch), want)
    for name in list(runtime.adapters):
        runtime.delete_adapter(name)
    mlora.unpatch(model)
    assert torch.equal(logits(model, batch), logits(world.base, batch))


def test_gradients_of_inputs(world: World) -> None:
    """Through the model's own embedding, since the tokens must be told."""
    ids, grads = prompts(ROWS[:1]), []
    for model, options in ((world.model, {"adapter_names": ["a"]}), (world.alone["a"], {})):
        seen: list[Tensor] = []
        embedding = model.get_input_embeddings()

        def keep(_: Any, __: Any, out: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(out.detach().requires_grad_())
            return seen[0]

        handle = embedding.register_forward_hook(keep)
        model(input_ids=ids, **options).logits.square().sum().backward()
        handle.remove()
        grads.append(seen[0].grad)
    assert_close(grads[0], grads[1])


@pytest.mark.parametrize("use_reentrant", (True, False))
def test_gradients_where_the_forward_pass_is_computed_again(world: World, use_reentrant: bool) -> None:
    """By when the adapters lie elsewhere, and each other call has tokens of its own."""
    ids, grads = prompts(ROWS[:3]), []
    for checkpointed in (False, True):
        model = served(world.base, world.folders, max_adapters=3)
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        model.get_input_embeddings().register_forward_hook(lambda *_, embeds=embeds: embeds * 1)
        out = model(input_ids=ids, adapter_names=["a", "plain", {"a": -0.5}], use_cache=False).logits
        if checkpointed:
            before = model.mlora._store["a"].slot
            others = [name for name in model.mlora.adapters if name not in ("a", "plain")]
            with torch.no_grad():
                for name in (*others, "plain", "a"):
                    model(input_ids=ids.flip(1), adapter_names=name)
            assert model.mlora._store["a"].slot != before
        with model.mlora.use_adapters("plain"):
            out.square().sum().backward()
        grads.append(embeds.grad)
    assert_close(grads[1], grads[0], 1e-5)


def test_compiled_code_refuses_them_and_serves_others(world: World) -> None:
    torch._dynamo.reset()
    model, batch = served(world.base, world.folders), {"input_ids": prompts(ROWS[:2])}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with model.mlora.use_adapters(["plain", None]):
        assert_close(logits(compiled, batch), logits(model, batch))
    refusal = pytest.raises(errors.UnsupportedAdapterError, match=r"aLoRA.*torch\.compile")
    with model.mlora.use_adapters(["a", None]), refusal:
        logits(compiled, batch)
    torch._dynamo.reset()


OPTIONS_REFUSED: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "tokens": ({"alora_invocation_tokens": "ab"}, errors.AdapterError, ("alora_invocation_tokens", "'ab'")),
    "negative": ({"alora_invocation_tokens": [5, -1]}, errors.AdapterError, ("alora_invocation_tokens", "-1")),
    "no task": ({"task_type": None}, errors.UnsupportedAdapterError, ("alora_invocation_tokens", "task_type None")),
    "task": ({"task_type": "SEQ_CLS"}, errors.UnsupportedAdapterError, ("'SEQ_CLS'", "CAUSAL_LM")),
    "bias": ({"bias": "lora_only"}, errors.UnsupportedAdapterError, ("bias 'lora_only'", "all tokens")),
    "dora": ({"use_dora": True}, errors.UnsupportedAdapterError, ("alora_invocation_tokens", "use_dora")),
}


@pytest.mark.parametrize("name", OPTIONS_REFUSED)
def test_options_that_do_not_fit_are_refused(world: World, tmp_path: Path, name: str) -> None:
    options, error, wanted = OPTIONS_REFUSED[name]
    folder = made(tmp_path, world.base, "a", 1, lora_bias=False)
    with refused(world.model, error, *wanted):
        world.model.mlora.load_adapter(rewrite(folder, tmp_path / "bad", options), "bad")


@pytest.mark.parametrize("kind", ("t5", "embedding", "conv"))
def test_models_and_modules_that_it_is_not_defined_for(tmp_path: Path, kind: str) -> None:
    model = build({"embedding": "llama"}.get(kind, kind))
    mlora.patch(model)
    if kind == "embedding":
        config = {"r": 2, "target_modules": ["embed_tokens"]}
        folder = make_adapter(tmp_path / "plain", build("llama"), 1, **config)
    elif kind == "conv":
        folder = make_adapter(tmp_path / "plain", build("conv"), 1, r=2, target_modules=["convolution"])
    else:
        folder = make_adapter(tmp_path / "plain", build("t5"), 1, r=2, target_modules=["q"])
    options = {"task_type": "CAUSAL_LM", "alora_invocation_tokens": [3]}
    with pytest.raises(errors.UnsupportedAdapterError, match="alora_invocation_tokens"):
        model.mlora.load_adapter(rewrite(folder, tmp_path / "bad", options), "bad")
    assert not model.mlora.adapters


def test_an_input_of_several_kinds() -> None:
    """Ids beside embeddings are read where there are as many."""
    from mlora.plan.call import Call

    ids, embeds = torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3, 4)
    assert Call((), {"input_ids": ids, "inputs_embeds": embeds}).ids is ids
    assert Call((), {"input_ids": ids[:, 1:], "inputs_embeds": embeds}).ids is None
    assert Call((embeds,), {}).ids is None and Call((), {}).ids is None
    assert Call((ids[0],), {}).ids.shape == (1, 3)
    assert Call((), {"mems": [ids]}).past is None and Call((ids,), {}).past == 0
    assert inputs_for("llama", 2).keys() >= {"input_ids"}
