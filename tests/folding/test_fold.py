"""Adapters folded into the base weights, and taken out again to the bit."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_close, build, inputs_for, logits, make_adapter, peft_alone, row_of, served, state_hash

import mlora
from mlora import errors
from mlora.ops import dispatch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def model(llama: Any, folders: dict[str, Path]) -> Any:
    return served(llama, folders)


@pytest.mark.parametrize("entry", ["r3", "rs16", "dora1", {"r3": 0.7, "rs16": -0.5, "dora1": 0.4}])
def test_a_folded_model_computes_what_the_routed_one_does(model: Any, batch: Any, entry: Any) -> None:
    want = logits(model, batch, adapter_names=entry)
    model.mlora.merge_adapter(entry)
    assert model.mlora.merged == (entry if isinstance(entry, dict) else {entry: 1.0})
    assert_close(logits(model, batch), want)


@pytest.mark.parametrize("name", ["r3", "rs16", "dora1"])
def test_pefts_merge_is_the_same(model: Any, llama: Any, folders: dict[str, Path], batch: Any, name: str) -> None:
    model.mlora.merge_adapter(name)
    assert_close(logits(model, batch), logits(peft_alone(llama, folders[name]).merge_and_unload(), batch))


@pytest.mark.parametrize("kind", ["gpt2", "t5", "bert"])
def test_other_models(kind: str, tmp_path: Path) -> None:
    """GPT-2's Conv1D keeps its weight transposed; BERT's linears have biases."""
    base = build(kind)
    targets = {"gpt2": ["c_attn", "c_fc", "c_proj"], "t5": ["q", "wo"], "bert": ["query", "dense"]}[kind]
    options = {"fan_in_fan_out": True} if kind == "gpt2" else {}
    make_adapter(tmp_path / "lora", base, 1, r=3, target_modules=targets, **options)
    make_adapter(tmp_path / "dora", base, 2, r=3, target_modules=targets, use_dora=True, **options)
    model = served(base, {name: tmp_path / name for name in ("lora", "dora")})
    batch, before = inputs_for(kind, 3), state_hash(model)
    for entry in ("lora", "dora", {"lora": 0.5, "dora": 1.5}):
        want = logits(model, batch, adapter_names=entry)
        model.mlora.merge_adapter(entry)
        assert state_hash(model) != before
        assert_close(logits(model, batch), want)
        model.mlora.unmerge_adapter()
        assert state_hash(model) == before


# Back to the bit


@pytest.mark.parametrize("keep", ["copy", "corrections", "checkpoint"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_a_hundred_times_in_and_out(
    llama: Any, folders: dict[str, Path], tmp_path: Path, dtype: torch.dtype, keep: str
) -> None:
    base = copy.deepcopy(llama).to(dtype)
    base.save_pretrained(tmp_path)
    model = served(base, {name: folders[name] for name in ("r3", "rs16")})
    before = state_hash(model)
    options = {"keep": keep, "checkpoint": tmp_path} if keep == "checkpoint" else {"keep": keep}
    for i in range(100 if keep == "copy" else 10):
        model.mlora.merge_adapter({"r3": 1.0 + i, "rs16": -0.3}, **options, safe=i % 10 == 0)
        assert state_hash(model) != before
        model.mlora.unmerge_adapter()
        assert state_hash(model) == before


@pytest.mark.parametrize("keep", ["copy", "corrections"])
def test_switching_does_not_drift(llama: Any, folders: dict[str, Path], keep: str) -> None:
    base = copy.deepcopy(llama).bfloat16()
    model, fresh = (served(base, {name: folders[name] for name in ("r3", "rs16", "bias8")}) for _ in range(2))
    before = state_hash(model)
    fresh.mlora.merge_adapter({"rs16": 0.5})
    for _ in range(20):
        model.mlora.merge_adapter("r3", keep=keep)
        model.mlora.merge_adapter({"r3": -2, "rs16": 1}, keep=keep)
        model.mlora.merge_adapter({"rs16": 0.5}, keep=keep)
    assert state_hash(model) == state_hash(fresh)
    model.mlora.unmerge_adapter()
    assert state_hash(model) == before


def test_switching_to_other_modules_restores_those_left(llama: Any, tmp_path: Path) -> None:
    make_adapter(tmp_path / "q", llama, 1, r=2, target_modules=["q_proj", "k_proj"])
    make_adapter(tmp_path / "v", llama, 2, r=2, target_modules=["v_proj", "k_proj"])
    model, fresh = (served(llama, {name: tmp_path / name for name in "qv"}) for _ in range(2))
    before = state_hash(model)
    fresh.mlora.merge_adapter("v")
    model.mlora.merge_adapter("q")
    model.mlora.merge_adapter("v")
    assert state_hash(model) == state_hash(fresh)
    model.mlora.merge_adapter(None)
    assert state_hash(model) == before and model.mlora.merged == {}


# Beside routed rows


@pytest.mark.parametrize("folded", ["r3", {"r3": 0.5, "rs16": -1.0}, "dora1"])
def test_rows_that_name_adapters_get_those_alone(model: Any, batch: Any, folded: Any) -> None:
    entries = ["rs16", None, folded, {"r3": 0.3, "dora1": 0.5}]
    want = logits(model, batch, adapter_names=entries)
    model.mlora.merge_adapter(folded)
    assert_close(logits(model, batch, adapter_names=entries), want)
    assert_close(logits(model, batch, adapter_names="__base__")[1:2], want[1:2])
    model.mlora.unmerge_adapter()
    assert torch.equal(logits(model, batch, adapter_names=entries), want)
    assert set(model.mlora.adapters) == {"r3", "rs16", "dora1", "bias8"}


@pytest.mark.parametrize("keep", ["copy", "corrections"])
def test_an_adapter_loaded_beside_a_folded_one_sees_the_base(
    model: Any, folders: dict[str, Path], batch: Any, keep: str
) -> None:
    """DoRA's norm is of the base weight, not of what is folded into it."""
    want = logits(model, batch, adapter_names="dora1")
    model.mlora.delete_adapter("dora1")
    model.mlora.merge_adapter("rs16", keep=keep)
    model.mlora.load_adapter(folders["dora1"], "dora1")
    assert_close(logits(model, batch, adapter_names="dora1"), want)


