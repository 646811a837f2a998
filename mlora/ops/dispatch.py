"""Which implementation runs, and the functions the layers call.

`MLORA_BACKEND` (read at import) forces one of BACKENDS. Two of them are for tests: under `triton` CPU tensors too go
through the Triton kernels, which takes TRITON_INTERPRET=1, and under `emulation` through the CUDA kernels.
"""

from __future__ import annotations

import functools
import os
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from . import layout
from .library import EMULATED, HAS_CPU, HAS_CUDA, HAS_TRITON

BACKENDS = ("cpu", "cuda", "emulation", "reference", "triton")
_ISA_AVX512_BF16 = 3
_KERNEL_DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))

# Beyond this many tokens the tensor cores of the Triton kernels beat the CUDA library's one launch.
CUDA_MAX_TOKENS = 128

# Modules that `apply_group_` takes at most.
GROUP = 4

# Up to this many tokens `linear` beats the library's matmul followed by `apply_`.
FUSED_MAX_TOKENS = 64


def _forced() -> str | None:
    name = os.environ.get("MLORA_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise ValueError(f"MLORA_BACKEND is {name!r}, must be one of {', '.join(BACKENDS)}")
    if name == "cpu" and not HAS_CPU:
        raise ValueError("MLORA_BACKEND is 'cpu', but mlora was built without its C++ operators")
    if name == "triton" and not HAS_TRITON:
        raise ValueError("MLORA_BACKEND is 'triton', which is not installed")
    if name == "cuda" and not HAS_CUDA:
        raise ValueError("MLORA_BACKEND is 'cuda', but mlora was built without its CUDA operators")
    if name is None and not HAS_CPU:
        warnings.warn(
            "mlora uses its reference backend; build with a C++ compiler for speed", RuntimeWarning, stacklevel=2
        )
    return name


_FORCED = _forced()
_NATIVE = HAS_CPU and _FORCED in (None, "cpu", "cuda")
_PREFIX = {"reference": "reference_", "triton": "triton_"}.get(_FORCED or "", "")
_BY_SIZE = HAS_CUDA and HAS_TRITON and _FORCED is None

_reference_apply_ = torch.ops.mlora.reference_apply_.default
_reference_scale_input = torch.ops.mlora.reference_scale_input.default
_reference_merge_ = torch.ops.mlora.reference_merge_.default
_apply_ = getattr(torch.ops.mlora, _PREFIX + "apply_").default
_linear = getattr(torch.ops.mlora, _PREFIX + "linear").default
_scale_input = getattr(torch.ops.mlora, _PREFIX + "scale_input").default
_apply_group_ = torch.ops.mlora.apply_group_.default
_merge_ = getattr(torch.ops.mlora, _PREFIX + "merge_").default
_embed_ = torch.ops.mlora.embed_.default
_large_apply_ = torch.ops.mlora.triton_apply_.default if _BY_SIZE else _apply_


def backend(device: torch.device | str, dtype: torch.dtype) -> str:
    """Name of the implementation that serves tensors of this device and dtype: one of BACKENDS."""
    if _FORCED == "reference" or dtype not in _KERNEL_DTYPES:
        return "reference"
    kind = torch.device(device).type
    if kind == "cpu" and (EMULATED or _NATIVE):
        return "emulation" if EMULATED else "cpu"
    if kind == "cuda" and HAS_CUDA and _FORCED != "triton":
        return "cuda"
    if _FORCED == "triton" or (HAS_TRITON and kind == "cuda"):
        return "triton"
    return "reference"


@functools.cache
def _clusters(index: int) -> bool:
    """Whether blocks of the device share memory; a device that is not here counts as one where they do."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(index)[0] >= 9


@torch.compiler.assume_constant_result
def cuda_tokens(index: int) -> int:
    """How many tokens the CUDA library takes at most, where there is Triton too: none on a device without clusters of
    blocks, each of which would repeat the whole shrink."""
    return CUDA_MAX_TOKENS if _clusters(index) else 0


def apply_(y: Tensor, base: Tensor | None, x: Tensor, arena: Tensor, table: Tensor, plan: Tensor) -> None:
    """See `reference.apply`; in place."""
    if x.dtype is arena.dtype and y.dtype is arena.dtype and arena.dtype in _KERNEL_DTYPES:
        if _BY_SIZE and x.is_cuda and x.numel() > cuda_tokens(x.device.index) * x.shape[-1]:
            _large_apply_(y, base, x, arena, table, plan)
            return
        _apply_(y, base, x, arena, table, plan)
    else:
        _reference_apply_(y, base, x, arena, table, plan)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, arena: Tensor, table: Tensor, plan: Tensor, kblock: int
) -> Tensor:
    """See `reference.linear`. Offered where `probe_kblock` is not 0; `kblock` is what that returned."""
    return _linear(x, weight, bias, arena, table, plan, kblock)


def scale_input(x: Tensor, arena: Tensor, table: Tensor, plan: Tensor) -> Tensor:
    """See `reference.scale_input`."""
    if x.dtype is arena.dtype and arena.dtype in _KERNEL_DTYPES:
        return _scale_input(x, arena, table, plan)
    return _reference_scale_input(x, arena, table, plan)


def apply_group_(y: list[Tensor], x: Tensor, arena: Tensor, tables: list[Tensor], plan: Tensor) -> None:
    """See `reference.apply_group_`; one launch where the backend has one for a group, else one a module."""
    small = x.numel() <= (cuda_tokens(x.device.index) if _BY_SIZE and x.is_cuda else CUDA_MAX_TOKENS) * x.shape[-1]
    if small and backend(x.device, x.dtype) in ("cuda", "emulation") and all(t.dtype is x.dtype for t in (arena, *y)):
        _apply_group_(y, x, arena, tables, plan)
    else:
        for out, table in zip(y, tables, strict=True):
            apply_(out, None, x, arena, table, plan)


def embed_(y: Tensor, ids: Tensor, arena: Tensor, table: Tensor, plan: Tensor, vocab: int) -> None:
    """See `reference.embed`; in place."""
    _embed_(y, ids, arena, table, plan, vocab)


def merge_(weight: Tensor, source: Tensor | None, arena: Tensor, table: Tensor, plan: Tensor) -> None:
    """See `reference.merge_`; in place."""
    if weight.dtype is arena.dtype and arena.dtype in _KERNEL_DTYPES:
        _merge_(weight, source, arena, table, plan)
    else:
        _reference_merge_(weight, source, arena, table, plan)


def probe_kblock(in_features: int, out_features: int, bias: bool, rows: int) -> int:
    """The `kblock` with which `linear` returns the library's bits for base rows of a bf16 linear; 0 if none does.

    Asks the library, once a shape and number of threads, with inputs whose second half of features cancels the
    first, so that only the rounding noise of the order of summation is left. The answer for 2 tokens holds for up to
    FUSED_MAX_TOKENS.
    """
    if not (_NATIVE and HAS_CPU) or not 1 <= rows <= FUSED_MAX_TOKENS or in_features % 2:
        return 0
    if torch.ops.mlora.isa() < _ISA_AVX512_BF16:
        return 0
    return _probe(in_features, out_features, bias, rows == 1, torch.get_num_threads())


@functools.cache
def _probe(in_features: int, out_features: int, bias: bool, single: bool, threads: int) -> int:
    half, distinct = in_features // 2, 61
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(FUSED_MAX_TOKENS + distinct, in_features, generator=generator).bfloat16()
    tokens, columns = noise[:FUSED_MAX_TOKENS], noise[FUSED_MAX_TOKENS:]
    tokens[:, half : 2 * half] = -tokens[:, :half].roll(2, 1)
    columns[:, half : 2 * half] = columns[:, :half].roll(2, 1)
    weight = columns.repeat(-(-out_features // distinct), 1)[:out_features]
    b = None
    if bias:  # none, one as small as the noise, and one that hides it
        b = (torch.arange(out_features) % 3).bfloat16() * torch.tensor(0.3).bfloat16()
        b[1::3] *= 2.0**-15
    table = torch.empty(0, layout.TABLE_WIDTH, dtype=torch.int64)
    arena = torch.empty(0, dtype=torch.bfloat16)
    none = torch.zeros(layout.PLAN_HEADER, dtype=torch.int32)

    inputs = [tokens[:rows] for rows in ((1,) if single else (2, 16, FUSED_MAX_TOKENS))]
    expected = [F.linear(x, weight, b) for x in inputs]
    for kblock in dict.fromkeys((in_features,) if single else (512, 1024, in_features, 2048, 256, 128, 64)):
        pairs = zip(inputs, expected, strict=True)
        if all(torch.equal(_linear(x, weight, b, arena, table, none, kblock), y) for x, y in pairs):
            return kblock
    return 0
