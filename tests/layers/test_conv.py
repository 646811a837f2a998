"""Adapters of convolutions, per row of a batch."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import BUILDERS, assert_close, build, inputs_for, logits, peft_alone, row_of
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import mlora
from mlora import errors
from mlora.layers import ConvLayer, find_layers
from mlora.layers import conv as layer_module


class Net(nn.Module):
    """Convolutions of one, two and three dimensions beside a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.wave = nn.Conv1d(3, 8, 5, stride=2, padding=2)
        self.image = nn.Conv2d(1, 6, (3, 2), padding="same")
        self.groups = nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 0), groups=2, bias=False)
        self.volume = nn.Conv3d(1, 4, (3, 2, 2))
        self.head = nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.image(self.wave(x)[:, None]))
        x = torch.tanh(self.groups(x))[:, None]
        return self.head(torch.tanh(self.volume(x)).flatten(2).mean(-1))


TARGETS = ["wave", "image", "groups", "volume", "head"]
UNGROUPED = ["wave", "image", "volume", "head"]
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 4, "lora_alpha": 6, "target_modules": TARGETS}),
    "rs": ("LoraConfig", {"r": 2, "use_rslora": True, "target_modules": TARGETS, "rank_pattern": {"wave": 5}}),
    "dora": ("LoraConfig", {"r": 3, "use_dora": True, "target_modules": UNGROUPED}),
    "bias": ("LoraConfig", {"r": 2, "lora_bias": True, "target_modules": TARGETS}),
    "bases": ("LoraConfig", {"r": 2, "bias": "all", "target_modules": UNGROUPED}),
    "ia3": ("IA3Config", {"target_modules": TARGETS[1:], "feedforward_modules": ["groups", "volume"]}),
    "ia3 on others": ("IA3Config", {"target_modules": TARGETS[1:], "feedforward_modules": ["image", "head"]}),
    "loha": ("LoHaConfig", {"r": 2, "target_modules": ["wave", "image", "head"]}),
    "tucker": ("LoHaConfig", {"r": 2, "use_effective_conv2d": True, "target_modules": ["wave", "image"]}),
    "lokr": ("LoKrConfig", {"r": 1, "use_effective_conv2d": True, "target_modules": ["wave", "image"]}),
    "saved": ("LoraConfig", {"r": 2, "target_modules": ["head"], "modules_to_save": ["groups", "volume"]}),
}


@pytest.fixture(autouse=True, scope="module")
def _net() -> Any:
    BUILDERS["net"] = Net
    yield
    del BUILDERS["net"]


def waves(rows: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, 3, 21, generator=torch.Generator().manual_seed(seed))