def test_the_default_keeps_its_meaning(model: Any, batch: Any) -> None:
    model.mlora.set_adapter("rs16")
    want = logits(model, batch)
    model.mlora.merge_adapter("r3")
    assert_close(logits(model, batch), want)
    model.mlora.set_adapter(None)
    model.mlora.unmerge_adapter()
    model.mlora.set_adapter("rs16")
    assert torch.equal(logits(model, batch), want)


def test_generate_with_a_folded_adapter(model: Any) -> None:
    ids = torch.randint(2, 60, (3, 5), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    want = model.generate(ids, adapter_names=["r3", None, "rs16"], **options)
    model.mlora.merge_adapter("r3")
    assert torch.equal(model.generate(ids, adapter_names=["r3", None, "rs16"], **options), want)
    assert torch.equal(model.generate(ids, **options)[0], want[0])


# A plain model


def test_merge_and_unload(model: Any, llama: Any, batch: Any, tmp_path: Path) -> None:
    want = logits(model, batch, adapter_names={"r3": 1.0, "dora1": 0.5})
    plain = model.mlora.merge_and_unload({"r3": 1.0, "dora1": 0.5})
    assert plain is model and type(plain) is type(llama) and not hasattr(plain, "mlora")
    assert_close(logits(plain, batch), want)
    plain.save_pretrained(tmp_path)
    assert torch.equal(logits(type(llama).from_pretrained(tmp_path).eval(), batch), logits(plain, batch))


# Refused, with nothing changed


@pytest.fixture
def tied(tmp_path: Path) -> Any:
    base = build("llama")
    base.lm_head.weight = base.model.embed_tokens.weight
    assert base.lm_head.weight is base.model.embed_tokens.weight
    make_adapter(tmp_path / "head", base, 1, r=2, target_modules=["q_proj", "lm_head"])
    return served(base, {"head": tmp_path / "head"})


def unchanged(model: Any, error: Any, wanted: str, *args: Any, **options: Any) -> None:
    before = state_hash(model), model.mlora.merged
    with pytest.raises(error, match=wanted):
        model.mlora.merge_adapter(*args, **options)
    assert (state_hash(model), model.mlora.merged) == before


def test_tied_weights(tied: Any) -> None:
    unchanged(tied, errors.MergeError, "lm_head: another module has the same weight", "head")


def test_what_cannot_be_folded(model: Any, tmp_path: Path) -> None:
    unchanged(model, errors.MergeError, "adds to its bias and it has none", "bias8")
    unchanged(model, errors.MergeError, "keep is 'nothing'", "r3", keep="nothing")
    unchanged(model, errors.MergeError, "takes recipes that only add", "dora1", keep="corrections")
    unchanged(model, errors.MergeError, "no safetensors files", "r3", keep="checkpoint", checkpoint=tmp_path)
    unchanged(model, errors.UnknownAdapterError, "'nobody'", "nobody")
    model.mlora.merge_adapter("r3")
    unchanged(model, errors.MergeError, "adds to its bias and it has none", "bias8")
    unchanged(model, errors.MergeError, "takes recipes that only add", "dora1", keep="corrections")


def test_a_checkpoint_that_is_not_the_models(model: Any, llama: Any, tmp_path: Path) -> None:
    other = copy.deepcopy(llama)
    other.model.layers[0].self_attn.q_proj.weight.data[0, 0] += 1
    other.save_pretrained(tmp_path)
    unchanged(model, errors.MergeError, "is not what its file holds", "r3", keep="checkpoint", checkpoint=tmp_path)
    llama.save_pretrained(tmp_path)
    model.mlora.merge_adapter("r3", keep="checkpoint", checkpoint=tmp_path)
    folded = state_hash(model)
    other.save_pretrained(tmp_path)
    with pytest.raises(errors.MergeError, match="changed on disk"):
        model.mlora.unmerge_adapter()
    assert state_hash(model) == folded and model.mlora.merged == {"r3": 1.0}
    llama.save_pretrained(tmp_path)
    model.mlora.unmerge_adapter()


def test_results_that_are_not_finite(llama: Any, folders: dict[str, Path]) -> None:
    model = served(copy.deepcopy(llama).half(), {"r3": folders["r3"]})
    unchanged(model, errors.MergeError, "cannot hold", {"r3": 1e6})


@pytest.mark.parametrize("after", [None, "rs16"])
def test_a_failure_half_way(model: Any, monkeypatch: pytest.MonkeyPatch, after: str | None) -> None:
    if after:
        model.mlora.merge_adapter(after)
    real, calls = dispatch.merge_, []

    def failing(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("half way")
        real(*args)

    monkeypatch.setattr(dispatch, "merge_", failing)
    unchanged(model, RuntimeError, "half way", "r3", safe=False)
    assert len(calls) >= 3


def test_while_a_call_is_routed(model: Any) -> None:
    with model.mlora.use_adapters("r3"):
        unchanged(model, errors.AdapterInUseError, "while a call", "r3")


def test_unloading_while_a_call_is_routed_forgets_nothing(model: Any) -> None:
    before = state_hash(model)
    model.mlora.merge_adapter("r3")
    with model.mlora.use_adapters("rs16"), pytest.raises(errors.AdapterInUseError, match="while a call"):
        model.mlora.merge_and_unload()
    assert model.mlora.merged == {"r3": 1.0}
    model.mlora.unmerge_adapter()
    assert state_hash(model) == before


def test_what_is_folded_in_cannot_go(model: Any, batch: Any) -> None:
    model.mlora.merge_adapter("r3")
    with pytest.raises(errors.AdapterInUseError, match="unmerge_adapter first"):
        model.mlora.delete_adapter("r3")
    with pytest.raises(errors.PatchError, match="unmerge_adapter first"):
        mlora.unpatch(model)
    model.mlora.unmerge_adapter()
    model.mlora.unmerge_adapter()  # nothing to do
    model.mlora.delete_adapter("r3")
    mlora.unpatch(model)


def test_rows_keep_to_themselves_with_a_folded_adapter(model: Any, batch: Any) -> None:
    model.mlora.merge_adapter("r3")
    mixed = logits(model, batch, adapter_names=["rs16", None, "r3", "rs16"])
    for row, name in enumerate(["rs16", "__base__", "r3", "rs16"]):
        assert_close(mixed[row : row + 1], logits(model, row_of(batch, row), adapter_names=name))


@pytest.mark.parametrize("entry", [["r3", "rs16"], ["r3"], []])
def test_a_list_of_entries_is_not_folded(model: Any, entry: Any) -> None:
    with pytest.raises(errors.EntryError, match="one entry for the whole model"):
        model.mlora.merge_adapter(entry)
    assert model.mlora.merged == {}


# Beside other threads

PATIENCE = 0.5  # seconds given to what must not happen


def in_thread(work: Callable[[], Any]) -> Callable[[], Any]:
    """Start `work` in a thread; the returned function waits for its result, or raises what it raised."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result() -> Any:
        thread.join(60)
        assert not thread.is_alive()
        if isinstance(found[0], BaseException):
            raise found[0]
        return found[0]

    return result


def paused_fold(monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], None], after: int = 1) -> None:
    """Folding calls meanwhile() when it has changed `after` weights."""
    merge_, calls = dispatch.merge_, []

    def hooked(*args: Any) -> None:
        calls.append(args)
        if len(calls) == after + 1:
            meanwhile()
        merge_(*args)

    monkeypatch.setattr(dispatch, "merge_", hooked)


@pytest.mark.parametrize("default", [None, "r3"])
@pytest.mark.parametrize("what", ["merge_adapter", "unmerge_adapter", "merge_and_unload"])
def test_nothing_is_folded_under_a_running_call(model: Any, batch: Any, default: str | None, what: str) -> None:
    """Also one that names no adapters, with and without a default."""
    model.mlora.set_adapter(default)
    want, before = logits(model, batch), state_hash(model)
    inside, proceed = threading.Event(), threading.Event()
    hook = model.model.layers[0].register_forward_hook(lambda *_: (inside.set(), proceed.wait(60), None)[-1])
    running = in_thread(lambda: logits(model, batch))
    assert inside.wait(60)
    with pytest.raises(errors.AdapterInUseError, match=what):
        getattr(model.mlora, what)(*(["rs16"] if what != "unmerge_adapter" else []))
    proceed.set()
    assert torch.equal(running(), want)
    assert state_hash(model) == before
    hook.remove()
    model.mlora.merge_adapter("rs16")


@pytest.mark.parametrize("default", [None, "r3"])
def test_a_call_waits_for_the_end_of_a_fold(
    model: Any, batch: Any, default: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.mlora.merge_adapter("rs16")
    model.mlora.set_adapter(default)
    want = logits(model, batch)
    model.mlora.unmerge_adapter()
    reached, calls = threading.Event(), []
    model.model.layers[0].register_forward_pre_hook(lambda *_: reached.set())

    def call() -> None:
        calls.append(in_thread(lambda: logits(model, batch)))
        assert not reached.wait(PATIENCE)

    paused_fold(monkeypatch, call)
    model.mlora.merge_adapter("rs16", safe=False)
    assert torch.equal(calls[0](), want)


def test_a_lowering_never_reads_a_half_folded_weight(
    model: Any, batch: Any, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DoRA's norm is of the base, whenever its weight is read."""
    want, loads = logits(model, batch, adapter_names="dora1"), []
    name = model.mlora.adapters["dora1"].modules[0]
    base, has_read = model.mlora.bases[name], threading.Event()
    monkeypatch.setitem(model.mlora.bases, name, replace(base, weight=lambda: (base.weight(), has_read.set())[0]))
    before = model.get_submodule(name).weight.clone()

    def load() -> None:
        assert not torch.equal(model.get_submodule(name).weight, before)
        loads.append(in_thread(lambda: model.mlora.load_adapter(folders["dora1"], "again")))
        assert not has_read.wait(PATIENCE)

    paused_fold(monkeypatch, load, after=5)
    model.mlora.merge_adapter("rs16", safe=False)
    loads[0]()
    model.mlora.unmerge_adapter()
    assert torch.equal(logits(model, batch, adapter_names="again"), want)


def test_a_weight_that_a_lowering_has_read_does_not_change(
    model: Any, batch: Any, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    want = logits(model, batch, adapter_names="dora1")
    name = model.mlora.adapters["dora1"].modules[0]
    base, has_read, proceed = model.mlora.bases[name], threading.Event(), threading.Event()

    def weight() -> torch.Tensor:
        found = base.weight()
        has_read.set()
        proceed.wait(60)
        return found

    monkeypatch.setitem(model.mlora.bases, name, replace(base, weight=weight))
    loaded = in_thread(lambda: model.mlora.load_adapter(folders["dora1"], "again"))
    assert has_read.wait(60)
    model.mlora.merge_adapter("rs16")
    proceed.set()
    loaded()
    model.mlora.unmerge_adapter()
    assert torch.equal(logits(model, batch, adapter_names="again"), want)


def test_a_default_is_not_set_for_weights_that_have_changed(
    model: Any, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the making of its plan and its setting another thread wants to fold something in, and has to wait."""
    want = logits(model, batch, adapter_names="r3")
    planner = model.mlora._router._planner
    acquire, folding, done = planner.acquire, [], threading.Event()

    def hooked(*args: Any) -> Any:
        plan = acquire(*args)
        if not folding:
            folding.append(in_thread(lambda: (model.mlora.merge_adapter("rs16"), done.set())))
            assert not done.wait(0.5)
        return plan

    monkeypatch.setattr(planner, "acquire", hooked)
    model.mlora.set_adapter("r3")
    folding[0]()
    assert model.mlora.merged == {"rs16": 1.0}
    assert_close(logits(model, batch), want)


def test_an_adapter_deleted_before_it_is_served_beside_a_folded_one(
    model: Any, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another thread, between the reading of the entries and the lowering."""
    model.mlora.merge_adapter("dora1")
    bridges = model.mlora._bridges
    make = bridges.make
    monkeypatch.setattr(bridges, "make", lambda recipe: (model.mlora.delete_adapter("r3"), make(recipe)))
    with pytest.raises(errors.UnknownAdapterError, match="no adapter 'r3' is loaded"):
        logits(model, batch, adapter_names="r3")
    assert model.mlora._readers.count == 0
