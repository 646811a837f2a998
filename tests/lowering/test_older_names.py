"""Adapters made for a model whose modules had other names, or were other modules, when they were made.

The oracle is the model with s B A added to the weights that those modules held; where PEFT serves such a file as well,
PEFT with it alone.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import HIDDEN, VOCAB, assert_close, build, inputs_for, logits, make_adapter, peft_alone, refused
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import mlora
from mlora import errors

View = Callable[[Any], Tensor]  # of a model: the part of a weight that an old module held


def randomized(model: Any) -> Any:
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
    return model.eval()


class Old:
    """An adapter for modules of an older version, and the model that it makes."""

    def __init__(self, base: Any, seed: int = 1, **config: Any) -> None:
        self.config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, **config}
        self.want, self.tensors = copy.deepcopy(base), {}
        self.draw = torch.Generator().manual_seed(seed)

    def add(
        self, name: str, view: View | None, shape: tuple[int, int] = (8, 8), rank: int = 2, scale: float = 3.0
    ) -> None:
        """LoRA of what was called `name` and is `view` of the model now, or nothing."""
        weight = view(self.want) if view else torch.empty(shape)
        a = torch.randn(rank, weight.shape[1], generator=self.draw) * 0.4
        b = torch.randn(weight.shape[0], rank, generator=self.draw) * 0.4
        self.tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        weight.data += scale * b @ a

    def linear(self, name: str, now: str) -> None:
        self.add(name, lambda model: model.get_submodule(now).weight)

    def adapter(self) -> mlora.Adapter:
        return mlora.Adapter(self.config, self.tensors)

    def check(self, base: Any, batch: Mapping[str, Tensor], relative: float = 1e-5) -> mlora.AdapterInfo:
        model = copy.deepcopy(base)
        info = mlora.patch(model).add_adapter("old", self.adapter())
        got, bare = output(model, batch, adapter_names=["old", None]), output(base, batch)
        want = output(self.want, batch)
        assert (want - bare).abs().max() > 0.05
        assert_close(got[:1], want[:1], relative)
        assert_close(got[1:], bare[1:])
        return info


def output(model: Any, batch: Mapping[str, Tensor], **options: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch, **options)[0]


# One linear an expert -> fused parameters

EXPERTS = {"mixtral": ("block_sparse_moe", "w1", "w3", "w2"), "qwen2moe": ("mlp", "gate_proj", "up_proj", "down_proj")}


def of_experts(
    kind: str,
    base: Any,
    parts: str = "gate up down",
    skip: tuple[int, ...] = (),
    ranks: Mapping[str, int] | None = None,
    scales: Mapping[str, float] | None = None,
    **config: Any,
) -> Old:
    """An adapter of transformers 4: of the experts of layer 0, of their router and of q_proj."""
    block, *leaves = EXPERTS[kind]
    leaf = dict(zip(("gate", "up", "down"), leaves, strict=True))
    targets = ["q_proj", "gate", *(leaf[part] for part in parts.split())]
    old = Old(base, **{"target_modules": targets, **config})
    layer, ranks, scales = "model.layers.0", ranks or {}, scales or {}
    old.linear(f"{layer}.self_attn.q_proj", f"{layer}.self_attn.q_proj")
    old.add(f"{layer}.{block}.gate", lambda m: m.model.layers[0].mlp.gate.weight)
    width = base.model.layers[0].mlp.experts.down_proj.shape[2]
    views: dict[str, Callable[[Any, int], Tensor]] = {
        "gate": lambda m, e: m.model.layers[0].mlp.experts.gate_up_proj[e, :width],
        "up": lambda m, e: m.model.layers[0].mlp.experts.gate_up_proj[e, width:],
        "down": lambda m, e: m.model.layers[0].mlp.experts.down_proj[e],
    }
    for expert in range(4):
        for part in parts.split():
            if expert not in skip:
                view = views[part]
                old.add(
                    f"{layer}.{block}.experts.{expert}.{leaf[part]}",
                    lambda m, view=view, expert=expert: view(m, expert).detach(),
                    rank=ranks.get(part, 2),
                    scale=scales.get(part, 3.0),
                )
    return old


FUSED: dict[str, dict[str, Any]] = {
    "plain": {},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*(q_proj|\.gate|experts\.\d\.\w+)"},
    "up and down": {"parts": "up down"},
    "some experts": {"skip": (0, 2)},
    "first layer": {"layers_to_transform": [0]},
    "rsLoRA": {"use_rslora": True, "scales": dict.fromkeys(("gate", "up", "down"), 6 / 2**0.5)},
    "patterns": {"ranks": {"up": 3, "down": 1}, "scales": {"gate": 1.5, "up": 2.0, "down": 6.0}},
}


@pytest.fixture(scope="module")
def bases() -> dict[str, Any]:
    return {kind: randomized(build(kind)) for kind in EXPERTS}


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("case", FUSED)
def test_experts_of_transformers_4(bases: dict[str, Any], kind: str, case: str, tmp_path: Path) -> None:
    options = dict(FUSED[case])
    if case == "patterns":
        _, gate, up, down = EXPERTS[kind]
        options |= {"rank_pattern": {up: 3, rf".*experts\.\d\.{down}": 1}, "alpha_pattern": {gate: 3}}
    old = of_experts(kind, bases[kind], **options)
    if case == "rsLoRA":  # of the others too
        for name in ("self_attn.q_proj", f"{EXPERTS[kind][0]}.gate"):
            a, b = (old.tensors[f"model.layers.0.{name}.lora_{side}.weight"] for side in "AB")
            now = f"model.layers.0.{name}".replace("block_sparse_moe", "mlp")
            old.want.get_submodule(now).weight.data += (6 / 2**0.5 - 3) * b @ a
    info = old.check(bases[kind], inputs_for(kind, 2))
    stacks = {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"}
    assert {*stacks, "model.layers.0.mlp.gate.weight", "model.layers.0.self_attn.q_proj"} == set(info.modules)
    if case == "plain" and kind == "mixtral":  # PEFT 0.21.2 does not load Qwen2-MoE's
        tensors = {f"base_model.model.{key}": tensor for key, tensor in old.tensors.items()}
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        mlora.Adapter(old.config, tensors).save_pretrained(tmp_path)
        batch = inputs_for(kind, 2)
        assert_close(logits(peft_alone(bases[kind], tmp_path), batch), logits(old.want, batch))


def test_squares_of_transformers_4_are_not_turned() -> None:
    config = transformers.OlmoeConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=16, num_experts=4, num_experts_per_tok=2,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, pad_token_id=0,
    )  # fmt: skip
    base = randomized(transformers.OlmoeForCausalLM(config))
    assert base.model.layers[0].mlp.experts.gate_up_proj.shape == (4, HIDDEN, HIDDEN)
    old = of_experts("qwen2moe", base, "gate up", peft_version="0.15.2")
    old.check(base, inputs_for("qwen2moe", 2))


def test_experts_that_cannot_be_converted_are_refused(bases: dict[str, Any]) -> None:
    base = bases["mixtral"]
    model = copy.deepcopy(base)
    runtime = mlora.patch(model)
    old = of_experts("mixtral", base)
    cases: dict[str, tuple[dict[str, Any], Callable[[dict[str, Tensor]], dict[str, Tensor]], tuple[str, ...]]] = {
        "dora": (
            {"use_dora": True},
            lambda t: t | {
                key.replace("lora_B.weight", "lora_magnitude_vector"): tensor.norm(dim=1)
                for key, tensor in t.items()
                if "lora_B" in key
            },
            ("experts.0.w1", "gate_up_proj", "plain LoRA", "magnitude"),
        ),
        "another number": (
            {},
            lambda t: {k.replace("experts.3", "experts.4"): v for k, v in t.items()},
            ("experts.4", "4 experts"),
        ),
        "another width": (
            {},
            lambda t: {k: v[:, :30] if "experts.2.w2.lora_A" in k else v for k, v in t.items()},
            ("experts.2.w2", "30", "48"),
        ),
        "not targeted": (
            {"target_modules": ["q_proj", "gate", "w1", "w3"]}, dict, ("experts.down_proj", "do not name")
        ),
    }  # fmt: skip
    for options, change, wanted in cases.values():
        with refused(model, errors.AdapterError, *wanted):
            runtime.add_adapter("old", mlora.Adapter({**old.config, **options}, change(old.tensors)))


def test_one_matrix_that_became_two() -> None:
    """DINOv2's SwiGLU had gate and up in one linear."""
    config = transformers.Dinov2Config(
        hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=4, image_size=12, patch_size=4, use_swiglu_ffn=True
    )
    base = randomized(transformers.Dinov2Model(config))
    mlp = base.encoder.layer[0].mlp if hasattr(base, "encoder") else base.layers[0].mlp
    path = next(name for name, module in base.named_modules() if module is mlp)
    width = mlp.gate_proj.weight.shape[0]
    old = Old(base, target_modules=["weights_in", "query"])
    a = torch.randn(2, HIDDEN, generator=old.draw) * 0.4
    b = torch.randn(2 * width, 2, generator=old.draw) * 0.4
    name = f"{path}.weights_in"
    old.tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    new = old.want.get_submodule(path)
    new.gate_proj.weight.data += 3 * b[:width] @ a
    new.up_proj.weight.data += 3 * b[width:] @ a
    now = next(name for name, _ in base.named_modules() if name.endswith("attention.q_proj"))
    old.linear(now.replace("attention.q_proj", "attention.attention.query"), now)
    old.check(base, {"pixel_values": torch.randn(2, 3, 12, 12)})


