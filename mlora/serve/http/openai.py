"""OpenAI's routes: /v1/completions, /v1/chat/completions and /v1/models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from .describe import CARD, CARDS, CHAT, COMPLETION, answered
from .openai_answers import respond
from .openai_asked import chat_asked, completion_asked
from .openai_types import ChatRequest, CompletionRequest
from .problems import NOT_FOUND, Problem
from .server import Server


def routes(server: Server) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/completions", responses=answered(COMPLETION, events=True))
    async def completions(body: CompletionRequest, request: HttpRequest) -> Response:
        """An answer to each prompt, or several."""
        return await respond(server, request, await completion_asked(server, body))

    @router.post("/v1/chat/completions", responses=answered(CHAT, events=True))
    async def chat(body: ChatRequest, request: HttpRequest) -> Response:
        """The next message of a chat, or several."""
        return await respond(server, request, await chat_asked(server, body))

    @router.get("/v1/models", responses=answered(CARDS))
    async def models() -> dict[str, Any]:
        """The base and the adapters that are known; those in roots once they have been asked for."""
        cards = [_card(server, server.model, server.model, None)]
        cards += [_card(server, name, source, server.model) for name, source in server.names.known().items()]
        return {"object": "list", "data": cards}

    @router.get("/v1/models/{model:path}", responses=answered(CARD))
    async def model(model: str) -> dict[str, Any]:
        """One of them."""
        if model == server.model:
            return _card(server, model, model, None)
        source = server.names.known().get(model)
        if source is None:
            raise Problem(NOT_FOUND, f"there is no model or adapter {model!r}", "model", "model_not_found")
        return _card(server, model, source, server.model)

    return router


def _card(server: Server, name: str, source: str, parent: str | None) -> dict[str, Any]:
    card = {"id": name, "object": "model", "created": int(server.started), "owned_by": "mlora", "root": source}
    return {**card, "parent": parent, "max_model_len": server.longest, "permission": []}
