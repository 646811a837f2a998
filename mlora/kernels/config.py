"""Launch configurations: a small table by form and architecture, and the grids.

Two forms. *Decode*, up to DECODE_TOKENS tokens: the batch may be all different adapters, so tiles are small and the sum
over `in` is split into pairs of leaves, or into leaves where that makes no more pieces than programs. *Prefill*: tiles
of 64 tokens, so that A and B are read once for 64 rows, which makes them a small part of the traffic; larger tiles
would leave processors without work at 2048 tokens.

What may change a row's bits (LEAF, BK, RE) depends on the width and the dtype alone, never on the number of tokens.
`shrink` and `expand` use mma.sync on every architecture and in both forms, so both round alike: the rows of their
products (rank rows; 32 columns) are too few for the instructions of a warp group.
They wait for memory anyway.
"""

from __future__ import annotations

from dataclasses import dataclass

DECODE_TOKENS = 128
WORKSPACE_BYTES = 64 << 20
MAX_CAPACITY = 256  # rank rows of a recipe that `shrink` hands over to `expand`
MIN_CAPACITY = 64  # what `expand` keeps for all columns: 4 * RANKS
RANKS = 16  # rank rows at once in `expand` and `linear` (RE): one number, since it orders sums
SHRINK_STAGES = 3  # blocks of `in` in flight

_LEAVES = 32  # at most, of the sum over `in`
PART = 4  # leaves of a part
SEGMENT = 64  # tokens of a chain of a gradient, as on the CPU
_REACH = 1 << 31


@dataclass(frozen=True)
class Device:
    """What a configuration depends on.

    Args:
        processors: streaming multiprocessors. `capability`: 10 * major + minor, e.g. 90.
    """

    processors: int
    capability: int


@dataclass(frozen=True)
class Form:
    """Tiles of one form; names in the kernels are in brackets.

    Args:
        leaves, least: of the sum over `in` that make a slice of the workspace, at most (LEAVES) and at least. In decode
            the device decides (`shrink.divide`).
        per_processor: programs a processor.
        shrink_tokens, expand_tokens: tokens of a tile (BM). In decode the device may take half as many for `shrink`.
        columns: of a tile of `expand` (BN).
        ranks: rank rows at once (RC). shrink_warps, expand_warps: of a program.
        expand_grain: columns of a unit of work (GRAIN).
    """

    leaves: int
    least: int
    per_processor: int
    shrink_tokens: int
    shrink_warps: int
    ranks: int
    expand_warps: int
    expand_tokens: int
    expand_grain: int
    columns: int


# Decode: a rank row and one sector of y are the smallest pieces that cost nothing to hand to another processor. With 8
# warps of `shrink` a thread has 128 bits of each of x and A, and few registers of the sums.
DECODE = Form(2, 1, 1, 32, 8, 32, 4, 32, 16, 32)
PREFILL = Form(PART, PART, 2, 64, 8, 32, 8, 64, 64, 32)


def form(tokens: int) -> Form:
    return DECODE if tokens <= DECODE_TOKENS else PREFILL


