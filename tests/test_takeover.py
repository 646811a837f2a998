"""Adapters taken over from live PEFT models and from transformers models with adapters of their own."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import assert_close, identity, inputs_for, logits, make_adapter, peft_alone, state_hash
from safetensors.torch import load_file
from torch import Tensor

import mlora
from mlora import errors

TARGETS = ["q_proj", "down_proj"]


@pytest.fixture
def live(llama: Any, folders: dict[str, Path]) -> Any:
    """A PeftModel with the adapters "a" (r3) and "b" (rs16), of which "a" is active."""
    model = peft.PeftModel.from_pretrained(copy.deepcopy(llama), folders["r3"], adapter_name="a")
    model.load_adapter(folders["rs16"], adapter_name="b")
    return model.eval()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return inputs_for("llama", 3)


@pytest.mark.parametrize(
    "config",
    (
        peft.LoraConfig(r=2, target_modules=TARGETS, lora_bias=True),
        peft.AdaLoraConfig(init_r=3, total_step=5, target_modules=TARGETS),
        peft.VeraConfig(r=3, target_modules=TARGETS),
        peft.VBLoRAConfig(r=2, num_vectors=5, vector_length=8, target_modules=TARGETS, save_only_topk_weights=True),
        peft.ShiraConfig(r=2, target_modules=TARGETS),
        peft.OFTConfig(oft_block_size=4, target_modules=TARGETS),
    ),
    ids=lambda config: config.peft_type.value.lower(),
)
def test_from_peft_gives_what_peft_saves(llama: Any, tmp_path: Path, config: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(llama), config, adapter_name="mine")
        model.save_pretrained(tmp_path)
    adapter = mlora.Adapter.from_peft(model, "mine")
    saved = mlora.Adapter.from_pretrained(tmp_path / "mine")
    assert adapter.peft_type == saved.peft_type and "'mine'" in adapter.source
    assert adapter.tensors.keys() == saved.tensors.keys()
    assert all(torch.equal(adapter.tensors[key], saved.tensors[key]) for key in saved.tensors)
    for parameter in model.parameters():  # a copy: training on does not change it
        parameter.data.add_(1)
    assert all(torch.equal(adapter.tensors[key], saved.tensors[key]) for key in saved.tensors)
    adapter.save_pretrained(tmp_path / "again")
    assert (
        load_file(tmp_path / "again" / "adapter_model.safetensors").keys()
        == load_file(tmp_path / "mine" / "adapter_model.safetensors").keys()
    )


def test_from_peft_names_what_is_not_there(live: Any, llama: Any) -> None:
    with pytest.raises(errors.UnknownAdapterError, match=r"'c'.*'a', 'b'"):
        mlora.Adapter.from_peft(live, "c")
    with pytest.raises(errors.UnknownAdapterError, match="none"):
        mlora.Adapter.from_peft(llama, "a")


@pytest.mark.parametrize("inner", (False, True), ids=("wrapper", "model-inside"))
def test_patch_takes_a_peft_model_over(
    live: Any, llama: Any, folders: dict[str, Path], batch: dict[str, Tensor], inner: bool
) -> None:
    base, linear = live.get_base_model(), live.get_base_model().model.layers[0].self_attn.q_proj.get_base_layer()
    runtime = mlora.patch(base if inner else live)
    assert runtime.model is base and base.model.layers[0].self_attn.q_proj is linear
    assert list(base.state_dict()) == list(llama.state_dict())
    assert list(runtime.adapters) == ["a", "b"]
    for name, folder in (("a", "r3"), ("b", "rs16")):
        want = logits(peft_alone(llama, folders[folder]), batch)
        assert_close(logits(base, batch, adapter_names=name), want)
        if name == "a":
            assert_close(logits(base, batch), want)  # it was active, so it is the default
    assert torch.equal(logits(base, batch, adapter_names="__base__"), logits(llama, batch))
    if not inner:
        for call in (live, live.generate):
            with pytest.raises(errors.PatchError, match=r"runtime\.model"):
                call(**batch)
    runtime.set_adapter(None)
    assert state_hash(mlora.unpatch(base)) == state_hash(llama)
    mlora.patch(base)  # nothing of PEFT's is left


def test_a_trained_head_is_taken_over(llama: Any, tmp_path: Path, batch: dict[str, Tensor]) -> None:
    folder = make_adapter(tmp_path, llama, 1, r=2, target_modules=TARGETS, modules_to_save=["lm_head"])
    want = logits(peft_alone(llama, folder), batch)
    runtime = mlora.patch(peft_alone(llama, folder))
    assert type(runtime.model.lm_head).__name__ == "Linear"
    assert_close(logits(runtime.model, batch), want)
    assert torch.equal(logits(runtime.model, batch, adapter_names="__base__"), logits(llama, batch))


def test_disabled_adapters_are_no_default(live: Any, llama: Any, batch: dict[str, Tensor]) -> None:
    live.base_model.disable_adapter_layers()
    runtime = mlora.patch(live)
    assert torch.equal(logits(runtime.model, batch), logits(llama, batch))


def test_patch_takes_a_transformers_model_with_adapters_over(
    llama: Any, folders: dict[str, Path], batch: dict[str, Tensor]
) -> None:
    model = copy.deepcopy(llama)
    # Its set_adapter may want a later PEFT than there is; what is loaded is active.
    model.load_adapter(str(folders["rs16"]), adapter_name="b")
    model.load_adapter(str(folders["r3"]), adapter_name="a")
    runtime = mlora.patch(model)
    assert runtime.model is model and list(runtime.adapters) == ["b", "a"]
    want = logits(peft_alone(llama, folders["r3"]), batch)
    assert_close(logits(model, batch), want)
    mixed = logits(model, batch, adapter_names=["a", None, "b"])
    assert_close(mixed[:1], want[:1])
    assert_close(mixed[2:], logits(peft_alone(llama, folders["rs16"]), batch)[2:])


@pytest.mark.parametrize("where", ("wrapper", "model-inside", "transformers"))
@pytest.mark.parametrize(
    ("options", "error", "wanted"),
    (
        ({"memory": 4096}, errors.CapacityError, "4,096"),  # which holds "a" and not "b"
        ({"memory": 0}, errors.PatchError, "memory=0"),
        ({"dtype": torch.float16}, errors.AdapterError, "overflow"),
    ),
    ids=("room", "option", "overflow"),
)
def test_a_failure_on_the_way_puts_peft_back(
    live: Any, llama: Any, folders: dict[str, Path], batch: dict[str, Tensor], where: str, options: Any, error: Any,
    wanted: str,
) -> None:  # fmt: skip
    if where == "transformers":
        model = copy.deepcopy(llama)
        model.load_adapter(str(folders["r3"]), adapter_name="a")
        model.load_adapter(str(folders["rs16"]), adapter_name="b")
    else:
        model = live.get_base_model() if where == "model-inside" else live
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if name.endswith("v_proj.lora_B.b.weight"))[0, 0] = 1e5
    want, before = logits(model, batch), identity(model)
    with pytest.raises(error, match=wanted):
        mlora.patch(model, **options)
    assert identity(model) == before and torch.equal(logits(model, batch), want)
    assert mlora.patch(model).adapters.keys() == {"a", "b"}


@pytest.mark.parametrize("where", ("wrapper", "model-inside"))
def test_a_config_that_fails_on_the_way_puts_peft_back(
    live: Any, folders: dict[str, Path], batch: dict[str, Tensor], where: str
) -> None:
    model = live.get_base_model() if where == "model-inside" else live
    want, before = logits(model, batch), identity(model)
    config = {"adapters": {"adapters": {"c": {"path": str(folders["rs16"])}, "d": {"path": "nowhere"}}}}
    with pytest.raises(errors.AdapterError, match="nowhere"):
        mlora.from_config(config, model=model)
    assert identity(model) == before and torch.equal(logits(model, batch), want)
    del config["adapters"]["adapters"]["d"]
    runtime = mlora.from_config(config, model=model, max_adapters=7)
    assert list(runtime.adapters) == ["a", "b", "c"] and runtime._store.slots == 7


def test_what_peft_loses_in_a_live_model_is_noticed(llama: Any, folders: dict[str, Path]) -> None:
    # PEFT takes the "1" of layers.1 for the name of an adapter, and leaves that layer out of adapter 0's state.
    live = peft.PeftModel.from_pretrained(copy.deepcopy(llama), folders["r3"], adapter_name="0")
    live.load_adapter(folders["rs16"], adapter_name="1")
    with pytest.raises(errors.AdapterError, match=r"layers\.1.*no weights"):
        mlora.patch(live)


def check_untouched(model: Any, batch: dict[str, Tensor], *wanted: str, error: Any = errors.PatchError) -> None:
    before, keys = logits(model, batch), list(model.state_dict())
    with pytest.raises(error) as caught:
        mlora.patch(model)
    assert all(part in str(caught.value) for part in wanted), str(caught.value)
    assert torch.equal(logits(model, batch), before) and list(model.state_dict()) == keys


def test_what_cannot_be_taken_over_stays_as_it_is(
    live: Any, llama: Any, tmp_path: Path, batch: dict[str, Tensor]
) -> None:
    live.base_model.set_adapter(["a", "b"])
    check_untouched(live, batch, "several", "a, b")
    live.base_model.set_adapter("b")
    live.merge_adapter()
    check_untouched(live, batch, "merged", "b")
    live.unmerge_adapter()
    folder = tmp_path / "lily"
    peft.get_peft_model(copy.deepcopy(llama), peft.LilyConfig(r=2, target_modules=TARGETS)).save_pretrained(folder)
    check_untouched(peft_alone(llama, folder), batch, "LILY", error=errors.UnsupportedAdapterError)
