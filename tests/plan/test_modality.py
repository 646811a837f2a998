"""Models that read images or sounds beside text: to which rows those belong is proven, or refused."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HIDDEN, VOCAB, assert_close, logits, make_adapter, peft_alone, refused, row_of
from torch import Tensor, nn

import mlora
from mlora import errors
from mlora.plan.modality import foreign_in, placeholders_of

IMAGE = VOCAB - 1
SECOND = VOCAB - 2  # of videos, where a model has both
LENGTH = 32
TEXT = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
VISION = {
    "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 12, "patch_size": 4,
}  # fmt: skip


def llava() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text, vision = LlamaConfig(**TEXT), CLIPVisionConfig(**VISION, projection_dim=HIDDEN)
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, image_token_index=IMAGE)
    )


def idefics3() -> Any:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    return Idefics3ForConditionalGeneration(
        Idefics3Config(
            text_config={"model_type": "llama", **TEXT}, vision_config={**VISION, "model_type": "idefics3_vision"},
            image_token_id=IMAGE, scale_factor=3, pad_token_id=0,
        )
    )  # fmt: skip


def qwen2vl() -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {
        "depth": 2, "embed_dim": HIDDEN, "hidden_size": HIDDEN, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
    }  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, image_token_id=IMAGE,
            video_token_id=SECOND, vision_start_token_id=2, vision_end_token_id=3,
        )
    )  # fmt: skip


def blip2() -> Any:
    from transformers import Blip2Config, Blip2ForConditionalGeneration, OPTConfig

    text = OPTConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, word_embed_proj_dim=HIDDEN, ffn_dim=48, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    former = {**VISION, "num_hidden_layers": 1, "encoder_hidden_size": HIDDEN, "vocab_size": VOCAB}
    return Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config=VISION, qformer_config=former, text_config=text.to_dict(), num_query_tokens=3,
            image_token_index=IMAGE,
        )
    )  # fmt: skip


# Tokens that stand for one image, and modules that read images and text. BLIP-2 reads images before `generate` calls
# anything that is patched.
FAMILIES = {
    "llava": (llava, 9, ["q_proj", "v_proj", "fc1", "linear_2", "lm_head"]),
    "blip2": (blip2, 3, ["qkv", "query", "language_projection", "lm_head"]),
    "idefics3": (idefics3, 1, ["q_proj", "out_proj", "fc2", "proj", "lm_head"]),
}


@cache
def base_of(family: str) -> Any:
    torch.manual_seed(0)
    model = {**{name: make for name, (make, _, _) in FAMILIES.items()}, "qwen2vl": qwen2vl}[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def batch_of(family: str, images: list[int], seed: int = 1) -> dict[str, Tensor]:
    """Rows of text with as many images each."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, SECOND, (len(images), LENGTH), generator=draw)
    _, each, _ = FAMILIES[family]
    for row, count in enumerate(images):
        ids[row, 2 : 2 + count * each] = IMAGE
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if not any(images):
        return batch
    pixels = torch.randn(sum(images), 3, 12, 12, generator=draw)
    if family == "idefics3":  # a place for as many images in each row, of which it leaves empty ones out
        places = torch.zeros(len(images), max(images), 3, 12, 12)
        for row, own in enumerate(pixels.split(images)):
            places[row, : len(own)] = own
        pixels = places
    return {**batch, "pixel_values": pixels}


