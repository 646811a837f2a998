"""LoRAX's routes, to the letter of what its server and its client read and write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from http_serving import Served, serving

import mlora

TIES = {"ids": ["a", "b"], "weights": [0.6, 0.4], "merge_strategy": "ties", "density": 0.5}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("adapters")) as served:
        yield served


def ask(served: Served, path: str = "/generate", **parameters: Any) -> Any:
    return served.post(path, {"inputs": "hello", "parameters": {"max_new_tokens": 8, **parameters}})


def events(text: str) -> list[Any]:
    """There is no [DONE], on which LoRAX's client would fail."""
    return [json.loads(line.removeprefix("data:")) for line in text.split("\n\n") if line]


@pytest.mark.parametrize(
    ("parameters", "entry"),
    [
        ({}, None),
        ({"adapter_id": ""}, None),
        ({"adapter_id": "tiny"}, None),
        ({"adapter_id": "b", "adapter_source": "local"}, "b"),
        ({"merged_adapters": TIES}, mlora.Merge(("a", "b"), (0.6, 0.4), "ties", density=0.5)),
        ({"merged_adapters": {"ids": ["a", "b"], "weights": [0.5, 1.0], "density": 0.0}}, {"a": 0.5, "b": 1.0}),
    ],
    ids=["none", "empty", "base", "adapter", "ties", "linear"],
)
def test_the_same_on_all_routes(served: Served, parameters: dict[str, Any], entry: Any) -> None:
    wanted = served.text("hello", entry, max_new_tokens=8)
    tokens = served.tokens("hello", entry, max_new_tokens=8)
    whole = ask(served, details=True, **parameters)
    assert whole.json()["generated_text"] == wanted
    details = whole.json()["details"]
    assert [token["id"] for token in details["tokens"]] == tokens
    assert {key: details[key] for key in ("finish_reason", "prompt_tokens", "generated_tokens", "seed", "prefill")} == {
        "finish_reason": "length", "prompt_tokens": 5, "generated_tokens": 8, "seed": None, "prefill": []
    }  # fmt: skip
    assert all(type(token["logprob"]) is float and token["skipped"] is False for token in details["tokens"])
    assert ask(served, "/", **parameters).json() == [{"generated_text": wanted, "details": None}]

    body = {"inputs": "hello", "parameters": {"max_new_tokens": 8, **parameters}}
    for answer in (served.post("/generate_stream", body), served.post("/", {**body, "stream": True})):
        assert answer.headers["content-type"].startswith("text/event-stream")
        *parts, last = events(answer.text)
        assert "".join(part["token"]["text"] for part in [*parts, last]) == last["generated_text"] == wanted
        assert all(part["generated_text"] is None and part["details"] is None for part in parts)
        assert last["details"]["finish_reason"] == "length" and last["details"]["generated_tokens"] == 8


def test_headers(served: Served) -> None:
    headers = ask(served, adapter_id="a", adapter_source="local").headers
    assert headers["x-adapter-id"] == "a" and headers["x-adapter-source"] == "local"
    assert headers["x-model-id"] == "tiny" and headers["x-compute-type"] == "cpu"
    assert (headers["x-prompt-tokens"], headers["x-generated-tokens"], headers["x-total-tokens"]) == ("5", "8", "13")
    times = ("compute-time", "total-time", "validation-time", "queue-time", "inference-time", "time-per-token")
    assert all(headers[f"x-{name}"].isdigit() for name in (*times, "time-to-first-token"))


def test_options(served: Served) -> None:
    free = served.text("hello", "a", max_new_tokens=20)
    stop = free[3:5]
    cut = ask(served, adapter_id="a", stop=[stop], max_new_tokens=20, details=True).json()
    assert cut["generated_text"] == free[: free.index(stop) + 2]  # which LoRAX leaves in
    assert cut["details"]["finish_reason"] == "stop_sequence"
    assert ask(served, adapter_id="a", return_full_text=True).json()["generated_text"].startswith("hello" + free[:5])
    drawn = {"adapter_id": "a", "do_sample": True, "seed": 11, "details": True}
    answer = ask(served, **drawn).json()
    assert answer["generated_text"] == served.text("hello", "a", max_new_tokens=8, temperature=1.0, seed=11)
    assert answer["details"]["seed"] == 11
    seed = ask(served, **{**drawn, "seed": None}).json()["details"]["seed"]
    again = ask(served, **{**drawn, "seed": seed}).json()["generated_text"]
    assert again == served.text("hello", "a", max_new_tokens=8, temperature=1.0, seed=seed)
    short = served.post("/generate", {"inputs": "abc hello", "parameters": {"truncate": 5, "max_new_tokens": 8}})
    assert short.json()["generated_text"] == served.text("hello", None, max_new_tokens=8)
    top = ask(served, details=True, return_k_alternatives=3).json()["details"]["tokens"][0]
    assert len(top["alternative_tokens"]) == 3 and top["alternative_tokens"][0]["id"] == top["id"]
    chat = served.post("/generate", {"inputs": "x", "parameters": {"apply_chat_template": True, "max_new_tokens": 8}})
    assert chat.json()["generated_text"] == served.text("u x a", None, max_new_tokens=8)


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ({"watermark": True}, "watermark"),
        ({"best_of": 2}, "best_of"),
        ({"typical_p": 0.5}, "typical_p"),
        ({"decoder_input_details": True}, "decoder_input_details"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format"),
        ({"api_token": "x"}, "api_token"),
        ({"adapter_source": "s3", "adapter_id": "a"}, "adapter_source"),
        ({"schema": "x"}, "schema"),
        ({"temperature": -1}, "temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 1000}, "max_new_tokens"),
        ({"top_p": 2}, "top_p"),
        ({"adapter_id": "a", "merged_adapters": TIES}, "merged_adapters"),
        ({"merged_adapters": {**TIES, "merge_strategy": "nope"}}, "merged_adapters"),
        ({"merged_adapters": {**TIES, "majority_sign_method": "nope"}}, "majority_sign_method"),
    ],
    ids=lambda value: json.dumps(value)[:50],
)
def test_what_is_not_served_is_named(served: Served, parameters: dict[str, Any], name: str) -> None:
    answer = ask(served, **parameters)
    assert answer.status_code == 422, answer.text
    assert answer.json()["error_type"] == "validation" and name in answer.json()["error"]
    stream = ask(served, "/generate_stream", **parameters)
    assert stream.status_code == 422 and stream.json() == answer.json()


