"""What stands before all routes: keys, the size of bodies, request ids, the access log, and what nobody caught."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .problems import FAILED, FORBIDDEN, TOO_LARGE, UNAUTHORIZED, UNAVAILABLE, Problem
from .server import Server
from .streams import Gone

log = logging.getLogger("mlora.serve")
access = logging.getLogger("mlora.serve.access")

ADMIN_PATHS = frozenset(
    ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/load_lora_adapter", "/unload_lora_adapter"]
)
_OPEN = frozenset(["/health", "/ping", "/ready"])  # for who watches the process; and the page, which asks for the key
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_WENT_AWAY = 499  # in the log only


class Guard:
    """ASGI middleware. A body is read as a whole before its route runs, up to the limit."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self._app = app
        self._server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        began = time.monotonic()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        status, entry = 0, ""

        async def answer(message: Message) -> None:
            nonlocal status, entry
            if message["type"] == "http.response.start":
                status = message["status"]
                own = MutableHeaders(raw=list(message["headers"]))
                own["x-request-id"] = id
                entry = own.get("x-adapter-id", "")
                message = {**message, "headers": own.raw}
            await send(message)

        path = scope["path"]
        try:
            self._check(path, scope["method"], headers)
            body = await self._read(headers, receive)
            await self._app(scope, _replaying(body, receive), answer)
        except Gone:
            status = _WENT_AWAY
        except Problem as problem:
            await problem.response(path)(scope, receive, answer)
        except asyncio.CancelledError:  # by a server that waits no longer for what runs
            if not self._server.draining:
                raise
            if not status:
                late = Problem(UNAVAILABLE, "the server is shutting down", retry_after=1.0)
                await late.response(path)(scope, receive, answer)
        except Exception:
            log.exception("request %s failed", id)
            if not status:
                await Problem(FAILED, f"the server failed; its log has request {id}").response(path)(
                    scope, receive, answer
                )
        finally:
            self._count(scope, id, status, entry, time.monotonic() - began)

    def _check(self, path: str, method: str, headers: Headers) -> None:
        """Raises Problem: it has no key that opens this."""
        own = self._server.access
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode() if scheme.lower() == "bearer" else b""
        is_admin = own.admin_key is not None and hmac.compare_digest(given, own.admin_key.encode())
        if path in ADMIN_PATHS:
            if not is_admin:
                raise Problem(FORBIDDEN if given else UNAUTHORIZED, "this takes the admin key", code="invalid_api_key")
            return
        if is_admin or not own.keys or path in _OPEN or (path == "/" and method in ("GET", "HEAD")):
            return
        if not any(hmac.compare_digest(given, key.encode()) for key in own.keys):
            raise Problem(UNAUTHORIZED, "the API key is missing or wrong", code="invalid_api_key")

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        """Raises Problem: the body is beyond the limit; Gone."""
        most = self._server.limits.body
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > most:
            raise Problem(TOO_LARGE, f"the body has {length} bytes; at most {most} are read")
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Gone
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > most:
                raise Problem(TOO_LARGE, f"the body has more than the {most} bytes that are read")
            if not message.get("more_body", False):
                return b"".join(parts)

    def _count(self, scope: Scope, id: str, status: int, entry: str, seconds: float) -> None:
        if status == _WENT_AWAY:
            self._server.metrics.cancelled()
        elif status >= 400:
            self._server.metrics.refused(status)
        client = scope.get("client") or ("-",)
        path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")
        access.info(
            "%s %s %s %d %.1f ms id=%s%s", client[0], scope["method"], path, status, seconds * 1e3, id,
            f" adapter={entry}" if entry else "",
        )  # fmt: skip


def _replaying(body: bytes, receive: Receive) -> Receive:
    """What was read, and then what comes."""
    told = False

    async def replay() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