@pytest.fixture(scope="session")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Of each family, adapters of the tower, the projector and the text: two, and one of the text alone."""
    found: dict[str, dict[str, Path]] = {}
    for family, (_, _, targets) in FAMILIES.items():
        folder, base = tmp_path_factory.mktemp(family), base_of(family)
        found[family] = {
            name: make_adapter(folder / name, base, seed, r=3, strength=2.0, target_modules=modules)
            for seed, (name, modules) in enumerate((("a", targets), ("b", targets), ("text", ["lm_head"])))
        }
    return found


def served(family: str, folders: dict[str, Path]) -> Any:
    model = copy.deepcopy(base_of(family))
    runtime = mlora.patch(model, memory=1 << 20)
    for name, folder in folders.items():
        runtime.load_adapter(folder, name)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_with_an_image_each_get_what_peft_gives(family: str, roots: dict[str, dict[str, Path]]) -> None:
    folders, base = roots[family], base_of(family)
    model, batch = served(family, folders), batch_of(family, [1, 1, 1])
    assert torch.equal(logits(model, batch), logits(base, batch))
    got = logits(model, batch, adapter_names=["a", None, "b"])
    for row, name in enumerate(("a", None, "b")):
        alone = base if name is None else peft_alone(base, folders[name])
        assert_close(got[row : row + 1], logits(alone, row_of(batch, row)))
    settings = {"max_new_tokens": 4, "do_sample": False}
    out = model.generate(**batch, adapter_names=["a", None, "b"], **settings)
    beams = model.generate(**batch, adapter_names=["a", None, "b"], num_beams=2, **settings)
    for row, name in enumerate(("a", None, "b")):
        own = row_of(batch, row)
        assert torch.equal(out[row : row + 1], model.generate(**own, adapter_names=name, **settings))
        assert torch.equal(beams[row : row + 1], model.generate(**own, adapter_names=name, num_beams=2, **settings))


@pytest.mark.parametrize("how", ("call", "generate", "context"))
@pytest.mark.parametrize("images", ([2, 0], [0, 2], [2, 1, 0], [1, 0]))
@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_images_as_rows_are_not_taken_for_one_each(
    family: str, images: list[int], how: str, roots: dict[str, dict[str, Path]]
) -> None:
    model, batch = served(family, roots[family]), batch_of(family, images)
    entries = ["a", "b", None][: len(images)]
    with refused(model, errors.AttributionError, "vision", "placeholder", str(IMAGE)), torch.no_grad():
        if how == "call":
            model(**batch, adapter_names=entries)
        elif how == "generate":
            model.generate(**batch, adapter_names=entries, max_new_tokens=2)
        else:
            with model.mlora.use_adapters(entries):
                model(**batch)
    # One adapter for all rows, and adapters of the text alone, have nothing to attribute.
    want = logits(peft_alone(base_of(family), roots[family]["a"]), batch)
    assert_close(logits(model, batch, adapter_names="a"), want)
    got = logits(model, batch, adapter_names=["text", None, "text"][: len(images)])
    assert_close(got[:1], logits(peft_alone(base_of(family), roots[family]["text"]), batch)[:1])
    assert torch.equal(got[1], logits(base_of(family), batch)[1])


@pytest.mark.parametrize("family", ("llava", "idefics3"))  # BLIP-2 cannot go without images
def test_text_alone_needs_no_images(family: str, roots: dict[str, dict[str, Path]]) -> None:
    model, batch = served(family, roots[family]), batch_of(family, [0, 0])
    got = logits(model, batch, adapter_names=["a", "b"])
    for row, name in enumerate(("a", "b")):
        assert_close(got[row : row + 1], logits(peft_alone(base_of(family), roots[family][name]), row_of(batch, row)))


def test_images_without_ids_are_refused(roots: dict[str, dict[str, Path]]) -> None:
    model, batch = served("llava", roots["llava"]), batch_of("llava", [1, 1])
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    given = {"inputs_embeds": embeds, "pixel_values": batch["pixel_values"]}
    with refused(model, errors.AttributionError, "input_ids"), torch.no_grad():
        model(**given, adapter_names=["a", "b"])
    with refused(model, errors.AttributionError, "outside of a call"), model.mlora.use_adapters(["a", "b"]):
        model.model(**batch)
    with torch.no_grad(), model.mlora.use_adapters("a"):
        model.model(**batch)


def test_patches_in_one_list_are_not_taken_for_the_batchs_tokens(tmp_path: Path) -> None:
    """As many as there are tokens in all rows: of images of unlike sizes, one a row."""
    base = base_of("qwen2vl")
    folder = make_adapter(tmp_path, base, 1, r=3, target_modules=["qkv", "fc1"])
    model, grid = copy.deepcopy(base), torch.tensor([[1, 2, 8], [1, 6, 8]])
    mlora.patch(model, memory=1 << 20).load_adapter(folder, "a")
    ids = torch.randint(4, SECOND, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    for row, count in enumerate((grid.prod(1) // 4).tolist()):
        ids[row, 2] = 2
        ids[row, 3 : 3 + count] = IMAGE
    pixels = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 4 * 4)
    assert len(pixels) == ids.numel()
    kinds = (ids == IMAGE).int()
    batch = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "image_grid_thw": grid,
        "mm_token_type_ids": kinds,
    }  # fmt: skip
    with refused(model, errors.AttributionError, "visual", "(64, 32)"), torch.no_grad():
        model(**batch, adapter_names=["a", None])
    assert_close(logits(model, batch, adapter_names="a"), logits(peft_alone(base, folder), batch))


class Looping(nn.Module):
    """A model that runs its tower once for each row's images, or puts videos behind images in one list."""

    def __init__(self) -> None:
        super().__init__()
        self.config = base_of("qwen2vl").config
        self.tower = nn.Linear(HIDDEN, HIDDEN)
        self.text = nn.Module()
        self.text.embed = nn.Embedding(VOCAB, HIDDEN)
        self.text.get_input_embeddings = lambda: self.text.embed  # type: ignore[assignment]

    def forward(self, input_ids: Tensor, images: list[Tensor]) -> list[Tensor]:
        return [self.text.embed(input_ids), *map(self.tower, images)]


