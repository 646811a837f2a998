"""GET /adapters: what there is, what it costs and who uses it; the page's table."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from .describe import STOCK, answered
from .server import Server


def routes(server: Server) -> APIRouter:
    router = APIRouter()

    @router.get("/adapters", responses=answered(STOCK))
    async def stock() -> dict[str, Any]:
        """The model and its adapters. Of one that is not loaded yet only its name and where it comes from are known."""
        stats = server.engine.stats()
        adapters = [_row(server, name, source) for name, source in server.names.known().items()]
        return {"model": server.model, "running": stats.running, "waiting": stats.waiting, "adapters": adapters}

    return router


def _row(server: Server, name: str, source: str) -> dict[str, Any]:
    """`bytes`: on the device. `error`: the largest of `AdapterInfo.errors`."""
    running, waiting = server.metrics.users(name)
    row: dict[str, Any] = {"name": name, "source": source, "running": running, "waiting": waiting}
    info = server.engine.runtime.adapter(name)
    if info is None or not info.peft_type:  # gone, or not loaded yet
        return {**row, "where": "files"}
    return {
        **row,
        "where": info.location,
        "type": info.variant or info.peft_type,
        "rank": info.rank,
        "modules": len(info.modules),
        "bytes": info.bytes,
        "error": info.error,
    }
