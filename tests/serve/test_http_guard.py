"""Keys, limits, ids, metrics, and clients that go away."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from http_serving import Served, running, serving, wait_for
from serving import slow

from mlora.serve.http import Access, Limits, create_app

BODY = {"model": "a", "prompt": "hello", "temperature": 0, "max_tokens": 4}
LONG = {**BODY, "max_tokens": 200}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    options = {"max_running": 2, "ahead": 1, "max_waiting": 1}  # so that two wait
    with serving(
        tmp_path_factory.mktemp("adapters"), options=options, limits=Limits(body=5000), access=Access(["key", "other"])
    ) as served:
        served.client.headers["authorization"] = "Bearer other"
        yield served


def idle(served: Served) -> bool:
    stats = served.engine.stats()
    return stats.running == stats.waiting == stats.reserved_tokens == 0


def metric(served: Served, name: str) -> float:
    """The sum of its series."""
    lines = served.client.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))


def test_keys(served: Served) -> None:
    with httpx.Client(base_url=served.url) as client:
        for given, status in (
            (None, 401),
            ("Bearer no", 401),
            ("Basic key", 401),
            ("Bearer key", 200),
            ("bearer other", 200),
        ):
            headers = {} if given is None else {"authorization": given}
            assert client.post("/v1/completions", json=BODY, headers=headers).status_code == status
            for path in ("/v1/models", "/metrics", "/info", "/openapi.json"):
                assert client.get(path, headers=headers).status_code == status, path
        for path in ("/health", "/ready", "/ping", "/"):
            assert client.get(path).status_code == 200
        answer = client.post("/v1/completions", json=BODY)
        assert answer.headers["www-authenticate"] == "Bearer" and answer.json()["error"]["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="no").models.list()


def test_bodies_that_are_too_large(served: Served) -> None:
    """Told by their length, or as they come."""
    body = json.dumps({**BODY, "prompt": "a" * 5000}).encode()
    whole = served.client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert whole.status_code == 413 and "5000" in whole.json()["error"]["message"]

    def parts() -> Iterator[bytes]:
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    chunked = served.client.post("/generate", content=parts(), headers={"content-type": "application/json"})
    assert chunked.status_code == 413 and chunked.json()["error_type"] == "too_large"
    assert served.post("/v1/completions", {**BODY, "user": "a" * 4000}).status_code == 200


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"[" * 4000, b"\xff\xfe", b'{"model": "\\ud800"}'])
def test_bodies_that_are_none(served: Served, body: bytes) -> None:
    for path, status in (("/v1/completions", 400), ("/v1/chat/completions", 400), ("/generate", 422)):
        answer = served.client.post(path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == status, answer.text
        assert "error" in answer.json()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is missing"),
        (b"{", "the body is no JSON: Expecting property name enclosed in double quotes at character 1"),
        (b"[]", "the body must be a JSON object, sent as application/json"),
        (b"[" * 4000, "the body cannot be read: it must be JSON in UTF-8, and not nested too deeply"),
        (b"\xff", "the body cannot be read: it must be JSON in UTF-8, and not nested too deeply"),
    ],
)
def test_what_is_wrong_with_a_body(served: Served, body: bytes, message: str) -> None:
    answer = served.client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.json()["error"] == {
        "message": message, "type": "invalid_request_error", "param": None, "code": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/completions", {"prompt": "a\ud800"}, "prompt"),
        ("/v1/completions", {"prompt": ["a", "\udc00a"]}, "prompt.1"),
        ("/v1/completions", {"prompt": "a", "stop": ["\ud800"]}, "stop.0"),
        ("/v1/completions", {"prompt": "a", "adapter": "\ud800"}, "adapter"),
        ("/v1/completions", {"prompt": "a", "merged_adapters": {"ids": ["\ud800"]}}, "merged_adapters.ids.0"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]},
            "messages.0.content.0.text",
        ),
    ],
)
def test_halves_of_surrogate_pairs_are_no_text(served: Served, path: str, body: Any, field: str) -> None:
    """JSON can write them. No tokenizer takes them, and no answer can repeat them."""
    content = json.dumps({**body, "model": "a", "max_tokens": 2})
    answer = served.client.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == field and error["message"] == f"{field} is no text: it has half of a surrogate pair"


def test_whole_surrogate_pairs_are_text(served: Served) -> None:
    content = '{"model": "a", "prompt": "hi \\ud83d\\ude00", "max_tokens": 2}'
    assert "\\u" in content
    answer = served.client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("path", ["/", "/health", "/ping", "/ready"])
def test_who_watches_may_ask_for_the_head_alone(served: Served, path: str) -> None:
    answer = served.client.head(path)
    assert answer.status_code == 200 and answer.content == b""


def test_too_many_requests(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """429 with Retry-After in both dialects, and the rest is served."""
    slow(monkeypatch, 0.02)
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(served.post, "/v1/completions", {**BODY, "max_tokens": 40}) for _ in range(4)]
        wait_for(lambda: served.engine.stats().running == 2 and served.engine.stats().waiting == 2)
        for path, body in (
            ("/v1/completions", BODY),
            ("/generate", {"inputs": "x"}),
            ("/generate_stream", {"inputs": "x"}),
        ):
            answer = served.post(path, body)
            assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1, answer.text
        assert answer.json()["error_type"] == "overloaded"
        assert [call.result().status_code for call in calls] == [200] * 4
    wait_for(lambda: idle(served))


def test_request_ids_and_the_log(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="mlora.serve.access")
    answer = served.client.post("/v1/completions", json=BODY, headers={"x-request-id": "abc-1"})
    assert answer.headers["x-request-id"] == "abc-1"
    wait_for(lambda: "id=abc-1" in caplog.text)
    assert "POST /v1/completions 200" in caplog.text and "adapter=a" in caplog.text and "hello" not in caplog.text
    bad = served.client.get("/nothing%0d%0ahere", headers={"x-request-id": "no spaces please"})
    assert bad.status_code == 404 and len(bad.headers["x-request-id"]) == 32
    wait_for(lambda: "%0d%0a" in caplog.text)


def test_no_other_origin_is_let_in(served: Served) -> None:
    answer = served.client.options(
        "/v1/completions", headers={"origin": "https://example.com", "access-control-request-method": "POST"}
    )
    assert answer.status_code == 405 and not any(name.startswith("access-control") for name in answer.headers)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate", "/generate_stream"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_who_goes_away_frees_its_place(
    served: Served, monkeypatch: pytest.MonkeyPatch, path: str, stream: bool
) -> None:
    """Within a few steps, whether it runs or waits, has got tokens or not."""
    slow(monkeypatch, 0.01)
    gone = metric(served, "mlora_requests_cancelled_total")
    body: dict[str, Any] = {**LONG, "stream": stream}
    if path == "/v1/chat/completions":
        body = {**body, "messages": [{"role": "user", "content": "x"}]}
        del body["prompt"]
    elif path.startswith("/generate"):
        body = {"inputs": "hello", "parameters": {"max_new_tokens": 200}}
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer key\r\ncontent-type: application/json\r\n"
    sockets = []
    for _ in range(3):  # two run, and one waits
        connection = socket.create_connection(served.url.removeprefix("http://").split(":"))  # type: ignore[arg-type]
        connection.sendall(f"{head}content-length: {len(raw)}\r\n\r\n".encode() + raw)
        sockets.append(connection)
    wait_for(lambda: served.engine.stats().running == 2 and served.engine.stats().waiting == 1)
    steps = served.engine.stats().steps
    wait_for(lambda: served.engine.stats().steps > steps + 3)
    if "stream" in path or body.get("stream"):
        assert sockets[0].recv(4096).startswith(b"HTTP/1.1 200")
    sockets[2].close()
    wait_for(lambda: served.engine.stats().waiting == 0)
    assert served.engine.stats().running == 2
    steps = served.engine.stats().steps
    for connection in sockets[:2]:
        connection.close()
    wait_for(lambda: idle(served))
    assert served.engine.stats().steps - steps < 20  # of 200: some pass while this looks
    wait_for(lambda: metric(served, "mlora_requests_cancelled_total") == gone + 3)


def test_metrics(served: Served) -> None:
    wait_for(lambda: idle(served))
    names = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total")
    names += ("vllm:time_to_first_token_seconds_count", "vllm:inter_token_latency_seconds_count")
    names += ("vllm:e2e_request_latency_seconds_count", "vllm:request_queue_time_seconds_count")
    names += ("mlora_adapter_requests_total", "mlora_requests_refused_total", "vllm:prefix_cache_queries_total")
    before = {name: metric(served, name) for name in names}
    assert served.post("/v1/completions", {**BODY, "model": '{"a": 1, "b": 1}', "n": 2}).status_code == 200
    assert served.post("/v1/completions", {**BODY, "model": "nobody"}).status_code == 404
    grown = {name: metric(served, name) - before[name] for name in names}
    assert grown == dict(zip(names, (5, 8, 2, 1, 6, 2, 1, 2, 1, 5), strict=True))
    text = served.client.get("/metrics").text
    for line in ('vllm:num_requests_running{model_name="tiny"} 0.0', 'finished_reason="length"', 'adapter="b"'):
        assert line in text
    assert 'running_lora_adapters=""' in text and 'max_lora="' in text


def test_metrics_of_what_runs(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch, 0.01)
    body = {**BODY, "max_tokens": 120}
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(served.post, "/v1/completions", body) for _ in range(2)]
        wait_for(lambda: metric(served, "vllm:num_requests_running") == 2)
        calls.append(pool.submit(served.post, "/v1/completions", {**body, "model": "b"}))
        wait_for(lambda: 'running_lora_adapters="a"' in served.client.get("/metrics").text)
        wait_for(lambda: metric(served, "vllm:num_requests_waiting") == 1)
        assert 0 < metric(served, "vllm:kv_cache_usage_perc") <= 1
        wait_for(lambda: 'waiting_lora_adapters="b"' in served.client.get("/metrics").text)  # both a have a token
        assert all(call.result().status_code == 200 for call in calls)


def test_many_idle_connections_and_streams(served: Served) -> None:
    """Sockets that stay open cost nothing, and streams run beside them."""
    where = served.url.removeprefix("http://").split(":")
    idle_ones = [socket.create_connection(where) for _ in range(100)]  # type: ignore[arg-type]
    get = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    for connection in idle_ones:
        connection.sendall(get)
    assert all(b" 200 " in connection.recv(4096) for connection in idle_ones)
    assert served.post("/v1/completions", BODY).status_code == 200
    for connection in idle_ones:
        connection.sendall(get)
    assert all(b" 200 " in connection.recv(4096) for connection in idle_ones)
    for connection in idle_ones:
        connection.close()


def test_a_failure_is_told_and_logged(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """A step that fails is an error of its requests, before their first token by status and later by an event; what
    nobody expected is a 500 without its words."""
    from mlora.serve.batching import ContinuousBatchingManager as Manager

    with serving(tmp_path) as served:
        step = Manager._generation_step
        failing = threading.Event()

        def sometimes(worker: Manager) -> None:
            time.sleep(0.01)
            if failing.is_set():
                failing.clear()
                raise RuntimeError("secret")
            step(worker)

        monkeypatch.setattr(Manager, "_generation_step", sometimes)
        with served.client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            failing.set()
            found = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert found[-1]["error"]["type"] == "server_error"
        with served.client.stream(
            "POST", "/generate_stream", json={"inputs": "x", "parameters": {"max_new_tokens": 90}}
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            failing.set()
            found = [json.loads(line[5:]) for line in lines if line.startswith("data:")]
        assert found[-1]["error_type"] == "generation"
        assert served.post("/v1/completions", BODY).status_code == 200  # another worker took over

        monkeypatch.setattr(served.engine, "generate", lambda *_: 1 / 0)
        for path, body in (("/v1/completions", BODY), ("/generate", {"inputs": "x"})):
            answer = served.post(path, body)
            assert (
                answer.status_code in (424, 500) and "division" not in answer.text and "x-request-id" in answer.headers
            )
        assert "ZeroDivisionError" in caplog.text
        served.engine.close()
        monkeypatch.undo()
        assert served.post("/v1/completions", BODY).status_code == 503
        assert served.client.get("/health").status_code == served.client.get("/ready").status_code == 503


def test_the_page(served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Browsers get the page of the package, without the key; it may reach this server only."""
    from mlora.serve.http import app

    page = tmp_path / "page.html"
    page.write_text("<p>hello</p>")
    monkeypatch.setattr(app, "files", lambda _: tmp_path)
    answer = httpx.get(served.url, headers={"accept": "text/html,*/*"})
    assert answer.text == "<p>hello</p>" and "default-src 'none'" in answer.headers["content-security-policy"]
    assert httpx.get(served.url).text == ""


def test_what_an_app_needs(served: Served, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="admin key"):
        create_app(served.engine, "tiny", runtime_adapters=True)
    with pytest.raises(ValueError, match="the base is called 'a', and so is an adapter"):
        create_app(served.engine, "a")
    with pytest.raises(ValueError, match="no folder"):
        create_app(served.engine, "tiny", roots=[tmp_path / "nothing"])
    with pytest.raises(ValueError, match="no hub id"):
        create_app(served.engine, "tiny", hub_ids=["x"])
    assert running is not None


@pytest.mark.parametrize("key", ["", " ", "key\n"])
def test_keys_that_let_everybody_in_or_nobody(key: str) -> None:
    """As of a variable that is not set: a request without a key has the empty one."""
    with pytest.raises(ValueError, match="API key is empty"):
        Access(["key", key])
    with pytest.raises(ValueError, match="admin key is empty"):
        Access(["key"], key)
