"""`mlora serve` as a process: what it says, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import adapters, base_model, letters
from typer.testing import CliRunner

from mlora.cli import app


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer, and adapters a and b."""
    folder = tmp_path_factory.mktemp("served")
    base = base_model()
    base.config.max_position_embeddings = 4096
    base.save_pretrained(folder / "model")
    letters().save_pretrained(folder / "model")
    adapters(folder / "adapters", base, ("a", "b"))
    return folder


@contextmanager
def command(*options: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """The process, its URL, and what it says on stderr."""
    line = [sys.executable, "-m", "mlora", "serve", "--port", "0", "--name", "tiny", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MLORA_API_KEY": "one two"}
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment)
    said: list[str] = []
    assert process.stderr is not None
    reading = threading.Thread(target=lambda: said.extend(iter(process.stderr.readline, "")), daemon=True)
    reading.start()
    try:
        end = time.monotonic() + 120
        while not (found := re.search(r"on (http://\S+)", "".join(said))):
            assert process.poll() is None and time.monotonic() < end, "".join(said)
            time.sleep(0.02)
        yield process, found[1], said
    finally:
        process.kill()
        process.wait()
        reading.join(10)


def stream(url: str, tokens: int) -> tuple[list[Any], threading.Thread]:
    """What a stream gives, in a thread of its own: parsed events, and at last how it ended."""
    found: list[Any] = []

    def read() -> None:
        body = {"model": "a", "prompt": "hello", "max_tokens": tokens, "stream": True}
        try:
            with httpx.stream(
                "POST", f"{url}/v1/completions", json=body, headers={"authorization": "Bearer two"}, timeout=60
            ) as answer:
                found.extend(line.removeprefix("data: ") for line in answer.iter_lines() if line)
        except httpx.HTTPError as error:
            found.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    while not found and thread.is_alive():
        time.sleep(0.01)
    return found, thread


def test_a_served_process_and_its_end(folder: Path) -> None:
    """After SIGTERM streams that are open end as if nothing was, no new connection is taken, and it exits with 0; what
    takes longer than it may is cut off."""
    adapter = f"a={folder / 'adapters' / 'a'}"
    root = str(folder / "adapters")
    model = str(folder / "model")
    with command(model, "--adapter", adapter, "--adapter-root", root, "--drain-seconds", "60") as (process, url, said):
        headers = {"authorization": "Bearer one"}
        models = httpx.get(f"{url}/v1/models", headers=headers).json()["data"]
        assert [card["id"] for card in models] == ["tiny", "a"]
        body = {"model": "b", "prompt": "hello", "max_tokens": 4}
        assert httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60).status_code == 200
        assert httpx.get(f"{url}/v1/models").status_code == 401
        found, thread = stream(url, 1500)
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                httpx.get(f"{url}/health")
            except httpx.HTTPError:
                break
            time.sleep(0.02)
        assert thread.is_alive() and process.poll() is None  # nobody new comes in, and the stream goes on
        thread.join(60)
        assert found[-1] == "[DONE]" and json.loads(found[-2])["choices"][0]["finish_reason"] == "length"
        assert process.wait(30) == 0
        assert "POST /v1/completions 200" in "".join(said) and "Traceback" not in "".join(said)

    section = {"adapters": {"a": {"path": "adapters/a"}, "b": {"path": "adapters/b"}}}
    section["merge"] = {"name": "both", "sources": ["a", "b"], "combination_type": "ties"}
    (folder / "config.yaml").write_text(json.dumps({"base_model": model, "adapters": section}))
    options = ["--config", str(folder / "config.yaml"), "--drain-seconds", "1", "--max-running", "1", "--fused-always"]
    with command(*options, "--cache-tokens", "4096") as (process, url, said):
        models = httpx.get(f"{url}/v1/models", headers=headers).json()["data"]
        assert [card["id"] for card in models] == ["tiny", "a", "b", "both"]
        texts = set()
        for name in ("tiny", "a", "b", "both"):
            body = {"model": name, "prompt": "hello", "max_tokens": 8, "temperature": 0}
            answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)
            texts.add(answer.json()["choices"][0]["text"])
        assert len(texts) == 4
        found, thread = stream(url, 4000)
        body = {"model": "a", "prompt": "hello", "max_tokens": 4}
        with ThreadPoolExecutor(1) as pool:
            waits = pool.submit(httpx.post, f"{url}/v1/completions", json=body, headers=headers, timeout=60)
            while httpx.get(f"{url}/adapters", headers=headers).json()["waiting"] < 1:
                assert not waits.done()
            process.send_signal(signal.SIGTERM)
            late = waits.result()
        assert process.wait(30) == 0
        thread.join(30)
        assert found[-1] != "[DONE]"
        assert late.status_code == 503 and late.json()["error"]["message"] == "the server is shutting down"
        assert "Traceback" not in "".join(said)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--allow-runtime-adapters"], "--admin-key"),
        (["--max-body", "x"], "--max-body"),
        (["--adapter", "a=/nowhere/x"], "--adapter"),
        (["--config", "/nowhere.yaml"], "MODEL"),
        (["--device", "tpu9"], "--device"),
        (["--adapter-root", "/nowhere"], "'/nowhere' is no folder"),
        (["--hub-adapter", "x"], "'x' is no hub id"),
        (["--host", "no.host.invalid"], "--host no.host.invalid --port 8000: cannot listen there"),
        (["--api-key", ""], "an API key is empty"),
        (["--api-key", "key", "--admin-key", " "], "an admin key is empty"),
        (["--name", "b", "--adapter", "b=ADAPTERS/a"], "--name 'b'"),
    ],
)
def test_wrong_options(folder: Path, options: list[str], said: str) -> None:
    """Before anything is loaded."""
    own = [option.replace("ADAPTERS", str(folder / "adapters")) for option in options]
    result = CliRunner().invoke(app, ["serve", str(folder / "model"), *own])
    assert result.exit_code == 2 and said in result.output and "loading" not in result.output


def test_a_port_that_is_taken(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        result = CliRunner().invoke(app, ["serve", str(folder / "model"), "--port", port])
    assert result.exit_code == 2 and f"--port {port}: cannot listen there: Address already in use" in result.output
    assert "loading" not in result.output


def test_help_tells_each_limit() -> None:
    result = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"})
    text = result.output
    assert result.exit_code == 0
    for default in (
        "default: 64",
        "default: 1024",
        "default: 256",
        "default: 512",
        "default: 8MiB",
        "default: 20",
        "default: 30",
    ):
        assert default in text


def test_without_the_packages_it_says_what_to_install(folder: Path) -> None:
    """And the rest of mlora does without them."""
    script = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("fastapi", "starlette", "uvicorn", "prometheus_client"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import mlora, mlora.serve, mlora.cli
from mlora.cli import app
sys.argv = ["mlora", "serve", sys.argv[1]]
app()
"""
    run = subprocess.run(
        [sys.executable, "-c", script, str(folder / "model")], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 1 and "pip install 'mlora-runtime[serve]'" in run.stderr, run.stderr
