"""Which implementation runs, and the functions the layers call.

`MLORA_BACKEND` (read at import) forces one of BACKENDS. Two of them are for tests: under `triton` CPU tensors too go
through the Triton kernels, which takes TRITON_INTERPRET=1, and under `emulation` through the CUDA kernels.
"""

from __future__ import annotations

import functools
import os
import sys
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import layout
from . import library
from .library import CUDA_ERROR, EMULATED, HAS_CPU, HAS_CUDA, HAS_TRITON

BACKENDS = ("cpu", "cuda", "emulation", "reference", "triton")
_BLOCKS_ISA = {torch.float32: 1, torch.bfloat16: 3}  # what a kblock needs: AVX2, and dot products of bf16
_ATTEND_ISA = 1  # AVX2
_DOTS_ISA = {torch.float16: 1, torch.bfloat16: 1}  # what DOTS needs: AVX2

# What `linear` may be given for a kblock beside a number of inputs.
LIBRARY = 0  # the library computes the product, and rounds it before the delta is added
PROBED = -1  # what `probe_kblock` says, which the operator asks when it first sees a shape and remembers
ALONG = -2  # dot products along the input: fast, and not in the order of any library
FASTEST = -3  # what `fastest.probe` says, asked as `probe_kblock` is
DOTS = -4  # dot products as torch's own, which multiply 16 bits where no library does

# The blocks in which libraries are known or likely to add up inputs.
_KBLOCKS = {
    torch.float32: (192, 384, 256, 336, 128, 512, 320, 288, 240, 224, 448, 96, 64),
    torch.bfloat16: (512, 1024, 2048, 256, 128, 64),
}
_DOT_STEP = 32  # inputs of which DOTS takes a multiple
_KERNEL_DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))

# Beyond this many tokens the tensor cores of the Triton kernels beat the CUDA library's one launch.
CUDA_MAX_TOKENS = 128

# Modules that `apply_group_` takes at most, and the backends that gain by it.
GROUP = 4
GROUPING = ("cuda", "emulation")

# Up to so many tokens `linear` beats the library's matmul followed by `apply_`; beyond, it depends on the library.
FEW_TOKENS = 64
_NOISE = {torch.float32: 2.0**-23, torch.float16: 2.0**-18, torch.bfloat16: 2.0**-15}  # of sums that cancel
# Up to so many tokens libraries have a kernel for each number of them.
_OWN_TOKENS = {torch.float32: 12, torch.float16: 1, torch.bfloat16: 1}
_MOST_TOKENS = 1 << 14
MOST_OUTPUTS = 1 << 25  # of a call that is asked about
_FASTER = 0.95