def leaf(width: int) -> int:
    """Elements of a leaf of the sum over `width`: at most 32 leaves, of a multiple of 64."""
    return max(64, -(-width // (_LEAVES * 64)) * 64)


def shrink_registers(keep: bool, widen: bool) -> int:
    """Registers that a thread of `shrink` may take. Where it leaves v for training, 96 would spill on some
    architectures, as 80 would where it widens x beside an arena of fp32; 128 leave room for the two programs of 8
    warps that a processor gets in prefill, and for no more."""
    return 128 if keep or widen else 80


def expand_registers(device: Device, f: Form, itemsize: int) -> int:
    """Registers that a thread of `expand` may take. Where a processor has 48 warps, 88 leave room for 42% of them in
    programs of 4, and 80 for 50%."""
    return 88 if (_family(device.capability), f, itemsize) == (120, DECODE, 2) else 80


def expand_wide(device: Device, f: Form, itemsize: int) -> int:
    """WIDE of `expand`: what makes a load of B 128 bits, where registers suffice; fp32 needs none in decode."""
    family = _family(device.capability)
    if itemsize == 4:
        return 1
    if family < 100:
        return 2 if f is DECODE else 4
    return 2 if family == 100 and f is PREFILL else 1


def far(elements: int) -> bool:
    """Whether 32 bits may not reach over a part of an arena of so many elements."""
    return elements >= _REACH


def block_k(itemsize: int) -> int:
    """Elements of `in` at once: 128 bytes."""
    return 128 // itemsize


def slices(width: int, leaves: int) -> int:
    """Slices of the workspace, of that many leaves each."""
    return -(-width // (leaf(width) * leaves))


def capacity(tokens: int, width: int) -> int:
    """Rank rows that the workspace holds for each token: 256, or what fits into 64 MiB, but at least 64."""
    fits = WORKSPACE_BYTES // (4 * tokens * slices(width, form(tokens).least))
    return max(MIN_CAPACITY, min(MAX_CAPACITY, fits // 32 * 32))


def shrink_grid(device: Device, tokens: int, width: int) -> int:
    """Programs of `shrink`: as many as have work if every row takes one adapter, of rank 8 or more in decode."""
    f = form(tokens)
    n = slices(width, f.least)
    least = tokens * n * 8 if f is DECODE else -(-tokens // f.shrink_tokens) * n
    return max(1, min(device.processors * f.per_processor, least))


def expand_grid(device: Device, tokens: int, width_out: int) -> int:
    """Programs of `expand`: as many as have work if every row takes the same adapter. In prefill so many that each then
    has as much: runs that end with a tile read its v once."""
    f = form(tokens)
    least = -(-tokens // f.expand_tokens) * -(-width_out // f.expand_grain)
    most = device.processors * f.per_processor
    return max(1, min(most, least)) if f is DECODE else -(-least // -(-least // most))


def linear_tiles(device: Device, tokens: int, itemsize: int, widen: bool) -> tuple[int, int, int, int, int, int]:
    """BM, BN, BK, warps, stages and registers of `linear`. BK gives a thread 128 bits of the narrowest tile, the RANKS
    rows of A, so no more warps than that; as many stages as leave room in shared memory for 38% of a processor's
    threads. fp32 has no tensor cores here and wants small tiles, and short blocks where x is to `widen` beside A."""
    family = _family(device.capability)
    if itemsize == 4:
        return 16, 32, 16, 2, 3, 80 if family in (80, 90, 100) else 96  # with 48 warps a processor that is 42%
    if tokens <= DECODE_TOKENS:
        return 16, 64, 16 if widen else 64, 4, 3 if family in (80, 90, 100) else 2, 80
    return 32, 64, 16 if widen else 64, 4, 3 if family in (90, 100) else 2, 96 if widen else 80


def _family(capability: int) -> int:
    """The architecture whose figures serve `capability`: 90, 100 and 120 for their minor versions too."""
    return capability // 10 * 10 if capability >= 90 else capability


def linear_grid(device: Device, tokens: int, width_out: int, bm: int, bn: int, warps: int, registers: int) -> int:
    """Programs of `linear`: as many as the processors' registers have room for at once, or one a tile if there are
    fewer."""
    resident = 65536 // (32 * registers) // warps
    return max(1, min(device.processors * resident, -(-tokens // bm) * -(-width_out // bn)))


def gradient_tiles(itemsize: int) -> tuple[int, int, int, int, int]:
    """BR, BN, BT, warps and registers of `rank_gradients`. 32 columns are two sectors of 16 bits, and too few for the
    instructions of a warp group; 64 would spill. fp32 has no tensor cores here and wants few tokens at once."""
    return (16, 64, 16, 8, 80) if itemsize == 4 else (16, 32, 64, 4, 80)


def gradient_grid(device: Device, kept: int, width: int, bn: int, warps: int, registers: int) -> int:
    """Programs of `rank_gradients`: as many as the processors' registers have room for at once, or, of v of `kept`
    numbers, one a tile if every token had an adapter of its own."""
    resident = 65536 // (32 * registers) // warps
    return max(1, min(device.processors * resident, kept * -(-width // bn)))