# Modules that have another name


@pytest.fixture(scope="module")
def gemma() -> Any:
    text = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "layer_types": ["full_attention"] * 2,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 12, "patch_size": 4,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        image_token_index=60, boi_token_index=61, eoi_token_index=62, mm_tokens_per_image=4, text_config=text,
        vision_config=vision,
    )  # fmt: skip
    return randomized(transformers.Gemma3ForConditionalGeneration(config))


OLD = "language_model.model.layers.{}.self_attn.{}"
NEW = "model.language_model.layers.{}.self_attn.{}"
BATCH = {"input_ids": torch.randint(2, 60, (2, 6), generator=torch.Generator().manual_seed(2))}


@pytest.mark.parametrize(
    "targets",
    [["q_proj", "o_proj"], r"language_model\.model\.layers\.\d\.self_attn\.(q|o)_proj"],
    ids=["list", "regex of old names"],
)
def test_a_vision_language_model_from_before_its_renaming(gemma: Any, targets: Any) -> None:
    old = Old(gemma, target_modules=targets, rank_pattern={r"language_model\.model\.layers\.1\.self_attn\.o_proj": 5})
    for layer in (0, 1):
        for leaf in ("q_proj", "o_proj"):
            rank = 5 if (layer, leaf) == (1, "o_proj") else 2
            now = NEW.format(layer, leaf)
            old.add(OLD.format(layer, leaf), lambda m, now=now: m.get_submodule(now).weight, rank=rank, scale=6 / rank)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the list names the image tower's q_proj too
        info = old.check(gemma, BATCH)
    assert set(info.modules) == {NEW.format(n, leaf) for n in (0, 1) for leaf in ("q_proj", "o_proj")}
    assert info.missing == (("model.vision_tower.encoder.layers.0.self_attn.q_proj",) if type(targets) is list else ())


