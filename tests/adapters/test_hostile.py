"""Folders made to break the loader: a clean error or a working adapter, in bounded time, and never half of one."""

from __future__ import annotations

import copy
import json
import os
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import build, inputs_for, logits, refused, snapshot
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import mlora
import mlora.adapters.folder
from mlora import errors
from mlora.lowering import LOWERINGS

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SECONDS = 10  # of one load, on a loaded machine; they take milliseconds

TARGETS = ["q_proj", "down_proj"]
CONFIGS: dict[str, peft.PeftConfig] = {
    "lora": peft.LoraConfig(r=2, target_modules=TARGETS),
    "adalora": peft.AdaLoraConfig(init_r=2, total_step=5, target_modules=TARGETS),
    "loha": peft.LoHaConfig(r=2, target_modules=TARGETS),
    "lokr": peft.LoKrConfig(r=2, target_modules=TARGETS),
    "vera": peft.VeraConfig(r=2, target_modules=TARGETS),
    "vblora": peft.VBLoRAConfig(
        r=2, num_vectors=5, vector_length=8, target_modules=TARGETS, save_only_topk_weights=True
    ),
    "delora": peft.DeloraConfig(r=2, target_modules=TARGETS),
    "randlora": peft.RandLoraConfig(r=4, target_modules=TARGETS),
    "miss": peft.MissConfig(r=4, target_modules=TARGETS),
    "gralora": peft.GraloraConfig(r=4, target_modules=TARGETS),
    "hra": peft.HRAConfig(r=2, target_modules=TARGETS),
    "ia3": peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "road": peft.RoadConfig(group_size=8, target_modules=TARGETS),
    "oft": peft.OFTConfig(oft_block_size=4, target_modules=TARGETS),
    "fourierft": peft.FourierFTConfig(n_frequency=9, target_modules=TARGETS),
    "c3a": peft.C3AConfig(block_size=8, target_modules=TARGETS),
    "shira": peft.ShiraConfig(r=2, target_modules=TARGETS),
    "hira": peft.HiraConfig(r=2, target_modules=TARGETS),
}


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    model = build("llama")
    mlora.patch(model, memory=1 << 20, max_adapters=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlora.adapters.folder, "MOMENT", 0.0)  # nobody else writes to these folders
        yield model


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("honest")
    for name, config in CONFIGS.items():
        peft.get_peft_model(build("llama"), copy.deepcopy(config)).save_pretrained(root / name)
    return {name: root / name for name in CONFIGS}


def attempt(model: Any, folder: Path, **options: Any) -> bool:
    """Load `folder`: True if it works and computes finite numbers, False if it is refused and left no trace."""
    runtime, before, start = model.mlora, snapshot(model), time.monotonic()
    try:
        runtime.load_adapter(folder, "hostile", **options)
    except errors.MloraError as error:
        assert str(error)
        after = snapshot(model)
        assert after == before, "a refused adapter left something behind"
        return False
    finally:
        assert time.monotonic() - start < SECONDS
    try:
        logits(model, inputs_for("llama", 2), adapter_names="hostile")
    finally:
        runtime.delete_adapter("hostile")
    return True


NAMES = st.sampled_from(
    ["", ".", "..", "../../etc/passwd", "/", "a/b", "\x00", "é", "\U0001f600", "q_proj", "(", "(a+)+$", "x" * 5000]
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.sampled_from([0, -1, 1, 2, 3, 4, 8, 1 << 31, 1 << 63, 10**400])
    | st.sampled_from([0.0, -0.5, 1e-300, 1e39, float("nan"), float("inf")])
    | NAMES
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=6
)
COMMON = ["target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias", "peft_type"]
OPTIONS = sorted({key for config in CONFIGS.values() for key in config.to_dict()} - {"peft_type"})

shared_fixtures = settings(
    max_examples=int(os.environ.get("MLORA_EXAMPLES", "150")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@shared_fixtures
@given(
    data=st.data(),
    kind=st.sampled_from(sorted(CONFIGS)),
    approximate=st.sampled_from([None, 2]),
)
def test_any_config(
    model: Any, honest: dict[str, Path], tmp_path: Path, data: Any, kind: str, approximate: int | None
) -> None:
    folder = shutil.copytree(honest[kind], tmp_path / "c", dirs_exist_ok=True)
    config = json.loads((honest[kind] / CONFIG).read_text())
    own = sorted(LOWERINGS[kind.upper()].format.honoured) + COMMON
    changes = data.draw(
        st.dictionaries(st.sampled_from(own) | st.sampled_from(OPTIONS), VALUES, min_size=1, max_size=3)
    )
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))
    attempt(model, folder, approximate=approximate)


@st.composite
def tensors(draw: Any) -> Any:
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 8, 32, 48]), max_size=4))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.uint8, torch.bool]))
    value = draw(st.sampled_from([0.0, 1.0, -1.0, 200.0, 1e38, float("nan"), float("-inf")]))
    return torch.full(shape, 0.0).add(value if dtype.is_floating_point else min(max(value, 0), 100)).to(dtype)


