"""Dropout whose mask depends on a key and on where an element is, and on nothing else: the rest of a batch, the device
and the number of threads do not change it, and whoever needs it again makes it again.

The mask is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), as `tl.philox` has it:
word column % 4 of the counter (column // 4, position, row, step) under the adapter's key. An element is kept if that
word, of 32 bits, is not below the threshold.

    places  int32 (rows, 4)      which adapter's row it is, as an index into odds (-1: its elements stay as they are);
                                 the adapter's step; the row among the adapter's; the position of its first token
    odds    int32 (adapters, 3)  the key's two words, and the threshold: 2^32 times the chance of a zero, below 2^32
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import tokens_of, wide

WHO, STEP, ROW, POSITION = range(4)  # as in csrc/cpu/kernels.h
PLACE_WIDTH, ODDS_WIDTH = 4, 3

_WORD = 0xFFFFFFFF


def drop(x: Tensor, places: Tensor, odds: Tensor) -> Tensor:
    """What is kept of x, times 2^32 / (2^32 - threshold), rounded once, and zeros, whatever stood there.

    Shapes: x (..., width); places and odds as above. A row's tokens are T / rows consecutive ones of T.
    """
    flat = tokens_of("x", x)
    _check(flat.shape[0], places, odds)
    dtype = wide(x.dtype)
    out = flat.to(dtype)
    if flat.shape[0]:
        who = places[:, WHO].repeat_interleave(flat.shape[0] // len(places))
        if len(odds):
            threshold = (odds[:, 2].to(torch.int64) & _WORD)[who.clamp(min=0)]
            scale = (2.0**32 / (2.0**32 - threshold.double())).to(torch.float32 if dtype is torch.float32 else dtype)
            chosen = words(flat.shape, places, odds) >= threshold[:, None]
            out = torch.where((who < 0)[:, None], out, torch.where(chosen, out * scale[:, None], 0.0))
    out = out.to(x.dtype).view(x.shape)
    return out.clone() if out.data_ptr() == x.data_ptr() else out


def words(shape: tuple[int, ...], places: Tensor, odds: Tensor) -> Tensor:
    """The numbers, int64 of 32 bits, that decide about the elements of a (tokens, width)."""
    tokens, width = shape
    length = tokens // len(places)
    of_token = (places.to(torch.int64) & _WORD).repeat_interleave(length, 0)
    within = torch.arange(length, device=places.device).repeat(len(places))
    key = (odds.to(torch.int64) & _WORD)[places[:, WHO].clamp(min=0).repeat_interleave(length, 0).to(torch.int64)]
    counter = [
        torch.arange(-(-width // 4), device=places.device).expand(tokens, -1),
        ((of_token[:, POSITION] + within) & _WORD)[:, None],
        of_token[:, ROW, None],
        of_token[:, STEP, None],
    ]
    return torch.stack(philox(counter, key[:, 0, None], key[:, 1, None]), -1).flatten(1)[:, :width]


def philox(counter: list[Tensor], k0: Tensor, k1: Tensor) -> list[Tensor]:
    """Philox4x32-10 of four words of a counter and two of a key, int64 of 32 bits each."""
    c0, c1, c2, c3 = counter
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # modulo 2^64, of which the sign is a bit like the others
        c0, c1, c2, c3 = (b >> 32) & _WORD ^ c1 ^ k0, b & _WORD, (a >> 32) & _WORD ^ c3 ^ k1, a & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return [c0, c1, c2, c3]


def _check(tokens: int, places: Tensor, odds: Tensor) -> None:
    for name, t, width in (("places", places, PLACE_WIDTH), ("odds", odds, ODDS_WIDTH)):
        if t.dim() != 2 or t.shape[1] != width or t.dtype is not torch.int32:
            raise RuntimeError(f"mlora: {name} must be an int32 tensor of shape (n, {width}), is {tuple(t.shape)}")
    rows = len(places)
    if tokens % rows if rows else tokens:
        raise RuntimeError(f"mlora: {tokens} tokens do not divide into {rows} places")
    if rows and int(places[:, WHO].max()) >= len(odds):
        raise RuntimeError(f"mlora: places name adapter {int(places[:, WHO].max())} of {len(odds)}")
