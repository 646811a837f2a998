"""Models that transformers has split over processes: what a row gets is what it gets of the model in one process.

The processes are two and four with gloo on the CPU; one start of each runs all cases. The oracle is mlora in one
process, which the conformance suite compares with PEFT, and of plain LoRAs PEFT itself.
"""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DENSE, REFUSED, SPECS, TARGETS, Spec, make
from conftest import BUILDERS, VOCAB, _causal, assert_close, build, logits, make_adapter, peft_alone
from process import Case
from safetensors.torch import load_file
from torch import Tensor

import mlora

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.randint(2, VOCAB, (4, 7), generator=torch.Generator().manual_seed(3))

MODELS = {
    "llama": lambda: _causal("LlamaConfig", num_key_value_heads=4),
    "biased": lambda: _causal("LlamaConfig", num_key_value_heads=4, attention_bias=True, mlp_bias=True),
    "qwen3": lambda: _causal("Qwen3Config", num_key_value_heads=4),
    "mixtral": lambda: _causal(
        "MixtralConfig", num_key_value_heads=4, num_local_experts=4, num_experts_per_tok=2
    ),
    "qwen3moe": lambda: _causal(
        "Qwen3MoeConfig", num_key_value_heads=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        decoder_sparse_step=2, norm_topk_prob=True,
    ),
}  # fmt: skip
"""Of conftest's, with as many heads of keys as four processes can divide."""