def test_unknown_adapters(served: Served) -> None:
    for path in ("/generate", "/", "/generate_stream"):
        for parameters in ({"adapter_id": "e"}, {"merged_adapters": {**TIES, "ids": ["a", "e"]}}):
            answer = ask(served, path, **parameters)
            assert answer.status_code == 404 and "'e'" in answer.text


def test_the_rest(served: Served) -> None:
    info = served.client.get("/info").json()
    assert info["model_id"] == "tiny" and info["max_total_tokens"] == 256 and info["model_dtype"] == "float32"
    for path in ("/health", "/ping", "/ready", "/"):
        answer = served.client.get(path)
        assert answer.status_code == 200 and answer.text == ""
    tokens = served.post("/tokenize", {"inputs": "the end"}).json()
    assert [token["id"] for token in tokens] == served.tokenizer("the end")["input_ids"]
    assert "the end"[tokens[0]["start"] : tokens[0]["stop"]] == tokens[0]["text"]


CLIENT = """
import asyncio, json, sys
from lorax import AsyncClient, Client, MergedAdapters
from lorax.errors import NotFoundError, ValidationError
client = Client(sys.argv[1])
out = {}
def details(answer):
    return [token.id for token in answer.details.tokens], answer.details.finish_reason.value
answer = client.generate("hello", adapter_id="a", max_new_tokens=8)
out["a"], out["details"] = answer.generated_text, details(answer)
merged = MergedAdapters(ids=["a", "b"], weights=[0.6, 0.4], merge_strategy="ties", density=0.5)
out["ties"] = client.generate("hello", merged_adapters=merged, max_new_tokens=8).generated_text
merged = MergedAdapters(ids=["a", "b"], weights=[0.5, 1.0], merge_strategy="linear", density=0)
out["linear"] = client.generate("hello", merged_adapters=merged, max_new_tokens=8).generated_text
out["base"] = client.generate("hello", max_new_tokens=8).generated_text
text = ""
for event in client.generate_stream("hello", adapter_id="b", max_new_tokens=8):
    text += event.token.text
out["stream"], out["last"] = text, [event.generated_text, event.details.generated_tokens]
def error(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__
out["errors"] = [
    error(lambda: client.generate("hello", adapter_id="e")),
    error(lambda: list(client.generate_stream("hello", adapter_id="e"))),
    error(lambda: client.generate("hello", watermark=True)),
    error(lambda: list(client.generate_stream("hello", watermark=True))),
    error(lambda: client.generate("hello", max_new_tokens=5000)),
]
async def other():
    client = AsyncClient(sys.argv[1])
    answer = await client.generate("hello", adapter_id="c", max_new_tokens=8)
    text = ""
    async for event in client.generate_stream("hello", adapter_id="c", max_new_tokens=8):
        text += event.token.text
    return [answer.generated_text, text]
out["async"] = asyncio.run(other())
print(json.dumps(out))
"""


def test_the_client_unmodified(served: Served, lorax_python: Path) -> None:
    run = subprocess.run([lorax_python, "-c", CLIENT, served.url], capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    merge = mlora.Merge(("a", "b"), (0.6, 0.4), "ties", density=0.5)
    entries = {"a": "a", "ties": merge, "linear": {"a": 0.5, "b": 1.0}, "base": None, "stream": "b"}
    for name, entry in entries.items():
        assert found[name] == served.text("hello", entry, max_new_tokens=8), name
    assert found["details"] == [served.tokens("hello", "a", max_new_tokens=8), "length"]
    assert found["last"] == [found["stream"], 8]
    assert found["async"] == [served.text("hello", "c", max_new_tokens=8)] * 2
    unknown, invalid = ["NotFoundError"] * 2, ["ValidationError"] * 3
    assert found["errors"] == unknown + invalid


@pytest.fixture(scope="session")
def lorax_python() -> Path:
    """Of an environment with LoRAX's client, which needs an old hub library. It is kept in the cache's folder."""
    cache = Path(os.environ.get("MLORA_CACHE") or "~/.cache/mlora").expanduser()
    python = cache / "lorax-client-0.6.3" / "bin" / "python"
    if subprocess.run([python, "-c", "import lorax"], capture_output=True).returncode if python.exists() else True:
        make = [sys.executable, "-m", "venv", "--clear", str(python.parents[1])]
        install = [str(python), "-m", "pip", "install", "--quiet", "lorax-client==0.6.3"]
        for command in (make, install):
            done = subprocess.run(command, capture_output=True, text=True, timeout=280)
            if done.returncode:
                pytest.skip(
                    f"lorax-client cannot be installed: {(done.stderr.strip() or 'no reason').splitlines()[-1]}"
                )
    return python
