"""`attend_step` against an fp64 loop; a row's bits depend on the keys that it sees, and on nothing else."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from op_cases import ATTENTION_SHAPES as SHAPES
from op_cases import DTYPES, check, needs_native
from torch import Tensor

from mlora.ops import attention, dispatch

BATCH = 5
MASKS = ["none", "left", "holes", "one for all"]
KEYS = [1, 63, 64, 67, 256, 257, 700]


def masked(kind: str, keys: int) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "left":  # as of prompts of several lengths
        starts = torch.arange(BATCH) * keys // BATCH
        return (torch.arange(keys) >= starts[:, None])[:, None, None]
    draw = torch.Generator().manual_seed(keys)
    mask = torch.rand(1 if kind == "one for all" else BATCH, 1, 1, keys, generator=draw) < 0.7
    mask[..., keys // 2] = True
    return mask


class Step:
    """Queries, and caches with NaN in what no row sees."""

    def __init__(self, shape: str, keys: int, dtype: torch.dtype, mask: str = "none", batch: int = BATCH) -> None:
        heads, kv_heads, dim = SHAPES[shape]
        draw = torch.Generator().manual_seed(keys)
        self.q = torch.randn(batch, heads, 1, dim, generator=draw).to(dtype)
        self.k, self.v = (torch.randn(batch, kv_heads, keys, dim, generator=draw).to(dtype) for _ in range(2))
        self.mask = masked(mask, keys)
        if self.mask is not None:
            unseen = ~self.mask.expand(batch, kv_heads, 1, keys).transpose(2, 3)
            for cache in (self.k, self.v):
                cache.masked_fill_(unseen, torch.nan)
        self.scale = 1.3 / math.sqrt(dim)

    @property
    def given(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float]:
        return self.q, self.k, self.v, self.mask, self.scale

    def oracle(self) -> Tensor:
        """The fp64 loop."""
        batch, heads, _, dim = self.q.shape
        group = heads // self.k.shape[1]
        out = torch.empty(batch, 1, heads, dim, dtype=torch.float64)
        for b in range(batch):
            sees = [j for j in range(self.k.shape[2]) if self.mask is None or self.mask[b % len(self.mask), 0, 0, j]]
            for h in range(heads):
                keys, values = (t[b, h // group, sees].double() for t in (self.k, self.v))
                scores = self.scale * (keys @ self.q[b, h, 0].double())
                weights = (scores - scores.max()).exp()
                out[b, 0, h] = weights @ values / weights.sum()
        return out


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES)
def test_attend_step_matches_fp64(shape: str, dtype: torch.dtype, mask: str) -> None:
    for keys in KEYS:
        step = Step(shape, keys, dtype, mask)
        oracle = step.oracle()
        wide = (t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in step.given)
        torch.testing.assert_close(attention.attend_step(*wide), oracle, rtol=1e-10, atol=1e-12)  # type: ignore[arg-type]
        got = dispatch.attend_step(*step.given)
        assert got.shape == oracle.shape and got.is_contiguous()
        check(got, oracle, attention.attend_step(*step.given))


@needs_native
@pytest.mark.parametrize("heads", [4, 16], ids=["few rows", "many rows"])
def test_as_exact_as_torchs(heads: int) -> None:
    """In fp32, where sums of a dimension in one chain would be twice as far away."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(60, count, length, 64, generator=draw) for count, length in ((heads, 1), (1, 64), (1, 64)))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.75, enable_gqa=True)
    theirs = F.scaled_dot_product_attention(q, *(t.expand(-1, heads, -1, -1) for t in (k, v)), scale=0.75)
    ours = dispatch.attend_step(q, k, v, None, 0.75).transpose(1, 2)
    errors = [(out - exact).square().mean().sqrt() for out in (ours, theirs)]
    assert errors[0] <= 1.5 * errors[1]


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", ["9/3x64", "12/1x3"])
def test_a_row_does_not_see_its_batch_its_padding_or_the_threads(shape: str, dtype: torch.dtype, in_threads) -> None:
    for keys in (67, 700):
        step, together = Step(shape, keys, dtype, "left"), []
        for threads in (1, 2, 3, 7):
            in_threads(threads)
            together.append(dispatch.attend_step(*step.given))
        assert all(torch.equal(together[0], other) for other in together)
        assert step.mask is not None
        for b in range(BATCH):
            sees = step.mask[b, 0, 0]
            alone = (step.q[b : b + 1], *(t[b : b + 1, :, sees] for t in (step.k, step.v)), None, step.scale)
            assert torch.equal(dispatch.attend_step(*alone)[0], together[0][b])