# A type is refused where it turns blocks that a cut would divide, or brings a head of another size.
NOT_SPLIT = {
    "LoRA with a vocabulary of another size": "weights of another size",
    "OFT, one block": "multiples of",
    "RoAd 4": "multiples of",
}
LORAS: dict[str, dict[str, Any]] = {
    "seven": {"r": 4, "lora_alpha": 6, "target_modules": SEVEN},
    "bias": {"r": 3, "lora_alpha": 5, "lora_bias": True, "target_modules": ["q_proj", "o_proj", "down_proj"]},
    "dora": {"r": 2, "lora_alpha": 3, "use_dora": True, "target_modules": SEVEN},
    "head": {"r": 4, "lora_alpha": 6, "target_modules": ["lm_head", "embed_tokens", "o_proj"]},
    "heads' norms": {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "modules_to_save": ["q_norm", "k_norm"]},
    "norms": {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
    "all biases": {"r": 2, "lora_alpha": 3, "bias": "all", "target_modules": SEVEN},
    "experts": {
        "r": 2, "lora_alpha": 3, "target_modules": ["o_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    },
    "router": {"r": 2, "lora_alpha": 3, "target_modules": ["v_proj"], "target_parameters": ["mlp.gate.weight"]},
}  # fmt: skip
ON = {
    "llama": ("seven", "bias", "dora", "head"),
    "biased": ("seven", "bias", "dora", "all biases"),
    "qwen3": ("seven", "dora", "heads' norms"),
    "mixtral": ("experts", "router"),
    "qwen3moe": ("seven", "experts"),
}


# Of the conformance suite's types on Llama one form of each, and those of LoRA that take something else of a module.
MORE = (
    "DoRA", "LoRA with lora_bias", "LoRA with bias all", "DoRA with bias lora_only", "KaSA", "BdLoRA", "PiSSA", "OLoRA",
    "LoRA with a trained lm_head", "LoRA with trained embeddings", "LoRA with trained tokens", "DoRA of embeddings",
    "LoRA with other trained tokens in the head", "LoRA with a vocabulary of another size", "aLoRA", "OFT, one block",
    "LoRA with linears' weights as target parameters", "RoAd 4",
)  # fmt: skip
SPECIFIC = [
    spec
    for spec in SPECS
    if spec.llama
    and spec.verdict != REFUSED
    and (spec.name in MORE or spec is next(other for other in SPECS if other.kind == spec.kind and other.llama))
]


TO_EACH = {"ep_implementation": "all_to_all"}


class Setting:
    """The models, their adapters, and the oracles, on disk for the processes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base = cache(self._base)
        self.served = cache(self._served)
        self.lora = cache(self._lora)
        self.spec = cache(self._spec)

    def _base(self, kind: str) -> Any:
        model = build(kind)
        model.save_pretrained(self.root / kind)
        return model

    def _served(self, kind: str) -> Any:
        model = copy.deepcopy(self.base(kind))
        mlora.patch(model, memory=8 << 20)
        return model

    def folder(self, kind: str) -> str:
        self.base(kind)
        return str(self.root / kind)

    def _lora(self, kind: str, name: str) -> Path:
        folder = self.root / f"{kind} {name}"
        return make_adapter(folder, self.base(kind), len(name), **LORAS[name])

    def _spec(self, spec: Spec) -> Path:
        return make(self.root / spec.id, spec, "llama", SPECS.index(spec))

    def one(self, kind: str, loads: Mapping[str, Any], entries: list[Any], ids: Tensor = IDS) -> Tensor:
        """What mlora gives in one process."""
        runtime = self.served(kind).mlora
        for name, (folder, options) in loads.items():
            runtime.load_adapter(folder, name, **options)
        out = logits(self.served(kind), {"input_ids": ids}, adapter_names=entries)
        for name in loads:
            runtime.delete_adapter(name)
        return out


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for kind, builder in MODELS.items():
            patch.setitem(BUILDERS, kind, builder)
        patch.setitem(TARGETS, "llama", ["q_proj", "v_proj", "up_proj", "down_proj"])
        yield Setting(tmp_path_factory.mktemp("parallel"))


def _case(setting: Setting, kind: str, name: str) -> Case:
    loads = {
        "it": (str(setting.lora(kind, name)), {}),
        "other": (str(setting.lora(kind, ON[kind][0])), {}),
    }
    return Case(f"{kind} {name}", setting.folder(kind), loads, ids=IDS, entries=_rows())


def _rows() -> list[Any]:
    return ["it", None, {"it": 0.7, "other": -0.4}, "other"]


def _of_spec(setting: Setting, spec: Spec) -> Case:
    loads = {
        "it": (str(setting.spec(spec)), {"dense": spec.verdict == DENSE}),
        "other": (str(setting.lora("llama", "seven")), {}),
    }
    ids = IDS.clone()
    if spec.invocation:
        ids[:, 2 : 2 + len(spec.invocation)] = torch.tensor(spec.invocation)
    rows = ["it", None, "other", "it"] if spec.size else _rows()
    return Case(f"spec {spec.name}", setting.folder("llama"), loads, ids=ids, entries=rows)


SINGLE = ("others", "alone", "silent", "loads_alone", "loads_others", "in_grad_mode", "folds", "trains", "sizes",
          "saves", "merges", "unpatched", "default", "generated")  # fmt: skip


def _single(setting: Setting, does: str) -> Case:
    loads = {"a": (str(setting.lora("llama", "seven")), {}), "b": (str(setting.lora("llama", "bias")), {})}
    rows: list[Any] = ["a", "b"] if does != "generated" else ["a", None]
    ids = IDS[:3] if does == "merges" else IDS[:2]
    if does == "default":
        rows = [{"a": 0.5, "b": 0.5}]
    return Case(does, setting.folder("llama"), loads, does, ids, rows)


@pytest.fixture(scope="module")
def started(setting: Setting) -> Any:
    """Number of processes -> it, cases by id, and what each process made of them."""

    @cache
    def of(world: int) -> tuple[int, dict[str, Case], list[dict[str, Any]]]:
        cases = [_single(setting, does) for does in SINGLE]
        if world == 2:
            cases += [_of_spec(setting, spec) for spec in SPECIFIC]
        cases += [_case(setting, kind, name) for kind, names in ON.items() for name in names]
        cases.append(Case("gpt2", setting.folder("gpt2")))
        if world == 2:
            plan = {"model.layers.*.input_layernorm": "sequence_parallel"}
            for id, kind, name, how in (
                ("norms", "llama", "norms", {"tp_size": 2, "tp_plan": plan}),
                ("experts apart", "mixtral", "experts", {"tp_size": 2, "ep_size": 2}),
                ("experts' tokens", "mixtral", "experts", {"tp_size": 2, "ep_size": 2, **TO_EACH}),
            ):
                loads = {"it": (str(setting.lora(kind, name)), {})}
                rows = ["it", None, "it", None]
                cases.append(Case(id, setting.folder(kind), loads, ids=IDS, entries=rows, distributed=how))
        return world, {case.id: case for case in cases}, start(world, cases)

    return of


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest, started: Any) -> Any:
    return started(request.param)


def start(world: int, cases: list[Case]) -> list[dict[str, Any]]:
    """Run the cases in `world` processes."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        torch.save(cases, Path(folder) / "cases.pt")
        paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "PYTHONPATH": paths,
                  "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # fmt: skip
        processes = [
            subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("process.py")), folder],
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world)
        ]
        try:
            told = [process.communicate(timeout=600)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert not any(process.returncode for process in processes), "\n".join(told)[-6000:]
        return [torch.load(Path(folder) / f"rank{rank}.pt", weights_only=False) for rank in range(world)]


def _is_error(made: Any) -> bool:
    return isinstance(made, tuple) and made[0] == "error"


def _check(setting: Setting, results: Any, id: str, kind: str) -> None:
    _, cases, made = results
    case = cases[id]
    want = setting.one(kind, case.loads, list(case.entries), case.ids)
    for each in made:
        assert not _is_error(each[id]), each[id]
        for row in range(len(want)):
            assert_close(each[id][row], want[row], 2e-5)
        assert torch.equal(each[id], made[0][id])
    bare = logits(setting.base(kind), {"input_ids": case.ids})
    assert_close(made[0][id][1], bare[1], 2e-5)
    assert (made[0][id][0] - bare[0]).abs().max() > 1e-3 * bare.abs().max()


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in ON.items() for name in names])
def test_loras(setting: Setting, results: Any, kind: str, name: str) -> None:
    _check(setting, results, f"{kind} {name}", kind)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_row_is_pefts(setting: Setting, results: Any, kind: str) -> None:
    alone = logits(peft_alone(setting.base(kind), setting.lora(kind, "seven")), {"input_ids": IDS})
    for each in results[2]:
        assert_close(each[f"{kind} seven"][0], alone[0], 2e-5)


