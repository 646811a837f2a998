"""Sizes as people write them."""

from __future__ import annotations

import re
from numbers import Integral

WANTED = "a whole number of bytes, at least 1, or a size such as 512MiB, 2GiB or 2GB"
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(?:([KMGT])(i?))?B?", re.IGNORECASE)


def size_of(value: object) -> int | None:
    """Bytes, of their number or of a text as in `WANTED`; None where it is neither, or not one byte."""
    if isinstance(value, str):
        if (found := _SIZE.fullmatch(value.strip())) is None:
            return None
        number, prefix, binary = found.groups()
        value = int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(prefix.upper()) + 1 if prefix else 0))
    return int(value) if isinstance(value, Integral) and int(value) >= 1 else None
