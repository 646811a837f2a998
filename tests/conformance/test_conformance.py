"""Every type and option in every scenario: what a row gets is what its adapter gives alone, or the adapter is
refused by name. `--conformance-table FILE` writes the verdicts as Markdown."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DENSE, EXACT, REFUSED, SPECS, Spec, make, merged, planted
from conftest import VOCAB, assert_close, build, inputs_for, logits, peft_alone, refused, rewrite, row_of
from torch import Tensor
from transformers import GenerationConfig
from transformers.pytorch_utils import Conv1D

import mlora
from mlora import errors
from mlora.ops import dispatch, fastest

SERVED = tuple(spec for spec in SPECS if spec.verdict != REFUSED)
ON_LLAMA = tuple(spec for spec in SERVED if spec.llama)
CASES = [(spec, model) for spec in SERVED for model in (*["llama"] * spec.llama, *spec.models)]
IDS = [f"{model}-{spec.id}" for spec, model in CASES]
KEYS = ("input_ids", "attention_mask")


class World:
    """One architecture: the bare model, its patched copy, and oracles, made when they are first asked for."""

    def __init__(self, kind: str, root: Path, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.kind, self.root, self.dtype = kind, root, dtype
        self.base = build(kind, dtype)
        self.model = copy.deepcopy(self.base)
        self.runtime = mlora.patch(self.model, memory=8 << 20, **options)
        self.folder = cache(self._folder)
        self.alone = cache(self._alone)
        self.load = cache(self._load)

    def _folder(self, spec: Spec) -> Path:
        return make(self.root / spec.id, spec, self.kind, SPECS.index(spec), self.dtype)

    def _load(self, spec: Spec) -> str:
        """Load the adapter, as whole matrices where it takes that."""
        info = self.runtime.load_adapter(self.folder(spec), spec.name, dense=spec.verdict == DENSE)
        assert not info.errors and (info.dense or spec.verdict != DENSE)
        assert info.peft_type.lower().replace("_", "") in spec.kind.lower().replace("config", "")
        return spec.name

    def _alone(self, spec: Spec) -> Any:
        """A fresh PEFT model. KaSA's base is cut anew: PEFT's SVD of it is in fp32, and what the model answers then is
        up to 1e-5 from the formula in fp64, from which mlora is 2e-6."""
        model = peft_alone(spec.on(self.base), self.folder(spec))
        if spec.options.get("kasa_config") and self.dtype is torch.float32:
            for name, layer in model.named_modules():
                if hasattr(layer, "lora_A"):
                    own = self.base.get_submodule(name.removeprefix("base_model.model."))
                    weight = own.weight.t() if isinstance(own, Conv1D) else own.weight
                    u, s, vh = torch.linalg.svd(weight.detach().double(), full_matrices=False)
                    s[-next(iter(layer.r.values())) :] = 0
                    cut = (u * s) @ vh
                    with torch.no_grad():
                        layer.base_layer.weight.copy_(cut.t() if isinstance(own, Conv1D) else cut)
        return model

    def oracle(self, entry: Any) -> Any:
        if entry is None:
            return self.base
        if isinstance(entry, Spec):
            return self.alone(entry)
        base = merged(self.base, {self.folder(spec): weight for spec, weight in entry.items() if not spec.invocation})
        for spec, weight in entry.items():
            if spec.invocation:  # which PEFT does not merge
                base = peft_alone(base, self.folder(spec), weights=(weight,))
        return base

    def entry(self, entry: Any) -> Any:
        if isinstance(entry, Mapping):
            return {self.load(spec): weight for spec, weight in entry.items()}
        return None if entry is None else self.load(entry)

    def check(self, entries: list[Any], seed: int = 1) -> Tensor:
        """Run one batch and compare each row with its oracle; the rows' own outputs."""
        batch = self.batch(entries, seed)
        got = logits(self.model, batch, adapter_names=[self.entry(entry) for entry in entries])
        for row, entry in enumerate(entries):
            want = logits(self.oracle(entry), row_of(batch, row))
            mine, width = got[row : row + 1], want.shape[-1]
            assert_close(mine[..., :width], want)
            assert not mine[..., width:].isfinite().any()  # of a wider head
            if entry is not None:
                bare = logits(self.base, row_of(batch, row) | self._known(batch, row))
                width = min(width, bare.shape[-1])
                change = (mine[..., :width] - bare[..., :width]).abs().max()
                assert change > 1e-3 * bare.abs().max(), "the adapter must change the answer"
        return got

    def batch(self, entries: list[Any], seed: int = 1) -> dict[str, Tensor]:
        batch = inputs_for(self.kind, len(entries), seed)
        if "input_ids" in batch:
            batch["input_ids"] = planted(batch["input_ids"], entries)
        return batch

    def _known(self, batch: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
        """The row's tokens, where the base has them all."""
        return {"input_ids": batch["input_ids"][row : row + 1].clamp(max=VOCAB - 1)} if "input_ids" in batch else {}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cache(lambda kind: World(kind, tmp_path_factory.mktemp(kind)))


def partners(spec: Spec, kind: str, count: int, summed: bool = False) -> list[Spec]:
    """Other served adapters of the model, of types other than `spec`'s, chosen by its place in the list; with `summed`
    such as are in sums."""
    others = [s for s, model in CASES if model == kind and s.kind != spec.kind and not (summed and s.size)]
    start = SPECS.index(spec) * 5
    return [others[(start + 7 * i) % len(others)] for i in range(count)]


@pytest.mark.parametrize(("spec", "kind"), CASES, ids=IDS)
def test_alone(worlds: Any, verdicts: Any, spec: Spec, kind: str) -> None:
    with verdicts(spec.name, kind, "single", spec.verdict):
        worlds(kind).check([spec])


@pytest.mark.parametrize(("spec", "kind"), CASES, ids=IDS)
def test_beside_base_rows_and_other_types(worlds: Any, verdicts: Any, spec: Spec, kind: str) -> None:
    world = worlds(kind)
    first, second = partners(spec, kind, 2)
    entries = [None, spec, first, spec, None, second, spec]
    with verdicts(spec.name, kind, "mixed", spec.verdict):
        got = world.check(entries)
        # Another order of the same rows gives each the same answer.
        order = [4, 2, 6, 0, 5, 3, 1]
        batch = {key: value[order] for key, value in world.batch(entries).items()}
        again = logits(world.model, batch, adapter_names=[world.entry(entries[i]) for i in order])
        finite = again.isfinite()
        assert torch.equal(finite, got[order].isfinite())
        assert_close(again[finite], got[order][finite], 1e-6)


PACKABLE = ("llama", "qwen2", "gpt2", "qwen2moe")
PACKED = [(spec, model) for spec, model in CASES if model in PACKABLE]


@pytest.mark.parametrize(("spec", "kind"), PACKED, ids=[f"{model}-{spec.id}" for spec, model in PACKED])
def test_packed(worlds: Any, verdicts: Any, spec: Spec, kind: str) -> None:
    """Sequences one behind another in one row; the head gets all tokens, or some, in another order and one twice."""
    world = worlds(kind)
    first, second = partners(spec, kind, 2)
    entries: list[Any] = [spec, None, first, spec, second, spec if spec.size else {spec: 0.7}]
    with verdicts(spec.name, kind, "packed", spec.verdict):
        rows = [row[mask.bool()] for row, mask in zip(*(world.batch(entries)[k] for k in KEYS), strict=True)]
        rows = [row[: max(5, len(row) - 2 * index)] for index, row in enumerate(rows)]  # invocations lie within 5
        want = []
        for row, entry in zip(rows, entries, strict=True):
            batch = {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]}
            want += logits(world.oracle(entry), batch)[0]
        lengths = [len(row) for row in rows]
        ids, positions = torch.cat(rows)[None], torch.cat([torch.arange(length) for length in lengths])[None]
        picks = [sum(lengths) - 1, lengths[0] - 1, 0, sum(lengths[:3]), lengths[0] - 1]
        named = [world.entry(entry) for entry in entries]
        with torch.no_grad(), world.runtime.use_adapters(named, lengths=lengths):
            batch = {"input_ids": ids, "position_ids": positions, "use_cache": False}
            whole = world.model(**batch).logits[0]
            picked = world.model(**batch, logits_to_keep=torch.tensor(picks)).logits[0]
        for got, wanted in ((whole, want), (picked, [want[index] for index in picks])):
            assert len(got) == len(wanted)
            for mine, alone in zip(got, wanted, strict=True):
                assert_close(mine[: len(alone)], alone)
                assert not mine[len(alone) :].isfinite().any()


