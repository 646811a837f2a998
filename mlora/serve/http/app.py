"""`create_app`: the app with all routes, for any ASGI server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response

from ... import errors
from ..engine import Engine
from . import adapters, lorax, openai, stock
from .describe import ANYTHING, answered
from .guard import Guard
from .metrics import CONTENT_TYPE
from .problems import INVALID, NO_METHOD, NOT_FOUND, SGLANG_PATHS, UNAVAILABLE, Problem, invalid_body, problem_of
from .server import Access, Limits, Server, build

# The page is one file, and asks this server only.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_app(
    engine: Engine,
    model: str,
    *,
    limits: Limits | None = None,
    access: Access | None = None,
    roots: Sequence[str | Path] = (),
    hub_ids: Sequence[str] = (),
    runtime_adapters: bool = False,
    base_tokenizer: bool = False,
) -> FastAPI:
    """The server of an engine, which is closed with it. `app.state.server` is its `Server`.

    Args:
        engine: with a tokenizer. `model`: what requests call the base.
        limits: of one request. `access`: keys.
        roots: folders whose subfolders are adapters that are loaded when they are first asked for, by their path in
            there. `hub_ids`: "org/name" or "org/name@revision" of adapters that may be fetched when asked for.
        runtime_adapters: whether adapters may be loaded and unloaded over HTTP, with `Access.admin_key`.
        base_tokenizer: ignore tokenizers and chat templates that adapters bring.

    Raises:
        ValueError: a root is no folder, a hub id is none, the engine has no tokenizer, or there is no admin key.
    """
    access = access or Access()
    if engine.tokenizer is None:
        raise ValueError("the server needs an engine with a tokenizer")
    if runtime_adapters and not access.admin_key:
        raise ValueError("loading adapters over HTTP needs an admin key")
    server = build(engine, model, limits or Limits(), access, roots, hub_ids, base_tokenizer)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        server.draining = True
        await asyncio.to_thread(engine.close)
        server.prompts.close()

    from mlora import __version__

    app = FastAPI(title="mlora", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.server = server
    app.add_middleware(Guard, server=server)
    _add_handlers(app, server)
    app.include_router(openai.routes(server))
    app.include_router(lorax.routes(server))
    app.include_router(stock.routes(server))
    if runtime_adapters:
        app.include_router(adapters.routes(server))
    _add_rest(app, server)
    return app


def _add_rest(app: FastAPI, server: Server) -> None:
    @app.get(
        "/metrics", response_class=PlainTextResponse, responses=answered({"type": "string"}, media_type="text/plain")
    )
    async def metrics() -> Response:
        """In Prometheus' format."""
        return Response(server.metrics.text(), headers={"content-type": CONTENT_TYPE})

    @app.get("/version", responses=answered(ANYTHING))
    async def version() -> dict[str, str]:
        return {"version": app.version}

    @app.head("/", include_in_schema=False)
    @app.get("/", response_class=Response, responses=answered(None))
    async def home(request: Request) -> Response:
        """The page for browsers; for others as `/health` (LoRAX)."""
        page = files(__package__).joinpath("page.html")
        if "text/html" in request.headers.get("accept", ""):
            return HTMLResponse(page.read_text(encoding="utf-8"), headers={"content-security-policy": _POLICY})
        if not server.engine.stats().alive:
            raise Problem(UNAVAILABLE, "unhealthy", retry_after=5.0)
        return Response()


def _add_handlers(app: FastAPI, server: Server) -> None:
    """Every error in the form of its route's dialect."""

    def respond(request: Request, problem: Problem) -> Response:
        path = request.url.path
        more: dict[str, Any] = {"loaded_adapters": server.names.known()} if path in SGLANG_PATHS else {}
        return problem.response(path, **more)

    @app.exception_handler(Problem)
    async def of_problem(request: Request, error: Problem) -> Response:
        return respond(request, error)

    @app.exception_handler(errors.MloraError)
    async def of_engine(request: Request, error: errors.MloraError) -> Response:
        return respond(request, problem_of(error))

    @app.exception_handler(RequestValidationError)
    async def of_body(request: Request, error: RequestValidationError) -> Response:
        return respond(request, invalid_body(error.errors()))

    @app.exception_handler(HTTPException)
    async def of_route(request: Request, error: HTTPException) -> Response:
        kinds = {404: NOT_FOUND, 405: NO_METHOD}
        what = f"{request.method} {request.url.path}"
        message = f"there is no {what}" if error.status_code in kinds else str(error.detail)
        if error.status_code == 400:  # of FastAPI: what json raises, other than of its grammar
            message = "the body cannot be read: it must be JSON in UTF-8, and not nested too deeply"
        response = respond(request, Problem(kinds.get(error.status_code, INVALID), message))
        for name, value in (error.headers or {}).items():
            response.headers[name] = value
        return response