def _forced() -> str | None:
    name = os.environ.get("MLORA_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise ValueError(f"MLORA_BACKEND is {name!r}, must be one of {', '.join(BACKENDS)}")
    if name == "cpu" and not HAS_CPU:
        raise ValueError("MLORA_BACKEND is 'cpu', but mlora was built without its C++ operators")
    if name == "triton" and not HAS_TRITON:
        raise ValueError("MLORA_BACKEND is 'triton', which is not installed")
    if name == "cuda" and not HAS_CUDA:
        why = f"do not load: {CUDA_ERROR}" if CUDA_ERROR else "were not built"
        raise ValueError(f"MLORA_BACKEND is 'cuda', but mlora's CUDA operators {why}")
    if name is None and not HAS_CPU:
        slow = "mlora uses its reference backend; build with a C++ compiler for speed"
        warnings.warn(slow, RuntimeWarning, stacklevel=_importer())
    if name is None and CUDA_ERROR:
        lost = (
            f"mlora's CUDA operators do not load beside torch {torch.__version__}, and Triton's kernels serve GPUs; "
            f"install the wheel for CUDA {torch.version.cuda}, or the one without: {CUDA_ERROR}"
        )
        warnings.warn(lost, RuntimeWarning, stacklevel=_importer())
    return name


def _importer() -> int:
    """The stack level, for a caller of `warnings.warn`, of the code outside of mlora that first uses it."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in ("mlora", "importlib"):
            break
        level += "importlib._bootstrap" not in frame.f_code.co_filename  # whose frames `warn` does not count
        frame = frame.f_back
    return level


_FORCED = _forced()
_NATIVE = HAS_CPU and _FORCED in (None, "cpu", "cuda")
_PREFIX = {"reference": "reference_", "triton": "triton_"}.get(_FORCED or "", "")
_CPU_PREFIX = "reference_" * (_FORCED == "reference")  # of operators that have a kernel for the CPU only
_BY_SIZE = HAS_CUDA and HAS_TRITON and _FORCED is None

_reference_apply_ = torch.ops.mlora.reference_apply_.default
_reference_scale_input = torch.ops.mlora.reference_scale_input.default
_reference_turn_output = torch.ops.mlora.reference_turn_output.default
_reference_embed_ = torch.ops.mlora.reference_embed_.default
_reference_merge_ = torch.ops.mlora.reference_merge_.default
_reference_apply_keep_ = torch.ops.mlora.reference_apply_keep_.default
_reference_drop = torch.ops.mlora.reference_drop.default
_reference_column_sums = torch.ops.mlora.reference_column_sums.default
_reference_row_norms = torch.ops.mlora.reference_row_norms.default
_reference_shrink_ = torch.ops.mlora.reference_shrink_.default
_reference_expand_ = torch.ops.mlora.reference_expand_.default
_reference_rank_gradients_ = torch.ops.mlora.reference_rank_gradients_.default
_apply_ = getattr(torch.ops.mlora, _PREFIX + "apply_").default
_apply_keep_ = getattr(torch.ops.mlora, _PREFIX + "apply_keep_").default
_linear_keep = getattr(torch.ops.mlora, _PREFIX + "linear_keep").default
_rank_gradients_ = getattr(torch.ops.mlora, _PREFIX + "rank_gradients_").default
_drop = getattr(torch.ops.mlora, _PREFIX + "drop").default
_column_sums = getattr(torch.ops.mlora, _CPU_PREFIX + "column_sums").default
_row_norms = getattr(torch.ops.mlora, _CPU_PREFIX + "row_norms").default
_linear = getattr(torch.ops.mlora, _PREFIX + "linear").default
_scale_input = getattr(torch.ops.mlora, _PREFIX + "scale_input").default
apply_native_ = _apply_  # `apply_` of tensors that are known to have dtypes which kernels take, on the CPU
_turn_output = getattr(torch.ops.mlora, _PREFIX + "turn_output").default
_apply_group_ = torch.ops.mlora.apply_group_.default
_merge_ = getattr(torch.ops.mlora, _PREFIX + "merge_").default
_embed_ = getattr(torch.ops.mlora, _PREFIX + "embed_").default
attend_ = getattr(torch.ops.mlora, _CPU_PREFIX + "attend_").default  # see ops/attention.py
attend_step = getattr(torch.ops.mlora, _CPU_PREFIX + "attend_step").default
_shrink_ = getattr(torch.ops.mlora, _CPU_PREFIX + "shrink_").default
_expand_ = getattr(torch.ops.mlora, _CPU_PREFIX + "expand_").default
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


def kernels_take(rows: torch.dtype, arena: torch.dtype) -> bool:
    """Whether kernels work on x and y in the dtype `rows` beside an arena of dtype `arena`: one dtype, or an arena of
    fp32 beside 16 bits."""
    return (rows is arena or arena is torch.float32) and rows in _KERNEL_DTYPES and arena in _KERNEL_DTYPES


@functools.cache
def _clusters(index: int) -> bool:
    """Whether blocks of the device share memory; a device that is not here counts as one where they do."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(index)[0] >= 9


def cuda_tokens(index: int) -> int:
    """How many tokens the CUDA library takes at most, where there is Triton too: none on a device without clusters of
    blocks, each of which would repeat the whole shrink."""
    return CUDA_MAX_TOKENS if _clusters(index) else 0


# What torch.compiler.assume_constant_result does, which imports the compiler for it: a second, and more.
cuda_tokens._dynamo_marked_constant = True  # type: ignore[attr-defined]


def apply_(y: Tensor, base: Tensor | None, x: Tensor, arena: Tensor, table: Tensor, plan: Tensor) -> None:
    """See `reference.apply`; in place."""
    if x.dtype is y.dtype and kernels_take(x.dtype, arena.dtype):
        if _BY_SIZE and x.is_cuda and x.numel() > cuda_tokens(x.device.index) * x.shape[-1]:
            _large_apply_(y, base, x, arena, table, plan)
            return
        _apply_(y, base, x, arena, table, plan)
    else:
        _reference_apply_(y, base, x, arena, table, plan)


def shrink_(v: Tensor, x: Tensor, arena: Tensor, table: Tensor, plan: Tensor) -> None:
    """See `phases.shrink_`."""
    native = kernels_take(x.dtype, arena.dtype)
    (_shrink_ if native else _reference_shrink_)(v, x, arena, table, plan)


def expand_(y: Tensor, v: Tensor, arena: Tensor, table: Tensor, plan: Tensor) -> None:
    """See `phases.expand_`."""
    native = kernels_take(y.dtype, arena.dtype)
    (_expand_ if native else _reference_expand_)(y, v, arena, table, plan)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, arena: Tensor, table: Tensor, plan: Tensor, kblock: int
) -> Tensor:
    """See `reference.linear`. `kblock`: LIBRARY, PROBED, ALONG, FASTEST, or what `probe_kblock` returned."""
    return _linear(x, weight, bias, arena, table, plan, kblock)


