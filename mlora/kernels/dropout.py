"""`drop`: dropout by a counter, one launch. See `ops/dropout.py`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def drop(
    y,  # (tokens, width), written
    x,  # (tokens, width)
    places,  # int32 (rows, 4)
    odds,  # int32 (adapters, 3)
    tokens, length, width, x_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """y[t] = what is kept of x[t], scaled."""
    columns = tl.cdiv(width, BN)
    token = tl.program_id(0) // columns * BM + tl.arange(0, BM)
    column = tl.program_id(0) % columns * BN
    cols = column + tl.arange(0, BN)
    live = token < tokens
    mask = live[:, None] & (cols < width)[None, :]
    place = places + token // length * 4
    who = tl.load(place, mask=live, other=-1)
    some = who >= 0
    values = tl.load(x + token.to(tl.int64)[:, None] * x_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if tl.max(who, axis=0) >= 0:
        own = odds + who * 3
        k0 = tl.load(own, mask=some, other=0).to(tl.uint32, bitcast=True)
        k1 = tl.load(own + 1, mask=some, other=0).to(tl.uint32, bitcast=True)
        threshold = tl.load(own + 2, mask=some, other=0).to(tl.uint32, bitcast=True)
        step = tl.load(place + 1, mask=some, other=0).to(tl.uint32, bitcast=True)
        row = tl.load(place + 2, mask=some, other=0).to(tl.uint32, bitcast=True)
        position = (tl.load(place + 3, mask=some, other=0) + token % length).to(tl.uint32)
        zeros = tl.zeros((BM, BN // 4), tl.uint32)
        first = zeros + (column // 4 + tl.arange(0, BN // 4)).to(tl.uint32)[None, :]
        seed = (k1.to(tl.uint64) << 32) | k0.to(tl.uint64)
        w0, w1, w2, w3 = tl.philox(
            seed[:, None], first, zeros + position[:, None], zeros + row[:, None], zeros + step[:, None]
        )
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BM, BN))
        scale = (4294967296.0 / (4294967296.0 - threshold.to(tl.float64))).to(tl.float32)
        kept = words.to(tl.uint32, bitcast=True) >= threshold[:, None]
        values = tl.where(some[:, None], tl.where(kept, values * scale[:, None], 0.0), values)
    to = y + token.to(tl.int64)[:, None] * width + cols[None, :]
    tl.store(to, values.to(y.dtype.element_ty), mask=mask)
