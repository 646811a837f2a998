"""Models that put the rows of a batch elsewhere than in front, or cut them into pieces: exact, or refused; never by a
number that fits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from conftest import HIDDEN, VOCAB, assert_close, build, make_adapter, peft_alone, refused, served
from torch import Tensor, nn

import mlora
from mlora import errors

TEXT = {"vocab_size": VOCAB, "num_attention_heads": 2, "num_hidden_layers": 1, "hidden_size": 16}
WINDOWS = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "window_size": 4}
SAM = {
    "hidden_size": 16, "output_channels": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 2, "window_size": 3, "global_attn_indexes": [1], "mlp_dim": 24, "use_rel_pos": True,
}  # fmt: skip


def randomized(model: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model.eval()


# Windows and tokens, row by row in the first dimension.


def deepseek() -> Any:
    config = tf.DeepseekV3Config(
        **TEXT, intermediate_size=24, moe_intermediate_size=8, n_routed_experts=4, n_group=2, topk_group=1,
        num_experts_per_tok=2, first_k_dense_replace=0, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, v_head_dim=8,
        qk_nope_head_dim=8, num_key_value_heads=2,
    )  # fmt: skip
    return tf.DeepseekV3ForCausalLM(config)


SERVED = {
    "deepseek": deepseek,
    "swin": lambda: tf.SwinForImageClassification(tf.SwinConfig(**WINDOWS, num_labels=3)),
    "swinv2": lambda: tf.Swinv2ForImageClassification(tf.Swinv2Config(**WINDOWS, num_labels=3)),
    "sam": lambda: tf.SamVisionModel(tf.SamVisionConfig(**SAM)),
    "mobilevit": lambda: tf.MobileViTForImageClassification(
        tf.MobileViTConfig(
            image_size=32, patch_size=2, hidden_sizes=[8, 8, 8], neck_hidden_sizes=[4, 4, 4, 4, 4, 4, 8], num_labels=3,
            num_attention_heads=2, mlp_ratio=2.0, expand_ratio=2.0,
        )
    ),
    "jetmoe": lambda: tf.JetMoeForCausalLM(
        tf.JetMoeConfig(
            vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_key_value_heads=2, kv_channels=8,
            intermediate_size=24, num_local_experts=4, num_experts_per_tok=2,
        )
    ),
    "vitdet": lambda: tf.VitDetModel(
        tf.VitDetConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=2, window_size=3,
            window_block_indices=[0], pretrain_image_size=16, mlp_ratio=2,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SERVED)
@torch.no_grad()
def test_all_linears_of_what_folds_rows(kind: str, tmp_path: Path) -> None:
    base, draw = randomized(SERVED[kind]()), torch.Generator().manual_seed(1)
    text = kind in ("deepseek", "jetmoe")
    how = {"target_modules": "all-linear" if text else r".*\.(query|value|qkv|proj|dense|lin1|fc1)"}
    folders = {name: make_adapter(tmp_path / name, base, seed, r=2, **how) for seed, name in enumerate("ab")}
    model = served(base, folders)
    if text:
        x: dict[str, Tensor] = {"input_ids": torch.randint(0, VOCAB, (3, 5), generator=draw)}
    else:
        size = 32 if kind == "mobilevit" else 16
        x = {"pixel_values": torch.randn(3, 3, size, size, generator=draw)}
    got = model(**x, adapter_names=["a", None, "b"])[0]
    for row, oracle in enumerate((peft_alone(base, folders["a"]), base, peft_alone(base, folders["b"]))):
        assert_close(got[row : row + 1], oracle(**{key: value[row : row + 1] for key, value in x.items()})[0], 2e-5)
    assert torch.equal(got, model(**x, adapter_names=["a", None, "b"])[0])


# Choices, row by row in the first dimension.

CHOICES = {
    "bert": lambda: tf.BertForMultipleChoice(tf.BertConfig(**TEXT, intermediate_size=24)),
    "roberta": lambda: tf.RobertaForMultipleChoice(tf.RobertaConfig(**TEXT, intermediate_size=24)),
    "xlnet": lambda: tf.XLNetForMultipleChoice(
        tf.XLNetConfig(vocab_size=VOCAB, d_model=16, n_layer=1, n_head=2, d_inner=24)
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ("bert", "roberta"))
@torch.no_grad()
def test_rows_of_several_choices(kind: str, tmp_path: Path) -> None:
    base, draw = randomized(CHOICES[kind]()), torch.Generator().manual_seed(1)
    saved = {"target_modules": "all-linear", "modules_to_save": ["classifier"]}
    folders = {name: make_adapter(tmp_path / name, base, seed, r=2, **saved) for seed, name in enumerate("ab")}
    model, oracles = served(base, folders), {name: peft_alone(base, folder) for name, folder in folders.items()}
    names = ["a", None, "b"]
    for choices, length in ((2, 6), (3, 3), (1, 4)):
        ids = torch.randint(3, VOCAB, (3, choices, length), generator=draw)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        embeds = {"inputs_embeds": base.get_input_embeddings()(ids), "attention_mask": inputs["attention_mask"]}
        for x in (inputs, embeds):
            got = model(**x, adapter_names=names).logits
            with model.mlora.use_adapters(names):
                assert torch.equal(model(**x).logits, got)
            for row, name in enumerate(names):
                want = oracles.get(name, base)(**{key: value[row : row + 1] for key, value in x.items()}).logits
                assert_close(got[row : row + 1], want, 2e-5)


@torch.no_grad()
def test_choices_of_a_model_that_puts_the_length_first(tmp_path: Path) -> None:
    base = randomized(CHOICES["xlnet"]())
    folders = {name: make_adapter(tmp_path / name, base, seed, r=2, target_modules="all-linear") for seed, name in
               enumerate("ab")}  # fmt: skip
    model, ids = served(base, folders), torch.randint(3, VOCAB, (2, 3, 6))
    with refused(model, errors.AttributionError, "2 rows"):
        model(ids, adapter_names=["a", "b"])
    assert_close(model(ids, adapter_names="a").logits, peft_alone(base, folders["a"])(ids).logits, 2e-5)


class Router(nn.Module):
    """Gives (rows * length, experts), in order or not."""

    def __init__(self, ordered: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, HIDDEN))
        self.ordered = ordered

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.ordered else x.movedim(1, 0)
        return (x.reshape(-1, HIDDEN) @ self.weight.t()).softmax(-1)


class Routed(nn.Module):
    def __init__(self, ordered: bool) -> None:
        super().__init__()
        self.gate, self.up = Router(ordered), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.up(x))


@pytest.mark.parametrize("ordered", (True, False))
@torch.no_grad()
def test_a_routers_order_is_looked_for(ordered: bool) -> None:
    torch.manual_seed(0)
    bare = Routed(ordered).eval()
    alone, model, x = copy.deepcopy(bare), copy.deepcopy(bare), torch.randn(3, 3, HIDDEN)
    a, b = torch.randn(2, HIDDEN), torch.randn(4, 2)
    alone.gate.weight += b @ a
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": ["gate.weight"]}
    tensors = {"gate.lora_A.weight": a, "gate.lora_B.weight": b}
    mlora.patch(model).add_adapter("a", mlora.Adapter(config, tensors))
    if not ordered:
        with refused(model, errors.AttributionError, "gate", "3 rows"):
            model(x, adapter_names=["a", None, "a"])
        return
    got = model(x, adapter_names=["a", None, "a"]).view(3, 3, 4)
    for row, oracle in enumerate((alone, bare, alone)):
        assert_close(got[row], oracle(x[row : row + 1]))


# The length in front: with as many rows as tokens, it looks like the batch.

SIZES = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
MIXED = {
    "xlnet": (lambda: tf.XLNetModel(tf.XLNetConfig(vocab_size=VOCAB, d_model=16, n_layer=1, n_head=2, d_inner=24)), 3),
    "fsmt": (
        lambda: tf.FSMTModel(
            tf.FSMTConfig(
                langs=["a", "b"], src_vocab_size=VOCAB, tgt_vocab_size=VOCAB, **SIZES, encoder_ffn_dim=24,
                decoder_ffn_dim=24, encoder_attention_heads=2, decoder_attention_heads=2,
            )
        ),
        3,
    ),
    "longformer": (
        lambda: tf.LongformerModel(tf.LongformerConfig(**TEXT, intermediate_size=24, attention_window=4)),
        4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MIXED)
@torch.no_grad()
def test_as_many_rows_as_tokens(kind: str, tmp_path: Path) -> None:
    make, length = MIXED[kind]
    base = randomized(make())
    folders = {name: make_adapter(tmp_path / name, base, seed, r=2, target_modules="all-linear") for seed, name in
               enumerate("ab")}  # fmt: skip
    names = ["a", *[None] * (length - 2), "b"]
    for rows, tokens in ((length, length), (length, 2 * length), (length, length)):  # learned from the second
        model = served(base, folders)
        ids = {"input_ids": torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(1))}
        if kind == "fsmt":
            ids["decoder_input_ids"] = ids["input_ids"]
        with refused(model, errors.AttributionError, f"{rows} rows", "the length before the rows"):
            model(**ids, adapter_names=names)
        want = peft_alone(base, folders["a"])(**ids)[0]
        assert_close(model(**ids, adapter_names=["a"] * rows)[0], want, 2e-5)


@torch.no_grad()
def test_ids_of_which_the_length_is_in_front(tmp_path: Path) -> None:
    base = randomized(MIXED["xlnet"][0]())
    folder = make_adapter(tmp_path / "a", base, 1, r=2, target_modules=["word_embedding"])
    for length in (3, 5, 3):
        model, ids = served(base, {"a": folder}), {"input_ids": torch.randint(3, VOCAB, (3, length))}
        with refused(model, errors.AttributionError, "word_embedding", f"({length}, 3)", "the length before the rows"):
            model(**ids, adapter_names=["a", None, "a"])
        assert_close(model(**ids, adapter_names="a")[0], peft_alone(base, folder)(**ids)[0], 2e-5)


class Turned(nn.Module):
    """Exchanges the first two dimensions of one of its layers' input, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.across = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.across(self.up(x).transpose(0, 1)).transpose(0, 1)