def apply_keep_(
    y: Tensor, v: Tensor, base: Tensor | None, x: Tensor, arena: Tensor, table: Tensor, plan: Tensor
) -> None:
    """See `training.apply_keep_`."""
    native = x.dtype is y.dtype and kernels_take(x.dtype, arena.dtype)
    (_apply_keep_ if native else _reference_apply_keep_)(y, v, base, x, arena, table, plan)


def linear_keep(
    x: Tensor, weight: Tensor, bias: Tensor | None, v: Tensor, arena: Tensor, table: Tensor, plan: Tensor, kblock: int
) -> Tensor:
    """See `training.linear_keep`; kblock as in `linear`."""
    return _linear_keep(x, weight, bias, v, arena, table, plan, kblock)


def rank_gradients_(
    to: Tensor, v: Tensor, rows: Tensor, offsets: Tensor, arena: Tensor, table: Tensor, plan: Tensor
) -> None:
    """See `training.rank_gradients_`."""
    native = kernels_take(rows.dtype, arena.dtype)
    (_rank_gradients_ if native else _reference_rank_gradients_)(to, v, rows, offsets, arena, table, plan)


def column_sums(left: Tensor, right: Tensor | None, tokens: Tensor | None) -> Tensor:
    """See `training.column_sums`."""
    return (_column_sums if left.dtype in _KERNEL_DTYPES else _reference_column_sums)(left, right, tokens)


def row_norms(weight: Tensor, b: Tensor, a: Tensor, scale: float) -> Tensor:
    """See `norms.row_norms`."""
    kernel = weight.dtype in _KERNEL_DTYPES and a.dtype is torch.float32
    return (_row_norms if kernel else _reference_row_norms)(weight, b, a, scale)


def drop(x: Tensor, places: Tensor, odds: Tensor) -> Tensor:
    """See `dropout.drop`."""
    return (_drop if x.dtype in _KERNEL_DTYPES else _reference_drop)(x, places, odds)


def scale_input(x: Tensor, arena: Tensor, table: Tensor, plan: Tensor) -> Tensor:
    """See `reference.scale_input`."""
    if kernels_take(x.dtype, arena.dtype):
        return _scale_input(x, arena, table, plan)
    return _reference_scale_input(x, arena, table, plan)


def turn_output(y: Tensor, base: Tensor | None, arena: Tensor, table: Tensor, plan: Tensor) -> Tensor:
    """See `reference.turn_output`."""
    if kernels_take(y.dtype, arena.dtype):
        return _turn_output(y, base, arena, table, plan)
    return _reference_turn_output(y, base, arena, table, plan)


def apply_group_(y: list[Tensor], x: Tensor, arena: Tensor, tables: list[Tensor], plan: Tensor) -> None:
    """See `reference.apply_group_`; one call where the backend serves a group at once, else one a module."""
    kind, most = backend(x.device, x.dtype), cuda_tokens(x.device.index) if _BY_SIZE and x.is_cuda else CUDA_MAX_TOKENS
    alike = kernels_take(x.dtype, arena.dtype) and all(t.dtype is x.dtype for t in y)
    if kind in GROUPING and x.numel() <= most * x.shape[-1] and alike:
        _apply_group_(y, x, arena, tables, plan)
    else:
        for out, table in zip(y, tables, strict=True):
            apply_(out, None, x, arena, table, plan)


def embed_(y: Tensor, ids: Tensor, arena: Tensor, table: Tensor, plan: Tensor, vocab: int) -> None:
    """See `reference.embed`; in place."""
    if kernels_take(y.dtype, arena.dtype):
        _embed_(y, ids, arena, table, plan, vocab)
    else:
        _reference_embed_(y, ids, arena, table, plan, vocab)


def merge_(weight: Tensor, source: Tensor | None, arena: Tensor, table: Tensor, plan: Tensor) -> None:
    """See `reference.merge_`; in place."""
    if kernels_take(weight.dtype, arena.dtype):
        _merge_(weight, source, arena, table, plan)
    else:
        _reference_merge_(weight, source, arena, table, plan)


def offered(tokens: int, dtype: torch.dtype) -> bool:
    """Whether `linear` computes the product of so many tokens itself, in an order of its own."""
    return _NATIVE and HAS_CPU and dtype in _KERNEL_DTYPES and 1 <= tokens <= _MOST_TOKENS


