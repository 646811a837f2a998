"""`mlora serve`: the HTTP server."""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import InputError, one_line_errors
from .models import check_device
from .options import (
    AdapterOption,
    ApproximateOption,
    DenseOption,
    DeviceOption,
    DtypeOption,
    IgnoreOption,
    PickleOption,
    StrictOption,
    parse_size,
)
from .progress import Progress, counted
from .served import choose

_SIZES = "bytes, or 512MiB, 2GiB, 2GB"
_KEEP_ALIVE = 75  # seconds that an idle connection stays open: longer than proxies keep theirs, which is 60 for most
_ADAPTERS, _ACCESS, _LIMITS, _REQUESTS = "Adapters", "Access", "Limits of all together", "Limits of a request"


def serve(
    model: Annotated[
        str | None,
        typer.Argument(help="The base model: a folder or hub id. Default: SmolLM2-135M-Instruct.", show_default=False),
    ] = None,
    adapter: AdapterOption = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="A YAML file of a model, its adapters and merges, in place of MODEL and --adapter.", show_default=False
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 is all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one, and tells it.")] = 8000,
    name: Annotated[
        str | None,
        typer.Option(help="What requests call the base model. Default: MODEL as given.", show_default=False),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    fused_always: Annotated[
        bool,
        typer.Option(
            "--fused-always",
            help="On the CPU: base products in the fastest order of addition, which may round otherwise than "
            "torch does, and otherwise in another process.",
        ),
    ] = False,
    base_tokenizer: Annotated[
        bool, typer.Option("--base-tokenizer", help="Ignore the tokenizers and chat templates that adapters bring.")
    ] = False,
    adapter_root: Annotated[
        list[Path] | None,
        typer.Option(
            help="A folder whose subfolders are adapters: each is loaded when a request first names it, by its path in "
            "there. Nothing outside is read. Repeatable.",
            metavar="FOLDER",
            rich_help_panel=_ADAPTERS,
            show_default=False,
        ),
    ] = None,
    hub_adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORG/NAME[@REVISION]",
            help="An adapter on the hub that may be fetched when a request first names it. Repeatable.",
            rich_help_panel=_ADAPTERS,
            show_default=False,
        ),
    ] = None,
    allow_runtime_adapters: Annotated[
        bool,
        typer.Option(
            "--allow-runtime-adapters",
            help="Load and unload adapters over HTTP (vLLM's and SGLang's routes), with the admin key.",
            rich_help_panel=_ADAPTERS,
        ),
    ] = False,
    fully_sharded: Annotated[
        bool,
        typer.Option(
            "--fully-sharded",
            help="Under torchrun: each process holds its share of the adapters and no more, for more exchanges.",
            rich_help_panel=_ADAPTERS,
        ),
    ] = False,
    approximate: ApproximateOption = None,
    dense: DenseOption = False,
    strict: StrictOption = False,
    ignore: IgnoreOption = None,
    allow_pickle: PickleOption = False,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            envvar="MLORA_API_KEY",
            help="Requests must bring it: Authorization: Bearer KEY. Repeatable. The variable, with spaces between "
            "keys, does not show in the list of processes.",
            rich_help_panel=_ACCESS,
            show_default=False,
        ),
    ] = None,
    admin_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            envvar="MLORA_ADMIN_KEY",
            help="Opens all, and what loads and unloads adapters.",
            rich_help_panel=_ACCESS,
            show_default=False,
        ),
    ] = None,
    max_running: Annotated[
        int, typer.Option(min=1, help="Answers that are generated at once.", rich_help_panel=_LIMITS)
    ] = 64,
    max_waiting: Annotated[
        int,
        typer.Option(min=0, help="Requests that wait beside them; of more, each gets 429.", rich_help_panel=_LIMITS),
    ] = 1024,
    max_waiting_per_adapter: Annotated[
        int, typer.Option(min=0, help="Of those, requests with one adapter.", rich_help_panel=_LIMITS)
    ] = 1024,
    max_adapters: Annotated[
        int, typer.Option(min=1, help="Adapters on the device at once.", rich_help_panel=_LIMITS)
    ] = 256,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help=f"For adapters on the device: {_SIZES}. Default: a quarter of what is free, or half the size of the "
            "model where that is more.",
            rich_help_panel=_LIMITS,
            show_default=False,
        ),
    ] = None,
    host_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="On the host for all adapters; those used longest ago are dropped, and read again when asked for. "
            "Default: no limit.",
            rich_help_panel=_LIMITS,
            show_default=False,
        ),
    ] = None,
    packed_cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Keep adapters there as they lie in memory, where making that takes more than reading their files.",
            rich_help_panel=_ADAPTERS,
            show_default=False,
        ),
    ] = None,
    cache_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Room for keys and values, in tokens, and so the most that a prompt with its answer may have. "
            "Default: 1,024 for each of --max-running, or what a quarter of the free memory has room for.",
            rich_help_panel=_LIMITS,
            show_default=False,
        ),
    ] = None,
    batch_tokens: Annotated[
        int,
        typer.Option(
            min=1, help="Tokens of one step; longer prompts are read in pieces between others.", rich_help_panel=_LIMITS
        ),
    ] = 512,
    drain_seconds: Annotated[
        int,
        typer.Option(
            min=0,
            help="After SIGTERM: what runs may take so long to end, and is cut off then.",
            rich_help_panel=_LIMITS,
        ),
    ] = 30,
    max_body: Annotated[
        str, typer.Option(metavar="SIZE", help="Of a body; more is 413.", rich_help_panel=_REQUESTS)
    ] = "8MiB",
    max_prompts: Annotated[int, typer.Option(min=1, help="Prompts in one request.", rich_help_panel=_REQUESTS)] = 64,
    max_answers: Annotated[
        int, typer.Option(min=1, help="n, the answers to a prompt.", rich_help_panel=_REQUESTS)
    ] = 16,
    max_stops: Annotated[int, typer.Option(min=1, help="Stop strings.", rich_help_panel=_REQUESTS)] = 16,
    max_logprobs: Annotated[
        int, typer.Option(min=0, help="Likeliest tokens beside each one.", rich_help_panel=_REQUESTS)
    ] = 20,
    default_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="Of an answer, where the request does not say; /v1/completions has 16.",
            rich_help_panel=_REQUESTS,
        ),
    ] = 512,
) -> None:
    """Serve a model and its adapters over HTTP: OpenAI's, LoRAX's, vLLM's and SGLang's routes.

    Every request picks its adapter, a mix or a merge by name. GET /openapi.json describes all routes.
    """
    with one_line_errors():
        processes, process = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
        if processes > 1:
            given = {"--device": device, "--adapter-root": adapter_root, "--hub-adapter": hub_adapter,
                     "--host-memory": host_memory, "--packed-cache": packed_cache}  # fmt: skip
            for option in (option for option, value in given.items() if value):
                raise InputError(f"{option} is not served in {processes} processes, as torchrun has started here")
        if allow_runtime_adapters and admin_key is None:
            raise InputError("--allow-runtime-adapters: wanted --admin-key beside it")
        body = parse_size(max_body, "--max-body")
        room = None if memory is None else parse_size(memory)
        host_room = None if host_memory is None else parse_size(host_memory, "--host-memory")
        served = choose(config, model, "MODEL", adapter, approximate, dense, strict, ignore, allow_pickle)
        check_device(device, dtype)
        from mlora.serve.http import Access, Limits, create_app, require

        require("uvicorn")
        from mlora.serve.http.roots import HubIds, Roots

        from . import models
        from .demo_model import MODEL_ID

        limits = Limits(body, max_prompts, max_answers, default_tokens, max_stops, max_logprobs)
        called = name or served.model or MODEL_ID
        if called in served.names:
            raise InputError(f"--name {called!r}: an adapter is called so, too")
        try:  # now, and not when the model has been loaded
            access = Access(tuple(api_key or ()), admin_key)
            roots, hub_ids = [root.expanduser() for root in adapter_root or []], hub_adapter or []
            Roots(roots), HubIds(hub_ids)
        except ValueError as error:
            raise InputError(str(error)) from None
        sockets = _bound(host, port) if process == 0 else []
        progress = Progress(quiet=process > 0)
        with progress.step(f"loading the model{f' {served.model}' if served.model else ''}"):
            tokenizer = models.load_tokenizer(served.model)
            served.read()
            loaded = served.load(device, dtype, processes > 1)
        with progress.step(f"loading {counted(len(served.names), 'adapter')}"):
            served.patch(
                loaded,
                memory=room,
                max_adapters=max_adapters,
                fused="always" if fused_always else True,
                host_memory=host_room,
                packed_cache=packed_cache,
                fully_sharded=fully_sharded,
            )
        from mlora.serve import Engine, follow

        if process > 0:
            for number in (signal.SIGTERM, signal.SIGINT):  # process 0 ends it, when it has drained
                signal.signal(number, signal.SIG_IGN)
            follow(loaded.mlora)
            return

        engine = Engine(
            loaded.mlora,
            tokenizer,
            max_running=max_running,
            max_waiting=max_waiting,
            max_waiting_per_adapter=max_waiting_per_adapter,
            cache_tokens=cache_tokens,
            batch_tokens=batch_tokens,
        )
        with engine:
            app = create_app(
                engine,
                called,
                limits=limits,
                access=access,
                roots=roots,
                hub_ids=hub_ids,
                runtime_adapters=allow_runtime_adapters,
                base_tokenizer=base_tokenizer,
            )
            if host not in ("127.0.0.1", "::1", "localhost") and not access.keys:
                progress.note(f"everybody who reaches {host} can ask: there is no --api-key")
            _run(app, sockets, drain_seconds, progress, engine)
            if engine.broken is not None and processes > 1:
                raise engine.broken


