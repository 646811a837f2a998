"""Merges of a patched model's adapters: as new adapters and as entries of a batch."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_close, formula, logits, row_of, served, state_hash

from mlora import Adapter, Merge, errors, patch
from mlora.lowering import lower, to_adapter
from mlora.lowering.delta import Delta
from mlora.merge import COMBINATION_TYPES


@pytest.fixture
def model(llama: Any, folders: dict[str, Path]) -> Any:
    return served(llama, folders)


# As new adapters


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
@pytest.mark.parametrize("weights", [{"r3": 0.7, "rs16": -0.4}, {"dora1": 0.5, "bias8": 1.5, "r3": 1.0}])
def test_a_weighted_adapter_is_the_sum_of_its_sources(
    model: Any, llama: Any, folders: dict[str, Path], batch: Any, kind: str, weights: dict[str, float]
) -> None:
    """Ranks, rsLoRA, DoRA and biases all count, which PEFT's own drops or distorts."""
    rank = {"svd_rank": 64} if kind == "svd" else {}
    info = model.mlora.add_weighted_adapter(list(weights), list(weights.values()), "new", kind, **rank)
    want = logits(formula(llama, {folders[name]: w for name, w in weights.items()}), batch)
    assert_close(logits(model, batch, adapter_names="new"), want)
    assert info.error < 1e-5 and model.mlora.adapters["new"].source.startswith(("linear(", "svd("))


@pytest.mark.parametrize(
    "weights", [{"r3": 0.7, "rs16": -0.4}, {"dora1": 0.5, "bias8": 1.5}, {"bias8": 1.0, "r3": 2.0}]
)
def test_a_weighted_adapter_can_be_saved_and_loaded_again(
    model: Any, batch: Any, tmp_path: Path, weights: dict[str, float]
) -> None:
    runtime = model.mlora
    runtime.add_weighted_adapter(list(weights), list(weights.values()), "new")
    runtime.save_adapter("new", tmp_path / "new")
    runtime.load_adapter(tmp_path / "new", "again")
    again = logits(model, batch, adapter_names="again")
    assert torch.equal(again, logits(model, batch, adapter_names="new"))
    kind = json.loads((tmp_path / "new" / "adapter_config.json").read_text())["peft_type"]
    assert kind == ("DELTA" if "dora1" in weights else "LORA")


def test_peft_reads_a_merged_lora(model: Any, llama: Any, batch: Any, tmp_path: Path) -> None:
    from conftest import peft_alone

    model.mlora.add_weighted_adapter(["r3", "rs16", "bias8"], [0.7, -0.4, 1.0], "new")
    model.mlora.save_adapter("new", tmp_path / "new")
    assert_close(logits(model, batch, adapter_names="new"), logits(peft_alone(llama, tmp_path / "new"), batch))


def test_the_error_of_a_cut_is_reported(model: Any) -> None:
    info = model.mlora.add_weighted_adapter(["r3", "rs16"], [1.0, 1.0], "new", "ties", density=0.5, svd_rank=2)
    assert info.rank == 2 and 0.1 < info.error < 1
    assert "new" in model.mlora.status()


def test_a_merge_of_merges(model: Any, batch: Any) -> None:
    model.mlora.add_weighted_adapter(["r3", "rs16"], [1.0, 0.5], "one")
    model.mlora.add_weighted_adapter(["one", "r3"], [1.0, -1.0], "two")
    assert_close(logits(model, batch, adapter_names="two"), logits(model, batch, adapter_names={"rs16": 0.5}))


@pytest.mark.parametrize(
    "change, error, wanted",
    [
        ({"adapter_name": "r3"}, errors.DuplicateAdapterError, "'r3'"),
        ({"adapters": ["r3", "nobody"]}, errors.UnknownAdapterError, "'nobody'"),
        ({"weights": [1.0]}, errors.MergeError, "1 weights for 2"),
        ({"weights": None}, errors.MergeError, "0 weights for 2"),
        ({"combination_type": "average"}, errors.MergeError, "'average'"),
        ({"desnity": 0.5}, errors.MergeError, "no 'desnity'; it takes .*density"),
        ({"space": "factor"}, errors.MergeError, r"equal ranks.*\[3, 16\]"),
        ({"adapters": ["r3", "dora1"], "space": "factor"}, errors.MergeError, "a gain, a turn or a bias"),
    ],
)
def test_bad_merges_change_nothing(model: Any, change: dict[str, Any], error: Any, wanted: str) -> None:
    before = dict(model.mlora.adapters), state_hash(model)
    with pytest.raises(error, match=wanted):
        model.mlora.add_weighted_adapter(
            **{"adapters": ["r3", "rs16"], "weights": [1.0, 1.0], "adapter_name": "new", **change}
        )
    assert (dict(model.mlora.adapters), state_hash(model)) == before