def test_renamed_adapters_merge_and_save(gemma: Any, tmp_path: Path) -> None:
    old = Old(gemma, target_modules=["o_proj"])
    old.linear(OLD.format(0, "o_proj"), NEW.format(0, "o_proj"))
    old.linear(OLD.format(1, "o_proj"), NEW.format(1, "o_proj"))
    model = copy.deepcopy(gemma)
    runtime = mlora.patch(model)
    runtime.add_adapter("a", old.adapter())
    runtime.add_weighted_adapter(["a"], [0.5], "half")
    got = output(model, BATCH, adapter_names=["half", {"a": 0.5}])
    assert_close(got, output(model, BATCH, adapter_names={"a": 0.5}))
    runtime.save_adapter("a", tmp_path)
    assert mlora.Adapter.from_pretrained(tmp_path).tensors.keys() == old.tensors.keys()


def text_encoder(kind: str) -> Any:
    sizes = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    config = transformers.SiglipTextConfig if kind.startswith("Siglip") else transformers.CLIPTextConfig
    return randomized(getattr(transformers, kind)(config(**sizes)))


@pytest.mark.parametrize("kind", ["CLIPTextModel", "SiglipTextModel", "CLIPTextModelWithProjection"])
@pytest.mark.parametrize("form", ["PEFT", "kohya", "diffusers"])
def test_text_encoders_from_before_they_lost_their_text_model(kind: str, form: str, tmp_path: Path) -> None:
    base, batch = text_encoder(kind), {"input_ids": torch.tensor([[1, 5, 6, 7, 2], [1, 9, 8, 7, 2]])}
    old = Old(base)
    for now, module in base.named_modules():
        if isinstance(module, nn.Linear) and "encoder.layers" in now:
            old.linear("text_model." + now.removeprefix("text_model."), now)
    if form == "PEFT":
        old.check(base, batch)
        return
    tensors = {}
    for key, tensor in old.tensors.items():
        name, _, factor = key.removesuffix(".weight").rpartition(".")
        kohya = {"lora_A": "lora_down", "lora_B": "lora_up"}[factor]
        flat = f"lora_te1_{name.replace('.', '_')}" if form == "kohya" else f"text_encoder.{name}"
        tensors |= {f"{flat}.{kohya if form == 'kohya' else factor}.weight": tensor, f"{flat}.alpha": torch.tensor(6.0)}
    old.config, old.tensors = {"peft_type": "LYCORIS"}, tensors
    old.check(base, batch)


