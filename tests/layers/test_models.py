"""Real architectures, patched by the one generic walk, against a fresh PEFT model per adapter and row."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    BUILDERS,
    VOCAB,
    assert_close,
    build,
    formula,
    inputs_for,
    logits,
    make_adapter,
    peft_alone,
    row_of,
)
from torch import Tensor

import mlora

# Per model: a list of module names, and a regex for other modules.
TARGETS: dict[str, tuple[list[str], str]] = {
    "llama": (["q_proj", "v_proj"], r".*\.mlp\.(up|down)_proj"),
    "qwen2": (["k_proj", "o_proj"], r".*\.mlp\.(gate|down)_proj"),
    "qwen3": (["q_proj", "o_proj"], r".*\.mlp\.(up|gate)_proj"),
    "gemma": (["q_proj", "down_proj"], r".*\.(k|o)_proj"),
    "gemma2": (["v_proj", "up_proj"], r".*\.(q|down)_proj"),
    "mixtral": (["q_proj", "v_proj"], r".*\.self_attn\.(k|o)_proj"),
    "qwen2moe": (["q_proj", "v_proj"], r".*\.self_attn\.(k|o)_proj"),
    "gpt2": (["c_attn"], r".*\.(c_fc|c_proj)"),
    "opt": (["q_proj", "fc1"], r".*\.(out_proj|fc2|project_in)"),
    "t5": (["q", "wi_1"], r".*(EncDecAttention\.(k|o)|wo)"),
    "bert": (["query", "dense"], r".*(key|value|classifier)"),
    "vit": (["q_proj", "fc1"], r".*(k_proj|fc2|classifier)"),
    "conv": (["layer.0.convolution", "shortcut.convolution"], r".*(embedder\.convolution|classifier\.1)"),
    "mlp": (["up", "blocks.0"], r"blocks\.2|head"),
}
KINDS = tuple(BUILDERS)
EXPERTS = ("mixtral", "qwen2moe")
ROWS = 6


def configs(kind: str) -> dict[str, dict[str, Any]]:
    names, regex = TARGETS[kind]
    everything = {
        "mlp": ["up", "blocks.0", "blocks.2", "head"],  # PEFT's all-linear is for transformers' models only,
        "conv": ["convolution", "classifier.1"],  # leaves convolutions out,
        "mixtral": ["q_proj", "k_proj", "v_proj", "o_proj"],  # and means parameters where there are experts
        "qwen2moe": ["q_proj", "k_proj", "v_proj", "o_proj"],
    }.get(kind, "all-linear")
    flag = {"fan_in_fan_out": kind == "gpt2"}
    return {
        "plain": {"r": 3, "lora_alpha": 7, "target_modules": names, **flag},
        "rs": {"r": 16, "lora_alpha": 6, "use_rslora": True, "target_modules": everything, **flag},
        "dora": {"r": 1, "lora_alpha": 2, "use_dora": True, "target_modules": regex, **flag},
        "bias": {
            "r": 8, "lora_alpha": 4, "lora_bias": True, "target_modules": names, **flag,
            "rank_pattern": {names[0]: 2}, "alpha_pattern": {rf".*\.?{names[-1]}": 12},
        },
    }  # fmt: skip


class Case:
    """One architecture: the bare model, its patched copy with four adapters, and the oracles."""

    def __init__(self, kind: str, root: Path) -> None:
        self.kind = kind
        self.base = build(kind)
        self.folders = {
            name: make_adapter(root / name, self.base, seed, **config)
            for seed, (name, config) in enumerate(configs(kind).items())
        }
        self.model = copy.deepcopy(self.base)
        self.runtime = mlora.patch(self.model, memory=1 << 20, max_adapters=8)
        for name, folder in self.folders.items():
            self.runtime.load_adapter(folder, name)
        self.alone = cache(self._alone)

    def _alone(self, entry: Any) -> Any:
        if entry is None:
            return self.base
        if isinstance(entry, str):
            return peft_alone(self.base, self.folders[entry])
        names = [name for name, _ in entry]
        return peft_alone(self.base, *(self.folders[n] for n in names), weights=[w for _, w in entry])

    def oracle(self, entry: Any) -> Any:
        return self.alone(tuple(entry.items()) if isinstance(entry, Mapping) else entry)

    def rows(self, batch: Mapping[str, Tensor], entries: list[Any]) -> Tensor:
        """Every row by itself through the oracle of its entry."""
        return torch.cat([logits(self.oracle(entry), row_of(batch, i)) for i, entry in enumerate(entries)])


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cache(lambda kind: Case(kind, tmp_path_factory.mktemp(kind)))


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest, cases: Any) -> Case:
    return cases(request.param)


MIXED = ["plain", None, "rs", "dora", "bias", "plain"]


@pytest.mark.parametrize("adapter", ("plain", "rs", "dora", "bias"))
def test_one_adapter_for_all_rows(case: Case, adapter: str) -> None:
    batch = inputs_for(case.kind, 3)
    want = case.rows(batch, [adapter] * 3)
    bare = logits(case.base, batch)
    assert (want - bare).abs().max() > 1e-2 * bare.abs().max(), "an adapter without an effect would prove nothing"
    assert_close(logits(case.model, batch, adapter_names=adapter), want)
    assert_close(logits(case.model, batch, adapter_names=[adapter] * 3), want)


@pytest.mark.parametrize("order", ((0, 1, 2, 3, 4, 5), (3, 5, 1, 0, 2, 4)), ids=("mixed", "shuffled"))
def test_every_row_its_own_adapter(case: Case, order: tuple[int, ...]) -> None:
    entries = [MIXED[i] for i in order]
    batch = inputs_for(case.kind, ROWS)
    got = logits(case.model, batch, adapter_names=entries)
    assert_close(got, case.rows(batch, entries))
    if case.kind not in EXPERTS:  # which experts' batches a row's tokens share depends on the other rows
        base = entries.index(None)
        assert torch.equal(got[base], logits(case.base, batch)[base]), "a base row has the bare model's bits"


def test_a_batch_of_base_rows_has_the_bare_models_bits(case: Case) -> None:
    batch = inputs_for(case.kind, ROWS)
    want = logits(case.base, batch)
    assert torch.equal(logits(case.model, batch), want)
    assert torch.equal(logits(case.model, batch, adapter_names=[None, "__base__"] * 3), want)
    assert torch.equal(logits(case.model, batch, adapter_names={"rs": 0.0}), want)


def test_weighted_rows_equal_pefts_sum_of_active_adapters(case: Case) -> None:
    entries = [{"plain": 0.7, "bias": 0.3}, {"rs": -1.5, "plain": 2.0}, "rs", {"bias": 0.25}, None]
    batch = inputs_for(case.kind, len(entries))
    assert_close(logits(case.model, batch, adapter_names=entries), case.rows(batch, entries))


def test_weighted_rows_with_dora_equal_the_formula(case: Case) -> None:
    mixes = [{"dora": 1.0}, {"dora": 0.4, "rs": 0.6}, {"dora": -0.5, "bias": 1.0, "plain": 0.5}]
    batch = inputs_for(case.kind, len(mixes))
    dtype = torch.float32 if case.kind in EXPERTS else torch.float64  # torch has no grouped product in fp64
    wide = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    want = [
        logits(formula(case.base, {case.folders[n]: w for n, w in mix.items()}, dtype), row_of(wide, i))
        for i, mix in enumerate(mixes)
    ]
    assert_close(logits(case.model, batch, adapter_names=mixes), torch.cat(want))


def test_rows_do_not_see_each_other(case: Case) -> None:
    if case.kind in EXPERTS:
        pytest.skip("its experts' matmuls mix the rows by themselves")
    batch = inputs_for(case.kind, ROWS)
    kept = {1: "rs", 3: {"dora": 0.5, "plain": 2.0}, 4: "bias"}

    def run(others: list[Any]) -> Tensor:
        entries = [kept.get(i, others[i]) for i in range(ROWS)]
        return logits(case.model, batch, adapter_names=entries)

    first = run([None] * ROWS)
    for others in (["rs"] * ROWS, ["dora", None, "plain", None, None, {"bias": 3.0}]):
        again = run(others)
        for row in kept:
            assert torch.equal(first[row], again[row]), f"row {row} changed with its neighbours"
        assert not torch.equal(first[0], again[0])


DTYPES = (
    ("llama", torch.bfloat16, torch.bfloat16),
    ("llama", torch.bfloat16, torch.float32),
    ("llama", torch.float16, torch.bfloat16),
    ("llama", torch.float16, torch.float16),
    ("llama", torch.float32, torch.bfloat16),
    ("llama", torch.float32, torch.float16),
    ("gpt2", torch.float16, torch.float32),
    ("gpt2", torch.bfloat16, torch.bfloat16),
    ("opt", torch.bfloat16, torch.float16),
    ("bert", torch.bfloat16, torch.bfloat16),
)


@pytest.mark.parametrize(
    ("kind", "base_dtype", "adapter_dtype"),
    DTYPES,
    ids=[f"{k}-{b}-{a}".replace("torch.", "") for k, b, a in DTYPES],
)
def test_mixed_dtypes_stay_within_twice_pefts_own_error(
    kind: str, base_dtype: torch.dtype, adapter_dtype: torch.dtype, tmp_path: Path
) -> None:
    base = build(kind, base_dtype)
    folders = {
        name: make_adapter(tmp_path / name, base, seed, adapter_dtype, **config)
        for seed, (name, config) in enumerate(configs(kind).items())
    }
    model = copy.deepcopy(base)
    runtime = mlora.patch(model, memory=1 << 20, max_adapters=8)
    for name, folder in folders.items():
        runtime.load_adapter(folder, name)
    wide = copy.deepcopy(base).float()
    entries = [None, *folders] * 2
    # Many tokens, and few enough for the op that computes the base product as well.
    batches = {length: inputs_for(kind, len(entries), length=length) for length in (7, 1)}
    got = {length: logits(model, batch, adapter_names=entries) for length, batch in batches.items()}
    for length, batch in batches.items():
        bare = logits(base, batch)
        for row in (0, len(folders) + 1):
            assert torch.equal(got[length][row], bare[row]), "base rows have the bare model's bits"
    errors = {length: ([], []) for length in batches}
    for name, folder in folders.items():
        exact, peft = peft_alone(wide, folder), peft_alone(base, folder)
        for length, batch in batches.items():
            for row in [row for row, entry in enumerate(entries) if entry == name]:
                one = row_of(batch, row)
                oracle = logits(exact, one)
                if base_dtype == torch.float32:
                    assert_close(got[length][row : row + 1], oracle)
                for mine, value in zip(errors[length], (got[length][row], logits(peft, one)[0]), strict=True):
                    mine.append((value.double() - oracle[0].double()).flatten())
    if base_dtype != torch.float32:
        # Over all rows: which single row is rounded well is a lottery.
        for length, (ours, theirs) in errors.items():
            error, allowed = (torch.cat(parts).norm().item() for parts in (ours, theirs))
            assert 0 < error <= 2 * allowed, f"{length} tokens: {error:.3g} from the oracle, PEFT {allowed:.3g}"


def test_all_linears_of_a_mixture_of_experts(cases: Any, tmp_path: Path) -> None:
    """By which PEFT means its routers and experts too, as target_parameters."""
    case = cases("mixtral")
    folder = make_adapter(tmp_path / "all", case.base, 1, r=2, target_modules="all-linear")
    info = case.runtime.load_adapter(folder, "all")
    assert {"model.layers.0.mlp.gate.weight", "model.layers.0.mlp.experts.down_proj"} <= set(info.modules)
    batch = inputs_for("mixtral", 3)
    got = logits(case.model, batch, adapter_names=["all", None, "all"])
    for row, oracle in enumerate((peft_alone(case.base, folder), case.base, peft_alone(case.base, folder))):
        assert_close(got[row : row + 1], logits(oracle, row_of(batch, row)))
    case.runtime.delete_adapter("all")


# Generation. The oracle runs the whole batch under one adapter and keeps that adapter's rows, so that
# sampling draws the same numbers for them.

NEW = 4
ENTRIES = ["plain", None, "rs", {"plain": 0.5, "bias": 1.5}]


def prompts(padding: str = "left") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, VOCAB, (len(ENTRIES), 6), generator=generator)
    mask = torch.ones_like(ids)
    for row, pad in ((0, 2), (3, 4)):
        span = slice(0, pad) if padding == "left" else slice(6 - pad, 6)
        ids[row, span], mask[row, span] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def expected(case: Case, entries: list[Any], batch: Mapping[str, Tensor], returned: int = 1, **options: Any) -> Tensor:
    rows = []
    for row, entry in enumerate(entries):
        oracle = case.oracle(entry)  # built before the seed: building draws numbers too
        torch.manual_seed(3)
        out = oracle.generate(**batch, max_new_tokens=NEW, **options)
        rows.append(out[row * returned : (row + 1) * returned])
    assert any(not torch.equal(rows[0], other) for other in rows[1:])
    return torch.cat(rows)


def generated(case: Case, entries: Any, batch: Mapping[str, Tensor], **options: Any) -> Tensor:
    torch.manual_seed(3)
    return case.model.generate(**batch, max_new_tokens=NEW, adapter_names=entries, **options)


SAMPLE = {"do_sample": True, "top_k": 0, "temperature": 1.5}
MODES: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("greedy", 1, {"do_sample": False}),
    ("sampling", 1, SAMPLE),
    ("beams", 1, {"num_beams": 3}),
    ("returned", 3, {**SAMPLE, "num_return_sequences": 3}),
    ("beams-returned", 2, {"num_beams": 4, "num_return_sequences": 2}),
    ("beam-sampling", 1, {**SAMPLE, "num_beams": 2}),
    ("static-cache", 1, {"cache_implementation": "static"}),
    ("no-cache", 1, {"use_cache": False}),
)


@pytest.mark.parametrize(("returned", "options"), [m[1:] for m in MODES], ids=[m[0] for m in MODES])
def test_generate(cases: Any, returned: int, options: dict[str, Any]) -> None:
    case, batch = cases("llama"), prompts()
    want = expected(case, ENTRIES, batch, returned, **options)
    assert torch.equal(generated(case, ENTRIES, batch, **options), want)


@pytest.mark.parametrize("kind", ("gpt2", "opt", "qwen3", "gemma2", "mixtral"))
def test_generate_on_other_models(cases: Any, kind: str) -> None:
    case, batch = cases(kind), prompts()
    want = expected(case, ENTRIES, batch, num_beams=2)
    assert torch.equal(generated(case, ENTRIES, batch, num_beams=2), want)


def test_generate_with_right_padding(cases: Any) -> None:
    case, batch = cases("llama"), prompts("right")
    assert torch.equal(generated(case, ENTRIES, batch), expected(case, ENTRIES, batch))


def test_generate_from_embeddings(cases: Any) -> None:
    case, batch = cases("llama"), prompts()
    embeds = {"inputs_embeds": case.base.get_input_embeddings()(batch["input_ids"]).detach()}
    embeds["attention_mask"] = batch["attention_mask"]
    assert torch.equal(generated(case, ENTRIES, embeds), expected(case, ENTRIES, embeds))


def test_generate_with_dora_rows(cases: Any) -> None:
    case, batch = cases("llama"), prompts()
    entries = ["dora", "bias", None, "dora"]
    assert torch.equal(generated(case, entries, batch), expected(case, entries, batch))


@pytest.mark.parametrize(
    ("settings", "own", "override", "returned", "positional"),
    (
        ({"num_beams": 3}, {}, {}, 1, False),
        ({**SAMPLE, "num_return_sequences": 2}, {}, {}, 2, True),
        ({}, {"num_beams": 3}, {}, 1, False),
        ({"length_penalty": 0.5}, {"num_beams": 3}, {}, 1, True),
        ({"num_beams": 3}, {"num_beams": 2}, {}, 1, False),
        ({"num_beams": 3}, {}, {"num_beams": 2}, 1, True),
        ({}, {"num_beams": 3}, {"num_beams": 1}, 1, False),
        ({}, {**SAMPLE, "num_return_sequences": 3}, {}, 3, False),
    ),
    ids=(
        "given-beams", "given-returned", "models-beams", "given-without-beams-models-beams",
        "given-over-models", "argument-over-given", "argument-over-models", "models-returned",
    ),
)  # fmt: skip
def test_generate_with_beams_from_a_config(
    cases: Any, settings: dict, own: dict, override: dict, returned: int, positional: bool
) -> None:
    from transformers import GenerationConfig

    case, batch = cases("llama"), prompts()
    given = GenerationConfig(max_new_tokens=NEW, **settings) if settings else None

    def run(model: Any, **names: Any) -> Tensor:
        torch.manual_seed(3)
        if positional:
            return model.generate(
                batch["input_ids"],
                given,
                attention_mask=batch["attention_mask"],
                max_new_tokens=NEW,
                **override,
                **names,
            )
        return model.generate(**batch, generation_config=given, max_new_tokens=NEW, **override, **names)

    want = []
    for row, entry in enumerate(ENTRIES):
        with own_settings(case.oracle(entry), own):
            out = run(case.oracle(entry))
        assert out.shape[0] == returned * len(ENTRIES)
        want.append(out[row * returned : (row + 1) * returned])
    with own_settings(case.model, own):
        assert torch.equal(run(case.model, adapter_names=ENTRIES), torch.cat(want))


@contextmanager
def own_settings(model: Any, settings: dict[str, Any]) -> Iterator[None]:
    """`settings` in the generation config that the model carries."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    saved = model.generation_config
    model.generation_config = copy.deepcopy(saved)
    model.generation_config.update(**settings)
    try:
        yield
    finally:
        model.generation_config = saved