def test_what_is_no_number_stays_in_its_row() -> None:
    step = Step("9/3x64", 70, torch.float32)
    step.k[1, 2, 3] = torch.nan
    finite = dispatch.attend_step(*step.given).isfinite().all(-1)[:, 0]
    assert not finite[1, 6:].any() and finite[1, :6].all() and finite[[0, 2, 3, 4]].all()


@pytest.mark.parametrize("keys", [0, 1, 70])
def test_a_row_that_sees_nothing_is_zero(keys: int) -> None:
    step = Step("9/3x64", keys, torch.bfloat16, batch=3)
    mask = torch.tensor([False, True, False]).view(3, 1, 1, 1).expand(3, 1, 1, keys)
    for operator in (dispatch.attend_step, attention.attend_step):
        got = operator(step.q, step.k, step.v, mask, step.scale)
        assert not got[[0, 2]].any() and bool(got[1].any()) == (keys > 0)


@pytest.mark.parametrize("heads", [9, 12], ids=["few rows", "many rows"])
def test_any_strides(heads: int) -> None:
    """Caches of tokens by heads, parts of longer ones, dimensions apart, keys and values that lie differently."""
    step = Step("9/3x64" if heads == 9 else "12/1x3", 67, torch.float32, "holes")
    expected = dispatch.attend_step(*step.given)
    tokens_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (step.k, step.v)]
    longer = [torch.cat([t, torch.full_like(t, torch.nan)], dim=2)[:, :, :67] for t in (step.k, step.v)]
    apart = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (step.q, step.k, step.v)]
    assert step.mask is not None
    sparse = torch.stack([step.mask, ~step.mask], dim=-1)[..., 0]
    for k, v in (tokens_first, longer, apart[1:], (tokens_first[0], longer[1])):
        for q, mask in ((step.q, step.mask), (apart[0], sparse)):
            assert torch.equal(dispatch.attend_step(q, k, v, mask, step.scale), expected)


def test_all_bytes_but_zero_are_true() -> None:
    """As to torch: a mask may be made of a buffer of 0 and 255."""
    step = Step("9/3x64", 67, torch.float32, "holes")
    assert step.mask is not None
    other = (step.mask.to(torch.uint8) * 254).view(torch.bool)
    got = dispatch.attend_step(step.q, step.k, step.v, other, step.scale)
    assert torch.equal(got, dispatch.attend_step(*step.given))


@pytest.mark.parametrize("prefix", ["", "reference_"])
def test_attend_step_opcheck(prefix: str) -> None:
    operator = getattr(torch.ops.mlora, prefix + "attend_step").default
    for dtype in (torch.float32, torch.bfloat16):
        for mask in ("none", "left"):
            step = Step("4/4x17", 5, dtype, mask)
            given = tuple(t.nan_to_num() if isinstance(t, Tensor) and t.is_floating_point() else t for t in step.given)
            torch.library.opcheck(operator, given)


NAMES = ("q", "k", "v", "mask")


@pytest.mark.parametrize("prefix", ["", "reference_"])
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda t: t.expand(-1, -1, 2, -1), "q must be"),
        ("q", lambda t: t[:, :3], "multiple of|q must be"),
        ("k", lambda t: t[:, :, 1:], "k has|k and v"),
        ("k", lambda t: t[1:], "k and v"),
        ("k", lambda t: t[0], "k and v"),
        ("k", lambda t: t.half(), "k and v"),
        ("v", lambda t: t[..., 1:], "k and v"),
        ("mask", lambda t: t.float(), "mask must be of bool"),
        ("mask", lambda t: t[..., 1:], "mask must be of bool"),
        ("mask", lambda t: t[:2], "mask must be of bool"),
        ("mask", lambda t: t.expand(-1, 4, -1, -1), "mask must be of bool"),
    ],
)
def test_wrong_tensors_are_refused(name: str, change, message: str, prefix: str) -> None:
    step = Step("4/4x17", 5, torch.float32, "left")
    tensors = dict(zip(NAMES, step.given, strict=False))
    tensors[name] = change(tensors[name])
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.mlora, prefix + "attend_step")(*tensors.values(), 0.3)