# A model with and without its head


def test_an_adapter_of_a_model_with_a_head_on_the_model_without() -> None:
    whole = randomized(build("llama"))
    base = whole.model
    old = Old(base, target_modules=["v_proj", "lm_head"], layers_to_transform=None)
    for layer in (0, 1):
        old.linear(f"model.layers.{layer}.self_attn.v_proj", f"layers.{layer}.self_attn.v_proj")
    old.check(base, BATCH)
    old.add("lm_head", None, (VOCAB, HIDDEN))
    model = copy.deepcopy(base)
    with refused(mlora.patch(model).model, errors.AdapterError, "lm_head", "strict=True"):
        model.mlora.add_adapter("a", old.adapter(), strict=True)
    with pytest.warns(UserWarning, match=r"lm_head.*does not have"):
        info = old.check(base, BATCH)
    assert info.unused == ("lm_head",) and not info.missing


def test_an_adapter_of_a_model_without_a_head_on_the_model_with_it() -> None:
    base = randomized(build("llama"))
    old = Old(base, target_modules=["v_proj"], layers_to_transform=[1], layers_pattern="layers")
    old.linear("layers.1.self_attn.v_proj", "model.layers.1.self_attn.v_proj")
    info = old.check(base, BATCH)
    assert info.modules == ("model.layers.1.self_attn.v_proj",) and not info.missing


# Modules that exist no more


