"""A Ray Serve application: replicas of one served model, and requests that go where their adapter is.

    ray deployment "Front": HTTP -> which adapter? -> the replica that it belongs to, another one if that is busy
    ray deployment "Replica", N times: the app of `mlora serve`, with an engine and all adapters within its reach

Every replica can serve every adapter: the ones it is given, and those of its roots, which it reads when they are first
asked for. `mlora/serve/affinity.py` says which one does, so that each keeps its own part of them on its device.

A config file of Ray's names `mlora.serve.ray:application` and its arguments; `serve run FILE` runs it:

    applications:
      - name: mlora
        import_path: mlora.serve.ray:application
        args: {model: org/base, adapters: {sql: /adapters/sql}, roots: [/adapters], replicas: 2}
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from .. import errors
from ..routing.entries import names_of
from .affinity import AffinityRouter
from .http.guard import ADMIN_PATHS

App = Any
"""An ASGI app."""


class Arguments(BaseModel):
    """Of `application`, as a config file writes them.

    Args:
        model: a folder or hub id. `adapters`: name -> folder or hub id. `roots`: see `create_app`.
        device, dtype: as `mlora serve` has them.
        replicas: how many; `autoscaling`: Ray's `AutoscalingConfig` in their place.
        running: requests that a replica takes at once. `waiting`: requests that wait for one beside them, beyond which
            they get 503.
        resources: of a replica, Ray's `ray_actor_options`, as {"num_cpus": 1, "num_gpus": 1}.
        keys: see `Access`. `engine`: other arguments of `Engine`.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    adapters: dict[str, str] = Field(default_factory=dict)
    roots: list[str] = Field(default_factory=list)
    device: str | None = None
    dtype: str = "auto"
    replicas: int = Field(1, ge=1)
    autoscaling: dict[str, Any] | None = None
    running: int = Field(64, ge=1)
    waiting: int = Field(256, ge=0)
    resources: dict[str, Any] = Field(default_factory=dict)
    keys: list[str] = Field(default_factory=list)
    engine: dict[str, Any] = Field(default_factory=dict)


def application(args: Arguments) -> serve.Application:
    """The application of a config file, see the module's docstring."""
    return deploy(
        lambda: _app(args),
        args.model,
        replicas=args.replicas,
        autoscaling=args.autoscaling,
        running=args.running,
        waiting=args.waiting,
        resources=args.resources,
    )


def deploy(
    make: Callable[[], App],
    model: str,
    *,
    replicas: int = 1,
    autoscaling: Mapping[str, Any] | None = None,
    running: int = 64,
    waiting: int = 256,
    resources: Mapping[str, Any] | None = None,
) -> serve.Application:
    """An application for `serve.run`. The arguments are those of `Arguments`.

    Args:
        make: makes a replica's app (`mlora.serve.http.create_app`); called in its process.
        model: what requests call the base there. Requests for it go to any replica.
    """
    size = {"num_replicas": replicas} if autoscaling is None else {"autoscaling_config": dict(autoscaling)}
    routing: dict[str, Any] = {"request_router_class": AffinityRouter, "max_backoff_s": 0.1}
    replica: Any = serve.deployment(
        max_ongoing_requests=running,
        max_queued_requests=waiting,
        ray_actor_options=dict(resources or {}),
        graceful_shutdown_timeout_s=30,
        request_router_config=RequestRouterConfig(**routing),
        **size,
    )
    front: Any = serve.deployment(max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0})
    application: serve.Application = front(Front).bind(replica(Replica).bind(make), model)
    return application