@shared_fixtures
@given(
    data=st.data(),
    kind=st.sampled_from(sorted(CONFIGS)),
    count=st.integers(1, 3),
    approximate=st.sampled_from([None, 2]),
)
def test_any_tensors(
    model: Any, honest: dict[str, Path], tmp_path: Path, data: Any, kind: str, count: int, approximate: int | None
) -> None:
    folder = shutil.copytree(honest[kind], tmp_path / "t", dirs_exist_ok=True)
    state = load_file(honest[kind] / WEIGHTS)
    for _ in range(count):
        key = data.draw(st.sampled_from(sorted(state)))
        what = data.draw(st.sampled_from(["value", "value", "drop", "rename", "copy", "module"]))
        if what == "value":
            state[key] = data.draw(tensors())
        elif what == "drop" and len(state) > 1:
            del state[key]
        elif what == "rename":
            state[data.draw(NAMES) or "x"] = state.pop(key)
        elif what == "copy":
            state[key.replace("layers.0", data.draw(st.sampled_from(["layers.9", "layers.-1", "layers.1"])))] = state[
                key
            ]
        else:
            state[key.removeprefix("base_model.model.")] = state[key]
    save_file({key: tensor.clone().contiguous() for key, tensor in state.items()}, folder / WEIGHTS)
    attempt(model, folder, approximate=approximate)


@shared_fixtures
@given(data=st.data(), kind=st.sampled_from(["lora", "vblora", "shira"]))
def test_any_bytes(model: Any, honest: dict[str, Path], tmp_path: Path, data: Any, kind: str) -> None:
    folder = shutil.copytree(honest[kind], tmp_path / "b", dirs_exist_ok=True)
    file = data.draw(st.sampled_from([CONFIG, WEIGHTS]))
    content = bytearray((honest[kind] / file).read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, min(len(content), 2000) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    (folder / file).write_bytes(bytes(content))
    attempt(model, folder)


def header(**tensors: Any) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


def byte(start: int, end: int) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}


NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
FILES: tuple[tuple[str, bytes], ...] = (
    ("huge-shape", header(**{NAME: {"dtype": "F32", "shape": [1 << 40, 32], "data_offsets": [0, 1 << 47]}})),
    ("empty-and-huge", header(**{NAME: {"dtype": "F32", "shape": [0, 1 << 60], "data_offsets": [0, 0]}})),
    ("overflowing-shape", header(**{NAME: {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 0]}})),
    ("negative-shape", header(**{NAME: {"dtype": "F32", "shape": [-1, 32], "data_offsets": [0, 0]}})),
    ("offsets-backwards", header(**{NAME: {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}})),
    ("overlapping", header(a=byte(0, 2), b=byte(1, 3)) + b"abc"),
    ("unknown-dtype", header(**{NAME: {"dtype": "F7", "shape": [1], "data_offsets": [0, 1]}}) + b"x"),
    ("long-header", struct.pack("<Q", 1 << 62) + b"{}"),
    ("deep-header", struct.pack("<Q", 200_000) + b"[" * 200_000),
    ("one-key-twice", header(x=byte(0, 1), y=byte(0, 1)).replace(b'"y"', b'"x"') + b"a"),
)  # fmt: skip


@pytest.mark.parametrize("content", [f[1] for f in FILES], ids=[f[0] for f in FILES])
def test_lying_headers(model: Any, honest: dict[str, Path], tmp_path: Path, content: bytes) -> None:
    folder = shutil.copytree(honest["lora"], tmp_path / "h")
    (folder / WEIGHTS).write_bytes(content)
    assert not attempt(model, folder)


def test_a_file_larger_than_memory_is_not_read(model: Any, honest: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(honest["lora"], tmp_path / "s")
    try:
        with (folder / WEIGHTS).open("r+b") as file:
            file.truncate(1 << 42)  # 4 TiB of holes
    except OSError:
        pytest.skip("this filesystem has no sparse files of that size")
    with refused(model, errors.AdapterError, WEIGHTS, f"{1 << 42:,}", "memory"):
        model.mlora.load_adapter(folder, "new")


def test_a_huge_config_is_not_read(model: Any, honest: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(honest["lora"], tmp_path / "g")
    (folder / CONFIG).write_bytes(b" " * ((16 << 20) + 1))
    with refused(model, errors.AdapterError, CONFIG, f"{(16 << 20) + 1:,}"):
        model.mlora.load_adapter(folder, "new")


def test_a_pattern_that_never_ends_is_cut_off(model: Any, honest: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(honest["lora"], tmp_path / "p")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "target_modules": r"(\w|\w|_|\.)*\1\1!"}))
    start = time.monotonic()
    with refused(model, errors.AdapterError, "pattern"):
        model.mlora.load_adapter(folder, "new")
    assert time.monotonic() - start < SECONDS


def test_tensors_of_no_module(model: Any, tmp_path: Path) -> None:
    mlora.Adapter({"peft_type": "VERA", "r": 2}, {"base_model.vera_A": torch.ones(2, 48)}).save_pretrained(tmp_path)
    with refused(model, errors.AdapterError, "no weights of any module"):
        model.mlora.load_adapter(tmp_path, "new")


def test_a_rank_that_would_square_is_served_in_bounded_memory(model: Any, tmp_path: Path) -> None:
    # A LoHa of rank r has r^2 rank rows when taken apart; here that would be 10^8 x 32 numbers.
    count = 10_000
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    tensors = {
        f"{name}.hada_w{i}_{side}": torch.full((32, count) if side == "a" else (count, 32), 1e-3)
        for name in names
        for i in (1, 2)
        for side in "ab"
    }
    config = {"peft_type": "LOHA", "r": count, "alpha": 1, "target_modules": ["q_proj"]}
    mlora.Adapter(config, tensors).save_pretrained(tmp_path)
    assert attempt(model, tmp_path)