@pytest.mark.parametrize(("spec", "kind"), CASES, ids=IDS)
def test_weighted(worlds: Any, verdicts: Any, spec: Spec, kind: str) -> None:
    world = worlds(kind)
    first, second = partners(spec, kind, 2, summed=True)
    entries: list[Any] = [{spec: 0.6}, {spec: -0.5, first: 1.2}, {spec: 0.3, first: 0.4, second: 0.5}]
    with verdicts(spec.name, kind, "weighted", REFUSED if spec.size else spec.verdict):
        if not spec.size:
            world.check(entries)
            return
        named = [world.entry(entry) for entry in entries]
        with refused(world.model, errors.EntryError, "another size", spec.name):
            world.model(**world.batch(entries), adapter_names=named)


# Those whose blob holds the tensors of their file and nothing else.
FORMED = {
    "LoRA", "rsLoRA", "LoRA with rank and alpha patterns", "MiCA", "LoRA, orthogonal init", "EVA", "aLoRA",
    "PiSSA, converted", "PiSSA with rsLoRA, converted", "OLoRA, converted",
    "LoRA with linears' weights as target parameters",
    "LoRA with a trained classifier",  # which Llama here does not have
}  # fmt: skip
ONES = [(spec, model) for spec, model in CASES if model == "llama" or spec.name == "LoRA"]