def make(folder: Path, base: nn.Module, kind: str, seed: int = 0, **options: Any) -> Path:
    """A PEFT folder whose every trainable tensor is random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(copy.deepcopy(base).float(), getattr(peft, kind)(**options))
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                gain = "magnitude" in name or "ia3" in name
                noise = 0.4 * torch.randn(parameter.shape, generator=generator)
                parameter.data.copy_(parameter * (1 + noise) if gain else noise)
        wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def net() -> Any:
    return build("net")


@pytest.fixture(scope="module")
def folders(net: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("convs")
    return {
        name: make(root / name, net, kind, seed, **options)
        for seed, (name, (kind, options)) in enumerate(ADAPTERS.items())
    }


@pytest.fixture
def served(net: Any, folders: dict[str, Path]) -> Any:
    model = copy.deepcopy(net)
    runtime = mlora.patch(model)
    for name, folder in folders.items():
        runtime.load_adapter(folder, name)
    return model


def call(model: nn.Module, x: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(x, **options)


def test_rows_are_those_of_peft_alone(net: Any, folders: dict[str, Path], served: Any) -> None:
    entries = [None, *ADAPTERS, "lora", "__base__", "dora"]
    x = waves(len(entries))
    got = call(served, x, adapter_names=entries)
    for row, name in enumerate(entries):
        bare = call(net, x[row : row + 1])
        if name not in folders:
            assert_close(got[row : row + 1], bare)
            continue
        assert_close(got[row : row + 1], call(peft_alone(net, folders[name]), x[row : row + 1]))
        assert (got[row] - bare[0]).abs().max() > 1e-3 * bare.abs().max()


def test_weighted_rows(net: Any, folders: dict[str, Path], served: Any) -> None:
    x, mixes = waves(3), [{"lora": 0.6, "rs": -0.5}, {"rs": 2.0}, {"lora": 1.0, "bias": 0.3}]
    got = call(served, x, adapter_names=mixes)
    for row, mix in enumerate(mixes):
        oracle = peft_alone(net, *(folders[name] for name in mix), weights=list(mix.values()))
        assert_close(got[row : row + 1], call(oracle, x[row : row + 1]))


CONVS: dict[str, tuple[type[nn.Module], tuple[Any, ...], dict[str, Any]]] = {
    "plain": (nn.Conv2d, (4, 6, 3), {}),
    "1x1": (nn.Conv2d, (4, 6, 1), {}),
    "1x1, strided": (nn.Conv2d, (4, 6, 1), {"stride": 2}),
    "strided, padded unevenly": (nn.Conv2d, (4, 6, (3, 4)), {"stride": (2, 3), "padding": (2, 1)}),
    "same, even kernel": (nn.Conv2d, (4, 6, (4, 2)), {"padding": "same"}),
    "valid": (nn.Conv1d, (4, 6, 3), {"padding": "valid"}),
    "circular": (nn.Conv1d, (4, 6, 5), {"padding": 2, "padding_mode": "circular"}),
    "reflect": (nn.Conv2d, (4, 6, 3), {"padding": 1, "padding_mode": "reflect"}),
    "replicate": (nn.Conv3d, (4, 6, 3), {"padding": 1, "padding_mode": "replicate"}),
    "same, circular": (nn.Conv2d, (4, 6, 2), {"padding": "same", "padding_mode": "circular"}),
    "groups": (nn.Conv2d, (4, 6, 3), {"groups": 2, "padding": 1}),
    "depthwise": (nn.Conv1d, (4, 8, 3), {"groups": 4}),
    "3-d": (nn.Conv3d, (4, 6, (2, 3, 1)), {"stride": (1, 2, 1), "padding": (1, 0, 2)}),
}
SPATIAL = {nn.Conv1d: (11,), nn.Conv2d: (9, 8), nn.Conv3d: (6, 7, 5)}


def single(name: str, seed: int = 0) -> tuple[Any, Tensor]:
    """A model of one convolution, and inputs of four rows for it."""
    torch.manual_seed(seed)
    cls, sizes, options = CONVS[name]
    return nn.Sequential(cls(*sizes, **options)), torch.randn(4, sizes[0], *SPATIAL[cls])


@pytest.mark.parametrize("name", CONVS)
def test_kernels_strides_paddings_and_groups(tmp_path: Path, name: str) -> None:
    base, x = single(name)
    folder = make(tmp_path, base, "LoraConfig", r=4, target_modules=["0"])
    model = copy.deepcopy(base)
    mlora.patch(model).load_adapter(folder, "a")
    got = call(model, x, adapter_names=["a", None, {"a": -0.5}, "a"])
    want, bare = call(peft_alone(base, folder), x), call(base, x)
    assert_close(got, torch.stack((want[0], bare[1], bare[2] - 0.5 * (want[2] - bare[2]), want[3])))
    assert torch.equal(call(model, x), bare)


def test_dilated_convolutions(tmp_path: Path) -> None:
    """LoHa keeps the dilation; PEFT's LoRA loses it."""
    base, x = nn.Sequential(nn.Conv2d(4, 6, 3, dilation=(2, 1), padding=2)), torch.randn(3, 4, 9, 8)
    folder = make(tmp_path / "loha", base, "LoHaConfig", r=2, target_modules=["0"])
    model = copy.deepcopy(base)
    runtime = mlora.patch(model)
    runtime.load_adapter(folder, "a")
    assert_close(call(model, x, adapter_names=["a"] * 3), call(peft_alone(base, folder), x))
    runtime.add_weighted_adapter(["a"], [2.0], "twice")  # no LoRA could hold it
    runtime.save_adapter("twice", tmp_path / "twice")
    assert runtime._registry["twice"].adapter.peft_type == "DELTA"
    runtime.load_adapter(tmp_path / "twice", "again")
    assert torch.equal(call(model, x, adapter_names="again"), call(model, x, adapter_names="twice"))


