"""`attend_` against an fp64 loop; sequences do not see each other, nor threads; what is read is read before writes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_cases import ATTENTION_SHAPES as SHAPES
from op_cases import DTYPES, check, needs_native
from torch import Tensor

from mlora.ops import attention, dispatch

STEP = str(Path(__file__).with_name("test_attend_step.py"))  # of the same kernels
RULES = {"all": (0, 0.0), "window": (50, 0.0), "softcap": (0, 1.5), "window and softcap": (300, 30.0)}
# (new tokens, past): decoding, prompts, chunks of prompts, tiles and blocks of all fillings.
LENGTHS = [(1, 700), (1, 0), (5, 300), (67, 0), (30, 530), (2, 62), (1, 255), (1, 256), (13, 1), (3, 64)]


class Packed:
    """Sequences over a cache whose rows lie anywhere, with NaN in those that none may read."""

    def __init__(self, lengths, heads, kv_heads, dim, dtype, seed=0):
        draw = torch.Generator().manual_seed(seed)
        randn = lambda *shape: torch.randn(shape, generator=draw).to(dtype)  # noqa: E731
        self.lengths, tokens = lengths, sum(new for new, _ in lengths)
        keys = sum(past for _, past in lengths)
        self.q = randn(1, tokens, heads, dim).transpose(1, 2)
        self.k, self.v = (randn(1, tokens, kv_heads, dim).transpose(1, 2) for _ in range(2))
        order = torch.randperm(keys + tokens + 5, generator=draw) + 2
        past, self.write = order[:keys], order[keys : keys + tokens]
        self.k_cache, self.v_cache = (
            torch.full((keys + tokens + 9, kv_heads, dim), torch.nan, dtype=dtype) for _ in range(2)
        )
        self.k_cache[past], self.v_cache[past] = randn(keys, kv_heads, dim), randn(keys, kv_heads, dim)
        parts, at = [torch.zeros(0, dtype=torch.int64)], 0
        for new, old in lengths:
            parts += [past[at : at + old], torch.ones(new, dtype=torch.int64)]  # as of transformers' sliding windows
            at += old
        self.read = torch.cat(parts)
        self.q_starts = torch.tensor([0] + [new for new, _ in lengths]).cumsum(0).int()
        self.k_starts = torch.tensor([0] + [new + old for new, old in lengths]).cumsum(0).int()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        cached = (self.k_cache, self.v_cache, self.read, self.write, self.q_starts, self.k_starts)
        return (self.q, self.k, self.v, *cached)

    def alone(self, s: int) -> tuple[Tensor, ...]:
        """The same of one sequence, with copies of the caches."""
        t, key = slice(*self.q_starts[s : s + 2].tolist()), slice(*self.k_starts[s : s + 2].tolist())
        starts = [torch.tensor([0, part.stop - part.start], dtype=torch.int32) for part in (t, key)]
        caches = (self.k_cache.clone(), self.v_cache.clone())
        return (*(x[:, :, t] for x in (self.q, self.k, self.v)), *caches, self.read[key], self.write[t], *starts)

    def oracle(self, scale: float, softcap: float, window: int) -> Tensor:
        """The fp64 loop."""
        heads, tokens, dim = self.q.shape[1:]
        group = heads // self.k.shape[1]
        out = torch.empty(1, tokens, heads, dim, dtype=torch.float64)
        for s, (new, past) in enumerate(self.lengths):
            rows, t0 = self.read[self.k_starts[s] :][:past], int(self.q_starts[s])
            for i in range(new):
                first = max(0, past + i + 1 - window) if window else 0
                here = slice(t0, t0 + i + 1)
                keys = torch.cat([self.k_cache[rows].transpose(0, 1), self.k[0, :, here]], 1)[:, first:].double()
                values = torch.cat([self.v_cache[rows].transpose(0, 1), self.v[0, :, here]], 1)[:, first:].double()
                scores = scale * torch.einsum("kjd,kgd->kgj", keys, self.q[0, :, t0 + i].double().view(-1, group, dim))
                if softcap:
                    scores = softcap * (scores / softcap).tanh()
                weights = (scores - scores.amax(-1, keepdim=True)).exp()
                weights /= weights.sum(-1, keepdim=True)
                out[0, t0 + i] = torch.einsum("kgj,kjd->kgd", weights, values).reshape(heads, dim)
        return out


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES)
def test_attend_matches_fp64(shape, dtype, rule):
    heads, kv_heads, dim = SHAPES[shape]
    window, softcap = RULES[rule]
    packed = Packed(LENGTHS, heads, kv_heads, dim, dtype)
    scale = 1.3 / math.sqrt(dim)
    oracle = packed.oracle(scale, softcap, window)
    k_cache, v_cache = packed.k_cache.clone(), packed.v_cache.clone()
    wide = (t.double() if t.is_floating_point() else t for t in packed.tensors)
    torch.testing.assert_close(attention.attend_(*wide, scale, softcap, window), oracle, rtol=1e-10, atol=1e-12)
    ref = attention.attend_(*(t.clone() for t in packed.tensors), scale, softcap, window)
    got = dispatch.attend_(*packed.tensors, scale, softcap, window)
    assert got.shape == oracle.shape and got.is_contiguous()
    check(got, oracle, ref)
    k_cache[packed.write], v_cache[packed.write] = packed.k[0].transpose(0, 1), packed.v[0].transpose(0, 1)
    assert same(packed.k_cache, k_cache) and same(packed.v_cache, v_cache), "wrote what it should not, or not all"


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("rule", ["all", "window"])
def test_a_sequence_does_not_see_its_batch_or_the_threads(rule, dtype):
    window, softcap = RULES[rule]
    packed = Packed(LENGTHS * 2, 9, 3, 64, dtype)
    k_cache, v_cache = packed.k_cache.clone(), packed.v_cache.clone()
    before, together = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            packed.k_cache.copy_(k_cache)
            packed.v_cache.copy_(v_cache)
            together.append(dispatch.attend_(*packed.tensors, 0.1, softcap, window))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(together[0], other) for other in together)
    packed.k_cache, packed.v_cache = k_cache, v_cache
    for s in range(len(packed.lengths)):
        got = dispatch.attend_(*packed.alone(s), 0.1, softcap, window)
        assert torch.equal(got, together[0][:, packed.q_starts[s] : packed.q_starts[s + 1]])


def test_what_is_no_number_stays_in_its_sequence():
    packed = Packed([(1, 70), (40, 3), (1, 300), (2, 0)], 4, 2, 20, torch.float32)
    packed.k_cache[packed.read[5]] = torch.nan
    packed.v[0, 0, 20, 3] = torch.inf
    got = dispatch.attend_(*packed.tensors, 0.2, 0.0, 0)
    finite = got.isfinite().flatten(2).all(-1)[0]
    starts = packed.q_starts.tolist()
    assert not finite[0] and not finite[20 : starts[2]].any()
    assert finite[starts[2] :].all() and finite[1:8].all()  # of its own, some see it with a weight of 0


@pytest.mark.parametrize("new", [1, 6, 30], ids=["decode", "chunk", "longer than the ring"])
def test_a_ring_is_read_before_it_is_written(new):
    """The rows that new keys take are those of keys which the first queries still see."""
    ring, dim = 12, 20
    packed = Packed([(new, ring - 1)], 4, 2, dim, torch.float32)
    rows = [*packed.read[: ring - 1].tolist(), 0]
    packed.write = torch.tensor([rows[(ring - 1 + i) % ring] for i in range(new)])
    oracle = packed.oracle(0.2, 0.0, ring)
    got = dispatch.attend_(*packed.tensors, 0.2, 0.0, ring)
    torch.testing.assert_close(got, oracle.float())
    last = packed.k[0, :, max(0, new - ring) :].transpose(0, 1)
    assert same(packed.k_cache[packed.write[max(0, new - ring) :]], last)


def test_any_strides():
    packed = Packed(LENGTHS, 6, 2, 20, torch.float32)
    expected = dispatch.attend_(*(t.clone() for t in packed.tensors), 0.2, 0.0, 0)
    wide = torch.full((len(packed.k_cache), 5, 20), torch.nan)
    wide[:, 1:3], wide[:, 3:] = packed.k_cache, packed.v_cache
    q = packed.q.transpose(2, 3).contiguous().transpose(2, 3)  # dimensions apart
    k = torch.cat([packed.k, packed.v], dim=3)[..., :20]
    tensors = (q, k, packed.v.contiguous(), wide[:, 1:3], wide[:, 3:], *packed.tensors[5:])
    assert torch.equal(dispatch.attend_(*tensors, 0.2, 0.0, 0), expected)
    assert same(wide[packed.write, 1:3], packed.k[0].transpose(0, 1)) and wide[:, 0].isnan().all()


def test_nothing_to_do():
    packed = Packed([(0, 5), (1, 3), (0, 0)], 4, 2, 8, torch.float32)
    assert dispatch.attend_(*packed.tensors, 0.2, 0.0, 0).isfinite().all()
    packed = Packed([], 4, 2, 8, torch.float32)
    assert dispatch.attend_(*packed.tensors, 0.2, 0.0, 0).shape == (1, 0, 4, 8)


@pytest.mark.parametrize("prefix", ["", "reference_"])
def test_attend_opcheck(prefix):
    operator = getattr(torch.ops.mlora, prefix + "attend_").default
    for dtype in (torch.float32, torch.bfloat16):
        packed = Packed([(1, 5), (3, 0)], 4, 2, 8, dtype)
        for cache in (packed.k_cache, packed.v_cache):
            cache.nan_to_num_()
        torch.library.opcheck(operator, (*packed.tensors, 0.3, 2.0, 4))


NAMES = ("q", "k", "v", "k_cache", "v_cache", "read", "write", "q_starts", "k_starts")


@pytest.mark.parametrize("prefix", ["", "reference_"])
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda t: t[0], "q must be"),
        ("q", lambda t: t[:, :3], "multiple of"),
        ("k", lambda t: t[:, :, 1:], "k and v|tokens"),
        ("v", lambda t: t[..., 1:], "k and v|of shape"),
        ("k_cache", lambda t: t.half(), "k_cache must be"),
        ("v_cache", lambda t: t[:, :1], "v_cache must be"),
        ("read", lambda t: t.int(), "read must be"),
        ("read", lambda t: t - 30, "read leads outside"),
        ("read", lambda t: t[:2], "past keys"),
        ("write", lambda t: t + 99, "write leads outside"),
        ("write", lambda t: t[1:], "write has 3 rows for 4 tokens"),
        ("q_starts", lambda t: t.long(), "q_starts must be"),
        ("q_starts", lambda t: t.flip(0), "q_starts must rise"),
        ("q_starts", lambda t: t // 2, "q_starts end at 2 of 4"),
        ("k_starts", lambda t: t[:2], "k_starts must be"),
        ("k_starts", lambda t: t // 4, "past keys"),
    ],
)
def test_wrong_tensors_are_refused(name, change, message, prefix):
    packed = Packed([(1, 5), (3, 2)], 4, 2, 8, torch.float32)
    tensors = dict(zip(NAMES, packed.tensors, strict=True))
    tensors[name] = change(tensors[name])
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.mlora, prefix + "attend_")(*tensors.values(), 0.3, 0.0, 0)


@needs_native
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_attend_in_lower_instruction_sets(isa):
    names = ["scalar", "avx2", "avx512", "avx512_bf16"]
    if names.index(isa) >= torch.ops.mlora.isa() or "MLORA_CPU_ISA" in os.environ:
        pytest.skip("not lower than what the tests above ran with")
    select = "fp64 and (64 or 17 or 80) and not (holes or one) or threads or number or ring"
    code = f"""
import sys, pytest, torch, mlora.ops.dispatch
assert torch.ops.mlora.isa() == {names.index(isa)}
sys.exit(pytest.main(["-qx", "-p", "no:cacheprovider", {__file__!r}, {STEP!r}, "-k", {select!r}]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MLORA_CPU_ISA": isa},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