@pytest.mark.parametrize(
    ("rows", "images", "served"),
    (
        (([IMAGE], [IMAGE]), (2,), True),
        (([SECOND], [SECOND]), (2,), True),
        (([IMAGE, IMAGE], [IMAGE, IMAGE]), (2, 2), False),  # row by row
        (([IMAGE], [SECOND]), (2,), False),  # in which order?
        (([IMAGE, SECOND], [IMAGE]), (2,), False),
        (([IMAGE], [IMAGE]), (3,), False),
        (([], []), (2,), True),  # not of another modality
    ),
)
def test_what_is_proven(rows: tuple[list[int], ...], images: tuple[int, ...], served: bool) -> None:
    model = Looping().eval()
    runtime = mlora.patch(model, memory=1 << 16)
    tensors = {"tower.lora_A.weight": torch.randn(2, HIDDEN), "tower.lora_B.weight": torch.randn(HIDDEN, 2)}
    runtime.add_adapter("a", mlora.Adapter({"peft_type": "LORA", "r": 2, "lora_alpha": 2}, tensors))
    given = [torch.randn(count, 4, HIDDEN) for count in images]
    ids = torch.tensor([own + [5] * (3 - len(own)) for own in rows])
    with torch.no_grad():
        if not served:
            with refused(model, errors.AttributionError, "tower"):
                model(ids, given, adapter_names=["a", None])
            return
        got, bare = model(ids, given, adapter_names=["a", None])[1], model(ids, given)[1]
    assert torch.equal(got[1], bare[1]) and not torch.equal(got[0], bare[0])


def test_compiled_code_refuses_rows_that_differ_in_a_tower(roots: dict[str, dict[str, Path]]) -> None:
    torch._dynamo.reset()
    model, batch = served("llava", roots["llava"]), batch_of("llava", [2, 0])
    tower = torch.compile(model.model.vision_tower, backend="eager")
    with torch.no_grad():
        with model.mlora.use_adapters(["a", "b"]), pytest.raises(errors.AttributionError, match="another modality"):
            tower(batch["pixel_values"])
        for entries in ("a", ["text", None]):
            with model.mlora.use_adapters(entries):
                got = tower(batch["pixel_values"]).last_hidden_state
                assert_close(got, model.model.vision_tower(batch["pixel_values"]).last_hidden_state, 1e-6)
    torch._dynamo.reset()


def test_features_of_speech_are_the_rows_themselves(tmp_path: Path) -> None:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    base = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=VOCAB, num_mel_bins=8, d_model=HIDDEN, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
            max_source_positions=10, max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
        )
    ).eval()  # fmt: skip
    folder = make_adapter(tmp_path, base, 1, r=3, strength=2.0, target_modules=["q_proj", "fc1"])
    model = copy.deepcopy(base)
    mlora.patch(model, memory=1 << 20).load_adapter(folder, "a")
    batch = {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": torch.tensor([[1, 5, 9], [1, 7, 3]])}
    got = logits(model, batch, adapter_names=["a", None])
    assert_close(got[:1], logits(peft_alone(base, folder), row_of(batch, 0)))
    assert_close(got[1:], logits(base, row_of(batch, 1)))


@pytest.mark.parametrize(
    ("name", "foreign", "text"),
    (
        ("LlavaForConditionalGeneration", ("vision_tower", "multi_modal_projector"), ("language_model", "lm_head")),
        ("Gemma3ForSequenceClassification", ("vision_tower", "multi_modal_projector"), ("language_model", "score")),
        ("Florence2ForConditionalGeneration", ("vision_tower",), ("language_model.encoder", "decoder", "lm_head")),
        ("FuyuForCausalLM", ("vision_embed_tokens",), ("language_model", "lm_head")),
        ("CsmForConditionalGeneration", ("codec_model",), ("backbone_model", "depth_decoder", "lm_head")),
        ("Phi4MultimodalForCausalLM", ("image_embed", "audio_embed"), ("layers", "lm_head")),
    ),
)
def test_what_reads_text(name: str, foreign: tuple[str, ...], text: tuple[str, ...]) -> None:
    """Parts of paths; what is called foreign counts as that inside of text too."""
    import transformers

    cls = getattr(transformers, name, None)
    if cls is None:
        pytest.skip(f"this transformers has no {name}")
    with torch.device("meta"):
        model = cls(cls.config_class())
    assert placeholders_of(model)
    is_foreign = foreign_in(model)
    for part, wanted in (*((part, True) for part in foreign), *((part, False) for part in text)):
        paths = [path for path, _ in model.named_modules() if f".{part}." in f".{path}."]
        inside = [path for path in paths if wanted or not any(f".{other}." in f".{path}." for other in foreign)]
        assert inside and all(is_foreign(path) is wanted for path in inside), part
