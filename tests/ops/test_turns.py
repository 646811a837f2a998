"""Adapters that turn inputs (OFT) or outputs (RoAd) of a module, beyond what conformance asks of every type."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import assert_close, build, inputs_for, logits, make_adapter, peft_alone, row_of, served, state_hash
from safetensors.torch import load_file
from torch import Tensor, nn

import mlora
from mlora import Merge, errors
from mlora.layers import base_linear
from mlora.lowering import lower
from mlora.merge import merge_module

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "bert": ["query", "dense"],
}
CONFIGS: dict[str, Callable[..., Any]] = {
    "oft": lambda **options: peft.OFTConfig(oft_block_size=4, **options),
    "oft2": lambda **options: peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, **options),
    "oft8": lambda **options: peft.OFTConfig(oft_block_size=8, **options),
    "road": lambda **options: peft.RoadConfig(group_size=8, **options),
    "road2": lambda **options: peft.RoadConfig(group_size=8, variant="road_4", **options),
}
PEFTS = ("bert", "llama")  # GPT-2's Conv1D is no layer of PEFT's OFT and RoAd


def made(folder: Path, base: Any, kind: str, name: str) -> Path:
    """An adapter of CONFIGS, or a LoRA or DoRA, for a model of conftest's."""
    if name in ("lora", "dora"):
        options = {"fan_in_fan_out": True} if kind == "gpt2" else {}
        return make_adapter(folder, base, 5, r=3, target_modules=TARGETS[kind], use_dora=name == "dora", **options)
    if kind == "gpt2":  # what PEFT would save, were its Conv1D a layer of its OFT and RoAd
        return _by_hand(folder, base, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(copy.deepcopy(base), CONFIGS[name](target_modules=TARGETS[kind]))
    draw = torch.Generator().manual_seed(len(name))
    for parameter_name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.data = 1 + 0.3 * noise.clamp(-2, 2) if "alpha" in parameter_name else 0.2 * noise
    wrapped.save_pretrained(folder)
    return folder


def _by_hand(folder: Path, base: Any, name: str) -> Path:
    config, tensors = CONFIGS[name](target_modules=TARGETS["gpt2"]), {}
    draw = torch.Generator().manual_seed(len(name))
    for path, module in base.named_modules():
        if path.rpartition(".")[2] in TARGETS["gpt2"]:
            inputs, outputs = module.weight.shape
            if "oft" in name:
                size = config.oft_block_size
                tensors[f"{path}.oft_R.weight"] = 0.2 * torch.randn(
                    inputs // size, size * (size - 1) // 2, generator=draw
                )
            else:
                count = outputs // 2 if config.variant == "road_1" else 2 * outputs
                tensors[f"{path}.road_theta"] = 0.5 * torch.randn(count, generator=draw)
                tensors[f"{path}.road_alpha"] = 1 + 0.3 * torch.randn(count, generator=draw).clamp(-2, 2)
    values = {key: value for key, value in config.to_dict().items() if value is not None}
    mlora.Adapter({**values, "peft_type": config.peft_type.value}, tensors).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Path]]:
    root, found = tmp_path_factory.mktemp("turns"), {}

    def of(kind: str, *names: str) -> dict[str, Path]:
        for name in names:
            if (kind, name) not in found:
                found[kind, name] = made(root / kind / name, build(kind), kind, name)
        return {name: found[kind, name] for name in names}

    return of


ALL = ("oft", "oft2", "oft8", "road", "road2", "lora", "dora")


# Rows beside each other


def test_other_rows_keep_their_bits(folders: Any) -> None:
    """Base rows have the bare model's, and a row with a turn those of the same row alone, whatever is beside them."""
    base, batch = build("llama"), inputs_for("llama", 6)
    model = served(base, folders("llama", *ALL))
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(6, 5, layer.in_features)
    entries = ["oft", None, "road", "lora", {"road": 0.5, "oft": 0.5}, "dora"]
    with torch.no_grad(), model.mlora.use_adapters(entries):
        got = layer(x)
    bare = base.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        assert torch.equal(got[1], bare(x)[1])
        for row, entry in enumerate(entries):
            with model.mlora.use_adapters([entry]):
                assert_close(got[row], layer(x[row : row + 1])[0], 1e-6)
    assert torch.equal(logits(model, batch), logits(base, batch))


