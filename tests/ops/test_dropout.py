"""Dropout by a counter: the numbers of its inventors, one mask whoever makes it, and what a mask depends on."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from op_cases import DTYPES, EPS, needs_native, sentinel
from torch import Tensor

from mlora.ops import dispatch, dropout

TRITON = importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
if TRITON:
    import interpreter

    interpreter.install()
BACKENDS = {
    "native": dispatch.drop,
    "reference": dropout.drop,
    "triton": lambda *args: torch.ops.mlora.triton_drop(*args),
}
backends = pytest.mark.parametrize(
    "backend",
    [
        pytest.param(name, marks=pytest.mark.skipif(name == "triton" and not TRITON, reason="no Triton interpreter"))
        for name in BACKENDS
    ],
)

# Random123's known answers for philox4x32-10: counter, key, words.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN, ids=["zeros", "ones", "pi"])
def test_philox_is_that_of_its_inventors(counter: list, key: list, expected: list) -> None:
    got = dropout.philox([torch.tensor(word) for word in counter], *(torch.tensor(word) for word in key))
    assert [int(word) for word in got] == expected


def signed(words: list[list[int]]) -> Tensor:
    return torch.tensor([[word - (1 << 32) if word >> 31 else word for word in row] for row in words]).int()


def chance(p: float) -> int:
    return round(p * 2**32)


PLACES = [[1, 7, 3, 0], [-1, 0, 0, 0], [0, 0, 0, 5], [1, 7, 4, 0], [2, 0xFFFFFFFF, 0xFFFFFFF0, 2]]
ODDS = [[0x9E3779B9, 0xFFFFFFFF, chance(0.5)], [3, 1, chance(0.1)], [0xFFFFFFFF, 2, chance(0.9)]]


@backends
@pytest.mark.parametrize("width", [1, 6, 64, 203])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_matches_the_mask(dtype: torch.dtype, width: int, backend: str) -> None:
    """x where the reference's words say so, scaled and rounded once; NaN of what is not kept does not get through."""
    places, odds, length = signed(PLACES), signed(ODDS), 3
    tokens = len(places) * length
    x, buffer = sentinel(tokens, width, dtype)
    x.copy_(torch.randn(tokens, width, generator=torch.Generator().manual_seed(0)))
    who = places[:, 0].repeat_interleave(length).long()
    threshold = torch.tensor([row[2] for row in ODDS])[who.clamp(min=0)][:, None]
    kept = (dropout.words((tokens, width), places, odds) >= threshold) | (who < 0)[:, None]
    scale = torch.where((who < 0)[:, None], 1.0, 2.0**32 / (2.0**32 - threshold.double()))
    x[~kept] = torch.nan
    before = buffer.clone()
    got = BACKENDS[backend](x, places, odds)
    want = torch.where(kept, x.double() * scale, 0.0)
    assert got.dtype is dtype and got.data_ptr() != x.data_ptr()
    # Rounded are the scale and the product, in fp32, and the result, half of whose smallest number is 2^-25 in float16.
    bound = (EPS[dtype] + 2 * EPS[torch.float32]) * want.abs() + 2.0**-25 * (dtype is torch.float16)
    assert ((got.double() - want).abs() <= bound).all()
    assert torch.equal(got == 0, ~kept)
    assert torch.equal(got[who < 0], x[who < 0]), "rows without dropout"
    assert torch.equal(buffer.view(torch.uint8), before.view(torch.uint8))


@backends
def test_a_mask_depends_on_its_place_alone(backend: str, in_threads) -> None:
    """Alone or beside others, in one piece or token by token, however many threads."""
    run, ones, width = BACKENDS[backend], torch.ones, 40
    odds = signed(ODDS)
    place = [1, 7, 3, 4]
    want = run(ones(6, width), signed([place]), odds)
    assert 0 < int((want == 0).sum()) < want.numel()
    for threads in (1, 2):
        in_threads(threads)
        beside = run(ones(18, width), signed([[0, 1, 2, 3], place, [-1, 0, 0, 0]]), odds)
        assert torch.equal(beside[6:12], want)
        tokens = run(ones(6, width), signed([[*place[:3], 4 + i] for i in range(6)]), odds)
        assert torch.equal(tokens, want)
        wider = run(ones(6, width + 9), signed([place]), odds)
        assert torch.equal(wider[:, :width], want)
    alone = run(ones(6, width), signed([[0, *place[1:]]]), odds[1:2])
    assert torch.equal(alone, want), "by its index"