@pytest.mark.parametrize(("spec", "kind"), ONES, ids=[f"{model}-{spec.id}" for spec, model in ONES])
def test_another_of_its_form(worlds: Any, tmp_path: Path, spec: Spec, kind: str) -> None:
    """A file of other numbers, packed by the form of one that came before, is what it is by itself, to the bit."""
    world = worlds(kind)
    runtime, options = world.runtime, {"dense": spec.verdict == DENSE}
    forms = runtime._tiers._forms._known
    forms.clear()

    def load(number: int) -> Any:
        def scaled(state: dict[str, Tensor]) -> dict[str, Tensor]:
            return {key: tensor / number if ".lora_" in key else tensor for key, tensor in state.items()}

        folder = tmp_path / str(number)
        if not folder.exists():
            rewrite(world.folder(spec), folder, tensors=scaled)
        runtime.load_adapter(folder, "another", **options)
        packed, adapter = runtime._store["another"], runtime._registry.adapter("another")
        info = runtime.adapter("another")
        tensors = {key: tensor.clone() for key, tensor in adapter.tensors.items()}
        runtime.delete_adapter("another")
        return packed, info, tensors, dict(adapter.config)

    load(2)
    assert len(forms) == (spec.name in FORMED and kind != "conv")
    got = load(4)
    forms.clear()
    wanted = load(4)
    assert got[0].blob.equal(wanted[0].blob) and (got[0].rows == wanted[0].rows).all()
    assert (got[0].touches == wanted[0].touches).all()
    for name in ("cuts", "heads", "trained", "rests", "invocation"):
        assert getattr(got[0], name) == getattr(wanted[0], name)
    assert got[1] == wanted[1] and got[3] == wanted[3] and got[2].keys() == wanted[2].keys()
    assert all(tensor.equal(wanted[2][key]) for key, tensor in got[2].items())