def test_siblings_of_a_turned_layer_are_served_with_the_others(folders: Any, llama: Any, tmp_path: Path) -> None:
    """q is turned, k and v are not: what they read is the same tensor, and a group is learned from it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(copy.deepcopy(llama), peft.RoadConfig(group_size=8, target_modules=["q_proj"]))
    for name, parameter in wrapped.named_parameters():
        if "road" in name:
            parameter.data = parameter.data + 0.5 * torch.rand(parameter.shape)
    wrapped.save_pretrained(tmp_path / "road")
    make_adapter(tmp_path / "lora", llama, 1, r=3, target_modules=["q_proj", "k_proj", "v_proj"])
    model, batch = (
        served(llama, {name: tmp_path / name for name in ("road", "lora")}, fused=False),
        inputs_for("llama", 3),
    )
    for entries in (["lora"] * 3, ["road", "lora", None], ["lora", None, "road"]):
        for _ in range(2):
            got = logits(model, batch, adapter_names=entries)
            for row, entry in enumerate(entries):
                oracle = llama if entry is None else peft_alone(llama, tmp_path / entry)
                assert_close(got[row : row + 1], logits(oracle, row_of(batch, row)))


# Folding


@pytest.mark.parametrize("kind", ("llama", "gpt2", "bert"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_folded_model_computes_what_the_routed_one_does(folders: Any, kind: str, dtype: torch.dtype) -> None:
    model = served(build(kind, dtype), folders(kind, *ALL))
    batch, before = inputs_for(kind, 3), state_hash(model)
    for entry in (
        "oft",
        "road",
        {"road": 0.7, "road2": 0.4, "lora": 1.0},
        {"oft": 0.5, "oft8": -0.3, "dora": 0.5, "road": 1},
    ):
        want = logits(model, batch, adapter_names=entry)
        model.mlora.merge_adapter(entry)
        assert state_hash(model) != before
        if dtype is torch.float32:
            assert_close(logits(model, batch), want)
        if kind in PEFTS and isinstance(entry, str) and dtype is torch.float32:
            alone = peft_alone(build(kind), folders(kind, entry)[entry]).merge_and_unload()
            assert_close(logits(model, batch), logits(alone, batch))
        model.mlora.unmerge_adapter()
        assert state_hash(model) == before


@pytest.mark.parametrize("kind", ("llama", "gpt2", "bert"))
@pytest.mark.parametrize(
    ("folded", "entries"),
    (
        ("oft", ["oft2", None, {"lora": 0.5}, {"oft": -0.5, "oft2": 0.6}]),
        ("road", ["road2", None, {"lora": 0.5, "dora": 0.5}, {"road": 0.4, "road2": 0.6}]),
        ({"road": 0.5, "lora": 1.0}, ["road2", None, "dora", "lora"]),
        ("dora", ["road", None, "road2", "lora"]),
        ({"oft": 0.5, "lora": 1.0}, ["oft2", None, "lora", "oft"]),
    ),
)
def test_rows_beside_what_is_folded_in_get_their_adapters_alone(
    folders: Any, kind: str, folded: Any, entries: Any
) -> None:
    model, batch = served(build(kind), folders(kind, *ALL)), inputs_for(kind, 4)
    want = logits(model, batch, adapter_names=entries)
    model.mlora.merge_adapter(folded)
    assert_close(logits(model, batch, adapter_names=entries), want, 2e-5)
    model.mlora.unmerge_adapter()
    assert torch.equal(logits(model, batch, adapter_names=entries), want)


@pytest.mark.parametrize(
    ("folded", "entry", "message"),
    (("oft", "road", "do not combine"), ("oft", "oft8", "different sizes"), ("dora", "oft", "do not combine")),
)
def test_what_does_not_combine_is_refused(folders: Any, folded: str, entry: str, message: str) -> None:
    model, batch = served(build("llama"), folders("llama", *ALL)), inputs_for("llama", 2)
    model.mlora.merge_adapter(folded)
    with pytest.raises(errors.MergeError, match=rf"module model\..*{message}"):
        logits(model, batch, adapter_names=entry)


def test_corrections_do_not_take_turns(folders: Any) -> None:
    model = served(build("llama"), folders("llama", "road"))
    before = state_hash(model)
    with pytest.raises(errors.MergeError, match="turns it"):
        model.mlora.merge_adapter("road", keep="corrections")
    assert state_hash(model) == before


# Merging


@pytest.mark.parametrize("names", (("oft", "oft2", "lora"), ("road", "road2", "dora"), ("oft", "road", "lora")))
def test_a_linear_merge_is_the_weighted_entry_and_can_be_saved(folders: Any, tmp_path: Path, names: Any) -> None:
    model, batch = served(build("bert"), folders("bert", *ALL)), inputs_for("bert", 3)
    weights = [0.6, -0.5, 0.9]
    want = logits(model, batch, adapter_names=dict(zip(names, weights, strict=True)))
    runtime = model.mlora
    runtime.add_weighted_adapter(list(names), weights, "sum", combination_type="linear")
    assert_close(logits(model, batch, adapter_names="sum"), want)
    runtime.save_adapter("sum", tmp_path)
    assert any("turn" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    assert runtime.load_adapter(tmp_path, "again").peft_type == "DELTA"
    assert torch.equal(logits(model, batch, adapter_names="again"), logits(model, batch, adapter_names="sum"))


def test_turns_of_different_blocks_make_no_one_adapter(folders: Any) -> None:
    model = served(build("llama"), folders("llama", "oft", "oft8"))
    with pytest.raises(errors.MergeError, match="blocks of different sizes are served in weighted entries"):
        model.mlora.add_weighted_adapter(["oft", "oft8"], [1, 1], "sum", combination_type="linear")


@pytest.mark.parametrize("name", ("oft", "road2", "dora"))
def test_other_strategies_see_the_true_change(folders: Any, name: str) -> None:
    """TIES of one adapter that keeps everything, at full rank: the adapter, biases that it changes included."""
    base = build("bert")
    for module in base.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.data = torch.randn(module.bias.shape, generator=torch.Generator().manual_seed(1))
    model, batch = served(base, folders("bert", name)), inputs_for("bert", 3)
    want = logits(model, batch, adapter_names=name)
    entry = Merge([name], [1.0], "ties", density=1.0, svd_rank=64)
    assert_close(logits(model, batch, adapter_names=entry), want, 3e-5)


def test_factor_space_refuses_turns(folders: Any) -> None:
    base = build("llama")
    name, module = next((n, m) for n, m in base.named_modules() if n.endswith("q_proj"))
    linear = base_linear(name, module)
    delta = lower(mlora.Adapter.from_pretrained(folders("llama", "oft")["oft"]), bases_of(base)).deltas[name]
    with pytest.raises(errors.MergeError, match="a turn or a bias"):
        merge_module([delta], Merge(["a"], [1.0], "linear", space="factor"), linear)


def bases_of(model: Any) -> Any:
    from mlora.layers import base_linears, find_layers

    return base_linears(model, find_layers(model))


# Files


@pytest.mark.parametrize(
    ("tensors", "message"),
    (
        ({"delta_turn": torch.ones(2, 6)}, "delta_turn_stride is missing"),
        (
            {"delta_turn": torch.ones(2, 6), "delta_turn_stride": torch.tensor(2)},
            "2 elements, 2 apart, .* not divide 6",
        ),
        ({"delta_turn": torch.ones(2, 6), "delta_turn_stride": torch.tensor(0)}, "do not divide"),
        ({"delta_turn": torch.ones(2, 6), "delta_turn_stride": torch.tensor(1.0)}, "whole numbers"),
        ({"delta_in_turn": torch.ones(2, 6), "delta_in_turn_stride": torch.tensor(1)}, "must be .any, 4"),
    ),
)
def test_files_that_do_not_fit(tensors: dict[str, Tensor], message: str) -> None:
    adapter = mlora.Adapter({"peft_type": "DELTA"}, {f"0.{key}": tensor for key, tensor in tensors.items()})
    with pytest.raises(errors.AdapterError, match=message):
        mlora.patch(nn.Sequential(nn.Linear(4, 6))).add_adapter("a", adapter)


def test_an_embedding_is_not_turned(llama: Any) -> None:
    width = llama.model.embed_tokens.embedding_dim
    tensors = {"model.embed_tokens.oft_R.weight": torch.ones(width // 4, 6)}
    adapter = mlora.Adapter({"peft_type": "OFT", "oft_block_size": 4}, tensors)
    with pytest.raises(errors.UnsupportedAdapterError, match="an embedding is served with LoRA or TinyLoRA only"):
        mlora.patch(copy.deepcopy(llama)).add_adapter("a", adapter)


def test_no_weight_is_needed(folders: Any) -> None:
    """OFT and RoAd act beside the base, so a base whose weight nobody can read serves them."""

    class Closed(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features = inner.in_features, inner.out_features
            self.register_buffer("packed", inner.weight.detach().double())
            self.register_buffer("bias", inner.bias.detach())

        def forward(self, x: Tensor) -> Tensor:
            if not x.any():
                raise RuntimeError("not for probing")
            return (x.double() @ self.packed.t()).to(x.dtype) + self.bias

    base, batch = build("bert"), inputs_for("bert", 2)
    closed = copy.deepcopy(base)
    for layer in closed.bert.encoder.layer:
        layer.attention.self.query = Closed(layer.attention.self.query)
    for name, folder in folders("bert", "oft", "road").items():
        got = logits(served(closed, {name: folder}), batch, adapter_names=name)
        assert_close(got, logits(peft_alone(base, folder), batch))


# Autograd and compilation


@pytest.mark.parametrize("entries", (["oft", "road", None], [{"oft": 0.5, "road": 0.7, "dora": 0.4}] * 3))
def test_gradients_reach_the_input(folders: Any, entries: Any) -> None:
    base = build("bert")
    model = served(base, folders("bert", *ALL))
    layer = model.bert.encoder.layer[0].attention.self.query
    x = torch.randn(3, 4, layer.in_features, dtype=torch.float32, requires_grad=True)
    with model.mlora.use_adapters(entries):
        y = layer(x)
        with torch.no_grad():
            assert_close(layer(x), y.detach(), 1e-6)
        (got,) = torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum(), x)
        weight = torch.linspace(-1, 1, y.numel()).view(y.shape)
        with torch.no_grad():  # the layer is affine: its gradient is what it makes of the unit vectors
            columns = [
                layer(torch.eye(layer.in_features)[i].expand(3, 4, -1)) - layer(0 * x) for i in range(layer.in_features)
            ]
    want = torch.stack([(column * weight).sum(-1) for column in columns], dim=-1)
    assert_close(got, want)


@pytest.fixture
def strict_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def test_compiled_code_follows_the_entries(folders: Any, strict_dynamo: None) -> None:
    model, batch = served(build("llama"), folders("llama", *ALL)), inputs_for("llama", 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for entries in (
        ["oft", None, "road", "lora"],
        [{"oft": 0.5, "road": 0.5, "dora": 1.0}] * 4,
        None,
        ["road2", "oft8", "oft", None],
    ):
        want = logits(model, batch, adapter_names=entries)
        with model.mlora.use_adapters(entries):
            assert_close(logits(compiled, batch), want, 1e-6)
    model.mlora.delete_adapter("oft")
    with model.mlora.use_adapters("road"):
        assert_close(logits(compiled, batch), logits(model, batch, adapter_names="road"), 1e-6)
