"""Adapters that come and go while the server runs: vLLM's and SGLang's routes, folders, and the list of hub ids."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_serving import Served, running, serving, wait_for
from serving import slow

from mlora.serve.http import Access, create_app
from mlora.serve.http.roots import HubIds, Roots

BODY = {"prompt": "hello", "temperature": 0, "max_tokens": 8}
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    access = Access(["key"], "admin")
    with serving(tmp_path_factory.mktemp("adapters"), access=access, runtime_adapters=True) as served:
        served.client.headers["authorization"] = "Bearer admin"
        yield served


def text(served: Served, model: str) -> Any:
    return served.post("/v1/completions", {"model": model, **BODY}).json()["choices"][0]["text"]


def test_loading_and_unloading(served: Served) -> None:
    """vLLM's answers, word for word."""
    a = str(served.folders["a"])
    answer = served.post(LOAD, {"lora_name": "new", "lora_path": a})
    assert answer.status_code == 200 and answer.text == "Success: LoRA adapter 'new' added successfully."
    assert text(served, "new") == text(served, "a") != text(served, "tiny")
    again = served.post(LOAD, {"lora_name": "new", "lora_path": a})
    assert again.status_code == 400 and again.json()["error"]["type"] == "InvalidUserInput"
    assert again.json()["error"]["code"] == 400 and "already" in again.json()["error"]["message"]
    b = {"lora_name": "new", "lora_path": str(served.folders["b"]), "load_inplace": True}
    assert served.post(LOAD, b).status_code == 200
    assert text(served, "new") == text(served, "b")
    answer = served.post(UNLOAD, {"lora_name": "new"})
    assert answer.status_code == 200 and answer.text == "Success: LoRA adapter 'new' removed successfully."
    assert served.post(UNLOAD, {"lora_name": "new"}).json()["error"]["type"] == "NotFoundError"
    assert served.post("/v1/completions", {"model": "new", **BODY}).status_code == 404


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"lora_path": "x"}, 400, "lora_name is missing"),
        ({"lora_name": "x", "lora_path": "/nowhere/at/all"}, 404, "/nowhere/at/all"),
        ({"lora_name": "tiny", "lora_path": "x"}, 400, "tiny"),
        ({"lora_name": "{}", "lora_path": "x"}, 400, "{}"),
        ({"lora_name": "x\n", "lora_path": "x"}, 400, "name"),
        ({"lora_name": "x", "lora_path": "x", "is_3d_lora_weight": True}, 400, "is_3d_lora_weight"),
        ({"lora_name": "x", "lora_path": "x", "what": 1}, 400, "what is not served"),
    ],
)
def test_what_cannot_be_loaded(served: Served, body: Any, status: int, said: str) -> None:
    answer = served.post(LOAD, body)
    assert answer.status_code == status and said in answer.json()["error"]["message"]
    assert answer.json()["error"]["code"] == status


def test_a_damaged_adapter_harms_nobody(served: Served, tmp_path: Path) -> None:
    shutil.copytree(served.folders["a"], tmp_path / "bad")
    (tmp_path / "bad" / "adapter_model.safetensors").write_bytes(b"nothing")
    answer = served.post(LOAD, {"lora_name": "bad", "lora_path": str(tmp_path / "bad")})
    assert answer.status_code == 400 and "bad" not in served.state.names
    assert text(served, "a") == served.text("hello", "a", max_new_tokens=8)


def test_sglang(served: Served) -> None:
    a = str(served.folders["a"])
    answer = served.post("/load_lora_adapter", {"lora_name": "two", "lora_path": a, "pinned": False}).json()
    assert answer["success"] is True and answer["loaded_adapters"]["two"] == a
    again = served.post("/load_lora_adapter", {"lora_name": "two", "lora_path": a})
    assert again.status_code == 400 and again.json()["success"] is False and again.json()["loaded_adapters"]["two"] == a
    pinned = served.post("/load_lora_adapter", {"lora_name": "three", "lora_path": a, "pinned": True})
    assert pinned.status_code == 400 and "pinned" in pinned.json()["error_message"]
    assert text(served, "tiny:two") == text(served, "a")
    assert served.post("/unload_lora_adapter", {"lora_name": "two"}).json()["success"] is True
    assert served.post("/unload_lora_adapter", {"lora_name": "two"}).status_code == 404