@pytest.fixture(scope="module")
def always(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Base products in mlora's own order, whether that is faster or not."""
    with pytest.MonkeyPatch.context() as patch:
        own = lambda _in, _out, _bias, tokens, dtype: dispatch.ALONG if dispatch.offered(tokens, dtype) else 0  # noqa: E731
        patch.setattr(fastest, "probe", own)
        yield World("llama", tmp_path_factory.mktemp("always"), fused="always")


@pytest.mark.parametrize("name", ("LoRA", "DoRA", "IA3", "LoHa", "RoAd 1", "aLoRA", "VeRA"))
def test_in_an_order_of_its_own(always: World, name: str) -> None:
    spec = next(spec for spec in SPECS if spec.name == name)
    first, second = partners(spec, "llama", 2)
    always.check([None, spec, first, None, spec, second])


@pytest.mark.parametrize("kind", ("llama", "gpt2", "conv"))
def test_an_input_gain_and_an_output_gain_in_one_row(worlds: Any, kind: str) -> None:
    """Weighted rows of IA3 and DoRA on the same modules, the last of which IA3 scales the inputs of: the base is wanted
    of both u * x and x. Rows of either alone stand beside them."""
    ia3, dora = (next(spec for spec in SPECS if spec.name == name) for name in ("IA3", "DoRA"))
    entries = [{ia3: 1.0, dora: 1.0}, ia3, {dora: 1.5, ia3: 0.7}, None, dora, {ia3: -0.6, dora: 0.8}]
    worlds(kind).check(entries, seed=3)


@pytest.mark.parametrize("kind", ("llama", "bert"))
def test_turns_of_either_side_and_gains_in_one_row(worlds: Any, kind: str) -> None:
    """Weighted rows in which RoAd turns what DoRA scales, or what the base makes of an input that OFT turned; turns of
    blocks of other sizes meet, and rows of each alone stand beside."""
    road, other, oft, cayley, ia3, dora = (
        next(spec for spec in SPECS if spec.name == name)
        for name in ("RoAd 1", "RoAd 4", "OFT", "OFT, exact Cayley", "IA3", "DoRA")
    )
    entries: list[Any] = [{road: 0.7, oft: 0.5}, oft, road, {road: 0.8, dora: 0.6}, None]
    entries += [{oft: 1.0, dora: 0.5, ia3: 0.4}, {road: 0.5, other: -0.4}, {oft: 0.6, cayley: 0.6}, dora]
    entries += [{road: 0.5, other: 0.4, oft: 0.3, cayley: 0.3, ia3: 0.9}]
    worlds(kind).check(entries, seed=4)
    for entry in entries:  # what one row needs, the others' may hide
        worlds(kind).check([entry, None], seed=5)


@pytest.mark.parametrize("kind", sorted({spec.kind for spec in ON_LLAMA}))
def test_mixed_within_a_type(worlds: Any, kind: str) -> None:
    specs = [spec for spec in ON_LLAMA if spec.kind == kind]
    worlds("llama").check([*specs, None, *specs[::-1]], seed=2)


NEW = 4


@pytest.mark.parametrize("beams", (1, 3), ids=("greedy", "beams"))
@pytest.mark.parametrize("spec", ON_LLAMA, ids=[spec.id for spec in ON_LLAMA])
def test_generate(worlds: Any, verdicts: Any, spec: Spec, beams: int) -> None:
    world = worlds("llama")
    other = partners(spec, "llama", 1)[0]
    entries = [spec, None, other, spec]
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, VOCAB, (len(entries), 6), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, :2] = mask[0, :2] = 0
    batch = {"input_ids": planted(ids, entries), "attention_mask": mask}
    options = {"max_new_tokens": NEW, "num_beams": beams, "do_sample": False}
    with verdicts(spec.name, "llama", "generate", spec.verdict):
        got = world.model.generate(**batch, **options, adapter_names=[world.entry(entry) for entry in entries])
        for row, entry in enumerate(entries):
            one, how = row_of(batch, row), options
            if entry is not None and entry.invocation and beams > 1:  # which PEFT does not find for beams itself
                start = max(at for at, token in enumerate(one["input_ids"][0].tolist()) if token == entry.invocation[0])
                how = {"generation_config": GenerationConfig(**options, pad_token_id=0)}
                how["alora_offsets"] = [one["input_ids"].shape[1] - start] * beams
            want = world.oracle(entry).generate(**one, **how)
            assert torch.equal(got[row : row + 1], want), f"row {row}"


@pytest.mark.parametrize("spec", ON_LLAMA, ids=[spec.id for spec in ON_LLAMA])
def test_bf16_is_within_twice_pefts_own_error(worlds: Any, halves: World, verdicts: Any, spec: Spec) -> None:
    wide = worlds("llama")
    batch = wide.batch([spec] * 6)
    with verdicts(spec.name, "llama", "bf16", spec.verdict):
        folder = halves.folder(spec)
        oracle = logits(peft_alone(spec.on(copy.deepcopy(halves.base).float()), folder), batch).double()
        theirs = logits(peft_alone(spec.on(halves.base), folder), batch).double()
        name = halves.runtime.load_adapter(folder, spec.name, dense=spec.verdict == DENSE).name
        ours = logits(halves.model, batch, adapter_names=[name] * 6).double()
        error, allowed = (ours - oracle).norm().item(), (theirs - oracle).norm().item()
        assert 0 < error <= 2 * allowed, f"{error:.3g} from the oracle, PEFT {allowed:.3g}"


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World("llama", tmp_path_factory.mktemp("bf16"), torch.bfloat16)


