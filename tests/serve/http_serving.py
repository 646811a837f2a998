"""A tiny served model behind a real socket, and what its answers must be."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from serving import adapters, alone, base_model, engine, letters, patched

import mlora
from mlora.serve import Engine, Sampling
from mlora.serve.http import Access, Limits, create_app

CHAT = (
    "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)


class Served:
    """A running server. `url`: of it. `folders`: of the adapters that its model was loaded with."""

    def __init__(self, app: Any, url: str, engine: Engine, folders: dict[str, Path]) -> None:
        self.app, self.url, self.engine, self.folders = app, url, engine, folders
        self.client = httpx.Client(base_url=url, timeout=30)
        self.state = app.state.server
        self.tokenizer = engine.tokenizer

    def post(self, path: str, body: Any, key: str | None = None) -> httpx.Response:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return self.client.post(path, json=body, headers=headers)

    def tokens(self, text: str, entry: Any, sampling: Sampling | None = None, **options: Any) -> list[int]:
        """What `generate` of the request alone gives."""
        ids = self.tokenizer(text)["input_ids"]
        return alone(self.engine.runtime.model, ids, entry, sampling or Sampling(**options))

    def text(self, prompt: str, entry: Any, **options: Any) -> str:
        return str(self.tokenizer.decode(self.tokens(prompt, entry, **options), skip_special_tokens=True))


@contextmanager
def running(app: Any) -> Iterator[str]:
    """The URL of an app that runs in a thread of its own."""
    config = uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


@contextmanager
def serving(
    folder: Path, *, options: dict[str, Any] | None = None, limits: Limits | None = None, **own: Any
) -> Iterator[Served]:
    """A server with adapters a to d. `options`: of the engine. `own`: of `create_app`."""
    base = base_model()
    base.config.max_position_embeddings = 256  # which rotary embeddings do not mind
    folders = adapters(folder, base)
    tokenizer = letters()
    tokenizer.chat_template = CHAT
    with engine(patched(base, folders), tokenizer, **(options or {})) as served:
        app = create_app(served, "tiny", limits=limits, **own)
        with running(app) as url:
            yield Served(app, url, served, folders)


def wait_for(condition: Any, seconds: float = 20) -> None:
    """Until it is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.005)


__all__ = ["Access", "Limits", "Served", "mlora", "running", "serving", "wait_for"]
