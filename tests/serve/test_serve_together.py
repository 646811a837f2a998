"""Models that are split over two processes, served by both: by an engine, and by `mlora serve`. Answers are those of
`generate` of each request alone on the model in one process; a process that is gone ends the other."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from conftest import _causal
from serving import Sampling, adapters, alone, letters, patched, prompt
from typer.testing import CliRunner

import mlora
from mlora.cli import app
from mlora.serve import follow
from mlora.serve.text import Detokenizer

ADMIN = {"authorization": "Bearer admin"}
NEW = 12


@dataclass
class World:
    """A folder with a model in `model`, the runtime of it in one process, and its adapters."""

    folder: Path
    runtime: mlora.Runtime
    folders: dict[str, Path]

    def ids(self, prompt: Sequence[int], entry: Any, **options: Any) -> list[int]:
        return alone(self.runtime.model, prompt, entry, Sampling(**{"max_new_tokens": NEW, **options}))

    def text(self, prompt: Sequence[int], entry: Any) -> str:
        detokenizer = Detokenizer(letters(), prompt, True)
        return "".join(map(detokenizer.push, self.ids(prompt, entry))) + detokenizer.rest()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("together")
    base = _causal("LlamaConfig", num_key_value_heads=4)
    base.save_pretrained(folder / "model")
    letters().save_pretrained(folder / "model")
    folders = adapters(folder / "adapters", base, ("a", "b", "c"))
    return World(folder, patched(base, folders), folders)


@contextmanager
def started(*line: str) -> Iterator[tuple[list[subprocess.Popen[str]], list[str]]]:
    """Two processes, and what they say."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    own = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    processes = [
        subprocess.Popen([sys.executable, *line], stderr=subprocess.PIPE, text=True, env=environment)
        for environment in own
    ]
    said: list[str] = []
    readers = [
        threading.Thread(target=lambda p=process: said.extend(iter(p.stderr.readline, "")), daemon=True)
        for process in processes
    ]
    for reader in readers:
        reader.start()
    try:
        yield processes, said
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for reader in readers:
            reader.join(10)


def test_an_engine_over_two_processes(world: World, tmp_path: Path) -> None:
    """Requests of all kinds while adapters come and go, in room for five of them. Then process 0 is gone."""
    mix, merge = {"a": 0.7, "b": 0.5}, {"adapters": ["a", "b"], "weights": [0.7, 0.5], "combination_type": "ties"}
    merge["density"] = 0.6
    requests: list[tuple[Any, ...]] = [
        (prompt(seed, 5 + seed), entry, {"max_new_tokens": 4 + seed})
        for seed, entry in enumerate([None, "a", "b", mix, merge, "a", None, "b", "a"])
    ]
    drawn = {"temperature": 0.9, "top_k": 0, "top_p": 1.0, "seed": 5}
    requests += [(prompt(20), entry, {"max_new_tokens": NEW, **drawn}) for entry in ("a", None)]
    (tmp_path / "model").symlink_to(world.folder / "model")
    one = max(info.bytes for info in world.runtime.adapters.values())
    given = {"requests": requests, "prompt": prompt(30), "folders": world.folders, "room": 5 * one}
    torch.save(given, tmp_path / "given.pt")
    with started(str(Path(__file__).with_name("together_process.py")), str(tmp_path)) as (processes, said):
        assert processes[0].wait(240) == 9, "".join(said)
        gone = time.time()
        assert processes[1].wait(60) == 0, "".join(said)
    found, other = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(2))
    assert found["answers"] == [world.ids(ids, entry, **options) for ids, entry, options in requests]
    of = {name: world.ids(prompt(30), name) for name in (None, "a", "b", "c")}
    assert found["left"][0].id == of["a"][0] and len(found["left"]) == 3
    assert (found["loaded"], found["replaced"], found["old"]) == (of["c"], of["b"], of["c"])
    assert found["deleted"][0] == "UnknownAdapterError" and found["nowhere"][0] == "AdapterError"
    assert found["more"] == [of["abc"[number % 3]] for number in range(8)]
    assert found["many"] == [(0, of["a"]), (1, of[None])] and found["again"] == of["a"]
    assert found["status"] == other["status"] and f"{5 * one:,} bytes" in found["status"]
    assert "engine's steps have ended" in other["error"] and other["when"] - gone < 10