def _bound(host: str, port: int) -> list[socket.socket]:
    """A socket for each address of `host`. Who connects is refused until the server listens."""
    found: list[socket.socket] = []
    try:
        for family, _, _, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            try:
                one = socket.socket(family)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                same = found[0].getsockname()[1] if found else port  # where 0 stands for a free one
                one.bind((address[0], same, *address[2:]))
                found.append(one)
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # as ::1 where there is no IPv6
                    raise
                reason = error
        if not found:
            raise reason
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: cannot listen there: {error.strerror}") from None
    return found


def _run(app: Any, own: list[socket.socket], drain_seconds: int, progress: Progress, engine: Any) -> None:
    """Until SIGTERM or SIGINT. A second one ends it at once. So does the end of an engine in several processes, which
    see that when this one ends."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if self.started:
                host, port = own[0].getsockname()[:2]
                progress.note(
                    f"serving {app.state.server.model} on http://{f'[{host}]' if ':' in host else host}:{port}"
                )

        async def shutdown(self, sockets: Any = None) -> None:
            app.state.server.draining = True
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app, log_config=_logging(), access_log=False, server_header=False, ws="none",
        timeout_keep_alive=_KEEP_ALIVE, timeout_graceful_shutdown=drain_seconds,
    )  # fmt: skip
    # uvicorn sends itself the signal that ended it once more, when all is done: which then is nothing new.
    signal.signal(signal.SIGTERM, lambda *_: None)
    server = Server(config)
    if engine.runtime.processes > 1:

        def watch() -> None:
            engine.join()
            server.should_exit = True

        threading.Thread(target=watch, daemon=True).start()
    server.run(own)
    if not server.started:
        raise RuntimeError("the server did not start; what it said is above")


def _logging() -> dict[str, Any]:
    """A line each on stderr."""
    form = {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": form},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
        "loggers": {
            "uvicorn": {"handlers": ["stderr"], "level": "WARNING", "propagate": False},
            "mlora": {"handlers": ["stderr"], "level": "INFO", "propagate": False},
        },
    }
