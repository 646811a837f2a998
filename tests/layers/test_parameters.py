"""LoRA of parameters (`target_parameters`), per row: experts', routers' and other modules' own, and linears' weights.
Oracles: PEFT alone, or a loop over experts."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import (
    HIDDEN,
    VOCAB,
    assert_close,
    build,
    identity,
    inputs_for,
    logits,
    make_adapter,
    peft_alone,
    refused,
    rewrite,
    row_of,
    served,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM
from typer.testing import CliRunner

import mlora
from mlora import errors
from mlora.cli import app
from mlora.layers import ParametersLayer
from mlora.ops import reference

GATE, DOWN = "experts.gate_up_proj", "experts.down_proj"
LINEARS = ["q_proj", "shared_expert.down_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "both": {
        "r": 3, "lora_alpha": 7, "target_modules": ["q_proj"], "target_parameters": [GATE, f"mlp.{DOWN}"],
        "rank_pattern": {r"layers\.0\.mlp\.experts\.down_proj": 2}, "alpha_pattern": {"gate_up_proj": 5},
    },
    "down": {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": [], "target_parameters": [DOWN]},
    "gate": {"r": 1, "lora_alpha": 2, "target_modules": [], "target_parameters": [f"model.layers.1.mlp.{GATE}"]},
    "plain": {"r": 2, "lora_alpha": 4, "target_modules": LINEARS},
}  # fmt: skip
ENTRIES: list[Any] = ["down", None, "both", "plain", "gate", "both", {"both": 1.0}]


def gpt_oss() -> Any:
    """A tiny model whose experts lie as (experts, in, out), with biases."""
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    model = GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, HIDDEN**-0.5)
    return model


class World:
    """A bare model, a patched copy of it, and the adapters of `CONFIGS`."""

    def __init__(self, base: Any, root: Path) -> None:
        self.base = base
        self.folders = {}
        for seed, (name, config) in enumerate(CONFIGS.items(), start=3):
            config = dict(config)
            if name == "plain":
                config["target_modules"] = ["q_proj"] if base.config.model_type == "gpt_oss" else LINEARS
            self.folders[name] = make_adapter(root / name, base, seed, **config)
        self.model = served(base, self.folders)

    def alone(self, entry: Any) -> Any:
        name = next(iter(entry)) if isinstance(entry, Mapping) else entry
        return self.base if name is None else peft_alone(self.base, self.folders[name])


KINDS = ("qwen2moe", "gpt_oss")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    bases = {"qwen2moe": build("qwen2moe"), "gpt_oss": gpt_oss()}
    return {kind: World(base, tmp_path_factory.mktemp(kind)) for kind, base in bases.items()}


@pytest.fixture
def world(worlds: dict[str, World]) -> World:
    return worlds["qwen2moe"]


def summed(base: Any, mix: Mapping[Path, float]) -> Any:
    """The base with the weighted sum of the experts' deltas, one expert and one rank row at a time, in fp64."""
    model = copy.deepcopy(base)
    parameters = dict(model.named_parameters())
    for folder, weight in mix.items():
        config = peft.LoraConfig.from_pretrained(folder)
        tensors = load_file(folder / "adapter_model.safetensors")
        for layer in range(2):
            path = f"model.layers.{layer}.mlp.experts"
            names = [
                n for n in ("gate_up_proj", "down_proj") if f"{path}.{n}".endswith(tuple(config.target_parameters))
            ]
            for depth, name in enumerate(reversed(names)):
                key = f"base_model.model.{path}" + ".base_layer" * depth
                a, b = (tensors[f"{key}.lora_{part}.weight"].double() for part in "AB")
                stack = parameters[f"{path}.{name}"]
                experts = len(stack)
                rank = a.shape[0] // experts
                alpha = config.alpha_pattern.get(name, config.lora_alpha)
                scale = weight * alpha / (rank**0.5 if config.use_rslora else rank)
                for e in range(experts):
                    delta = sum(torch.outer(b[:, j * experts + e], a[e * rank + j]) for j in range(rank)) * scale
                    delta = delta.t() if base.config.model_type == "gpt_oss" else delta
                    stack.data[e] = (stack[e].double() + delta).float()
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_gets_what_its_adapter_gives_alone(worlds: dict[str, World], kind: str) -> None:
    world = worlds[kind]
    batch = inputs_for(kind, len(ENTRIES))
    got = logits(world.model, batch, adapter_names=ENTRIES)
    bare = logits(world.base, batch)
    for row, entry in enumerate(ENTRIES):
        assert_close(got[row : row + 1], logits(world.alone(entry), row_of(batch, row)))
        assert entry is None or (got[row] - bare[row]).abs().max() > 1e-3 * bare.abs().max()

    order = [3, 6, 0, 2, 5, 1, 4]
    shuffled = {key: value[order] for key, value in batch.items()}
    again = logits(world.model, shuffled, adapter_names=[ENTRIES[i] for i in order])
    assert_close(again, got[order], 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_weighted_rows_are_sums_of_deltas(worlds: dict[str, World], kind: str) -> None:
    world = worlds[kind]
    mixes = [{"down": 0.4}, {"down": -1.5, "gate": 0.5}, {"gate": 2.0}]
    batch = inputs_for(kind, len(mixes))
    got = logits(world.model, batch, adapter_names=mixes)
    for row, mix in enumerate(mixes):
        oracle = summed(world.base, {world.folders[name]: weight for name, weight in mix.items()})
        assert_close(got[row : row + 1], logits(oracle, row_of(batch, row)))


def test_all_rows_under_one_entry_are_one_call(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = world.base.model.layers[0].mlp.experts
    calls = []
    own = type(experts)._apply_gate
    monkeypatch.setattr(type(experts), "_apply_gate", lambda self, x: calls.append(len(x)) or own(self, x))
    batch = inputs_for("qwen2moe", 4)
    for entries, wanted in (
        ("both", 2),
        (["down"] * 4, 2),
        (["both", "down", None, "plain"], 6),
        (["plain"] * 4, 2),
        (["down", {"down": 1.0, "plain": 0.5}, "down", {"down": 1.0, "plain": 2.0}], 2),  # which do the same here
        (["down", {"down": 1.0, "plain": 0.5}, {"down": 2.0}, None], 6),
    ):
        calls.clear()
        logits(world.model, batch, adapter_names=entries)
        assert len(calls) == wanted, entries  # of two layers


def test_layers_without_such_adapters_run_the_base(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("divided")

    monkeypatch.setattr(ParametersLayer, "_divided", fail)
    batch = inputs_for("qwen2moe", 2)
    logits(world.model, batch, adapter_names=["plain", None])
    assert torch.equal(logits(world.model, batch), logits(world.base, batch))
    with pytest.raises(AssertionError, match="divided"):
        logits(world.model, batch, adapter_names=["gate", None])


def first_experts(model: Any, batch: Mapping[str, Tensor], **options: Any) -> tuple[tuple[Any, ...], Tensor]:
    """What the first layer's experts got, and gave."""
    seen: list[Any] = []
    layer = model.get_submodule(next(n for n, _ in model.named_modules() if n.endswith("layers.0.mlp.experts")))
    handle = layer.register_forward_hook(lambda module, args, output: seen.append((args, output)))
    logits(model, batch, **options)
    handle.remove()
    return seen[0]


def test_base_rows_have_the_bits_of_the_bare_experts(world: World) -> None:
    batch = inputs_for("qwen2moe", 4)
    args, got = first_experts(world.model, batch, adapter_names=["both", None, "down", None])
    length = batch["input_ids"].shape[1]
    rows = torch.cat([torch.arange(row * length, (row + 1) * length) for row in (1, 3)])
    with torch.no_grad():
        bare = world.base.model.layers[0].mlp.experts(*(arg[rows] for arg in args))
    assert torch.equal(got[rows], bare)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_precision_stays_within_pefts_own_error(tmp_path: Path, dtype: torch.dtype) -> None:
    base = build("qwen2moe", dtype)
    config = {**CONFIGS["both"], "target_modules": []}  # so that all get the same input there
    folder = make_adapter(tmp_path / "both", base, 5, dtype=dtype, **config)
    model, batch = served(base, {"both": folder}), inputs_for("qwen2moe", 6)
    args, ours = first_experts(model, batch, adapter_names=["both"] * 6)
    peft_model = peft_alone(base, folder)
    layer = peft_model.base_model.model.model.layers[0].mlp.experts
    wide = copy.deepcopy(layer).float()
    with torch.no_grad():
        theirs = layer(*args).double()
        oracle = wide(*(arg.float() if arg.is_floating_point() else arg for arg in args)).double()
    error, allowed = (ours.double() - oracle).norm().item(), (theirs - oracle).norm().item()
    assert 0 < error <= 1.05 * allowed, f"{error:.3g} from the oracle, PEFT {allowed:.3g}"


def test_weights_in_half_precision_are_rounded_once(tmp_path: Path) -> None:
    base = build("qwen2moe", torch.bfloat16)
    configs = {name: {**CONFIGS[name], "target_modules": []} for name in ("both", "down")}
    folders = {
        name: make_adapter(tmp_path / name, base, seed, dtype=torch.bfloat16, **config)
        for seed, (name, config) in enumerate(configs.items())
    }
    model, mix = served(base, folders), {"both": 0.7, "down": -1.3}
    layer = model.model.layers[1].mlp.experts
    with model.mlora.use_adapters(mix):
        ((changes, _),) = layer._parts(model.mlora._shared.local.plan)
        got = layer._weight("down_proj", changes["down_proj"])
    oracle = summed(copy.deepcopy(base).float(), {folders[name]: weight for name, weight in mix.items()})
    want = oracle.model.layers[1].mlp.experts.down_proj.bfloat16()
    assert (got != want).float().mean() < 0.01  # ties of the rounding


def test_what_is_told_on_the_host_is_what_kernels_read(world: World) -> None:
    entries: list[Any] = ["down", None, {"both": 0.3, "gate": -1.7}, "plain", "down", {"both": 0.1, "down": 0.2}]
    store, stacks, compared = world.model.mlora._store, world.model.mlora._router._planner._assembly._experts, 0
    with world.model.mlora.use_adapters(entries):
        plan = world.model.mlora._shared.local.plan
        assert plan is not None and sorted(torch.cat([r.rows for r in plan.routes[0]]).tolist()) == list(range(6))
        for index in stacks:
            told = {tuple(route.rows.tolist()): route.terms.get(index, ()) for route in plan.routes[0]}
            read = reference.routes(plan.tensors[0], store.table(index), plan.rows)
            assert len(read) == len(told) - 1  # kernels know of no base
            for route in read:
                terms = tuple((t.rank, t.a, t.b, t.weight * t.scale) for t in route.terms if t.rank)
                assert told[tuple(route.tokens.tolist())] == terms
            compared += len(read)
    assert compared == 4 * len(stacks)


@pytest.mark.parametrize("beams", (1, 2))
def test_generate(world: World, beams: int) -> None:
    entries = ["both", None, "down"]
    ids = torch.randint(2, VOCAB, (3, 5), generator=torch.Generator().manual_seed(2))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
    got = world.model.generate(**batch, **options, adapter_names=entries)
    for row, entry in enumerate(entries):
        want = world.alone(entry).generate(**row_of(batch, row), **options)
        assert torch.equal(got[row : row + 1], want)


def test_gradients_of_inputs(world: World) -> None:
    grads = []
    embeds = torch.randn(2, 4, HIDDEN, generator=torch.Generator().manual_seed(4))
    for model, options in ((world.model, {"adapter_names": [None, "both"]}), (world.alone("both"), {})):
        x = embeds.clone().requires_grad_()
        model(inputs_embeds=x, **options).logits[1].square().sum().backward()
        grads.append(x.grad[1])
    assert_close(grads[0], grads[1])


def test_eviction_saving_and_unpatching(world: World, tmp_path: Path) -> None:
    model = copy.deepcopy(world.base)
    before, batch = identity(model), inputs_for("qwen2moe", 2)
    runtime = mlora.patch(model, max_adapters=1)
    for name in ("both", "down"):
        info = runtime.load_adapter(world.folders[name], name)
    assert info.ranks == (4,) and runtime.adapters["both"].ranks == (2, 3)
    assert "model.layers.0.mlp.experts.down_proj" in info.modules and "rsLoRA" in runtime.status()
    for name in ("both", "down", "both"):  # each takes the other's place
        assert_close(logits(model, batch, adapter_names=name), logits(world.alone(name), batch))
    runtime.save_adapter("both", tmp_path / "saved")
    runtime.delete_adapter("both")
    runtime.load_adapter(tmp_path / "saved", "again")
    assert_close(logits(model, batch, adapter_names="again"), logits(world.alone("both"), batch))
    runtime.delete_adapter("again")
    with pytest.raises(errors.ModelMovedError):
        model.model.layers[0].mlp.experts.to(torch.float16)
    mlora.unpatch(model)
    assert identity(model) == before
    assert torch.equal(logits(model, batch), logits(world.base, batch))


# Fused experts are known by their interface.


class Fused(nn.Module):
    """Experts that take what nobody can divide: a mask of (experts, tokens)."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.Parameter(torch.randn(3, 5, HIDDEN))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return torch.einsum("eoi,ti,et->to", self.matrices, hidden, mask)


class Toy(nn.Module):
    def __init__(self, gathers: bool = False) -> None:
        super().__init__()
        self.up, self.fused = nn.Linear(HIDDEN, HIDDEN), Fused()
        self.gathers = gathers

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x).flatten(0, 1)
        x = x[: len(x) // 2 + 1] if self.gathers else x
        return self.fused(x, mask=torch.ones(3, len(x)).softmax(0))


@pytest.mark.parametrize("gathers", (False, True), ids=("an argument", "tokens"))
def test_what_cannot_be_divided_is_served_under_one_entry_only(tmp_path: Path, gathers: bool) -> None:
    base = Toy(gathers)
    folder = make_adapter(tmp_path / "toy", base, 3, r=2, target_modules=[], target_parameters=["fused.matrices"])
    model, x = served(base, {"toy": folder}), torch.randn(4, 3, HIDDEN)
    with torch.no_grad():
        assert_close(model(x, adapter_names="toy"), peft_alone(base, folder)(x))
        with refused(model, errors.AttributionError, "fused", "12 tokens" if not gathers else "(7, 32)"):
            model(x, adapter_names=["toy", None, None, "toy"])
        with model.mlora.use_adapters("toy"):
            hidden, mask = x[0], torch.rand(3, 3)
            assert torch.equal(model.fused(mask=mask, hidden=hidden), model.fused(hidden, mask))


def test_a_replaced_forward_leaves_the_parameters_out(tmp_path: Path) -> None:
    base = Toy()
    folder = make_adapter(tmp_path / "toy", base, 3, r=2, target_modules=[], target_parameters=["fused.matrices"])
    model = copy.deepcopy(base)
    model.fused.forward = lambda hidden, mask: hidden
    with pytest.raises(errors.UnsupportedAdapterError, match=r"fused\.matrices"):
        mlora.patch(model).load_adapter(folder, "toy")


# Refusals.

Files = tuple[dict[str, Any], Any, type[Exception], tuple[str, ...]]


def without(part: str) -> Any:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if part not in key}


def reshaped(part: str, cut: Any) -> Any:
    return lambda tensors: {key: cut(tensor) if part in key else tensor for key, tensor in tensors.items()}


FILES: dict[str, Files] = {
    "unknown": (
        {"target_parameters": [GATE, DOWN, "gate.bias"]}, None, errors.UnsupportedAdapterError,
        ("target_parameters", "gate.bias"),
    ),
    "a norm's": (
        {"target_parameters": [GATE, DOWN, "input_layernorm.weight"]}, None, errors.UnsupportedAdapterError,
        ("target_parameters", "input_layernorm.weight"),
    ),
    "a text": ({"target_parameters": GATE}, None, errors.AdapterError, ("target_parameters", "list")),
    "one too few": ({"target_parameters": [DOWN]}, None, errors.AdapterError, ("experts.base_layer",)),
    "none named": ({"target_parameters": None}, None, errors.AdapterError, ("mlp.experts",)),
    "half a pair": ({}, without("1.mlp.experts.lora_A"), errors.AdapterError, ("1.mlp.experts.down_proj", "lora_A")),
    "rank": ({"r": 4}, None, errors.AdapterError, ("(12, 32)", "(16, 32)")),
    "width": ({}, reshaped("experts.lora_A", lambda a: a[:, 1:]), errors.AdapterError, ("(12, 23)", "(12, 24)")),
    "outputs": ({}, reshaped("experts.lora_B", lambda b: b[1:]), errors.AdapterError, ("(31, 12)", "(32, 12)")),
    "lora_bias": ({"lora_bias": True}, None, errors.UnsupportedAdapterError, ("lora_bias", "target_parameters")),
    "dora": ({"use_dora": True}, None, errors.UnsupportedAdapterError, ("use_dora", "target_parameters")),
    "turned": ({"fan_in_fan_out": True}, None, errors.UnsupportedAdapterError, ("fan_in_fan_out",)),
    "a module": (
        {},
        lambda tensors: {key.replace("experts.lora", "experts.down_proj.lora"): t for key, t in tensors.items()},
        errors.AdapterError,
        ("experts.down_proj", "parameter"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_that_do_not_fit_are_refused(world: World, tmp_path: Path, name: str) -> None:
    options, tensors, error, wanted = FILES[name]
    config = {"r": 3, "target_modules": [], "target_parameters": [GATE, DOWN]}
    folder = rewrite(make_adapter(tmp_path / "good", world.base, 1, **config), tmp_path / "bad", options, tensors)
    with refused(world.model, error, *wanted):
        world.model.mlora.load_adapter(folder, "bad")


def test_target_modules_do_not_name_parameters(world: World, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "linears", world.base, 1, r=2, target_modules=["down_proj"])
    model, batch = served(world.base, {"linears": folder}), inputs_for("qwen2moe", 2)
    assert all("shared_expert" in name for name in model.mlora.adapters["linears"].modules)
    assert_close(logits(model, batch, adapter_names="linears"), logits(peft_alone(world.base, folder), batch))


def test_what_would_make_new_weights_is_refused(world: World) -> None:
    model, runtime = world.model, world.model.mlora
    with refused(model, errors.MergeError, "experts.gate_up_proj", "target_parameters"):
        runtime.merge_adapter("both")
    with refused(model, errors.MergeError, "experts", "target_parameters"):
        runtime.add_weighted_adapter(["both", "down"], [0.5, 0.5], "merged")
    with refused(model, errors.MergeError, "experts", "target_parameters"):
        logits(
            model, inputs_for("qwen2moe", 1), adapter_names=[mlora.Merge(["down", "gate"], [1, 1], "ties", density=1)]
        )


def test_command_line(world: World, tmp_path: Path) -> None:
    both = str(world.folders["both"])
    told = CliRunner().invoke(app, ["inspect", both])
    assert told.exit_code == 0 and "options and tensors are known; pass --model" in told.output
    made = CliRunner().invoke(app, ["merge", str(tmp_path / "out"), "--adapter", both])
    assert made.exit_code and "target_parameters" in made.output and "merges" in made.output


def test_rows_beside_something_folded_in(world: World, tmp_path: Path) -> None:
    dora = make_adapter(tmp_path / "dora", world.base, 8, r=2, use_dora=True, target_modules=["o_proj"])
    model = served(world.base, {**world.folders, "dora": dora})
    runtime, batch = model.mlora, inputs_for("qwen2moe", 2)
    runtime.merge_adapter("plain")
    got = logits(model, batch, adapter_names=["down", None])
    assert_close(got[:1], logits(world.alone("down"), row_of(batch, 0)))
    runtime.unmerge_adapter()
    runtime.merge_adapter("dora")
    with pytest.raises(errors.MergeError, match=r"experts\.\w+: rows with target_parameters"):
        logits(model, batch, adapter_names=["down", None])
    runtime.unmerge_adapter()


def test_compiled_code_refuses_them_and_serves_others(world: World) -> None:
    torch._dynamo.reset()
    model, batch = served(world.base, world.folders), inputs_for("qwen2moe", 2)
    compiled = torch.compile(model, backend="eager")
    with model.mlora.use_adapters(["plain", None]):
        want = logits(model, batch)
        assert_close(logits(compiled, batch), want)
    refusal = pytest.raises(errors.UnsupportedAdapterError, match="target_parameters")
    with model.mlora.use_adapters(["down", None]), refusal:
        logits(compiled, batch)
    torch._dynamo.reset()


def test_live_models_with_them_are_refused(world: World) -> None:
    live = peft_alone(world.base, world.folders["both"])
    with pytest.raises(errors.UnsupportedAdapterError, match="target_parameters: oracle-0"):
        mlora.patch(live)
    adapter = mlora.Adapter.from_peft(live, "oracle-0")
    model, batch = copy.deepcopy(world.base), inputs_for("qwen2moe", 2)
    mlora.patch(model).add_adapter("copied", adapter)
    assert_close(logits(model, batch, adapter_names="copied"), logits(live, batch))


# Matrices: routers, linears' weights, any module's own.

MATRIX = {"r": 2, "lora_alpha": 5, "target_modules": []}
MATRICES: dict[str, dict[str, dict[str, Any]]] = {
    "qwen2moe": {
        "router": {**MATRIX, "target_parameters": ["mlp.gate.weight"], "use_rslora": True},
        "all": {**MATRIX, "target_parameters": ["gate.weight", DOWN, GATE], "target_modules": ["q_proj"]},
    },
    "mixtral": {"router": {**MATRIX, "target_parameters": ["layers.1.mlp.gate.weight"]}},
    "gpt_oss": {
        "router": {**MATRIX, "target_parameters": ["router.weight"], "rank_pattern": {"router.weight": 3, "router": 1}},
        "biases": {**MATRIX, "target_parameters": ["gate_up_proj_bias", "down_proj", "down_proj_bias"]},
    },
    "llama": {
        "linears": {
            **MATRIX, "target_parameters": ["q_proj.weight", "mlp.down_proj.weight"],
            "rank_pattern": {"q_proj.weight": 3, "q_proj": 4}, "alpha_pattern": {"down_proj.weight": 9},
        },
        "ends": {
            **MATRIX, "target_parameters": ["embed_tokens.weight", "lm_head.weight"], "target_modules": ["v_proj"],
        },
    },
    "gpt2": {
        "linears": {**MATRIX, "target_parameters": ["c_attn.weight", "mlp.c_proj.weight"]},
        "tied": {**MATRIX, "target_parameters": ["wte.weight"]},
    },
    "gemma": {"scaled": {**MATRIX, "target_parameters": ["embed_tokens.weight"]}},
}  # fmt: skip


class Matrices:
    """A bare model, its patched copy, and the adapters of `MATRICES`."""

    def __init__(self, kind: str, root: Path) -> None:
        self.kind = kind
        self.base = gpt_oss() if kind == "gpt_oss" else build(kind)
        self.folders = {
            name: make_adapter(root / name, self.base, seed, **config)
            for seed, (name, config) in enumerate(MATRICES[kind].items(), start=2)
        }
        self.model = served(self.base, self.folders)
        self.names = [None, *self.folders]
        self.batch = inputs_for(kind, 2 * len(self.names))

    def alone(self, name: str | None) -> Any:
        return self.base if name is None else peft_alone(self.base, self.folders[name])


@pytest.fixture(scope="module")
def matrices(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cache(lambda kind: Matrices(kind, tmp_path_factory.mktemp(f"matrices-{kind}")))


@pytest.mark.parametrize("kind", MATRICES)
def test_matrices_per_row(matrices: Any, kind: str) -> None:
    world = matrices(kind)
    entries = [*world.names[::-1], *world.names]
    got = logits(world.model, world.batch, adapter_names=entries)
    for row, name in enumerate(entries):
        one = row_of(world.batch, row)
        assert_close(got[row : row + 1], logits(world.alone(name), one))
        assert name is None or (got[row] - logits(world.base, one)[0]).abs().max() > 1e-3
    name = world.names[1]
    assert_close(logits(world.model, world.batch, adapter_names=name), logits(world.alone(name), world.batch))


def added(base: Any, mix: Mapping[Path, float]) -> Any:
    """The base with the weighted sum of the deltas of matrices that are alone in their modules, in fp64."""
    model = copy.deepcopy(base)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for folder, weight in mix.items():
        config = peft.LoraConfig.from_pretrained(folder)
        tensors = load_file(folder / "adapter_model.safetensors")
        for path, held in parameters.items():
            if path.endswith(tuple(config.target_parameters)):
                key = f"base_model.model.{path.rpartition('.')[0]}"
                a, b = (tensors[f"{key}.lora_{part}.weight"].double() for part in "AB")
                alpha = next((v for k, v in config.alpha_pattern.items() if path.endswith(k)), config.lora_alpha)
                scale = weight * alpha / (len(a) ** 0.5 if config.use_rslora else len(a))
                held.data = (held.double() + scale * b @ a).float()
    return model


@pytest.mark.parametrize(("kind", "name"), (("qwen2moe", "router"), ("gpt2", "linears"), ("llama", "linears")))
def test_matrices_at_a_weight(matrices: Any, kind: str, name: str) -> None:
    world = matrices(kind)
    mixes: list[Any] = [{name: 0.6}, None, {name: -1.5}, name]
    batch = inputs_for(kind, len(mixes), 3)
    got = logits(world.model, batch, adapter_names=mixes)
    for row, mix in enumerate(mixes):
        mix = {name: 1.0} if mix == name else mix or {}
        oracle = added(world.base, {world.folders[n]: weight for n, weight in mix.items()})
        assert_close(got[row : row + 1], logits(oracle, row_of(batch, row)))


def test_routers_generate_and_tell_what_they_chose(matrices: Any) -> None:
    world = matrices("qwen2moe")
    names = ["router", None, "all"]
    ids = torch.randint(2, VOCAB, (3, 5), generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    got = world.model.generate(ids, **options, adapter_names=names)
    with torch.no_grad():
        told = world.model(ids, adapter_names=names, output_router_logits=True).router_logits
    for row, name in enumerate(names):
        alone = world.alone(name)
        assert torch.equal(got[row : row + 1], alone.generate(input_ids=ids[row : row + 1], **options))
        with torch.no_grad():
            want = alone(input_ids=ids[row : row + 1], output_router_logits=True).router_logits
        for mine, theirs in zip(told, want, strict=True):
            assert_close(mine.view(3, 5, -1)[row], theirs)


def test_weights_of_linears_merge_and_fold_and_those_of_routers_do_not(matrices: Any) -> None:
    world = matrices("llama")
    model, runtime = world.model, world.model.mlora
    want = logits(world.alone("linears"), world.batch)
    runtime.merge_adapter("linears")
    assert_close(logits(model, world.batch), want)
    runtime.unmerge_adapter()
    runtime.add_weighted_adapter(["linears", "ends"], [1.0, 0.0], "merged", "cat")
    assert_close(logits(model, world.batch, adapter_names="merged"), want)
    runtime.delete_adapter("merged")
    model, runtime = matrices("qwen2moe").model, matrices("qwen2moe").model.mlora
    with refused(model, errors.MergeError, "mlp.gate", "target_parameters"):
        runtime.merge_adapter("router")
    with refused(model, errors.MergeError, "mlp.gate.weight", "target_parameters"):
        runtime.add_weighted_adapter(["router", "router"], [0.5, 0.5], "merged")


def test_compiled_routers_are_refused_and_compiled_weights_served(matrices: Any) -> None:
    torch._dynamo.reset()
    refusal = pytest.raises(errors.UnsupportedAdapterError, match=r"target_parameters.*torch\.compile")
    for kind, name in (("qwen2moe", "router"), ("llama", "linears")):
        world = matrices(kind)
        compiled = torch.compile(world.model, backend="eager")
        with world.model.mlora.use_adapters(name):
            if kind == "llama":
                assert_close(logits(compiled, world.batch), logits(world.model, world.batch))
                continue
            with refusal:
                logits(compiled, world.batch)
    torch._dynamo.reset()


class Mixing(nn.Module):
    """A module with a matrix of its own that takes and gives other things than hidden states."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(5, HIDDEN))
        self.kind = kind
        if kind == "layers":
            self.inner = nn.Linear(5, 5)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Any:
        y = x @ self.matrix.t()
        if self.kind == "layers":
            y = self.inner(y)
        return (y, None, y.sum(-1)) if self.kind == "several" else y


class Owner(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.up, self.own, self.kind = nn.Linear(HIDDEN, HIDDEN), Mixing(kind), kind

    def forward(self, x: Tensor) -> Any:
        x = self.up(x)
        return self.own(x, other=torch.ones(x.shape[0])) if self.kind == "arguments" else self.own(x)


@pytest.mark.parametrize("kind", ("plain", "several", "layers", "arguments"))
def test_a_matrix_of_any_module(tmp_path: Path, kind: str) -> None:
    """Where it cannot be divided by recipe it is served under one entry."""
    base = Owner(kind)
    folder = make_adapter(tmp_path / "own", base, 3, r=2, target_modules=["up"], target_parameters=["own.matrix"])
    model, x = served(base, {"own": folder}), torch.randn(4, 3, HIDDEN)
    alone = peft_alone(base, folder)

    def check(got: Any, want: Any) -> None:
        for mine, theirs in zip(*((v if isinstance(v, tuple) else (v,)) for v in (got, want)), strict=True):
            assert mine is theirs if theirs is None else assert_close(mine, theirs) is None

    with torch.no_grad():
        check(model(x, adapter_names="own"), alone(x))
        check(model(x, adapter_names=["own"] * 4), alone(x))
        if kind in ("plain", "several"):
            got = model(x, adapter_names=["own", None, "own", {"own": 0.0}])
            outputs = got if kind == "several" else (got,)
            for row, oracle in enumerate((alone, base, alone, base)):
                check(tuple(v if v is None else v[row : row + 1] for v in outputs), oracle(x[row : row + 1]))
            return
    with refused(model, errors.AttributionError, "own", "inside" if kind == "layers" else "other inputs"):
        model(x, adapter_names=["own", None, "own", None])


class Router(nn.Linear):
    """A linear that does something else besides, as some routers do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(-1)


class Routed(nn.Module):
    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.up, self.router, self.positions = nn.Linear(HIDDEN, HIDDEN), Router(HIDDEN, 4), nn.Embedding(9, HIDDEN)
        self.attention = nn.MultiheadAttention(HIDDEN, 2)
        self.again = self.up

    def forward(self, x: Tensor) -> Tensor:
        return self.router(self.again(self.up(x)))


@pytest.mark.parametrize("name", ("router.weight", "positions.weight", "attention.in_proj_weight", "up.weight"))
def test_matrices_that_are_not_served(name: str) -> None:
    """What its module does with them is not known; or PEFT changes one of a module's places."""
    model = Routed()
    mlora.patch(model, memory=1 << 16)
    path = name.rpartition(".")[0]
    tensors = {f"{path}.lora_A.weight": torch.ones(2, HIDDEN), f"{path}.lora_B.weight": torch.ones(HIDDEN, 2)}
    if name == "up.weight":
        tensors |= {key.replace("up.", "again."): tensor for key, tensor in tensors.items()}
    targets = ["up.weight", "again.weight"] if name == "up.weight" else [name]
    adapter = mlora.Adapter({"peft_type": "LORA", "r": 2, "target_parameters": targets}, tensors)
    wanted = "module up: it is one module with again" if path == "up" else name
    with refused(model, errors.UnsupportedAdapterError, wanted, "served"):
        model.mlora.add_adapter("own", adapter)


def test_a_weight_that_is_named_twice(llama: Any, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "q", llama, 1, r=2, target_modules=["q_proj"])
    model = copy.deepcopy(llama)
    mlora.patch(model)
    bad = rewrite(folder, tmp_path / "bad", {"target_parameters": ["q_proj.weight"]})
    with refused(model, errors.AdapterError, "target_modules", "target_parameters", "q_proj"):
        model.mlora.load_adapter(bad, "bad")
    bias = rewrite(folder, tmp_path / "bias", {"target_parameters": ["q_proj.weight"], "target_modules": [],
                                               "use_dora": True})  # fmt: skip
    with refused(model, errors.UnsupportedAdapterError, "use_dora", "target_parameters"):
        model.mlora.load_adapter(bias, "bias")