class Pixels(nn.Module):
    """Hands its layer (positions, rows, channels), as Mask2Former's decoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.across = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).permute(2, 0, 1)
        return self.across(x).permute(1, 2, 0)


@torch.no_grad()
def test_positions_before_the_rows(tmp_path: Path) -> None:
    base = Pixels().eval()
    model = served(base, {"a": make_adapter(tmp_path / "a", base, 1, target_modules=["across"])})
    for size in ((2, 2), (3, 2)):
        with refused(model, errors.AttributionError, "across", "the length before the rows"):
            model(torch.randn(4, HIDDEN, *size), adapter_names=["a", None, None, "a"])


class Flattened(Turned):
    """Hands its layer (length * rows, in)."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x).transpose(0, 1)
        return self.across(x.reshape(-1, HIDDEN)).view(x.shape).transpose(0, 1)


@torch.no_grad()
def test_the_length_before_the_rows_in_one_dimension(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = Flattened().eval(), torch.randn(3, 5, HIDDEN)
    folders = {name: make_adapter(tmp_path / name, base, 1, target_modules=[name]) for name in ("up", "across")}
    model, alone = served(base, folders), {name: peft_alone(base, folder)(x) for name, folder in folders.items()}
    with refused(model, errors.AttributionError, "across", "(15, 32)", "the length before the rows"):
        model(x, adapter_names=["across", None, "across"])
    assert_close(model(x, adapter_names=["across"] * 3), alone["across"])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with model.mlora.use_adapters(["across", None, "across"]), pytest.raises(errors.AttributionError, match="15 rows"):
        compiled(x)
    with model.mlora.use_adapters("across"):
        assert_close(compiled(x), alone["across"])
    assert_close(model(x, adapter_names=["up", None, "up"]), torch.stack([alone["up"][0], base(x)[1], alone["up"][2]]))


@torch.no_grad()
def test_what_was_seen_to_be_in_front_is_believed() -> None:
    torch.manual_seed(0)
    bare = Turned().eval()
    model, runtimes = copy.deepcopy(bare), {}
    runtime = mlora.patch(model)
    for name in ("up", "across"):
        a, b = torch.randn(2, HIDDEN), torch.randn(HIDDEN, 2)
        tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        runtime.add_adapter(name, mlora.Adapter({"peft_type": "LORA", "r": 2, "lora_alpha": 2}, tensors))
        runtimes[name] = copy.deepcopy(bare)
        runtimes[name].get_submodule(name).weight += b @ a
    square, wide = torch.randn(3, 3, HIDDEN), torch.randn(3, 5, HIDDEN)
    for name in ("up", "across"):
        with refused(model, errors.AttributionError, name, "3 rows"):
            model(square, adapter_names=[name, None, name])
    with refused(model, errors.AttributionError, "across", "3 rows"):
        model(wide, adapter_names=["across", None, "across"])
    for x in (wide, square):
        got = model(x, adapter_names=["up", None, "up"])
        assert_close(got[[0, 2]], runtimes["up"](x)[[0, 2]])
        assert torch.equal(got[1], bare(x)[1])
    with refused(model, errors.AttributionError, "across", "3 rows"):
        model(square, adapter_names=["across", None, "across"])


@torch.no_grad()
def test_the_length_in_front_in_compiled_code() -> None:
    torch.manual_seed(0)
    model = Turned().eval()
    runtime = mlora.patch(model)
    tensors = {"across.lora_A.weight": torch.randn(2, HIDDEN), "across.lora_B.weight": torch.randn(HIDDEN, 2)}
    runtime.add_adapter("a", mlora.Adapter({"peft_type": "LORA", "r": 2, "lora_alpha": 2}, tensors))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for shape in ((3, 5, HIDDEN), (3, 3, HIDDEN)):
        x = torch.randn(shape)
        with runtime.use_adapters(["a", None, "a"]), pytest.raises(errors.AttributionError, match="another dimension"):
            compiled(x)
        for names in (["a"] * 3, "a"):
            with runtime.use_adapters(names):
                assert_close(compiled(x), model(x, adapter_names="a"))


@torch.no_grad()
def test_most_models_are_believed(tmp_path: Path) -> None:
    for kind in ("llama", "gpt2", "t5", "bert", "qwen2", "vit", "mixtral", "opt"):
        model = build(kind)
        mlora.patch(model)
        layers = [module._mlora for module in model.modules() if hasattr(module, "_mlora")]
        assert layers and not any(layer.order.exchanged or layer.order.windows for layer in layers)