def rate(keep: Tensor) -> float:
    return float(keep.double().mean())


def test_rate_and_independence() -> None:
    """A quarter of a million elements a mask: rates and agreements within five standard deviations of what is due."""
    p, length, width = 0.3, 256, 1024
    odds = signed([[1, 2, chance(p)], [1, 3, chance(p)], [2, 2, chance(p)]])

    def keep(who: int, step: int, row: int, position: int = 0) -> Tensor:
        return dispatch.drop(torch.ones(length, width), signed([[who, step, row, position]]), odds) != 0

    first = keep(0, 0, 0)
    deviation = (p * (1 - p) / first.numel()) ** 0.5
    assert abs(rate(first) - (1 - p)) < 5 * deviation
    for by in (0, 1):  # no column or position is kept more often than others
        means = first.double().mean(by)
        assert (means - (1 - p)).abs().max() < 5.5 * (p * (1 - p) / first.shape[by]) ** 0.5
    alike = p * p + (1 - p) ** 2
    spread = (alike * (1 - alike) / first.numel()) ** 0.5
    others = {
        "another module or adapter": keep(1, 0, 0), "another key": keep(2, 0, 0), "the next step": keep(0, 1, 0),
        "the next row": keep(0, 0, 1), "the next token": keep(0, 0, 0).roll(1, 0), "the next column": first.roll(1, 1),
        "four columns on": first.roll(4, 1), "positions further on": keep(0, 0, 0, 1000), "row and step": keep(0, 1, 1),
    }  # fmt: skip
    for name, other in others.items():
        assert abs(rate(first == other) - alike) < 5 * spread, name
    assert torch.equal(keep(0, 0, 0, 3)[:-3], first[3:]), "a position is a position"


def test_chances_near_the_ends() -> None:
    x = torch.ones(1, 4096)
    for p in (0.0, 2.0**-32, 1 - 2.0**-20):
        got = dispatch.drop(x, signed([[0, 0, 0, 0]]), signed([[5, 6, chance(p)]]))
        assert ((got == 0) | (got == torch.tensor(1 / (1 - p), dtype=torch.float32))).all()
        assert (got == 0).sum() <= 4096 * p + 5 * (4096 * p) ** 0.5


def test_fp64_is_served_by_the_reference() -> None:
    x = torch.randn(3, 8, dtype=torch.float64)
    places, odds = signed([[0, 1, 2, 3]]), signed([[5, 6, chance(0.25)]])
    got = dispatch.drop(x, places, odds)
    kept = dispatch.drop(torch.ones(3, 8), places, odds) != 0
    assert torch.equal(got, torch.where(kept, x * (2.0**32 / (2.0**32 - chance(0.25))), 0.0))


REFUSED = {
    "places of another width": (lambda a: a.update(places=a["places"][:, :3]), "places must"),
    "odds of another dtype": (lambda a: a.update(odds=a["odds"].long()), "odds must"),
    "tokens that do not divide": (lambda a: a.update(x=a["x"][:5]), "do not divide"),
    "an adapter beyond": (lambda a: a["places"].fill_(9), "name adapter 9"),
}


@pytest.mark.parametrize("how", REFUSED)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_wrong_memory_is_refused(how: str, backend: str) -> None:
    arguments = {"x": torch.ones(6, 8), "places": signed(PLACES[:3]), "odds": signed(ODDS)}
    spoil, message = REFUSED[how]
    spoil(arguments)
    with pytest.raises(RuntimeError, match=message):
        BACKENDS[backend](*arguments.values())


@needs_native
@pytest.mark.parametrize(
    "prefix",
    ["", "reference_", pytest.param("triton_", marks=pytest.mark.skipif(not TRITON, reason="no Triton interpreter"))],
)
def test_opcheck(prefix: str) -> None:
    op = getattr(torch.ops.mlora, f"{prefix}drop").default
    torch.library.opcheck(op, (torch.ones(6, 8), signed(PLACES[:3]), signed(ODDS)))