REFUSED = {
    "lora-dilated": (nn.Conv2d(4, 6, 3, dilation=2), "LoraConfig", {}, "dilated"),
    "dora-grouped": (nn.Conv2d(4, 6, 3, groups=2), "LoraConfig", {"use_dora": True, "r": 2}, "use_dora"),
    "loha-grouped": (nn.Conv2d(4, 6, 3, groups=2), "LoHaConfig", {}, "2 groups"),
    "hra-uneven": (nn.Conv2d(4, 6, 3, stride=(1, 2)), "HRAConfig", {}, "square"),
    "oft-3x3": (nn.Conv2d(4, 6, 3), "OFTConfig", {"oft_block_size": 4}, "overlaps"),
    "oft-circular": (
        nn.Conv2d(4, 6, 1, padding=1, padding_mode="circular"), "OFTConfig", {"oft_block_size": 4}, "padded with zeros",
    ),
    "lokr-1d": (nn.Conv1d(4, 6, 3), "LoKrConfig", {"r": 8}, "shuffles"),
    "saved-circular": (
        nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), "LoraConfig",
        {"modules_to_save": ["0"], "target_modules": ["1"]}, "pads",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_by_name(tmp_path: Path, case: str) -> None:
    conv, kind, options, reason = REFUSED[case]
    base = nn.Sequential(copy.deepcopy(conv), nn.Linear(3, 3))
    folder = make(tmp_path, base, kind, **{"target_modules": ["0"], **options})
    runtime = mlora.patch(copy.deepcopy(base))
    with pytest.raises(errors.UnsupportedAdapterError, match=r"module 0.*" + reason):
        runtime.load_adapter(folder, "a")


A, B = torch.ones(2, 4, 3, 3), torch.ones(6, 2, 1, 1)
DAMAGED = {
    "flat kernel": ({"lora_A.weight": A.reshape(2, 4, 9, 1), "lora_B.weight": B}, r"kernel \(3, 3\)"),
    "a matrix": ({"lora_A.weight": A.flatten(1), "lora_B.weight": B}, r"kernel \(3, 3\)"),
    "wide B": ({"lora_A.weight": A, "lora_B.weight": B.expand(6, 2, 3, 3)}, r"kernel \(1, 1\)"),
    "channels": ({"lora_A.weight": A[:, :3], "lora_B.weight": B}, "3 columns"),
    "rank": ({"lora_A.weight": A, "lora_B.weight": B[:, :1]}, "rank"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_weights(case: str) -> None:
    tensors, reason = DAMAGED[case]
    runtime = mlora.patch(nn.Sequential(nn.Conv2d(4, 6, 3)))
    adapter = mlora.Adapter(
        {"peft_type": "LORA", "r": 2, "target_modules": ["0"]}, {f"0.{key}": t for key, t in tensors.items()}
    )
    with pytest.raises(errors.AdapterError, match=reason):
        runtime.add_adapter("a", adapter)


@pytest.mark.parametrize("kind", ("VERA", "MISS", "DELORA"))
def test_types_that_peft_has_no_convolution_of(kind: str) -> None:
    part = {"VERA": "vera_lambda_b", "MISS": "miss_block", "DELORA": "delora_A"}[kind]
    adapter = mlora.Adapter({"peft_type": kind, "target_modules": ["0"]}, {f"0.{part}": torch.ones(6)})
    with pytest.raises(errors.UnsupportedAdapterError, match=rf"module 0: it is a 2-d convolution.*{kind}"):
        mlora.patch(nn.Sequential(nn.Conv2d(4, 6, 3))).add_adapter("a", adapter)


class Standardized(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)


class Causal(nn.Conv1d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(nn.functional.pad(input, (2, 0)), weight, bias)


class Named(nn.Conv2d):
    """A subclass that computes what its class does."""


def test_which_convolutions_are_served() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 2, 3), Standardized(2, 2, 3), Causal(2, 2, 3), nn.ConvTranspose2d(2, 2, 3), Named(2, 2, 3),
        nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 2, 3)),
    )  # fmt: skip
    assert list(find_layers(model)) == ["0", "4", "5"]
    runtime = mlora.patch(model)
    assert [isinstance(module, ConvLayer) for module in model] == [True, False, False, False, True, True]
    shapes = {"lora_A.weight": (2, 2, 3, 3), "lora_B.weight": (2, 2, 1, 1)}
    adapter = mlora.Adapter(
        {"peft_type": "LORA", "r": 2, "target_modules": ["3"]},
        {f"3.{key}": torch.ones(shape) for key, shape in shapes.items()},
    )
    with pytest.raises(errors.AdapterError, match=r"3, which this model has no linear or convolution for.*transposed"):
        runtime.add_adapter("a", adapter)


