"""Replicas on Ray Serve itself, of a tiny model. The oracle is `generate` of the request alone."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from http_serving import CHAT, wait_for
from serving import adapters, alone, base_model, letters, patched

from mlora.serve import Sampling

ray = pytest.importorskip("ray", reason="replicas need Ray Serve")
pytest.importorskip("ray.serve", reason="replicas need Ray Serve")

from mlora.serve.ray import Arguments, adapter_of, application, deploy  # noqa: E402

TOKENS = 8
RUNNING, WAITING = 4, 8


def make_app(folder: str) -> Any:
    """A replica's app: adapters a to d."""
    import torch

    from mlora.serve import Engine
    from mlora.serve.http import create_app

    torch.set_num_threads(1)
    base = base_model()
    base.config.max_position_embeddings = 512
    tokenizer = letters()
    tokenizer.chat_template = CHAT
    runtime = patched(base, {name: Path(folder) / name for name in "abcd"})
    engine = Engine(runtime, tokenizer, max_running=RUNNING, cache_tokens=4096)
    return create_app(engine, "tiny")


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        base = base_model()
        base.config.max_position_embeddings = 512
        self.model, self.tokenizer = patched(base, adapters(folder, base)).model, letters()
        self.client = httpx.Client(base_url="http://127.0.0.1:8765", timeout=60)

    def ask(self, model: Any, prompt: str = "hello", **options: Any) -> httpx.Response:
        named = model if isinstance(model, str) else json.dumps(model)
        body = {"model": named, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, **options}
        return self.client.post("/v1/completions", json=body)

    def text(self, entry: Any, prompt: str = "hello") -> str:
        ids = self.tokenizer(prompt)["input_ids"]
        tokens = alone(self.model, ids, entry, Sampling(max_new_tokens=TOKENS))
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def replicas(self) -> list[psutil.Process]:
        """Their processes."""
        named = "ray::ServeReplica:default:Replica"
        return [one for one in psutil.process_iter(["cmdline"]) if named in " ".join(one.info["cmdline"] or [])]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("ray")
    made = Cluster(folder)
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here.parent.parent), str(here.parent), str(here)])
    variables = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "RAY_DEDUP_LOGS": "0"}
    ray.init(
        num_cpus=4, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False, configure_logging=False,
        runtime_env={"env_vars": variables},
    )  # fmt: skip
    try:
        ray.serve.start(http_options={"port": 8765})
        root = str(folder)
        app = deploy(
            lambda: __import__("test_ray").make_app(root), "tiny", replicas=2, running=RUNNING, waiting=WAITING,
            resources={"num_cpus": 0.5},
        )  # fmt: skip
        ray.serve.run(app, name="default", route_prefix="/")
        yield made
    finally:
        ray.serve.shutdown()
        ray.shutdown()


def test_answers_and_their_places(cluster: Cluster) -> None:
    """Each answer is that of its request alone; requests of one adapter go to one replica."""
    for name in "abcd":
        places = set()
        for _ in range(4):
            answer = cluster.ask(name)
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["text"] == cluster.text(name)
            places.add(answer.headers["x-replica"])
        assert len(places) == 1, name
    assert cluster.ask({"a": 0.5, "b": 0.5}).json()["choices"][0]["text"] == cluster.text({"a": 0.5, "b": 0.5})
    assert cluster.ask("tiny").json()["choices"][0]["text"] == cluster.text(None)
    unknown = cluster.ask("nobody")
    assert unknown.status_code == 404 and "nobody" in unknown.json()["error"]["message"]


@pytest.mark.parametrize("name", ["a", "b", "c", "d"])
def test_requests_spill_where_the_adapters_replica_is_busy(cluster: Cluster, name: str) -> None:
    home = cluster.ask(name).headers["x-replica"]
    with ThreadPoolExecutor(2 * RUNNING) as pool:
        answers = list(pool.map(lambda _: cluster.ask(name, max_tokens=480, ignore_eos=True), range(2 * RUNNING)))
    assert [answer.status_code for answer in answers] == [200] * len(answers)
    places = {answer.headers["x-replica"] for answer in answers}
    assert len(places) == 2 and home in places
    wait_for(lambda: cluster.ask(name).headers["x-replica"] == home, 10)  # they come back