NOT_EXACT = tuple(spec for spec in SPECS if spec.verdict != EXACT)


@pytest.mark.parametrize("spec", NOT_EXACT, ids=[spec.id for spec in NOT_EXACT])
def test_refusals_name_their_reason(worlds: Any, verdicts: Any, spec: Spec) -> None:
    world = worlds("llama")
    with (
        verdicts(spec.name, "llama", "refusal", spec.verdict),
        refused(world.model, errors.UnsupportedAdapterError, spec.reason),
    ):
        world.runtime.load_adapter(world.folder(spec), "refused")


# The gains of BOFT stay exact, and only what mixes features is approximated.
DENSED = tuple(spec for spec in SPECS if spec.verdict == DENSE and spec.kind != "BOFTConfig")


@pytest.mark.parametrize("spec", DENSED, ids=[spec.id for spec in DENSED])
def test_an_approximation_is_the_best_of_its_rank_and_tells_its_error(worlds: Any, spec: Spec) -> None:
    world = worlds("llama")
    rank = 6
    info = world.runtime.load_adapter(world.folder(spec), f"{spec.name} at {rank}", approximate=rank)
    oracle = world.alone(spec)
    assert rank in info.ranks and info.errors
    for name in info.modules:
        base, layer = world.base.get_submodule(name), oracle.get_base_model().get_submodule(name)
        eye = torch.eye(base.in_features)
        with torch.no_grad():
            delta = (layer(eye) - layer(0 * eye) - base(eye) + base(0 * eye)).t().double()
        values = torch.linalg.svdvals(delta)
        if name in info.errors:
            wanted = (values[rank:].norm() / values.norm()).item()
            assert info.errors[name] == pytest.approx(wanted, rel=1e-3)
        else:  # few numbers, which a few rank rows hold exactly
            assert values[max(info.ranks) :].norm() <= 1e-5 * values.norm()
    assert f"{info.error:.1e}" in world.runtime.status()
    world.runtime.delete_adapter(info.name)


WHOLE = tuple(spec for spec in SPECS if spec.verdict == DENSE)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("spec", WHOLE, ids=[spec.id for spec in WHOLE])
def test_a_whole_matrix_is_folded_saved_and_loaded_again(
    worlds: Any, halves: World, tmp_path: Path, spec: Spec, dtype: torch.dtype
) -> None:
    wide, world = worlds("llama"), worlds("llama") if dtype is torch.float32 else halves
    runtime, batch = world.runtime, wide.batch([None] * 3)
    # PEFT keeps the V of a FRoD's file and takes the rest from the base that it loads it on: they must be one's.
    folder = (world if spec.kind == "FrodConfig" else wide).folder(spec)
    name = runtime.load_adapter(folder, f"{spec.name} of {dtype}", dense=True).name
    got = logits(world.model, batch, adapter_names=name)

    runtime.save_adapter(name, tmp_path / "saved")
    again = runtime.load_adapter(tmp_path / "saved", "again", dense=True)
    assert torch.equal(logits(world.model, batch, adapter_names="again"), got)
    merged = runtime.add_weighted_adapter([name], [1.0], "merged", "cat")
    assert merged.peft_type == "DELTA" and merged.dense == again.dense
    runtime.save_adapter("merged", tmp_path / "merged")
    runtime.load_adapter(tmp_path / "merged", "merged again")
    assert torch.equal(*(logits(world.model, batch, adapter_names=one) for one in ("merged", "merged again")))

    before = {key: value.clone() for key, value in world.model.state_dict().items()}
    runtime.merge_adapter(name)
    folded = logits(world.model, batch)
    runtime.unmerge_adapter()
    assert all(torch.equal(value, before[key]) for key, value in world.model.state_dict().items())
    for one in (name, "again", "merged", "merged again"):
        runtime.delete_adapter(one)

    exact = logits(peft_alone(copy.deepcopy(world.base).float(), folder), batch).double()
    if dtype is torch.float32:
        assert_close(got, exact.float())
        assert_close(folded, exact.float())
        return
    theirs = peft_alone(world.base, folder)
    allowed = (logits(theirs, batch).double() - exact).norm()
    assert (got.double() - exact).norm() <= 2 * allowed
    allowed = (logits(theirs.merge_and_unload(), batch).double() - exact).norm()
    assert (folded.double() - exact).norm() <= 2 * allowed