@pytest.mark.parametrize("kind", ("vit", "conv", "net"))
def test_an_untouched_model_keeps_its_bits(kind: str) -> None:
    base = build(kind)
    batch = {"x": waves(3)} if kind == "net" else inputs_for(kind, 3)
    model = copy.deepcopy(base)
    mlora.patch(model)
    assert any(isinstance(module, ConvLayer) for module in model.modules())
    assert torch.equal(logits(model, batch), logits(base, batch))
    assert mlora.unpatch(model) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]


def test_a_vits_projection(tmp_path: Path) -> None:
    base, batch = build("vit"), inputs_for("vit", 3)
    folder = make(tmp_path, base, "LoraConfig", r=4, target_modules=["projection", "q_proj"])
    model = copy.deepcopy(base)
    mlora.patch(model).load_adapter(folder, "a")
    got = logits(model, batch, adapter_names=["a", None, "a"])
    oracle = peft_alone(base, folder)
    for row, which in enumerate((oracle, base, oracle)):
        assert_close(got[row : row + 1], logits(which, row_of(batch, row)))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("layer", ("wave", "image", "groups", "volume"))
def test_a_rows_delta_does_not_depend_on_the_others(
    net: Any, folders: dict[str, Path], layer: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The delta alone: on a base that gives zeros, since the library's convolutions do depend on the batch."""
    model = copy.deepcopy(net)
    for parameter in model.get_submodule(layer).parameters():
        parameter.data.zero_()
    model.to(dtype)
    runtime = mlora.patch(model)
    for name in ("lora", "rs"):
        runtime.load_adapter(folders[name], name)
    module = model.get_submodule(layer)
    shape = {"wave": (3, 21), "image": (1, 8, 11), "groups": (6, 8, 11), "volume": (1, 8, 5, 9)}[layer]
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    entries = ["lora", None, {"lora": 0.5, "rs": -2.0}, "rs", "lora"]
    with torch.no_grad(), runtime.use_adapters(entries):
        got = module(x)
        monkeypatch.setattr(layer_module, "PATCH_BYTES", 1000)
        assert torch.equal(module(x), got), "laid out piece by piece it must be the same"
        assert got.is_contiguous()
        if x.dim() == 4:
            last = module(x.to(memory_format=torch.channels_last))
            assert torch.equal(last, got) and last.is_contiguous(memory_format=torch.channels_last)
    assert not got[1].any() and got[0].any()
    for row, entry in enumerate(entries):
        with torch.no_grad(), runtime.use_adapters([entry]):
            assert torch.equal(module(x[row : row + 1])[0], got[row])


def test_patches_are_laid_out_piece_by_piece(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more of them at once than a piece holds."""
    sizes = []
    apply_ = layer_module.dispatch.apply_
    monkeypatch.setattr(
        layer_module.dispatch, "apply_", lambda y, base, x, *rest: (sizes.append(x.nbytes), apply_(y, base, x, *rest))
    )
    x = torch.randn(2, 6, 40, 30)
    monkeypatch.setattr(layer_module, "PATCH_BYTES", 40_000)
    with torch.no_grad(), served.mlora.use_adapters("lora"):
        served.groups(x)
    assert len(sizes) > 1 and max(sizes) <= 40_000


def test_gains_alone_lay_no_patches_out(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ConvLayer, "_windows", lambda *_: pytest.fail("no term reads patches"))
    x = torch.randn(2, 1, 8, 11)
    with torch.no_grad(), served.mlora.use_adapters(["ia3", "ia3 on others"]):
        served.image(x)


def test_mixed_gains_evaluate_the_base_twice(net: Any, folders: dict[str, Path], served: Any) -> None:
    """An output gain of one adapter and an input gain of another add without a cross term."""
    x = torch.randn(2, 1, 8, 11)
    with torch.no_grad(), served.mlora.use_adapters({"ia3": 0.5, "ia3 on others": -2.0}):
        got = served.image(x)
    with torch.no_grad():
        bare = net.image(x)
        alone = [peft_alone(net, folders[name]).get_base_model().image(x) for name in ("ia3", "ia3 on others")]
    assert_close(got, bare + 0.5 * (alone[0] - bare) - 2.0 * (alone[1] - bare))


def test_warmup_knows_their_widths(served: Any) -> None:
    warmup = pytest.importorskip("mlora.layers.warmup", reason="Triton is not installed")
    assert [warmup._widths(served.get_submodule(name)) for name in ("groups", "volume")] == [(36, 8), (12, 4)]


def test_against_fp64(served: Any, folders: dict[str, Path]) -> None:
    """A grouped convolution's B is block-diagonal, and its A reads all channels."""
    tensors = served.mlora._registry["lora"].adapter.tensors
    a, b = (tensors[f"groups.lora_{part}.weight"].double() for part in "AB")
    x = torch.randn(2, 6, 8, 11)
    with torch.no_grad(), served.mlora.use_adapters("lora"):
        got = served.groups(x)
    inner = nn.functional.conv2d(x.double(), a, stride=(2, 1), padding=(1, 0))
    delta = torch.zeros_like(got, dtype=torch.float64)
    for out in range(8):
        for rank in range(2):
            first = 0 if out < 4 else 2
            delta[:, out] += 6 / 4 * b[out, rank, 0, 0] * inner[:, first + rank]
    base = nn.functional.conv2d(x.double(), served.groups.weight.double(), stride=(2, 1), padding=(1, 0), groups=2)
    assert_close(got, base + delta, 1e-6)


def test_bf16_is_within_twice_pefts_own_error(net: Any, folders: dict[str, Path]) -> None:
    half, x = copy.deepcopy(net).bfloat16(), waves(6).bfloat16()
    model = copy.deepcopy(half)
    runtime = mlora.patch(model)
    for name, folder in folders.items():
        runtime.load_adapter(folder, name)
        oracle = call(peft_alone(copy.deepcopy(half).float(), folder), x.float()).double()
        theirs = call(peft_alone(half, folder), x).double()
        ours = call(model, x, adapter_names=[name] * 6).double()
        error, allowed = (ours - oracle).norm().item(), (theirs - oracle).norm().item()
        assert 0 < error <= 2 * allowed, f"{name}: {error:.3g} from the oracle, PEFT {allowed:.3g}"


def test_rows_of_other_batches_are_refused(served: Any) -> None:
    with served.mlora.use_adapters(["lora", "rs"]), pytest.raises(errors.AttributionError, match="wave"):
        served.wave(torch.randn(3, 3, 21))
    with served.mlora.use_adapters(["lora", "rs", None]), pytest.raises(errors.AttributionError, match="wave"):
        served.wave(torch.randn(3, 21))  # one row, without a batch
    x = torch.randn(3, 21)
    with torch.no_grad(), served.mlora.use_adapters("lora"):
        assert_close(served.wave(x), served.wave(x[None])[0])


@pytest.mark.parametrize("keep", ("copy", "corrections", "checkpoint"))
def test_folding_is_pefts_merge_and_restores_every_byte(
    tmp_path: Path, net: Any, folders: dict[str, Path], keep: str
) -> None:
    names = ["lora"] if keep == "corrections" else ["bias", "dora", "ia3", "tucker"]
    ungrouped = copy.deepcopy(net)
    ungrouped.groups = nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 0))
    save_file(ungrouped.state_dict(), tmp_path / "model.safetensors")
    checkpoint = tmp_path if keep == "checkpoint" else None
    for seed, name in enumerate(names):
        kind, options = ADAPTERS[name]
        folder = make(tmp_path / name, ungrouped, kind, seed, **options)
        model, x = copy.deepcopy(ungrouped), waves(3)
        runtime = mlora.patch(model)
        runtime.load_adapter(folder, "a")
        runtime.merge_adapter("a", keep=keep, checkpoint=checkpoint)
        assert_close(call(model, x), call(peft_alone(ungrouped, folder).merge_and_unload(), x))
        assert_close(call(model, x, adapter_names=[None, "a", None])[::2], call(ungrouped, x)[::2])
        runtime.unmerge_adapter()
        for one, other in zip(model.parameters(), ungrouped.parameters(), strict=True):
            assert torch.equal(one, other)
    merged = model.mlora.merge_and_unload("a")
    assert type(merged.wave) is nn.Conv1d
    assert_close(call(merged, x), call(peft_alone(ungrouped, folder), x))