def test_the_admin_key(served: Served, tmp_path: Path) -> None:
    for path in (LOAD, UNLOAD, "/load_lora_adapter", "/unload_lora_adapter"):
        for key, status in (("key", 403), ("no", 403), (None, 401)):
            headers = {"authorization": f"Bearer {key}" if key else ""}
            answer = served.client.post(path, json={"lora_name": "a", "lora_path": "x"}, headers=headers)
            assert answer.status_code == status, answer.text
    assert "a" in served.state.names
    with serving(tmp_path, access=Access([], "admin")) as closed:  # nobody allowed it
        assert closed.post(UNLOAD, {"lora_name": "a"}, "admin").status_code == 404


def test_one_name_loaded_at_once(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """By many: one of them gets it; where it may be replaced, all."""
    load = served.engine.runtime.load_adapter

    def slowly(*given: Any, **options: Any) -> Any:
        time.sleep(0.1)
        return load(*given, **options)

    monkeypatch.setattr(served.engine.runtime, "load_adapter", slowly)
    body = {"lora_name": "race", "lora_path": str(served.folders["c"])}
    with ThreadPoolExecutor(8) as pool:
        found = [answer.status_code for answer in pool.map(lambda _: served.post(LOAD, body), range(8))]
    assert sorted(found) == [200] + [400] * 7
    assert text(served, "race") == text(served, "c")
    with ThreadPoolExecutor(8) as pool:
        gone = {"lora_name": "race"}
        found = [answer.status_code for answer in pool.map(lambda _: served.post(UNLOAD, gone), range(8))]
    assert sorted(found) == [200] + [404] * 7
    with ThreadPoolExecutor(8) as pool:
        again = {**body, "load_inplace": True}
        found = [answer.status_code for answer in pool.map(lambda _: served.post(LOAD, again), range(8))]
    assert found == [200] * 8 and text(served, "race") == text(served, "c")
    assert served.post(UNLOAD, gone).status_code == 200


def test_two_servers_of_one_engine(root: Path, tmp_path: Path) -> None:
    """Two event loops that load one name at the same time, by first use and by vLLM's route."""
    own = {"access": Access([], "admin"), "runtime_adapters": True, "roots": [root]}
    with serving(tmp_path / "own", **own) as one, running(create_app(one.engine, "tiny", **own)) as url:
        urls = [one.url, url] * 4
        body = {"model": "team/two", **BODY}
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda url: httpx.post(f"{url}/v1/completions", json=body, timeout=30), urls))
            assert {answer.json()["choices"][0]["text"] for answer in answers} == {text(one, "b")}
            assert one.engine.stats().loads == 1
            body = {"lora_name": "race", "lora_path": str(one.folders["c"])}
            key = {"authorization": "Bearer admin"}
            loads = pool.map(lambda url: httpx.post(f"{url}{LOAD}", json=body, headers=key, timeout=30), urls)
            assert sorted(answer.status_code for answer in loads) == [200] + [400] * 7
        assert text(one, "race") == text(one, "c")