class Replica:
    """One app, called without a socket."""

    def __init__(self, make: Callable[[], App]) -> None:
        self._app = make()
        self._calls: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[dict[str, Any]]:
        """The ASGI messages that answer a request. Whoever stops reading them has gone away."""
        messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        asked, gone = False, asyncio.Event()

        async def receive() -> dict[str, Any]:
            nonlocal asked
            if not asked:
                asked = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        call = asyncio.create_task(self._app({**scope, "app": self._app}, receive, messages.put))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        call.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    replica = serve.get_replica_context().replica_id.unique_id
                    message = {**message, "headers": [*message["headers"], (b"x-replica", replica.encode())]}
                yield message
        finally:
            gone.set()

    def check_health(self) -> None:
        """Raises where no worker is at work, so that Ray puts another replica in its place."""
        if not self._app.state.server.engine.stats().alive:
            raise errors.ServeError("the engine has no worker")

    def __del__(self) -> None:
        if (app := self.__dict__.get("_app")) is not None:
            app.state.server.engine.close()


class Front:
    """Takes requests to replicas. It reads of them which adapter they name; all else is the replica's matter."""

    def __init__(self, replicas: DeploymentHandle, model: str) -> None:
        self._replicas = replicas
        self._model = model

    async def __call__(self, request: Request) -> Response:
        if request.url.path in ADMIN_PATHS:
            return _problem(400, "adapters are loaded into one replica so, of several; put them into a root instead")
        body = await request.body()
        adapter = adapter_of(body, self._model)
        handle = self._replicas.options(stream=True, multiplexed_model_id=adapter)
        answer: Any = handle.remote(_plain(request.scope), body)
        messages = aiter(answer)
        try:
            start = await anext(messages)
        except (BackPressureError, DeploymentUnavailableError):
            return _problem(503, "all replicas are busy", {"retry-after": "1"})
        response = StreamingResponse(_body(answer, messages), start["status"])
        response.raw_headers = list(start["headers"])
        return response


async def _body(answer: Any, messages: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    """Of an answer that has begun; its replica hears when the client has gone."""
    try:
        async for message in messages:
            if message.get("body"):
                yield message["body"]
    finally:
        answer.cancel()


def adapter_of(body: bytes, model: str) -> str:
    """What names the place of a request: the first of its adapters, in the order of their names; empty where it is for
    the base, which is called `model`, or for no answer."""
    try:
        given = json.loads(body)
        parameters = given.get("parameters") or {}
        merged = given.get("merged_adapters") or parameters.get("merged_adapters") or {}
        entry = given.get("adapter") or parameters.get("adapter_id") or given.get("model") or ""
        if isinstance(entry, str) and entry.lstrip().startswith("{"):
            entry = json.loads(entry)
        if isinstance(entry, str):
            entry = "" if entry == model else entry.removeprefix(f"{model}:")
        names = merged["ids"] if merged else names_of(entry or None)
        first = min(str(name) for name in names) if names else ""
        first.encode()  # JSON may have halves of surrogate pairs, which Ray could not send
        return first
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError, errors.MloraError):
        return ""  # its replica says what is wrong with it


def _plain(scope: Mapping[str, Any]) -> dict[str, Any]:
    """What goes to another process of an ASGI scope."""
    kept = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path")
    return {key: scope[key] for key in (*kept, "headers", "client", "server") if key in scope}


def _problem(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    error = {"message": message, "type": "invalid_request_error" if status < 500 else "server_error"}
    return JSONResponse({"error": {**error, "param": None, "code": None}}, status, dict(headers or {}))


def _app(args: Arguments) -> App:
    """A replica's app, of a config file."""
    from ..patching import patch
    from . import Engine
    from .http import Access, create_app

    model, tokenizer = _load(args.model, args.device, args.dtype)
    runtime = patch(model)
    for name, source in args.adapters.items():
        runtime.load_adapter(source, name)
    engine = Engine(runtime, tokenizer, **{"max_running": args.running, **args.engine})
    return create_app(engine, args.model, roots=args.roots, access=Access(keys=tuple(args.keys)))


def _load(model: str, device: str | None, dtype: str) -> Sequence[Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    return (loaded if device is None else loaded.to(device)).eval(), AutoTokenizer.from_pretrained(model)