@pytest.mark.parametrize(("name", "reason"), (("groups", "groups"), ("circular", "zeros"), ("norm", "computed")))
def test_what_is_not_folded(tmp_path: Path, name: str, reason: str) -> None:
    base, x = single("plain" if name == "norm" else name)
    folder = make(tmp_path, base, "LoraConfig", r=4, target_modules=["0"])
    if name == "norm":
        nn.utils.parametrizations.weight_norm(base[0])
    bare = call(base, x)
    runtime = mlora.patch(base)
    runtime.load_adapter(folder, "a")
    with pytest.raises(errors.MergeError, match=rf"module 0.*{reason}"):
        runtime.merge_adapter("a")
    assert torch.equal(call(base, x), bare)


def test_merged_adapters_are_read_by_peft(tmp_path: Path, net: Any, folders: dict[str, Path], served: Any) -> None:
    """Of ungrouped convolutions; what a grouped one's mix is, no PEFT type holds."""
    ungrouped = [make(tmp_path / f"{i}", net, "LoraConfig", i, r=2, target_modules=UNGROUPED) for i in (1, 2)]
    model, x = copy.deepcopy(net), waves(2)
    runtime = mlora.patch(model)
    for name, folder in zip("ab", ungrouped, strict=True):
        runtime.load_adapter(folder, name)
    for how in ("linear", "ties"):
        options = {"density": 0.7} if how == "ties" else {}
        runtime.add_weighted_adapter(["a", "b"], [0.6, -0.5], how, how, **options)
        runtime.save_adapter(how, tmp_path / how)
        assert_close(call(peft_alone(net, tmp_path / how), x), call(model, x, adapter_names=how))
    assert_close(call(model, x, adapter_names="linear"), call(model, x, adapter_names={"a": 0.6, "b": -0.5}))

    served.mlora.add_weighted_adapter(["lora", "rs"], [0.6, -0.5], "sum")
    want = call(served, x, adapter_names={"lora": 0.6, "rs": -0.5})
    assert_close(call(served, x, adapter_names="sum"), want)
    served.mlora.save_adapter("sum", tmp_path / "sum")
    served.mlora.load_adapter(tmp_path / "sum", "again")
    assert_close(call(served, x, adapter_names="again"), want)