@pytest.mark.parametrize("spec", SPECIFIC, ids=[spec.id for spec in SPECIFIC])
def test_every_type(setting: Setting, started: Any, spec: Spec) -> None:
    results = started(2)
    if (words := NOT_SPLIT.get(spec.name)) is not None:
        for each in results[2]:
            kind, name, message = each[f"spec {spec.name}"]
            assert (kind, name) == ("error", "UnsupportedAdapterError") and words in message
        return
    _check(setting, results, f"spec {spec.name}", "llama")


def test_sequence_parallel_norms(setting: Setting, started: Any) -> None:
    _check(setting, started(2), "norms", "llama")


def test_experts_that_are_spread(setting: Setting, started: Any) -> None:
    """Each process has some of them (`ep_size`), and all tokens; else it cannot be told whose they are."""
    _check(setting, started(2), "experts apart", "mixtral")
    for each in started(2)[2]:
        _, name, message = each["experts' tokens"]
        assert name == "UnsupportedAdapterError" and "experts.gate_up_proj" in message


def test_a_default_and_generate(setting: Setting, results: Any) -> None:
    _, cases, made = results
    loads = cases["default"].loads
    want = setting.one("llama", loads, [{"a": 0.5, "b": 0.5}] * 2, IDS[:2])
    model = setting.served("llama")
    for name, (folder, options) in loads.items():
        model.mlora.load_adapter(folder, name, **options)
    texts = model.generate(
        input_ids=IDS[:2], adapter_names=["a", None], max_new_tokens=5, min_new_tokens=5, do_sample=False
    )
    for name in loads:
        model.mlora.delete_adapter(name)
    for each in made:
        assert_close(each["default"], want, 2e-5)
        assert torch.equal(each["generated"], texts)


def test_merges_of_whole_deltas(setting: Setting, results: Any) -> None:
    _, cases, made = results
    model = setting.served("llama")
    for name, (folder, options) in cases["merges"].loads.items():
        model.mlora.load_adapter(folder, name, **options)
    how = {"adapters": ["a", "b"], "weights": [0.7, 0.5], "combination_type": "ties", "density": 0.6}
    want = logits(model, {"input_ids": IDS[:3]}, adapter_names=[how, how, None])
    for name in cases["merges"].loads:
        model.mlora.delete_adapter(name)
    for each in made:
        assert not _is_error(each["merges"]), each["merges"]
        assert_close(each["merges"], want, 2e-5)


def test_processes_that_differ_are_told(results: Any) -> None:
    """And go on together afterwards: the other cases ran behind."""
    world, _, made = results
    for rank, each in enumerate(made):
        _, name, message = each["others"]
        assert name == "RoutingError" and "1 a" in message and "1 b" in message
        _, name, message = each["alone"]
        assert name == ("UnknownAdapterError" if rank == 1 else "RoutingError") and "missing" in message
        _, name, message = each["silent"]
        assert name == "RoutingError" and "process 1 is about to run the base" in message
        _, name, message = each["loads_alone"]
        assert name == ("AdapterError" if rank == 1 else "RoutingError") and "/nowhere" in message
        _, name, message = each["loads_others"]
        assert name == "RoutingError" and f"of the {world} processes" not in message and "process 0" in message


def test_what_is_refused(results: Any) -> None:
    for each in results[2]:
        _, name, message = each["in_grad_mode"]
        assert name == "UnsupportedModelError" and "torch.inference_mode" in message
        _, name, message = each["folds"]
        assert name == "MergeError" and "split over" in message
        _, name, message = each["trains"]
        assert name == "UnsupportedAdapterError" and "split over" in message


def test_gpt2_has_no_plan(results: Any) -> None:
    """Which transformers says."""
    for each in results[2]:
        _, name, message = each["gpt2"]
        assert name == "ValueError" and "tp_plan" in message


def test_a_process_holds_its_part(setting: Setting, results: Any) -> None:
    """A of what is split by its outputs is in all of them, and B of what is split by its inputs."""
    world, cases, made = results
    folder = Path(cases["sizes"].loads["a"][0])
    whole = held = 0
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        by_inputs = "o_proj" in key or "down_proj" in key
        is_cut = ("lora_A" in key) == by_inputs
        whole += tensor.numel() * 4
        held += tensor.numel() * 4 // (world if is_cut else 1)
    for each in made:
        assert held <= each["sizes"] <= held + 64 * 2 * 14
        assert each["sizes"] < whole


def test_saving_reads_the_whole(results: Any) -> None:
    _, cases, made = results
    want = load_file(Path(cases["saves"].loads["a"][0]) / "adapter_model.safetensors")
    for each in made:
        got = load_file(Path(each["saves"]) / "adapter_model.safetensors")
        assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)


def test_unpatching_leaves_no_trace(setting: Setting, results: Any) -> None:
    bare = logits(setting.base("llama"), {"input_ids": IDS[:2]})
    for each in results[2]:
        same, out = each["unpatched"]
        assert same
        assert_close(out, bare, 2e-5)