@pytest.mark.parametrize(
    ("returned", "options"),
    (
        (1, {}),
        (1, {"num_beams": 3}),
        (2, {"num_beams": 3, "num_return_sequences": 2}),
        (2, {**SAMPLE, "num_return_sequences": 2}),
    ),
    ids=("greedy", "beams", "beams-returned", "returned"),
)
def test_generate_with_an_encoder_and_a_decoder(cases: Any, returned: int, options: dict[str, Any]) -> None:
    case, batch = cases("t5"), prompts("right")
    want = expected(case, ENTRIES, batch, returned, **options)
    assert torch.equal(generated(case, ENTRIES, batch, **options), want)


@pytest.mark.parametrize("masked", (True, False), ids=("mask", "no-mask"))
def test_generate_from_what_an_encoder_gave(cases: Any, masked: bool) -> None:
    case, batch = cases("t5"), inputs_for("t5", len(ENTRIES))
    batch = {"input_ids": batch["input_ids"], "attention_mask": torch.ones_like(batch["attention_mask"])}
    with torch.no_grad(), case.runtime.use_adapters(ENTRIES):
        encoded = case.model.get_encoder()(**batch)
    given = {"attention_mask": batch["attention_mask"]} if masked else {}
    got = generated(case, ENTRIES, {"encoder_outputs": encoded, **given}, num_beams=2)
    assert torch.equal(got, generated(case, ENTRIES, batch, num_beams=2))


