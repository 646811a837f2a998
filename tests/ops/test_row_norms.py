"""Norms of the rows of W + s B A, and sums of columns over tokens: against fp64, whatever the sizes and strides."""

from __future__ import annotations

import pytest
import torch
from op_cases import DTYPES, EPS, NATIVE, needs_native, sentinel
from torch import Tensor

from mlora.ops import dispatch, norms, training

NORMS = {"native": dispatch.row_norms, "reference": norms.row_norms}
SUMS = {"native": dispatch.column_sums, "reference": training.column_sums}
backends = pytest.mark.parametrize("backend", ["native", "reference"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@backends
@pytest.mark.parametrize(
    ("outputs", "inputs", "rank"), [(1, 1, 1), (7, 33, 3), (64, 200, 16), (37, 97, 5), (9, 576, 64)]
)
@dtypes
def test_row_norms_match_fp64(
    dtype: torch.dtype, outputs: int, inputs: int, rank: int, backend: str, in_threads
) -> None:
    """Of rows at any distance, of a B that lies transposed, in any number of threads; nothing is written to."""
    weight, buffer = sentinel(outputs, inputs, dtype)
    weight.copy_(randn(outputs, inputs))
    a, b, scale = randn(rank, inputs, seed=1), randn(rank, outputs, seed=2).t(), 0.37
    before = buffer.clone()
    want = torch.linalg.vector_norm(weight.double() + scale * b.double() @ a.double(), dim=1)
    found = []
    for threads in (1, 2):
        in_threads(threads)
        found.append(NORMS[backend](weight, b, a, scale))
    got = found[0]
    assert got.dtype is torch.float32
    assert ((got - want).abs() <= (inputs + rank) * EPS[torch.float32] * want).all()
    assert torch.equal(buffer.view(torch.uint8), before.view(torch.uint8))
    if NATIVE and backend == "native":
        assert torch.equal(got, found[1]), "by two threads"
        assert torch.equal(got, dispatch.row_norms(weight.float(), b, a, scale)), "of the same numbers in fp32"
        assert torch.equal(got, dispatch.row_norms(weight.t().contiguous().t(), b, a, scale)), "as (in, out)"
        assert torch.equal(got[1:], dispatch.row_norms(weight[1:], b[1:], a, scale)), "a row depends on itself"


@backends
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (3, 33), (64, 64), (130, 203)])
@dtypes
def test_column_sums_match_fp64(dtype: torch.dtype, tokens: int, width: int, backend: str, in_threads) -> None:
    """With and without a right side, over all tokens and over some, of rows at any distance and in any number of
    threads."""
    left, right = sentinel(tokens, width, dtype)[0], randn(1, tokens, width, seed=1).to(dtype)
    left.copy_(randn(tokens, width))
    picked = torch.arange(tokens)[torch.arange(tokens) % 3 != 1]
    for other in (None, right):
        for own in (None, picked):
            found = []
            for threads in (1, 2):
                in_threads(threads)
                found.append(SUMS[backend](left, other, own))
            products = left.double() * (1 if other is None else other[0].double())
            products = products if own is None else products[own]
            got, want = found[0], products.sum(0)
            assert got.dtype is torch.float32 and (backend == "reference" or not NATIVE or torch.equal(got, found[1]))
            assert ((got - want).abs() <= (len(products) + 1) * EPS[torch.float32] * products.abs().sum(0)).all()
    alone = SUMS[backend](left[picked], right[:, picked], None)
    assert torch.equal(alone, SUMS[backend](left, right, picked)), "the other tokens do not count"
    assert not SUMS[backend](left, None, picked[:0]).any()


def test_fp64_is_served_by_the_reference() -> None:
    weight, a, b = (randn(*shape).double() for shape in ((5, 9), (2, 9), (5, 2)))
    want = torch.linalg.vector_norm(weight + 0.5 * b @ a, dim=1)
    assert torch.allclose(dispatch.row_norms(weight, b, a, 0.5), want, rtol=1e-14)
    assert torch.allclose(dispatch.column_sums(weight, None, None), weight.sum(0), rtol=1e-14)


REFUSED = {
    "a B of other rows": (lambda: (randn(5, 9), randn(4, 2), randn(2, 9), 1.0), "must be"),
    "an A of other columns": (lambda: (randn(5, 9), randn(5, 2), randn(2, 8), 1.0), "must be"),
    "factors in 16 bits": (lambda: (randn(5, 9), randn(5, 2).half(), randn(2, 9), 1.0), "must be float32"),
    "a right of other rows": (lambda: (randn(5, 9), randn(4, 9), None), "right must be"),
    "a right of another dtype": (lambda: (randn(5, 9), randn(5, 9).half(), None), "right must be"),
}


@pytest.mark.parametrize("how", REFUSED)
@backends
def test_wrong_memory_is_refused(how: str, backend: str) -> None:
    arguments, message = REFUSED[how]
    given = arguments()
    with pytest.raises(RuntimeError, match=message):
        (NORMS if len(given) == 4 else SUMS)[backend](*given)


@needs_native
def test_tokens_beyond_are_refused() -> None:
    with pytest.raises(RuntimeError, match="token 5 of 5"):
        dispatch.column_sums(randn(5, 9), None, torch.tensor([0, 5]))


@needs_native
@pytest.mark.parametrize("prefix", ["", "reference_"])
def test_opcheck(prefix: str) -> None:
    ops = torch.ops.mlora
    op_norms, op_sums = (getattr(ops, prefix + name).default for name in ("row_norms", "column_sums"))
    torch.library.opcheck(op_norms, (randn(6, 8).bfloat16(), randn(6, 2), randn(2, 8), 0.5))
    for tokens in (None, torch.tensor([0, 4, 2])):
        torch.library.opcheck(op_sums, (randn(2, 3, 8).bfloat16(), randn(2, 3, 8).bfloat16(), tokens))