def test_streams_come_as_they_are_made_and_end_with_their_client(cluster: Cluster) -> None:
    body = {"model": "b", "prompt": "hello", "max_tokens": TOKENS, "temperature": 0, "stream": True}
    with cluster.client.stream("POST", "/v1/completions", json=body) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]" and len(lines) > TOKENS
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1]) == cluster.text("b")
    for _ in range(2 * (RUNNING + WAITING)):  # places of clients that went away are free again
        with cluster.client.stream("POST", "/v1/completions", json={**body, "max_tokens": 400}) as answer:
            next(answer.iter_lines())
    wait_for(lambda: cluster.ask("b").status_code == 200, 30)


def test_beyond_the_limit_it_is_503(cluster: Cluster) -> None:
    many = 2 * RUNNING + WAITING + 12
    with ThreadPoolExecutor(many) as pool:
        answers = list(pool.map(lambda _: cluster.ask("c", max_tokens=400, ignore_eos=True), range(many)))
    refused = [answer for answer in answers if answer.status_code == 503]
    assert refused and all(answer.headers["retry-after"] for answer in refused)
    assert {answer.status_code for answer in answers} == {200, 503}


def test_another_replica_serves_when_one_is_killed(cluster: Cluster) -> None:
    assert len(cluster.replicas()) == 2
    cluster.replicas()[0].send_signal(signal.SIGKILL)
    want = {name: cluster.text(name) for name in "abcd"}

    def served() -> bool:
        answers = {name: cluster.ask(name) for name in want}
        return all(answers[n].is_success and answers[n].json()["choices"][0]["text"] == want[n] for n in want)

    wait_for(served, 60)
    wait_for(lambda: len(cluster.replicas()) == 2, 60)  # Ray starts another


@pytest.mark.skipif("MLORA_SOAK" not in os.environ, reason="takes a minute; set MLORA_SOAK")
def test_load_brings_another_replica(cluster: Cluster) -> None:
    root = str(cluster.folder)
    autoscaling = {
        "min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 1, "upscale_delay_s": 0.5,
        "metrics_interval_s": 0.2, "look_back_period_s": 1,
    }  # fmt: skip
    app = deploy(
        lambda: __import__("test_ray").make_app(root), "tiny", autoscaling=autoscaling, running=RUNNING,
        resources={"num_cpus": 0.5},
    )  # fmt: skip
    ray.serve.run(app, name="scaled", route_prefix="/scaled")
    try:

        def ask(name: str) -> str:
            body = {"model": name, "prompt": "hello", "max_tokens": 200, "ignore_eos": True}
            answer = cluster.client.post("/scaled/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            return str(answer.headers["x-replica"])

        with ThreadPoolExecutor(RUNNING) as pool:
            wait_for(lambda: len(set(pool.map(ask, "aaaa"))) == 2, 120)
    finally:
        ray.serve.delete("scaled")


def test_loading_into_one_replica_is_refused(cluster: Cluster) -> None:
    answer = cluster.client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "/x"})
    assert answer.status_code == 400 and "root" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "adapter"),
    [
        ({"model": "sql"}, "sql"),
        ({"model": "tiny"}, ""),
        ({"model": "tiny:sql"}, "sql"),
        ({"model": ""}, ""),
        ({"model": '{"b": 0.5, "a": 0.5}'}, "a"),
        ({"model": "tiny", "adapter": {"c": 1.0}}, "c"),
        ({"model": '{"adapters": ["z", "y"], "weights": [1, 1], "combination_type": "linear"}'}, "y"),
        ({"inputs": "x", "parameters": {"adapter_id": "chat"}}, "chat"),
        ({"inputs": "x", "parameters": {"merged_adapters": {"ids": ["q", "p"], "weights": [1, 1]}}}, "p"),
        ({"model": 7}, ""),
        ({"model": "\ud800"}, ""),
        ([], ""),
        ("x", ""),
    ],
)
def test_the_place_of_a_request(body: Any, adapter: str) -> None:
    assert adapter_of(json.dumps(body).encode(), "tiny") == adapter


def test_the_place_of_what_is_no_json() -> None:
    for body in (b"", b"{", b"\xff", b"[" * 100_000):
        assert adapter_of(body, "tiny") == ""


def test_a_config_file_says_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="replica"):
        application(Arguments(model="x", replica=2))  # type: ignore[call-arg]