@functools.cache
def attends(dtype: torch.dtype) -> bool:
    """Whether `attend_step` serves tensors of this dtype on the CPU faster than torch's attention, which the scalar
    kernels do not for all sizes."""
    return backend("cpu", dtype) == "cpu" and torch.ops.mlora.isa() >= _ATTEND_ISA


def _kblocks(in_features: int, dtype: torch.dtype, asked: tuple[int, ...]) -> list[int]:
    """The orders, as `linear` takes them for a kblock, that a library may add in."""
    isa, orders = torch.ops.mlora.isa(), []
    if dtype in _BLOCKS_ISA and isa >= _BLOCKS_ISA[dtype] and (dtype is not torch.bfloat16 or in_features % 2 == 0):
        whole = asked == (1,) and dtype is torch.bfloat16
        orders = [in_features] if whole else [*_KBLOCKS[dtype], in_features]
    if dtype in _DOTS_ISA and isa >= _DOTS_ISA[dtype] and in_features % _DOT_STEP == 0:
        orders.append(DOTS)
    return list(dict.fromkeys(orders))


def tokens_like(tokens: int) -> int:
    """A number of tokens for which `probe_kblock` answers the same; there are few of them."""
    return tokens if tokens <= FEW_TOKENS else 1 << (tokens - 1).bit_length()


def probe_kblock(in_features: int, out_features: int, bias: bool, tokens: int, dtype: torch.dtype) -> int:
    """The `kblock` with which `linear` returns the library's bits for base rows of a linear; 0 if none does, or if the
    library is as fast.

    Asks the library, with inputs whose second half of features cancels the first, so that only the rounding noise of
    the order of summation is left. Asked are so few tokens themselves, for which libraries have kernels of their own,
    and of more the ends of a range; beyond FEW_TOKENS, where the library can be the faster one, it is also timed. Each
    answer is kept for the process: a shape, a range of tokens, a number of threads.
    """
    if not offered(tokens, dtype) or not in_features:
        return 0
    most = tokens_like(tokens)
    if tokens <= _OWN_TOKENS[dtype]:
        asked: tuple[int, ...] = (tokens,)
    elif tokens <= FEW_TOKENS:
        asked = (_OWN_TOKENS[dtype] + 1, 16, FEW_TOKENS)
    else:
        asked = (most // 2 + 1, most)
    if max(asked) * out_features > MOST_OUTPUTS:
        return 0
    return _probe(in_features, out_features, bias, asked, dtype, torch.get_num_threads())


library.LIBRARY.define(
    "probe_kblock(int in_features, int out_features, bool bias, int tokens, ScalarType dtype) -> int"
)
library.LIBRARY.impl("probe_kblock", probe_kblock, "CompositeExplicitAutograd")


@functools.cache
def _probe(
    in_features: int, out_features: int, bias: bool, asked: tuple[int, ...], dtype: torch.dtype, threads: int
) -> int:
    half, distinct = in_features // 2, 61
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(distinct + max(asked), in_features, generator=generator).to(dtype)
    columns, tokens = noise[:distinct], noise[distinct:]
    tokens[:, half : 2 * half] = -tokens[:, :half].roll(2, 1)
    columns[:, half : 2 * half] = columns[:, :half].roll(2, 1)
    weight = columns.repeat(-(-out_features // distinct), 1)[:out_features]
    b = None
    if bias:  # none, one as small as the noise, and one that hides it
        b = (torch.arange(out_features) % 3).to(dtype) * torch.tensor(0.3, dtype=dtype)
        b[1::3] *= _NOISE[dtype]
    table = torch.empty(0, layout.TABLE_WIDTH, dtype=torch.int64)
    arena = torch.empty(0, dtype=dtype)
    none = torch.zeros(layout.PLAN_HEADER, dtype=torch.int32)

    def the_library(x: Tensor) -> Tensor:
        return F.linear(x, weight, b)

    inputs = [tokens[:rows] for rows in asked]
    expected = [the_library(x) for x in inputs]
    for kblock in _kblocks(in_features, dtype, asked):

        def ours(x: Tensor, kblock: int = kblock) -> Tensor:
            return _linear(x, weight, b, arena, table, none, kblock)

        if all(torch.equal(ours(x), y) for x, y in zip(inputs, expected, strict=True)):
            if asked[-1] <= FEW_TOKENS:
                return kblock
            x = inputs[-1]
            pairs = [(seconds(ours, x), seconds(the_library, x)) for _ in range(3)]
            mine, library = (min(times) for times in zip(*pairs, strict=True))
            return kblock if mine < _FASTER * library else 0
    return 0


def seconds(call: Callable[..., object], *args: object) -> float:
    """Time that a call takes."""
    start = time.perf_counter()
    call(*args)
    return time.perf_counter() - start