def test_keys_and_values_of_layers_that_share_others(tmp_path: Path) -> None:
    """Gemma 3n's last layers take those of earlier ones, and have lost the linears that made their own."""
    config = transformers.Gemma3nTextConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_kv_shared_layers=2, layer_types=["full_attention"] * 4,
        vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8, altup_num_inputs=2, laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4, pad_token_id=0,
    )  # fmt: skip
    base = randomized(transformers.Gemma3nForCausalLM(config))
    old = Old(base, target_modules=["q_proj", "k_proj"])
    for layer in range(4):
        for leaf in ("q_proj", "k_proj"):
            name = f"model.layers.{layer}.self_attn.{leaf}"
            gone = layer > 1 and leaf == "k_proj"
            old.add(
                name, None if gone else (lambda m, name=name: m.get_submodule(name).weight), (16, HIDDEN), scale=1.0
            )
    old.config["lora_alpha"] = 2
    with pytest.warns(UserWarning, match=r"layers\.2\.self_attn\.k_proj.*does not have"):
        info = old.check(base, BATCH, 1e-4)
    assert info.unused == ("model.layers.2.self_attn.k_proj", "model.layers.3.self_attn.k_proj")


def test_weights_that_do_nothing_anywhere_may_be_for_other_modules() -> None:
    base = randomized(build("llama"))
    old = Old(base, target_modules=["v_proj", "k_proj"])
    old.linear("model.layers.0.self_attn.v_proj", "model.layers.0.self_attn.v_proj")
    old.add("model.layers.7.self_attn.k_proj", None)
    model = copy.deepcopy(base)
    runtime = mlora.patch(model)
    with refused(model, errors.AdapterError, "layers.7.self_attn.k_proj"):
        runtime.add_adapter("a", old.adapter())
    old.tensors["model.layers.7.self_attn.k_proj.lora_B.weight"].zero_()
    with pytest.warns(UserWarning, match="layers.7"):
        assert old.check(base, BATCH).unused == ("model.layers.7.self_attn.k_proj",)
    alone = {key: tensor for key, tensor in old.tensors.items() if "layers.7" in key}
    with refused(model, errors.AdapterError, "no weights"):
        runtime.add_adapter("a", mlora.Adapter(old.config, alone))


# What is around modules of the model

AROUND: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch.compile": lambda module: torch.compile(module, backend="eager"),
    "checkpoint_wrapper": checkpoint_wrapper,
    "DataParallel": nn.DataParallel,
}


@pytest.mark.parametrize("whole", (False, True), ids=("layers", "all"))
@pytest.mark.parametrize("how", AROUND)
def test_what_is_around_modules_is_in_no_name(how: str, whole: bool, tmp_path: Path) -> None:
    if how == "DataParallel" and not whole:
        pytest.skip("it is around a model")
    base, batch = build("llama"), inputs_for("llama", 3)
    saved = {"target_modules": ["model.layers.0.self_attn.q_proj", "up_proj"], "modules_to_save": ["lm_head"]}
    folder = make_adapter(tmp_path / "a", base, 1, r=2, **saved)
    model = copy.deepcopy(base)
    if whole:
        model = AROUND[how](model)
    else:
        for index, layer in enumerate(model.model.layers):
            model.model.layers[index] = AROUND[how](layer)
    info = mlora.patch(model, memory=1 << 20).load_adapter(folder, "a", strict=True)
    assert len(info.modules) == 4
    with model.mlora.use_adapters(["a", None, "a"]):
        got = logits(model, batch)
    want, bare = logits(peft_alone(base, folder), batch), logits(base, batch)
    assert_close(got, torch.stack([want[0], bare[1], want[2]]))


def test_older_names_of_a_model_that_is_wrapped(bases: dict[str, Any]) -> None:
    old = of_experts("mixtral", bases["mixtral"])
    model = copy.deepcopy(bases["mixtral"])
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = checkpoint_wrapper(layer)
    mlora.patch(model, memory=1 << 20).add_adapter("old", old.adapter())
    batch = inputs_for("mixtral", 2)
    got = output(model, batch, adapter_names=["old", None])
    assert_close(got[:1], output(old.want, batch)[:1])
    assert_close(got[1:], output(bases["mixtral"], batch)[1:])
