"""Which order of addition makes a base product the fastest: asked where the library's bits are not wanted.

What is right is a matter of the machine, the shape and the number of tokens, so it is measured, once for each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import layout
from . import dispatch, library

_LONGER = 1.05  # times as long as another candidate may ALONG take, so that noise does not decide from day to day
_TIMES = 3  # that a candidate is timed
_HOPELESS = 2.0  # times as long as the fastest at first: not timed again
_COLD = 1 << 26  # bytes of weights, which no cache keeps
_MOST_COPIES = 64  # of a weight
_ENOUGH = 1 << 31  # multiply-adds of one timing, of which no library takes more than part of a second


def probe(in_features: int, out_features: int, bias: bool, tokens: int, dtype: torch.dtype) -> int:
    """The `kblock` with which `dispatch.linear` is the fastest for a linear, in whatever order it adds: ALONG, LIBRARY,
    or what `dispatch.probe_kblock` says.

    Each is timed on weights that come from memory, as those of a model do, for powers of two of tokens. Each answer is
    kept for the process: a shape, a range of tokens, a number of threads.
    """
    most = 1 << max(tokens - 1, 0).bit_length()
    if not dispatch.offered(tokens, dtype) or not 0 < most * out_features <= dispatch.MOST_OUTPUTS or in_features == 0:
        return dispatch.LIBRARY
    answers = _answers(in_features, out_features, bias, dtype, torch.get_num_threads())
    if most not in answers:
        few = [1 << i for i in range(dispatch.FEW_TOKENS.bit_length())]
        asked = [most] if most > dispatch.FEW_TOKENS else [n for n in few if n * out_features <= dispatch.MOST_OUTPUTS]
        for rows, kblock in _timed(in_features, out_features, bias, dtype, asked):
            answers.setdefault(rows, kblock)
    return answers[most]


@functools.cache
def _answers(in_features: int, out_features: int, bias: bool, dtype: torch.dtype, threads: int) -> dict[int, int]:
    """Tokens -> the answer, as they are found: of few tokens all at once, since weights take long to make."""
    return {}


def _timed(
    in_features: int, out_features: int, bias: bool, dtype: torch.dtype, asked: Iterable[int]
) -> Iterator[tuple[int, int]]:
    """Numbers of tokens, and which of the candidates takes least, the own order where it is hard to tell."""
    size = in_features * out_features
    copies = min(max(_COLD // (size * dtype.itemsize), 1), _MOST_COPIES)
    weights = torch.full((copies, out_features, in_features), 0.01, dtype=dtype)
    b = torch.zeros(out_features, dtype=dtype) if bias else None
    table = torch.empty(0, layout.TABLE_WIDTH, dtype=torch.int64)
    arena = torch.empty(0, dtype=dtype)
    none = torch.zeros(layout.PLAN_HEADER, dtype=torch.int32)
    for tokens in asked:
        x = torch.full((tokens, in_features), 0.01, dtype=dtype)
        some = list(weights[: max(_ENOUGH // (size * tokens), 1)])

        def over_some(kblock: int, x: Tensor = x, some: list[Tensor] = some) -> Callable[[], object]:
            if kblock == dispatch.LIBRARY:
                return lambda: [F.linear(x, weight, b) for weight in some]
            return lambda: [dispatch.linear(x, weight, b, arena, table, none, kblock) for weight in some]

        bit_equal = dispatch.probe_kblock(in_features, out_features, bias, tokens, dtype)
        calls = {kblock: over_some(kblock) for kblock in (dispatch.ALONG, dispatch.LIBRARY, bit_equal)}
        least = {kblock: dispatch.seconds(call) for kblock, call in calls.items()}
        hopeless = _HOPELESS * min(least.values())
        for _ in range(_TIMES - 1):
            for kblock, call in calls.items():
                if least[kblock] <= hopeless:
                    least[kblock] = min(least[kblock], dispatch.seconds(call))
        least[dispatch.ALONG] /= _LONGER
        yield tokens, min(least, key=least.__getitem__)


library.LIBRARY.define(
    "probe_fastest(int in_features, int out_features, bool bias, int tokens, ScalarType dtype) -> int"
)
library.LIBRARY.impl("probe_fastest", probe, "CompositeExplicitAutograd")