# To nothing


class Kinds(torch.nn.Module):
    """A token embedding, a linear, a norm and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(11, 8)
        self.linear = torch.nn.Linear(8, 6)
        self.norm = torch.nn.LayerNorm(6)
        self.conv = torch.nn.Conv1d(6, 4, 3)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.tokens

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.conv(self.norm(self.linear(self.tokens(ids))).transpose(1, 2))


SHAPES = {
    "tokens.lora_embedding_A": (2, 11), "tokens.lora_embedding_B": (8, 2), "linear.lora_A.weight": (2, 8),
    "linear.lora_B.weight": (6, 2), "conv.lora_A.weight": (2, 6, 3), "conv.lora_B.weight": (4, 2, 1),
}  # fmt: skip


def kinds_adapter(seed: int, fresh: bool = False, alpha: int = 4) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    tensors = {key: torch.randn(shape, generator=draw) for key, shape in SHAPES.items()}
    for key in ("tokens.lora_embedding_A", "linear.lora_B.weight", "conv.lora_B.weight"):
        tensors[key] *= not fresh
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": alpha, "target_modules": ["tokens", "linear", "conv"]}
    return Adapter(config, tensors)


@pytest.fixture
def kinds() -> Any:
    torch.manual_seed(0)
    model = Kinds().eval()
    runtime = patch(model)
    runtime.add_adapter("one", kinds_adapter(1))
    runtime.add_adapter("same", kinds_adapter(1))
    for name, made in {"fresh": kinds_adapter(2, fresh=True), "scaled": kinds_adapter(3, alpha=0)}.items():
        runtime.add_adapter(name, made)
    norm = {
        "norm.ln_tuning_layers.weight": model.norm.weight.detach().clone(),
        "norm.ln_tuning_layers.bias": torch.zeros(6),
    }
    runtime.add_adapter("norm", Adapter({"peft_type": "LN_TUNING", "target_modules": ["norm"]}, norm))
    return model


@pytest.mark.parametrize("kind", COMBINATION_TYPES)
@pytest.mark.parametrize(
    "names, weights",
    [(["one", "same"], [1, -1]), (["fresh", "scaled"], [1, 2]), (["norm", "fresh"], [1, 1]), (["norm"], [2])],
)
def test_a_merge_to_nothing_changes_nothing(
    kinds: Any, tmp_path: Path, kind: str, names: list[str], weights: list[float]
) -> None:
    if "dare" in kind and "one" in names:
        pytest.skip("masks differ by name, so this is not zero")
    runtime, ids = kinds.mlora, torch.arange(10).view(2, 5)
    how = Merge(names, weights, kind, density=0.5 if "_" in kind or kind == "ties" else None)
    with torch.no_grad():
        bare = kinds(ids)
        info = runtime.add_merge("new", how)
        assert info.zero and "its delta is zero" in runtime.status()
        assert torch.equal(kinds(ids, adapter_names="new"), bare)
        asked = kinds(ids, adapter_names=how)
        if how.is_sum:  # its terms are added up in the kernel
            assert_close(asked, bare)
        else:
            assert torch.equal(asked, bare)
        runtime.save_adapter("new", tmp_path / "new")
        assert runtime.load_adapter(tmp_path / "new", "again").zero
        assert torch.equal(kinds(ids, adapter_names="again"), bare)


def test_which_adapters_are_zero(kinds: Any) -> None:
    zero = {name: info.zero for name, info in kinds.mlora.adapters.items()}
    assert zero == {"one": False, "same": False, "fresh": True, "scaled": True, "norm": True}


def test_what_nearly_cancels_is_kept(kinds: Any) -> None:
    """Weights whose sum is not zero, though their largest digits cancel."""
    info = kinds.mlora.add_weighted_adapter(["one", "same"], [1.0, -1 + 2**-20], "new")
    assert not info.zero
    ids = torch.arange(10).view(2, 5)
    got, want = (kinds(ids, adapter_names=entry) for entry in ("new", {"one": 2.0**-20}))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


# As entries


def test_a_merge_in_a_batch_equals_the_merge_made_by_hand(model: Any, batch: Any) -> None:
    merge = Merge(["r3", "rs16"], [0.7, 0.3], "ties", density=0.5)
    model.mlora.add_weighted_adapter(["r3", "rs16"], [0.7, 0.3], "by hand", "ties", density=0.5)
    as_json = {"ids": ["rs16", "r3"], "weights": [0.3, 0.7], "merge_strategy": "ties", "density": 0.5}
    mixed = logits(model, batch, adapter_names=[merge, None, "by hand", as_json])
    for row, name in enumerate(["by hand", None, "by hand", "by hand"]):
        assert_close(mixed[row : row + 1], logits(model, row_of(batch, row), adapter_names=name))


def test_equal_merges_share_one_route_and_are_computed_once(
    model: Any, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, made = model.mlora, []
    merge_one = runtime._registry.add_merge
    monkeypatch.setattr(runtime._registry, "add_merge", lambda *a: (made.append(a), merge_one(*a))[1])
    a, b = (Merge(n, w, "ties", density=1.0) for n, w in ((["r3", "rs16"], [1, 2]), (["rs16", "r3"], [2, 1])))
    with runtime.use_adapters([a, b, "r3", b]):
        plan = runtime._shared.local.plan
        assert plan.tensors[0][:3].tolist() == [4, 2, 2]
    logits(model, batch, adapter_names=a)
    assert len(made) == 1


def test_a_linear_merge_is_a_weighted_entry(model: Any, batch: Any) -> None:
    before = set(model.mlora.adapters)
    merged = logits(model, batch, adapter_names=Merge(["dora1", "r3", "r3"], [0.5, 0.25, 0.25], normalize=True))
    assert torch.equal(merged, logits(model, batch, adapter_names={"dora1": 0.5, "r3": 0.5}))
    assert set(model.mlora.adapters) == before


def test_a_merge_goes_with_its_sources(model: Any, folders: dict[str, Path], batch: Any) -> None:
    runtime, merge = model.mlora, Merge(["r3", "rs16"], [1, 1], "ties", density=0.5)
    old = logits(model, batch, adapter_names=merge)
    with runtime.use_adapters(merge), pytest.raises(errors.AdapterInUseError, match="ties"):
        runtime.delete_adapter("r3")
    assert "r3" in runtime.adapters
    runtime.delete_adapter("r3")
    assert merge.label not in runtime.adapters
    with pytest.raises(errors.UnknownAdapterError, match="'r3'"):
        logits(model, batch, adapter_names=merge)
    runtime.load_adapter(folders["bias8"], "r3")  # another adapter of that name
    assert not torch.equal(logits(model, batch, adapter_names=merge), old)


def test_merges_of_merges_go_together(model: Any, batch: Any) -> None:
    one = Merge(["r3", "rs16"], [1, 1], "ties", density=0.5)
    logits(model, batch, adapter_names=one)
    logits(model, batch, adapter_names=Merge(["r3", one.label], [1, 1], "ties", density=0.5))
    model.mlora.delete_adapter("r3")
    assert set(model.mlora.adapters) == {"rs16", "dora1", "bias8"}


def test_merges_in_generate_and_as_default(model: Any) -> None:
    ids = torch.randint(2, 60, (2, 5), generator=torch.Generator().manual_seed(0))
    merge = Merge(["r3", "rs16"], [2, 2], "magnitude_prune", density=0.4)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    routed = model.generate(ids, adapter_names=[merge, None], num_beams=2, **options)
    with model.mlora.use_adapters(merge):
        assert torch.equal(model.generate(ids, num_beams=2, **options)[0], routed[0])
    model.mlora.set_adapter(merge)
    assert torch.equal(model.generate(ids, num_beams=2, **options)[0], routed[0])
    model.mlora.set_adapter(None)


def few_merges(llama: Any, folders: dict[str, Path], most: int) -> Any:
    model = copy.deepcopy(llama)
    runtime = patch(model, max_merges=most)
    for name in ("r3", "rs16"):
        runtime.load_adapter(folders[name], name)
    return model


def pruned(density: float) -> Merge:
    return Merge(["r3", "rs16"], [1, 1], "magnitude_prune", density=density)


def test_merges_that_were_not_used_for_longest_are_forgotten(llama: Any, folders: dict[str, Path], batch: Any) -> None:
    model = few_merges(llama, folders, 2)
    first, second, third = (pruned(density) for density in (0.3, 0.5, 0.7))
    want = logits(model, batch, adapter_names=first)
    logits(model, batch, adapter_names=second)
    logits(model, batch, adapter_names=first)
    logits(model, batch, adapter_names=third)
    assert set(model.mlora.adapters) == {"r3", "rs16", first.label, third.label}
    logits(model, batch, adapter_names=second)
    assert set(model.mlora.adapters) == {"r3", "rs16", third.label, second.label}
    assert_close(logits(model, batch, adapter_names=first), want)  # computed again
    model.mlora.add_merge("by hand", pruned(0.9))
    logits(model, batch, adapter_names=second)
    assert "by hand" in model.mlora.adapters


def test_merges_in_use_are_not_forgotten(llama: Any, folders: dict[str, Path], batch: Any) -> None:
    model = few_merges(llama, folders, 0)
    many = [pruned(density) for density in (0.3, 0.5, 0.7, 0.9)]
    mixed = logits(model, batch, adapter_names=many)
    for row, merge in enumerate(many):
        assert_close(mixed[row : row + 1], logits(model, row_of(batch, row), adapter_names=merge))
    model.mlora.set_adapter(many[0])
    logits(model, batch, adapter_names=many[1])
    assert_close(logits(model, batch)[:1], mixed[:1])
    model.mlora.set_adapter(None)
    model.mlora.merge_adapter(many[2])
    logits(model, batch, adapter_names=many[1])
    assert many[2].label in model.mlora.adapters
    assert_close(logits(model, batch)[2:3], mixed[2:3])
    with pytest.raises(errors.PatchError, match="max_merges=-1"):
        patch(copy.deepcopy(llama), max_merges=-1)


def test_threads_that_forget_each_others_merges(llama: Any, folders: dict[str, Path], batch: Any) -> None:
    model = few_merges(llama, folders, 1)
    merges = [pruned(density) for density in (0.3, 0.5, 0.7)]
    want = [logits(model, batch, adapter_names=merge) for merge in merges]
    found: list[tuple[int, torch.Tensor]] = []

    def ask(start: int) -> None:
        for i in range(6):
            at = (start + i) % 3
            found.append((at, logits(model, batch, adapter_names=merges[at])))

    threads = [threading.Thread(target=ask, args=(start,)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 18
    for at, got in found:
        assert_close(got, want[at])


def test_threads_that_ask_for_one_merge(model: Any, batch: Any) -> None:
    merge, results = Merge(["r3", "rs16"], [1, 1], "dare_ties", density=0.5), []

    def ask() -> None:
        results.append(logits(model, batch, adapter_names=merge))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(torch.equal(r, results[0]) for r in results)


def test_a_bad_merge_in_a_batch_changes_nothing(model: Any, batch: Any) -> None:
    with pytest.raises(errors.MergeError, match="density is None"):
        logits(model, batch, adapter_names=[{"ids": ["r3"], "merge_strategy": "ties"}, None, None, None])
    assert torch.equal(logits(model, batch), logits(model, batch, adapter_names=None))


# The form that holds any merge


def test_any_delta_can_be_written_as_an_adapter(model: Any) -> None:
    bases = model.mlora.bases
    name, base = next((n, b) for n, b in bases.items() if b.in_features != b.out_features and b.embed_scale is None)
    draw = torch.Generator().manual_seed(0)
    parts = {
        "a": torch.randn(2, base.in_features, generator=draw),
        "b": torch.randn(2, base.out_features, generator=draw),
        "gain": torch.randn(base.out_features, generator=draw),
        "in_gain": torch.randn(base.in_features, generator=draw),
        "shift": torch.randn(base.out_features, generator=draw),
    }
    for without in parts:
        delta = Delta(
            scale=0.5, **{k: v for k, v in parts.items() if k != without and not (without in "ab" and k in "ab")}
        )
        (back,) = lower(to_adapter({name: delta}, "test", bases), bases).deltas.values()
        for part in parts:
            want, got = getattr(delta, part), getattr(back, part)
            assert (want is None) == (got is None)
            if want is not None and part != "b":
                assert torch.equal(want, got)
        if delta.b is not None and back.b is not None:
            assert torch.equal(delta.b * 0.5, back.b * back.scale)
