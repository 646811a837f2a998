"""`Runtime.status`: a table of the adapters and the arena for people."""

from __future__ import annotations

from collections.abc import Iterable

from ..arena.store import Store
from .info import AdapterInfo, HostUse


def status(infos: Iterable[AdapterInfo], store: Store, host: HostUse) -> str:
    rows = [("adapter", "type", "rank", "modules", "bytes", "where", "error")]
    for info in infos:
        if info.location == "files":
            continue
        ranks = str(info.rank) if len(info.ranks) == 1 else f"{info.ranks[0]}-{info.ranks[-1]}"
        kind = info.variant or info.peft_type
        error = (f"{info.error:.1e}" if info.errors else "exact") + ("; its delta is zero" if info.zero else "")
        rows.append((info.name, kind, ranks, str(len(info.modules)), f"{info.bytes:,}", info.location, error))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    for space in store.spaces:
        lines.append(f"arena: {space.used:,} of {space.capacity:,} bytes, {store.dtype} on {space.device}")
        lines.append(f"  {space.room.why}")
    bound = "" if host.most is None else f" of {host.most:,}"
    lines.append(f"host: {host.used:,}{bound} bytes; {host.registered - host.loaded:,} adapters in files only")
    return "\n".join(line.rstrip() for line in lines)