def test_gains_of_a_circular_convolution_merge_by_sum_only(tmp_path: Path) -> None:
    base, x = single("circular")
    model = copy.deepcopy(base)
    runtime = mlora.patch(model)
    for i, name in enumerate("ab"):
        folder = make(tmp_path / name, base, "LoraConfig", i, r=2, use_dora=True, target_modules=["0"])
        runtime.load_adapter(folder, name)
        assert_close(call(model, x, adapter_names=name), call(peft_alone(base, folder), x))
    with pytest.raises(errors.MergeError, match=r"module 0.*zeros"):
        runtime.add_weighted_adapter(["a", "b"], [0.6, 0.5], "ties", "ties", density=0.5)
    runtime.add_weighted_adapter(["a", "b"], [0.6, 0.5], "sum")
    assert_close(call(model, x, adapter_names="sum"), call(model, x, adapter_names={"a": 0.6, "b": 0.5}))


def test_offline_merges_know_kernels(tmp_path: Path, net: Any) -> None:
    from mlora.merge.offline import merge_files

    adapters = {
        name: mlora.Adapter.from_pretrained(make(tmp_path / name, net, "LoraConfig", i, r=2, target_modules=UNGROUPED))
        for i, name in enumerate("ab")
    }
    merged, _ = merge_files(adapters, mlora.Merge(("a", "b"), (0.6, -0.5)))
    merged.save_pretrained(tmp_path / "sum")
    oracle, x = peft_alone(net, tmp_path / "a", tmp_path / "b", weights=(0.6, -0.5)), waves(2)
    assert_close(call(peft_alone(net, tmp_path / "sum"), x), call(oracle, x))


