"""Adapters that come and go while the server runs: vLLM's and SGLang's routes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import PlainTextResponse, Response

from ... import errors
from ...routing.entries import BASE
from .describe import CHANGED, answered
from .openai_types import Body
from .problems import ADAPTER, INVALID, NOT_FOUND, Problem
from .server import Server

_TEXT = answered({"type": "string"}, media_type="text/plain")

Name = Annotated[str, Field(min_length=1, max_length=512)]
Path_ = Annotated[str, Field(min_length=1, max_length=4096)]


class LoadRequest(Body):
    """vLLM's. `load_inplace`: the name may be taken; requests that run finish with what it was."""

    lora_name: Name
    lora_path: Path_
    load_inplace: bool | None = None
    is_3d_lora_weight: Literal[False] | None = None


class UnloadRequest(Body):
    """vLLM's. The number says nothing here."""

    lora_name: Name
    lora_int_id: int | None = None


class SGLangLoadRequest(Body):
    lora_name: Name
    lora_path: Path_
    pinned: Literal[False] | None = None


class SGLangUnloadRequest(Body):
    lora_name: Name


def routes(server: Server) -> APIRouter:
    router = APIRouter(tags=["Adapters"])

    @router.post("/v1/load_lora_adapter", response_class=PlainTextResponse, responses=_TEXT)
    async def load(body: LoadRequest) -> Response:
        """Load an adapter from a folder, a file, a URL or the hub."""
        await _load(server, body.lora_name, body.lora_path, bool(body.load_inplace))
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse, responses=_TEXT)
    async def unload(body: UnloadRequest) -> Response:
        """Forget one. Requests that run finish."""
        await _unload(server, body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    @router.post("/load_lora_adapter", responses=answered(CHANGED))
    async def sglang_load(body: SGLangLoadRequest) -> dict[str, Any]:
        """SGLang's form of it."""
        await _load(server, body.lora_name, body.lora_path, False)
        return {"success": True, "error_message": "", "loaded_adapters": server.names.known()}

    @router.post("/unload_lora_adapter", responses=answered(CHANGED))
    async def sglang_unload(body: SGLangUnloadRequest) -> dict[str, Any]:
        """SGLang's form of it."""
        await _unload(server, body.lora_name)
        return {"success": True, "error_message": "", "loaded_adapters": server.names.known()}

    return router


async def _load(server: Server, name: str, source: str, replace: bool) -> None:
    """Raises Problem: the name is taken and not to be replaced, or none; or the adapter cannot be served."""
    if name in (server.model, BASE) or not name.isprintable() or name.startswith("{"):
        raise Problem(INVALID, f"{name!r} cannot name an adapter", "lora_name")
    async with server.names.lock(name):
        began = time.monotonic()
        try:
            if name not in server.names:
                await server.engine.load_adapter(source, name)
            elif replace:
                await server.engine.replace_adapter(name, source)
            else:
                raise errors.DuplicateAdapterError(f"an adapter {name!r} is loaded already; load_inplace replaces it")
        except errors.DuplicateAdapterError as error:  # which another app of the engine may have loaded meanwhile
            raise Problem(INVALID, str(error), "lora_name") from error
        except errors.MloraError as error:
            missing = isinstance(error, errors.AdapterError) and "://" not in source and not Path(source).exists()
            raise Problem(NOT_FOUND if missing else ADAPTER, str(error), "lora_path") from error
        server.metrics.loaded(time.monotonic() - began)
        server.prompts.forget(name)


async def _unload(server: Server, name: str) -> None:
    """Raises Problem: there is none, or the weights have it."""
    async with server.names.lock(name):
        try:
            await server.engine.delete_adapter(name)
        except errors.UnknownAdapterError as error:
            raise Problem(NOT_FOUND, str(error), "lora_name") from error
        except errors.MloraError as error:
            raise Problem(INVALID, str(error), "lora_name") from error
        server.prompts.forget(name)
        server.metrics.unloaded(name)
