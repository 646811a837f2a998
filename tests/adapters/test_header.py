"""Headers of safetensors files: what is taken is what the library takes, and the tensors are those that it reads."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import load_file, save_file

import mlora
from mlora import errors
from mlora.adapters.header import parse
from mlora.adapters.loader import read_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def read(folder: Path, content: bytes | None = None, **options: Any) -> Any:
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA"}))
    if content is not None:
        (folder / WEIGHTS).write_bytes(content)
    return read_adapter(folder, **options)


@pytest.mark.parametrize("dtypes", [("bfloat16",), ("float32", "bfloat16", "int64", "uint8"), ("float64", "bool")])
def test_tensors_are_those_that_the_library_reads(tmp_path: Path, dtypes: tuple[str, ...]) -> None:
    tensors = {
        f"{index}.{name}": torch.randint(0, 2, (3, 2 * index + 1)).to(getattr(torch, name))
        for index in range(3)
        for name in dtypes
    } | {"scalar": torch.tensor(2.5).to(getattr(torch, dtypes[0])), "none": torch.empty(0, 3)}
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt", "odd": "x" * len(dtypes)})
    got = read(tmp_path).tensors
    assert got.keys() == tensors.keys()
    for key, tensor in load_file(tmp_path / WEIGHTS).items():
        assert got[key].dtype == tensor.dtype and got[key].shape == tensor.shape and torch.equal(got[key], tensor), key


def test_tensors_at_odd_bytes_are_read(tmp_path: Path) -> None:
    """The library writes the wide ones first; other writers need not."""
    text = json.dumps({
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }).encode()  # fmt: skip
    data = struct.pack("<Q", len(text)) + text + b"\x07" + struct.pack("<2f", 1.5, -2.0)
    got = read(tmp_path, data).tensors
    assert got["a"].tolist() == [7] and got["b"].tolist() == [1.5, -2.0]


SIZES = st.sampled_from([0, 1, 2, 3, 4, 8, -1, 1 << 40, 1 << 63, True, 1.0, "1", None])
OFFSETS = st.sampled_from([0, 1, 2, 3, 4, 8, 12, 16])
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BF16", "F16"]),
        "shape": st.lists(st.integers(0, 4) | SIZES, max_size=3),
        "data_offsets": st.lists(OFFSETS, min_size=2, max_size=2) | st.lists(SIZES, max_size=3),
    }
)


@st.composite
def headers(draw: Any) -> dict[str, Any]:
    """Half of them are right: tensors side by side."""
    if draw(st.booleans()):
        return draw(st.dictionaries(st.sampled_from("abc"), ENTRY, max_size=3))
    found, at = {}, 0
    for key in draw(st.permutations("abc"))[: draw(st.integers(1, 3))]:
        rows, columns = draw(st.integers(0, 2)), draw(st.integers(1, 3))
        found[key] = {"dtype": "U8", "shape": [rows, columns], "data_offsets": [at, at + rows * columns]}
        at += rows * columns
    return found


@settings(max_examples=300, deadline=None)
@given(header=headers(), size=st.integers(0, 16))
def test_headers_are_taken_as_the_library_takes_them(header: dict[str, Any], size: int) -> None:
    text = json.dumps(header).encode()
    try:
        deserialize(struct.pack("<Q", len(text)) + text + bytes(size))
        wanted = True
    except SafetensorError:
        wanted = False
    try:
        taken = parse(text).nbytes == size
    except ValueError:
        taken = False
    assert taken == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    (
        (b"", "Expecting value"),
        (b"[]", "no object"),
        (b'{"a": 1}', "described by 1"),
        (b'{"__metadata__": {"x": 1}}', "no texts"),
        (b"[" * 200_000, "nested"),
        (b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}', "starts at byte 1"),
        (b'{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 1]}}', "in 1 bytes"),
        (b'{"a": {"dtype": "U8", "shape": [0, 1e400], "data_offsets": [0, 0]}}', "shape [0, inf]"),
        (b'{"a": {"dtype": "U8", "shape": [0, %d], "data_offsets": [0, 0]}}' % (1 << 63), "shape"),
        (b'{"a": {"dtype": "U8", "shape": [%s], "data_offsets": [0, 1]}}' % b", ".join([b"1"] * 65), "shape"),
        (b'{"a": {}, "a": {}}', "twice"),
    ),
    ids=("none", "list", "number", "metadata", "deep", "gap", "short", "infinite", "huge", "dimensions", "twice"),
)
def test_headers_that_lie(text: bytes, wanted: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(text)
    assert wanted in str(caught.value)


def test_bytes_that_no_tensor_has_are_damage(tmp_path: Path) -> None:
    save_file({"a.lora_A.weight": torch.ones(2, 2)}, tmp_path / "good.safetensors")
    content = (tmp_path / "good.safetensors").read_bytes()
    for spoilt in (content + b"x", content[:-1]):
        with pytest.raises(errors.AdapterError, match=r"16 bytes of tensors; it has 1[57]"):
            read(tmp_path, spoilt)


def test_other_dtypes_are_refused_by_name_unless_they_are_ignored(tmp_path: Path) -> None:
    tensors = {"x.lora_A.weight": torch.ones(2, 2), "x.scales": torch.ones(4).to(torch.float8_e8m0fnu)}
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(errors.UnsupportedAdapterError, match=r"x\.scales is of dtype F8_E8M0"):
        read(tmp_path)
    got = read(tmp_path, ignore=["*.scales"])
    assert list(got.tensors) == ["x.lora_A.weight"] and got.ignored == ("x.scales",)
    with pytest.raises(errors.AdapterError, match=r"x is torch\.complex64"):
        mlora.Adapter({"peft_type": "LORA"}, {"x": torch.ones(1, dtype=torch.complex64)})


@pytest.mark.parametrize("dtype", (torch.float8_e4m3fn, torch.float8_e5m2))
def test_8_bit_floats_are_served_as_their_values(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base, x = torch.nn.Sequential(torch.nn.Linear(6, 5)), torch.randn(3, 6)
    a, b = torch.randn(2, 6).to(dtype), torch.randn(5, 2).to(dtype)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["0"]}
    adapter = mlora.Adapter(config, {"0.lora_A.weight": a, "0.lora_B.weight": b})
    want = base(x).double() + 2 * (x.double() @ a.double().t() @ b.double().t())
    adapter.save_pretrained(tmp_path)
    runtime = mlora.patch(base)
    runtime.load_adapter(tmp_path, "a")
    assert (base(x, adapter_names=["a"] * 3) - want).abs().max() < 1e-5 * want.abs().max()
    runtime.save_adapter("a", tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()
    poisoned = a.view(torch.uint8).clone()
    poisoned[0, 0] = 0x7F  # NaN in both
    with pytest.raises(errors.AdapterError, match=r"lora_A\.weight has 1 values that are NaN"):
        mlora.Adapter(config, {"0.lora_A.weight": poisoned.view(dtype), "0.lora_B.weight": b})
