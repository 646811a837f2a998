"""What other programs write: keys with wrappers and names, options that say nothing, alpha in every form, files of
several models; and `ignore`, the way around what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_close, inputs_for, logits, make_adapter, peft_alone, refused, rewrite
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mlora
from mlora import errors
from mlora.lowering import module_names

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROOT = "base_model.model."


@pytest.fixture
def good(folders: dict[str, Path]) -> Path:
    return folders["r3"]


def same(model: Any, first: str, second: str) -> bool:
    batch = inputs_for("llama", 2)
    return torch.equal(logits(model, batch, adapter_names=first), logits(model, batch, adapter_names=second))


# Keys


KEYS = (
    ("default", lambda key: key.replace(".weight", ".default.weight")),
    ("its-name", lambda key: key.replace(".weight", ".my_adapter.weight")),
    ("compiled", lambda key: f"_orig_mod.{key}"),
    ("compiled-inside", lambda key: key.replace(ROOT, f"{ROOT}_orig_mod.")),
    ("compiled-layer", lambda key: key.replace(".self_attn.", "._orig_mod.self_attn.")),
    ("compiled-linear", lambda key: key.replace(".lora_", "._orig_mod.lora_")),
    ("distributed", lambda key: f"module.{key}"),
    ("twice", lambda key: f"module._orig_mod.module.{key}"),
    ("fsdp", lambda key: key.replace(".self_attn.", "._fsdp_wrapped_module.self_attn.")),
    ("fsdp-all", lambda key: f"_fsdp_wrapped_module.{key}"),
    ("checkpointing", lambda key: key.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn.")),
    (
        "all",
        lambda key: key.replace(".self_attn.", "._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn.").replace(
            ".weight", ".x.weight"
        ),
    ),
)


@pytest.mark.parametrize("change", [key[1] for key in KEYS], ids=[key[0] for key in KEYS])
def test_keys_are_read_without_what_is_around_them(patched: Any, good: Path, tmp_path: Path, change: Any) -> None:
    folder = rewrite(good, tmp_path / "a", tensors=lambda state: {change(key): t for key, t in state.items()})
    patched.mlora.load_adapter(folder, "new")
    assert same(patched, "new", "r3")
    patched.mlora.save_adapter("new", tmp_path / "saved")
    assert load_file(tmp_path / "saved" / WEIGHTS).keys() == load_file(good / WEIGHTS).keys()


@pytest.mark.parametrize(
    ("key", "plain"),
    (
        ("h.0.ia3_l.default", "h.0.ia3_l"),
        ("h.0.hada_w1_a.default", "h.0.hada_w1_a"),
        ("h.0.lokr_w2.a", "h.0.lokr_w2"),
        ("h.0.lora_E.a", "h.0.lora_E"),
        ("h.0.lora_embedding_A.a", "h.0.lora_embedding_A"),
        ("h.0.lora_magnitude_vector.a.weight", "h.0.lora_magnitude_vector.weight"),
        ("h.0.lora_B.a.bias", "h.0.lora_B.bias"),
        ("h.0.oft_R.a.weight", "h.0.oft_R.weight"),
        ("base_model.vera_A.a", "base_model.vera_A"),
        ("e.token_adapter.trainable_tokens_delta.a", "e.token_adapter.trainable_tokens_delta"),
        ("h.0.ln_tuning_layers.a.bias", "h.0.ln_tuning_layers.bias"),
        ("lm_head.modules_to_save.a.weight", "lm_head.weight"),
        # None of these has an adapter's name in it.
        ("h.0.lora_A.weight", "h.0.lora_A.weight"),
        ("h.module.lora_B.bias", "h.module.lora_B.bias"),
        ("default.lora_A.weight", "default.lora_A.weight"),
        ("e.token_adapter.trainable_tokens_delta", "e.token_adapter.trainable_tokens_delta"),
        ("lora_unet_x.lora_down.weight", "lora_unet_x.lora_down.weight"),
        ("unet.x.lora_linear_layer.up.weight", "unet.x.lora_linear_layer.up.weight"),
        ("unet.x.lora.up.weight", "unet.x.lora.up.weight"),
        ("lycoris_x.lokr_w1", "lycoris_x.lokr_w1"),
        ("lora_te_x.alpha", "lora_te_x.alpha"),
    ),
)
def test_the_adapters_name_is_taken_out_of_a_key(key: str, plain: str) -> None:
    assert list(mlora.Adapter({"peft_type": "LORA"}, {key: torch.ones(1)}).tensors) == [plain]


def test_several_adapters_in_one_file_are_refused(patched: Any, good: Path, tmp_path: Path) -> None:
    def two(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k.replace(".weight", f".{'a' if 'q_proj' in k else 'b'}.weight"): t for k, t in state.items()}

    with refused(patched, errors.AdapterError, "several adapters (a, b)"):
        patched.mlora.load_adapter(rewrite(good, tmp_path / "a", tensors=two), "new")


# Options, and what is ignored


OPTIONS = (
    {
        "swift_type": "LORA",
        "lora_dtype": "bf16",
        "lorap_lr_ratio": 16.0,
        "lorap_emb_lr": 1e-6,
        "model_key_mapping": None,
    },
    {"lora_B_layout": "rank_major"},
    {"merge_weights": True, "enable_lora": None},
)


@pytest.mark.parametrize("options", OPTIONS, ids=("ms-swift", "unsloth", "loralib"))
def test_options_of_other_trainers_that_say_nothing(
    patched: Any, good: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    patched.mlora.load_adapter(rewrite(good, tmp_path / "a", options), "new")
    assert same(patched, "new", "r3") and patched.mlora.adapters["new"].ignored == ()


@pytest.mark.parametrize(
    "options",
    (
        {"swift_type": "LONGLORA"},
        {"lora_B_layout": "grouped_by_expert"},
        {"enable_lora": [True, False, True]},
        {"model_key_mapping": {"a": "b"}},
        {"use_magic": 0.5},
        {"arrow_config": {"top_k": 2}},
    ),
    ids=lambda options: next(iter(options)),
)
def test_an_option_that_is_refused_can_be_ignored(
    patched: Any, good: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    (name,) = options
    folder = rewrite(good, tmp_path / "a", options)
    with refused(patched, errors.UnsupportedAdapterError, name, f"ignore=['{name}']"):
        patched.mlora.load_adapter(folder, "new")
    info = patched.mlora.load_adapter(folder, "new", ignore=[name, "not_there"])
    assert same(patched, "new", "r3") and info.ignored == (name,)
    adapter = mlora.Adapter.from_pretrained(folder)
    assert patched.mlora.add_adapter("again", adapter, ignore=[name]).ignored == (name,)
    patched.mlora.save_adapter("again", tmp_path / "saved")  # what is served is saved
    assert name not in json.loads((tmp_path / "saved" / CONFIG).read_text())


def test_a_tensor_that_is_left_over_can_be_ignored(patched: Any, good: Path, tmp_path: Path) -> None:
    more = {"v_head.summary.weight": torch.full((1, 32), float("nan")), f"{ROOT}v_head.summary.bias": torch.ones(1)}
    folder = rewrite(good, tmp_path / "a", tensors=lambda state: state | more)
    for patterns in (["v_head.*"], ["v_head.summary.weight", "*v_head.summary.bias"]):
        info = patched.mlora.load_adapter(folder, "new", ignore=patterns)
        assert same(patched, "new", "r3") and set(info.ignored) == set(more)
        patched.mlora.delete_adapter("new")
    with refused(patched, errors.AdapterError, "NaN"):
        patched.mlora.load_adapter(folder, "new", ignore=["*bias"])
    whole = rewrite(good, tmp_path / "b", tensors=lambda state: state | {"v_head.summary.weight": torch.ones(1, 32)})
    with refused(patched, errors.UnsupportedAdapterError, "left over", "ignore=['v_head.summary.weight']"):
        patched.mlora.load_adapter(whole, "new")


@pytest.mark.parametrize("name", ("r", "lora_alpha", "use_rslora", "target_modules"))
def test_what_is_computed_by_is_not_ignored(patched: Any, good: Path, name: str) -> None:
    with refused(patched, errors.UnsupportedAdapterError, "ignore", repr(name)):
        patched.mlora.load_adapter(good, "new", ignore=[name])


@pytest.mark.parametrize("ignore", ("r", [1], 3), ids=repr)
def test_what_is_no_list_of_names(patched: Any, good: Path, ignore: Any) -> None:
    with refused(patched, errors.AdapterError, "ignore is", repr(ignore)):
        patched.mlora.load_adapter(good, "new", ignore=ignore)


def test_values_that_may_be_harmless_can_be_ignored(patched: Any, good: Path, tmp_path: Path) -> None:
    """A base that was rewritten along with the adapter; and modules that were saved elsewhere."""
    for name, value in (("init_lora_weights", "corda"), ("modules_to_save", ["lm_head"])):
        folder = rewrite(good, tmp_path / name, {name: value})
        with refused(patched, errors.AdapterError, name, f"ignore=['{name}']"):
            patched.mlora.load_adapter(folder, "new")
        assert patched.mlora.load_adapter(folder, name, ignore=[name]).ignored == (name,)
        assert same(patched, name, "r3")


# Bare files


class Part(nn.Module):
    """Two linears, by the names of a diffusion model's or of a text encoder's."""

    def __init__(self, first: str, width: int = 12) -> None:
        super().__init__()
        self.first = first
        self.blocks = nn.ModuleList([nn.ModuleDict({first: nn.Linear(width, width), "out": nn.Linear(width, width)})])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0]["out"](torch.tanh(self.blocks[0][self.first](x)))


def part(prefix: str, first: str, flat: bool, width: int = 12, seed: int = 0) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a model's part, of scale 2 / 4, and that model with its deltas, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(1)
    model, tensors = Part(first, width).double(), {}
    for child in (first, "out"):
        a, b = (torch.randn(*shape, generator=generator) for shape in ((4, width), (width, 4)))
        name = f"blocks_0_{child}" if flat else f"blocks.0.{child}"
        ends = ("lora_down", "lora_up") if flat else ("lora_A", "lora_B")
        tensors |= {f"{prefix}{name}.{ends[0]}.weight": a, f"{prefix}{name}.{ends[1]}.weight": b}
        tensors[f"{prefix}{name}.alpha"] = torch.tensor(2.0)
        model.blocks[0][child].weight.data += 0.5 * b.double() @ a.double()
    return tensors, model


def load(file: Path, first: str, want: Any, width: int = 12, **options: Any) -> Any:
    """Load `file` into the model and compare."""
    torch.manual_seed(1)
    model = Part(first, width).double().float()
    x = torch.randn(2, 3, width)
    info = mlora.patch(model).load_adapter(file, "a", **options)
    assert_close(model(x, adapter_names="a"), want(x.double()))
    return info


SEVERAL = (
    ("kohya", "lora_unet_", "lora_te_", True),
    ("kohya-sdxl", "lora_unet_", "lora_te1_", True),
    ("diffusers", "unet.", "text_encoder.", False),
    ("flux", "transformer.", "text_encoder_2.", False),
    ("comfy", "diffusion_model.", "text_encoders.clip_l.transformer.", False),
    ("bare", "", "text_encoder.", False),
)


@pytest.mark.parametrize(("first", "second", "flat"), [s[1:] for s in SEVERAL], ids=[s[0] for s in SEVERAL])
def test_each_model_takes_its_part_of_a_file(tmp_path: Path, first: str, second: str, flat: bool) -> None:
    unet, want_unet = part(first, "to_q", flat)
    text, want_text = part(second, "q_proj", flat, seed=1)
    file = tmp_path / "x.safetensors"
    save_file(unet | text, file)
    assert load(file, "to_q", want_unet).ignored == (f"{second}*",)
    assert load(file, "q_proj", want_text).ignored == (f"{first}*",)


def test_parts_of_one_shape_of_names_are_told_apart_by_width_or_by_the_user(tmp_path: Path) -> None:
    narrow, want_narrow = part("lora_te1_", "q_proj", True)
    wide, want_wide = part("lora_te2_", "q_proj", True, 16, seed=1)
    other, _ = part("lora_te3_", "q_proj", True, 16, seed=2)
    file = tmp_path / "x.safetensors"
    save_file(narrow | wide, file)
    load(file, "q_proj", want_narrow)
    load(file, "q_proj", want_wide, 16)
    save_file(narrow | wide | other, file)
    with pytest.raises(errors.AdapterError, match="several models") as caught:
        load(file, "q_proj", want_wide, 16)
    assert "ignore=['lora_te3_*']" in str(caught.value)
    assert set(load(file, "q_proj", want_wide, 16, ignore=["lora_te3_*"]).ignored) >= {"lora_te1_*"}


def test_a_part_of_which_the_model_has_some_is_not_taken(tmp_path: Path) -> None:
    """It was made for another model: half of it would be another adapter."""
    unet, want = part("lora_unet_", "to_q", True)
    text, _ = part("lora_te_", "q_proj", True)
    file = tmp_path / "x.safetensors"
    save_file(unet | text | {"lora_unet_mid.lora_down.weight": torch.ones(4, 12)}, file)
    with pytest.raises(errors.AdapterError):
        load(file, "to_q", want)


def test_configs_of_several_models_in_a_header(tmp_path: Path) -> None:
    unet, want = part("unet.", "to_q", False)
    text, want_text = part("text_encoder.", "q_proj", False, seed=1)
    values = {f"{p}.{k}": v for p in ("unet", "text_encoder") for k, v in {"r": 4, "lora_alpha": 2}.items()}
    file = tmp_path / "x.safetensors"
    tensors = {key: tensor for key, tensor in (unet | text).items() if not key.endswith("alpha")}
    save_file(tensors, file, metadata={"lora_adapter_metadata": json.dumps(values)})
    info = load(file, "to_q", want)
    assert info.peft_type == "LORA" and info.ignored == ("text_encoder.*",)
    load(file, "q_proj", want_text)
    with pytest.raises(errors.AdapterError, match=r"several models \(text_encoder, unet\)"):
        module_names(mlora.Adapter.from_pretrained(file))


ALPHAS = (
    ("fp32", torch.tensor(2.0)),
    ("bf16", torch.tensor(2.0).bfloat16()),
    ("vector", torch.tensor([2.0])),
    ("matrix", torch.tensor([[2.0]])),
    ("int", torch.tensor(2)),
    ("int-vector", torch.tensor([2], dtype=torch.int32)),
)


@pytest.mark.parametrize("alpha", [a[1] for a in ALPHAS], ids=[a[0] for a in ALPHAS])
def test_alpha_is_one_number_of_any_kind(tmp_path: Path, alpha: Tensor) -> None:
    tensors, want = part("lora_unet_", "to_q", True)
    tensors = {key: alpha.clone() if key.endswith("alpha") else tensor for key, tensor in tensors.items()}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"ss_network_alpha": "9"})
    load(tmp_path / "x.safetensors", "to_q", want)


def test_alpha_of_several_numbers_is_refused(tmp_path: Path) -> None:
    tensors, want = part("lora_unet_", "to_q", True)
    tensors["lora_unet_blocks_0_out.alpha"] = torch.ones(2)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(errors.AdapterError, match=r"alpha has shape \(2,\); it must be one number"):
        load(tmp_path / "x.safetensors", "to_q", want)


@pytest.mark.parametrize("key", ("ss_network_alpha", "alpha", "lora_alpha", "ss_other_alpha"))
def test_alpha_in_the_header_alone_is_told_and_not_guessed(tmp_path: Path, key: str) -> None:
    tensors, _ = part("lora_unet_", "to_q", True)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("alpha")}
    torch.manual_seed(1)
    want = Part("to_q").double()
    for child in ("to_q", "out"):
        name = f"lora_unet_blocks_0_{child}"
        b, a = (tensors[f"{name}.lora_{end}.weight"].double() for end in ("up", "down"))
        want.blocks[0][child].weight.data += b @ a
    file = tmp_path / "x.safetensors"
    save_file(tensors, file, metadata={key: "2"})
    with pytest.raises(errors.UnsupportedAdapterError) as caught:
        load(file, "to_q", want)
    assert f"{key}='2'" in str(caught.value) and f"ignore=['{key}']" in str(caught.value)
    assert load(file, "to_q", want, ignore=[key]).ignored == (key,)
    save_file(tensors, file, metadata={key: "4.0"})  # the rank: a scale of 1, either way
    assert load(file, "to_q", want).ignored == ()


@pytest.mark.parametrize(
    ("key", "shape"),
    (
        ("q_proj.lora_A.weight", (0,)),
        ("q_proj.lora_B.weight", (0,)),
        ("q_proj.lora_A.weight", (96,)),
        ("q_proj.hada_w1_a", (8,)),
        ("q_proj.lokr_w1", (8,)),
        ("lm_head.weight", (0,)),
        ("lm_head.weight", (2144,)),
    ),
)
def test_shards_are_refused_without_a_model_too(key: str, shape: tuple[int, ...]) -> None:
    kind = "LOHA" if "hada" in key else "LOKR" if "lokr" in key else "LORA"
    config = {"peft_type": kind, "r": 3, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    with pytest.raises(errors.AdapterError, match="ZeRO-3") as caught:
        module_names(mlora.Adapter(config, {key: torch.zeros(shape)}))
    assert str(shape) in str(caught.value)


class Odd(nn.Module):
    """A module with one that has the name of PEFT's own."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer, self.out = nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.base_layer(x)))


@pytest.mark.parametrize("bias", ("none", "all", "lora_only"))
@pytest.mark.parametrize("live", (False, True), ids=("file", "live"))
def test_modules_that_are_called_base_layer(tmp_path: Path, bias: str, live: bool) -> None:
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.ModuleDict({"odd": Odd()})["odd"], nn.Linear(5, 4)), torch.randn(2, 6)
    folder = make_adapter(tmp_path / "a", base, 3, r=2, target_modules=["base_layer", "1"], bias=bias)
    oracle = peft_alone(base, folder)
    want = oracle(x)
    assert not torch.allclose(want, base(x))
    if live:
        runtime = mlora.patch(oracle)
        assert_close(runtime.model(x, adapter_names="oracle-0"), want)
    else:
        mlora.patch(base).load_adapter(folder, "a")
        assert_close(base(x, adapter_names="a"), want)
