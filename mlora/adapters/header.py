"""The header of a safetensors file -> where its tensors lie.

The library checks headers only of files that it maps, and a mapped file that another process cuts off ends this one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_HEADER = 100_000_000  # bytes, as in the library

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class Place(NamedTuple):
    """Where a tensor lies: bytes `start` to `end` behind the header. `dtype` is the header's word for it.

    `at`: `start` in elements, -1 where it is between two of them or the dtype is not among `DTYPES`.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    strides: tuple[int, ...]
    at: int


class Header(NamedTuple):
    """The tensors in the order of their bytes, without gaps, and the file's own metadata."""

    places: tuple[Place, ...]
    metadata: dict[str, str]
    nbytes: int


@lru_cache(maxsize=16)  # adapters of one model and one rank have one header
def parse(text: bytes) -> Header:
    """Raises `ValueError` where the text is no header."""
    try:
        content = json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("its header is no object")
    metadata = content.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("the __metadata__ of its header are no texts")
    places = sorted((_place(key, value) for key, value in content.items()), key=lambda place: (place.start, place.end))
    at = 0
    for place in places:
        if place.start != at:
            raise ValueError(f"its tensor {place.key!r} starts at byte {place.start}, the one before it ends at {at}")
        at = place.end
    return Header(tuple(places), metadata, at)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header has a key twice")
    return found


def _place(key: str, value: Any) -> Place:
    if not isinstance(value, dict):
        raise ValueError(f"its tensor {key!r} is described by {value!r}")
    dtype: Any
    shape: Any
    offsets: Any
    dtype, shape, offsets = (value.get(name) for name in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and _sizes(shape) and _sizes(offsets) and len(offsets) == 2):
        raise ValueError(f"its tensor {key!r} has dtype {dtype!r}, shape {shape!r} and offsets {offsets!r}")
    start, end = offsets
    # torch counts strides in 63 bits, also of tensors without elements, and stops at 64 dimensions.
    if end < start or len(shape) > 64 or math.prod(max(size, 1) for size in shape) >= 1 << 63:
        raise ValueError(f"its tensor {key!r} has shape {shape!r} and offsets {offsets!r}")
    size = DTYPES[dtype].itemsize if dtype in DTYPES else 0
    if size and math.prod(shape) * size != end - start:
        raise ValueError(f"its tensor {key!r} has shape {shape!r} of {dtype} in {end - start} bytes")
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return Place(key, dtype, tuple(shape), start, end, strides, start // size if size and start % size == 0 else -1)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def cut(places: Iterable[Place], data: Tensor) -> dict[str, Tensor]:
    """The tensors at `places`, of dtypes among `DTYPES`, of the uint8 bytes behind the header: views of them where they
    are aligned."""
    flat: dict[str, Tensor] = {}
    found = {}
    for key, dtype, shape, start, end, strides, at in places:
        if at < 0:
            found[key] = data[start:end].clone().view(DTYPES[dtype]).view(shape)
            continue
        if dtype not in flat:
            flat[dtype] = data[: data.numel() - data.numel() % DTYPES[dtype].itemsize].view(DTYPES[dtype])
        found[key] = flat[dtype].as_strided(shape, strides, at)
    return found


class InMemory(Mapping[str, Tensor]):
    """What `cut` makes of `places` and `data`, when one of them is asked for first. `text`: the header, as it is in the
    file."""

    def __init__(self, text: bytes, places: Sequence[Place], data: Tensor) -> None:
        self.text, self.places, self.data = text, places, data

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        return cut(self.places, self.data)

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return (place.key for place in self.places)

    def __len__(self) -> int:
        return len(self.places)