@pytest.mark.parametrize("options", ({}, {"num_beams": 3}), ids=("greedy", "beams"))
def test_use_adapters_routes_what_runs_inside(cases: Any, options: dict[str, Any]) -> None:
    case, batch = cases("llama"), prompts()
    want = expected(case, ENTRIES, batch, **options)
    with case.runtime.use_adapters(ENTRIES):
        got = case.model.generate(**batch, max_new_tokens=NEW, **options)
        one = logits(case.model, batch)
        with case.runtime.use_adapters(None):
            bare = logits(case.model, batch)
        named = logits(case.model, batch, adapter_names="rs")
    assert torch.equal(got, want)
    assert torch.equal(one, logits(case.model, batch, adapter_names=ENTRIES))
    assert torch.equal(bare, logits(case.base, batch)), "the inner routing hides the outer one"
    assert torch.equal(named, logits(case.model, batch, adapter_names="rs")), "the call's own names win"
    assert torch.equal(logits(case.model, batch), logits(case.base, batch)), "nothing is left behind"


def test_use_adapters_around_a_submodule(cases: Any) -> None:
    case, batch = cases("llama"), inputs_for("llama", 4)
    names = ["plain", "rs", None, "dora"]
    with case.runtime.use_adapters(names), torch.no_grad():
        inner = case.model.model(**batch).last_hidden_state
        whole = case.model(**batch, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(inner, whole)
    assert not torch.equal(inner, case.base.model(**batch).last_hidden_state)


@pytest.mark.parametrize("entry", ("rs", {"plain": 0.5, "bias": 1.5}), ids=("name", "mix"))
def test_set_adapter_is_the_default(cases: Any, entry: Any) -> None:
    case, batch = cases("llama"), prompts()
    try:
        case.runtime.set_adapter(entry)
        with torch.no_grad():
            assert_close(logits(case.model, batch), case.rows(batch, [entry] * 4))
            got = case.model.generate(**batch, max_new_tokens=NEW, num_beams=2)
        assert torch.equal(got, case.oracle(entry).generate(**batch, max_new_tokens=NEW, num_beams=2))
        assert torch.equal(logits(case.model, batch, adapter_names=[None] * 4), logits(case.base, batch))
        mixed = logits(case.model, batch, adapter_names=["plain", None, None, None])
        assert_close(mixed, case.rows(batch, ["plain", None, None, None]))
    finally:
        case.runtime.set_adapter(None)
    assert torch.equal(logits(case.model, batch), logits(case.base, batch))


def test_generate_twice_gives_the_same_bits(cases: Any) -> None:
    case, batch = cases("llama"), inputs_for("llama", 4)
    runs = [logits(case.model, batch, adapter_names=ENTRIES) for _ in range(3)]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[1], runs[2])