@contextmanager
def served(world: World, *options: str) -> Iterator[tuple[list[subprocess.Popen[str]], str, list[str]]]:
    """The processes of `mlora serve` with adapters a and b, the URL, and what they say."""
    line = ["-m", "mlora", "serve", str(world.folder / "model"), "--port", "0", "--name", "tiny", "--memory", "8MiB"]
    line += ["--cache-tokens", "1024", "--allow-runtime-adapters", "--admin-key", "admin", *options]
    for name in ("a", "b"):
        line += ["--adapter", f"{name}={world.folders[name]}"]
    with started(*line) as (processes, said):
        end = time.monotonic() + 240
        while not (found := re.search(r"on (http://\S+)", "".join(said))):
            assert all(p.poll() is None for p in processes) and time.monotonic() < end, "".join(said)
            time.sleep(0.05)
        yield processes, found[1], said


def asked(url: str, model: str, ids: list[int], **options: Any) -> str:
    body = {"model": model, "prompt": ids, "max_tokens": NEW, "temperature": 0, **options}
    answer = httpx.post(f"{url}/v1/completions", json=body, headers=ADMIN, timeout=60)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def ordered(url: str, what: str, **body: str) -> int:
    return httpx.post(f"{url}/v1/{what}_lora_adapter", json=body, headers=ADMIN, timeout=60).status_code


def test_mlora_serve_in_two_processes(world: World) -> None:
    """Adapters beside each other, while another is loaded, deleted and loaded again; and both end well."""
    requests = [(prompt(seed, 5 + seed), name) for seed in range(6) for name in ("tiny", "a", "b")]
    with served(world) as (processes, url, said), ThreadPoolExecutor(8) as pool:
        texts = [pool.submit(asked, url, name, ids) for ids, name in requests]
        for what, source in (("load", "c"), ("unload", ""), ("load", "b")):
            path = {"lora_path": str(world.folders[source])} if source else {}
            assert ordered(url, what, lora_name="new", **path) == 200
            if source:
                assert asked(url, "new", prompt(70)) == world.text(prompt(70), source)
        for (ids, name), text in zip(requests, texts, strict=True):
            assert text.result() == world.text(ids, None if name == "tiny" else name)
        assert ordered(url, "load", lora_name="x", lora_path="/nowhere") == 404
        assert asked(url, "b", prompt(71)) == world.text(prompt(71), "b")
        processes[1].send_signal(signal.SIGTERM)  # which is process 0's to follow
        processes[0].send_signal(signal.SIGTERM)
        assert [process.wait(60) for process in processes] == [0, 0], "".join(said)
        assert "Traceback" not in "".join(said), "".join(said)


def test_a_process_that_is_gone_ends_mlora_serve(world: World) -> None:
    """While it answers. Each process holds its share of the adapters here."""
    with served(world, "--fully-sharded") as (processes, url, said):
        assert asked(url, "a", prompt(1)) == world.text(prompt(1), "a")
        body = {"model": "a", "prompt": prompt(2), "max_tokens": 50, "stream": True}
        with suppress(httpx.HTTPError), httpx.stream(
            "POST", f"{url}/v1/completions", json=body, headers=ADMIN, timeout=60
        ) as answer:  # fmt: skip
            for number, _ in enumerate(answer.iter_lines()):
                if number == 2:
                    processes[1].kill()
                    gone = time.monotonic()
        assert processes[0].wait(60) == 1 and time.monotonic() - gone < 15, "".join(said)
        assert "mlora: error:" in "".join(said)


def test_what_is_not_served_in_several_processes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(app, ["serve", str(world.folder / "model"), "--host-memory", "1GiB"])
    assert result.exit_code == 2 and "--host-memory is not served in 2 processes" in result.output


def test_the_first_process_does_not_follow(world: World) -> None:
    with pytest.raises(mlora.errors.ServeError, match="beside the first"):
        follow(world.runtime)
