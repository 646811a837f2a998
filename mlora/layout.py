"""The two integer layouts that Python, C++ and GPU kernels share.

**Table**, one per module: int64 `(slots, TABLE_WIDTH)`. Row `s` says where the adapter in slot `s`
keeps its parts for this module, as offsets in elements of the arena; an absent part is -1 and an
absent adapter is rank 0 with every part -1.

    column   meaning
    A        (rank, in) row-major
    B        (rank, out) row-major: rank row j adds `B[j] * (A[j] . x)`
    RANK     number of rank rows, 0 if none. Where there are some, one of A and B may be absent: it is the identity
             beside a whole matrix. Arenas of kernels that do not take that (CUDA's and Triton's) hold it.
    SCALE    bits of a float32 in the low half: the LoRA scaling, applied to `A x` in fp32
    GAIN     (out,) holding g - 1
    IN_GAIN  (in,)  holding u - 1
    SHIFT    (out,) holding c
    WHOLE    1 where B is the identity, held or absent, so that an embedding's A is looked up and nothing multiplied;
             else -1
    TURN     (size, out) holding T - I of the output's block-diagonal T
    IN_TURN  (size, in)  the same of the input's
    TURN_SHAPE, IN_TURN_SHAPE   size in the low 32 bits, stride in the high ones

A block is `size` elements, `stride` apart; blocks fill spans of size * stride elements. With k = n // stride % size,
element n of T v is v[n] + sum_j turn[j, n] * v[n + (j - k) * stride]. A block-diagonal matrix has a stride of 1; RoAd's
pairs are blocks of 2 elements, half a group apart.

The store puts parts at multiples of 64 bytes; the Triton kernels, which load 16 bytes at once, count on multiples of 8
elements. The store gives each adapter two rows, the second for the rests of its gains (`Store`).

**Plan**, one per forward: int32, one dimension, refreshed by one copy. With R rows, P routes and
E terms (a route is a distinct recipe; a term is one weighted slot of a recipe):

    [0:8]            header: R, P, E, X, N, F, 0, 0, where X is how often `generate` repeats a row, N is how many
                     entries were listed (R; of equal ones R is 1), and F says what compiled code must refuse: the sum
                     of HEADS, where one has a head or an embedding of another size, EXPERTS, where one changes
                     parameters (`target_parameters`), TAILS, where one is an aLoRA, which applies to some of a row's
                     tokens, and FOREIGN, where rows differ in a module that reads another modality than text
    row_start  P+1   rows of route p are row_order[row_start[p] : row_start[p+1]]
    row_order  R     rows sorted by route; those that take no adapter come last, after row_start[P]
    term_start P+1   terms of route p are [term_start[p], term_start[p+1])
    term_slot  E     slot of each term, >= 0
    term_weight E    bits of a float32

Example: rows `["sql", None, "sql", {"sql": .5, "chat": .5}]` with sql in slot 0 and chat in slot 3
give R=4, P=2, E=3, row_start [0, 2, 3], row_order [0, 2, 3, 1], term_start [0, 1, 3],
term_slot [0, 0, 3], term_weight [1, .5, .5].

An input of T tokens holds T / R consecutive tokens for each row; where recipes differ from token to token, every token
is a row of its own. Capacity beyond the last entry is ignored; a header of zeros routes nothing.
"""

from __future__ import annotations

TABLE_WIDTH = 12
A, B, RANK, SCALE, GAIN, IN_GAIN, SHIFT, WHOLE, TURN, TURN_SHAPE, IN_TURN, IN_TURN_SHAPE = range(TABLE_WIDTH)


# Where the columns come from of a table in which each module is turned round, as the gradient of its input is made: A
# and B change places, an output's gain becomes an input's, and the rest has no part in it.
EXCHANGED = {A: B, B: A, RANK: RANK, SCALE: SCALE, IN_GAIN: GAIN}


def turn_shape(size: int, stride: int) -> int:
    """Both in one word of a table."""
    return size | stride << 32


def size_and_stride(word: int) -> tuple[int, int]:
    """Undo `turn_shape`."""
    return word & 0xFFFFFFFF, word >> 32


PLAN_HEADER = 8
HEADS, EXPERTS, TAILS, FOREIGN = 1, 2, 4, 8