def test_what_runs_ends_with_what_it_began(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaced and unloaded under a request; later ones get the new, or 404."""
    slow(monkeypatch, 0.01)
    path = {name: str(served.folders[name]) for name in "ab"}
    wanted = served.text("hello", "a", max_new_tokens=60)
    for change in ({"lora_path": path["b"], "load_inplace": True}, None):
        served.post(LOAD, {"lora_name": "moving", "lora_path": path["a"], "load_inplace": True})
        with ThreadPoolExecutor(1) as pool:
            body = {"model": "moving", **BODY, "max_tokens": 60}
            call = pool.submit(served.post, "/v1/completions", body)
            wait_for(lambda: served.engine.stats().running == 1)
            if change is not None:
                assert served.post(LOAD, {"lora_name": "moving", **change}).status_code == 200
                assert text(served, "moving") == served.text("hello", "b", max_new_tokens=8)
            else:
                assert served.post(UNLOAD, {"lora_name": "moving"}).status_code == 200
                assert served.post("/v1/completions", body).status_code == 404
            assert not call.done()
            assert call.result().json()["choices"][0]["text"] == wanted


@pytest.fixture
def root(served: Served, tmp_path: Path) -> Path:
    """A folder of adapters, with ways out of it."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    for name, where in (("one", root), ("two", root / "team"), ("secret", outside)):
        shutil.copytree(served.folders["a" if name == "one" else "b"], where / name)
    (root / "link").symlink_to(outside / "secret")
    (root / "inner").symlink_to(root / "one")
    (root / "up").symlink_to(tmp_path)
    shutil.copytree(root / "one", root / "files")
    (root / "files" / "adapter_model.safetensors").unlink()
    (root / "files" / "adapter_model.safetensors").symlink_to(outside / "secret" / "adapter_model.safetensors")
    shutil.copytree(root / "one", root / "template")
    (root / "template" / "chat_template.jinja").symlink_to("/etc/hostname")
    (root / "empty").mkdir()
    return root


OUT = [
    "link", "files", "template", "empty", "up/outside/secret", "../outside/secret", "team/../../outside/secret",
    "one/", "./one", "team//two", "/etc", "one/../one", ".", "", "~", "one\\", "one\0", "team", "\ud800", "a" * 600,
    "nothing", "on\te",
]  # fmt: skip


def test_roots(root: Path) -> None:
    roots = Roots([root])
    assert roots.find("one") == ("one", root / "one")
    assert roots.find("team/two") == ("team/two", root / "team" / "two")
    assert roots.find(str(root / "team" / "two")) == ("team/two", root / "team" / "two")  # as LoRAX's local source
    assert roots.find("inner") == ("inner", root / "one")  # a link that stays inside
    for name in OUT:
        assert roots.find(name) is None, name
    assert roots.find(str(root.parent / "outside" / "secret")) is None


def test_hub_ids() -> None:
    ids = HubIds(["org/name", "org/other@abc123"])
    assert "org/name" in ids and "org/other" in ids and "org/third" not in ids and "org/other@abc123" not in ids
    assert ids.revision("org/name") is None and ids.revision("org/other") == "abc123"


def test_first_use_of_a_folder(root: Path, tmp_path: Path) -> None:
    """Known by its name in the root, read once however many ask at the same time, and by name only."""
    with serving(tmp_path / "own", roots=[root]) as served:
        body = {"model": "team/two", **BODY}
        assert "team/two" not in served.client.get("/v1/models").text
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: served.post("/v1/completions", body), range(8)))
        assert {answer.json()["choices"][0]["text"] for answer in answers} == {
            served.text("hello", "b", max_new_tokens=8)
        }
        assert served.engine.stats().loads == 1
        mixed = {"one": 0.5, "team/two": 1.0}
        answer = served.post("/v1/completions", {"model": "tiny", "adapter": mixed, **BODY}).json()
        assert answer["choices"][0]["text"] == served.text("hello", {"a": 0.5, "b": 1.0}, max_new_tokens=8)
        local = {"max_new_tokens": 8, "adapter_id": str(root / "one"), "adapter_source": "local"}
        answer = served.post("/generate", {"inputs": "hello", "parameters": local})
        assert answer.json()["generated_text"] == served.text("hello", "a", max_new_tokens=8)
        assert answer.headers["x-adapter-id"] == "one"  # one name for one adapter
        cards = {card["id"]: card for card in served.client.get("/v1/models").json()["data"]}
        assert set(cards) == {"tiny", "a", "b", "c", "d", "one", "team/two"}
        assert cards["team/two"]["root"] == str(root / "team" / "two") and cards["team/two"]["parent"] == "tiny"
        for name in OUT:
            if name and name != "\ud800":
                assert served.post("/v1/completions", {"model": name, **BODY}).status_code == 404, name
        answer = served.post("/generate", {"inputs": "x", "parameters": {"adapter_id": "two", "adapter_source": "hub"}})
        assert answer.status_code == 404


def test_a_damaged_folder_is_an_error_of_its_requests(root: Path, tmp_path: Path) -> None:
    (root / "one" / "adapter_model.safetensors").write_bytes(os.urandom(100))
    with serving(tmp_path / "own", roots=[root]) as served:
        for _ in range(2):
            for stream in (False, True):
                answer = served.post("/v1/completions", {"model": "one", "stream": stream, **BODY})
                assert answer.status_code == 400 and answer.json()["error"]["param"] == "model"
            answer = served.post("/generate", {"inputs": "x", "parameters": {"adapter_id": "one"}})
            assert answer.status_code == 424 and answer.json()["error_type"] == "generation"
        assert text(served, "a") == served.text("hello", "a", max_new_tokens=8)


def test_hub_ids_that_are_listed(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Are fetched, and no others."""
    import huggingface_hub

    from mlora.adapters import sources

    asked = []

    def fetch(name: str, revision: Any, token: Any, subfolder: Any) -> Path:
        asked.append((name, revision))
        return served.folders["b"]

    def snapshot(name: str, *, revision: Any, **_: Any) -> None:
        asked.append((name, revision))

    monkeypatch.setattr(sources, "_from_hub", fetch)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with serving(tmp_path, hub_ids=["org/b@v1"]) as own:
        assert text(own, "org/b") == own.text("hello", "b", max_new_tokens=8)
        assert own.post("/v1/completions", {"model": "org/c", **BODY}).status_code == 404
        assert own.post("/v1/completions", {"model": "org/b@v2", **BODY}).status_code == 404
    assert set(asked) == {("org/b", "v1")}