def test_inspect(tmp_path: Path, net: Any, folders: dict[str, Path]) -> None:
    from mlora.cli import app

    result = CliRunner().invoke(app, ["inspect", str(folders["lora"])])
    assert result.exit_code == 0 and "served   yes" in result.output and "ranks    4" in result.output, result.output


@pytest.mark.parametrize("name", ("lora", "dora", "ia3", "loha", "saved"))
def test_a_peft_model_is_taken_over(net: Any, folders: dict[str, Path], name: str) -> None:
    wrapped, x = peft_alone(net, folders[name]), waves(2)
    want = call(wrapped, x)
    model = mlora.patch(wrapped).model
    assert type(model.image).__name__ == "Conv2d"
    assert_close(call(model, x), want)


def test_compiled(served: Any, net: Any) -> None:
    x = waves(3)
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    with torch.no_grad():
        compiled = torch.compile(served, fullgraph=True, backend=backend)
        for entries in (["lora", None, "ia3"], [None] * 3, [{"dora": 0.5, "ia3": 1.0}, "bias", "tucker"], "rs"):
            with served.mlora.use_adapters(entries):
                assert_close(compiled(x), served(x))
        assert_close(compiled(x), net(x))
    assert len(graphs) == 1


def test_compiled_code_refuses_rows_of_other_batches(served: Any) -> None:
    compiled = torch.compile(served.groups, backend="aot_eager")
    with torch.no_grad(), served.mlora.use_adapters(["lora", None]):
        assert compiled(torch.randn(2, 6, 8, 11)).shape[0] == 2
        with pytest.raises(errors.AttributionError, match="2 entries"):
            compiled(torch.randn(4, 6, 8, 11))


@pytest.mark.parametrize("name", ("lora", "dora", "ia3", "ia3 on others"))
def test_gradients_reach_the_input(net: Any, folders: dict[str, Path], served: Any, name: str) -> None:
    ours, theirs = waves(3).requires_grad_(), waves(3).requires_grad_()
    served(ours, adapter_names=[name] * 3).square().sum().backward()
    peft_alone(net, folders[name])(theirs).square().sum().backward()
    assert_close(ours.grad, theirs.grad)


# Files of other trainers.


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def file_of(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def tucker(core: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
    """(out, in, kernel) of a core (r, r, kernel): LyCORIS' rebuild_tucker."""
    return torch.einsum("ij...,ip,jr->pr...", core.double(), outer.double(), inner.double())


def kohya(kind: str) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a (6, 4, 3, 2) convolution, and what they add to its weight by LyCORIS' formulas."""
    up, down, mid = numbers(6, 3, 1, 1, seed=1), numbers(3, 4, 3, 2, seed=2), numbers(3, 3, 3, 2, seed=3)
    alpha, small = torch.tensor(1.5), numbers(3, 4, 1, 1, seed=4)
    if kind == "lora":
        parts = {"lora_up.weight": up, "lora_down.weight": down, "alpha": alpha}
        return parts, 0.5 * torch.einsum("or,rikl->oikl", up[..., 0, 0].double(), down.double())
    if kind == "lora with a core":
        parts = {"lora_up.weight": up, "lora_down.weight": small, "lora_mid.weight": mid, "alpha": alpha}
        return parts, 0.5 * tucker(mid, up[..., 0, 0].t(), small[..., 0, 0])
    if kind == "loha":
        parts = {f"hada_w{i}_{s}": numbers(*n, seed=i) for i in (1, 2) for s, n in (("a", (6, 3)), ("b", (3, 24)))}
        product = [parts[f"hada_w{i}_a"].double() @ parts[f"hada_w{i}_b"].double() for i in (1, 2)]
        return {**parts, "alpha": alpha}, 0.5 * (product[0] * product[1]).reshape(6, 4, 3, 2)
    if kind == "loha with cores":
        parts = {f"hada_w{i}_{s}": numbers(3, n, seed=i) for i in (1, 2) for s, n in (("a", 6), ("b", 4))}
        cores = {f"hada_t{i}": numbers(3, 3, 3, 2, seed=5 + i) for i in (1, 2)}
        product = [tucker(cores[f"hada_t{i}"], parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"]) for i in (1, 2)]
        return {**parts, **cores, "alpha": alpha}, 0.5 * product[0] * product[1]
    one = numbers(2, 2, seed=1)
    if kind == "lokr":
        two = numbers(3, 2, 3, 2, seed=2)
        parts, scale = {"lokr_w1": one, "lokr_w2": two}, 1.0
    else:
        factors = {"lokr_w2_a": numbers(1, 3, seed=2), "lokr_w2_b": numbers(1, 2, seed=3)}
        core = numbers(1, 1, 3, 2, seed=4)
        two = tucker(core, factors["lokr_w2_a"], factors["lokr_w2_b"])
        parts, scale = {"lokr_w1": one, **factors, "lokr_t2": core, "alpha": torch.tensor(2.0)}, 2.0
    return parts, scale * torch.kron(one[..., None, None].double(), two.double())


@pytest.mark.parametrize("kind", ("lora", "lora with a core", "loha", "loha with cores", "lokr", "lokr with a core"))
def test_files_of_kohya_and_lycoris(tmp_path: Path, kind: str) -> None:
    base = nn.ModuleDict({"conv_in": nn.Conv2d(4, 6, (3, 2), padding=(1, 0), dilation=(1, 2))})
    parts, delta = kohya(kind)
    file = file_of(tmp_path / "a.safetensors", {f"lora_unet_conv_in.{key}": t for key, t in parts.items()})
    runtime = mlora.patch(base)
    info = runtime.load_adapter(file, "a", dense=kind == "lokr")
    assert not info.errors
    x = torch.randn(2, 4, 7, 8)
    with torch.no_grad(), runtime.use_adapters(["a", None]):
        got = base["conv_in"](x)
        weight, bias = base["conv_in"].weight.double(), base["conv_in"].bias.double()
    for row, changed in enumerate((weight + delta, weight)):
        want = nn.functional.conv2d(x[row : row + 1].double(), changed, bias, 1, (1, 0), (1, 2))
        assert_close(got[row : row + 1], want.detach(), 1e-6)


@pytest.mark.parametrize("module", (nn.Linear(4, 6), nn.Conv2d(4, 6, 1)), ids=("linear", "1x1"))
@pytest.mark.parametrize("trailing", ((), (1, 1)), ids=("matrix", "kernel"))
def test_1x1_convolutions_that_became_linears(tmp_path: Path, module: nn.Module, trailing: tuple[int, ...]) -> None:
    """As Stable Diffusion's proj_in did."""
    up, down = numbers(6, 2, seed=1), numbers(2, 4, seed=2)
    tensors = {"lora_up.weight": up.reshape(6, 2, *trailing), "lora_down.weight": down.reshape(2, 4, *trailing)}
    file = file_of(tmp_path / "a.safetensors", {f"lora_unet_proj_in.{key}": t for key, t in tensors.items()})
    base = nn.ModuleDict({"proj_in": copy.deepcopy(module)})
    runtime = mlora.patch(base)
    runtime.load_adapter(file, "a")
    x = torch.randn(2, 4) if isinstance(module, nn.Linear) else torch.randn(2, 4, 1, 1)
    with torch.no_grad(), runtime.use_adapters("a"):
        added = base["proj_in"](x) - module(x)
    assert_close(added.flatten(1), x.flatten(1).double() @ (up.double() @ down.double()).t())


@pytest.mark.parametrize("part", ("lora_mid.weight", "hada_t1", "lokr_t2"))
def test_cores_are_of_convolutions(tmp_path: Path, part: str) -> None:
    tensors = {part: torch.ones(2, 2, 3, 3), "alpha": torch.tensor(1.0)}
    if part == "lokr_t2":
        tensors.update({"lokr_w1": torch.ones(2, 2), "lokr_w2_a": torch.ones(2, 3), "lokr_w2_b": torch.ones(2, 2)})
    if part == "hada_t1":
        tensors["hada_w1_b"] = torch.ones(2, 4)
    file = file_of(tmp_path / "a.safetensors", {f"lora_unet_q.{key}": t for key, t in tensors.items()})
    with pytest.raises(errors.AdapterError, match=r"module q.*linear"):
        mlora.patch(nn.ModuleDict({"q": nn.Linear(4, 6)})).load_adapter(file, "a")
