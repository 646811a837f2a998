"""Traffic with everything at once. MLORA_SOAK=5000 asks so many requests; without it a few hundred."""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from serving import adapters, alone, base_model, engine, patched, prompt

from mlora import errors
from mlora.serve import Engine, Sampling
from mlora.serve.batching import Worker
from mlora.serve.request import Request, SequenceState

REQUESTS = int(os.environ.get("MLORA_SOAK", "250"))
CLIENTS = 20
CONTENTS = "abcdefgh"
KINDS = [
    Sampling(max_new_tokens=12),
    Sampling(max_new_tokens=20, temperature=1.0, seed=3),
    Sampling(max_new_tokens=8, temperature=0.7, top_k=12, repetition_penalty=1.2, seed=4),
]


class Boom(RuntimeError):
    pass


class Traffic:
    """Clients that ask, cancel, replace, delete and load; and what their answers may be."""

    def __init__(self, served: Engine, folders: dict[str, Path]) -> None:
        self.served, self.folders = served, folders
        self.asked = 0
        self.ends: Counter[str] = Counter()
        self.random = random.Random(5)
        # Name -> its contents, oldest first: "x" and "y" are replaced, "z" comes and goes, others are known by path.
        self.contents: dict[str, list[str]] = {"x": ["a"], "y": ["b"], "z": ["c"]}
        self.settled = Counter[str]()  # which of them it had when the last change that is through was made
        self.answers: list[tuple[int, int, list[str | None], list[int]]] = []  # with what they may be of

    async def client(self) -> None:
        while self.asked < REQUESTS:
            self.asked += 1
            if self.random.random() < 0.06:
                await self.change()
            await self.ask()

    async def change(self) -> None:
        name, content = self.random.choice("xyz"), self.random.choice(CONTENTS)
        try:
            if name == "z":
                await self.served.delete_adapter("z")
            own = len(self.contents[name])
            self.contents[name].append(content)  # first, or a request could see it before
            if name == "z":
                await self.served.load_adapter(self.folders[content], "z")
            else:
                await self.served.replace_adapter(name, self.folders[content])
            self.settled[name] = max(own, self.settled[name])
        except (errors.UnknownAdapterError, errors.DuplicateAdapterError):  # another client is at it
            assert name == "z"
            self.ends["raced"] += 1

    async def ask(self) -> None:
        pick, seed, kind = self.random, self.random.randrange(9), self.random.randrange(3)
        name = pick.choice(["x", "y", "z", None, *(f"path-{content}" for content in CONTENTS)])
        leave = pick.randrange(8) if pick.random() < 0.2 else None
        since = self.settled[name] if name in self.contents else 0
        got: list[int] = []
        upto = None
        try:
            async for token in self.served.generate(prompt(seed, 6 + seed), name, KINDS[kind]):
                got.append(token.id)
                if upto is None and name in self.contents:
                    upto = len(self.contents[name])
                if leave is not None and len(got) > leave:
                    break
        except errors.ServeError as error:
            assert isinstance(error.__cause__, Boom), error
            self.ends["failed"] += 1
        except errors.UnknownAdapterError:
            assert name == "z"
            self.ends["unknown"] += 1
            return
        except errors.Overloaded as error:
            assert 1 <= error.retry_after <= 60
            self.ends["overloaded"] += 1
            return
        else:
            self.ends["left" if leave is not None and len(got) > leave else "whole"] += 1
        if name is None:
            entries = [None]
        elif name in self.contents:
            entries = list(self.contents[name][since:upto])
        else:
            entries = [name.removeprefix("path-")]
        self.answers.append((seed, kind, entries, got))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_soak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """No answer is wrong, none is lost, and nothing is left behind."""
    others = left()  # of other tests
    base = base_model()
    folders = adapters(tmp_path, base, CONTENTS)
    oracle = patched(base, folders).model
    host = 9 * max(packed.held for packed in oracle.mlora._store._adapters.values())
    names = {"x": folders["a"], "y": folders["b"], "z": folders["c"]}
    runtime = patched(base, names, max_adapters=7, host_memory=host)
    step, broken = Worker._generation_step, random.Random(9)

    def sometimes(worker: Worker) -> None:
        if worker.steps and broken.random() < 0.004:
            raise Boom("a step failed")
        step(worker)

    monkeypatch.setattr(Worker, "_generation_step", sometimes)
    logging.disable()  # or pytest would keep the errors, and what their frames have
    request.addfinalizer(lambda: logging.disable(logging.NOTSET))

    async def run() -> Traffic:
        options: dict[str, Any] = {"max_running": 8, "max_waiting": 14, "cache_tokens": 400}
        async with engine(runtime, **options) as served:
            for content in CONTENTS:
                served.register(f"path-{content}", folders[content])
            traffic = Traffic(served, folders)
            halfway = asyncio.create_task(watch(traffic))
            await asyncio.wait_for(asyncio.gather(*(traffic.client() for _ in range(CLIENTS))), 3600)
            before = await halfway
            for _ in range(400):
                stats = served.stats()
                if stats.running == stats.waiting == stats.adapters == 0:
                    break
                await asyncio.sleep(0.01)
            assert stats.running == stats.waiting == stats.adapters == stats.reserved_tokens == 0
            assert not served._runner._running and not served._admission._pending and not served._admission._flights
            assert sum(traffic.ends.values()) - traffic.ends["raced"] == traffic.asked >= REQUESTS
            if REQUESTS >= 2000:
                assert rss() - before < 40 << 20
            assert stats.drops and stats.loads > len(CONTENTS)
            return traffic

    traffic = asyncio.run(run())
    wanted = functools.cache(lambda seed, entry, kind: alone(oracle, prompt(seed, 6 + seed), entry, KINDS[kind]))
    for seed, kind, entries, got in traffic.answers:  # now, for `generate` draws from what all threads share
        assert got in [wanted(seed, entry, kind)[: len(got)] for entry in entries]
    ends = traffic.ends
    del traffic
    assert ends["whole"] > REQUESTS / 3 and ends["left"]
    assert {*map(id, left())} <= {*map(id, others)}
    assert not any(packed.pins for packed in runtime._store._adapters.values())
    assert set(runtime.adapters) <= {"x", "y", "z", *(f"path-{content}" for content in CONTENTS)}


def left() -> list[Any]:
    """The requests and sequences that there are."""
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) in (Request, SequenceState)]


async def watch(traffic: Traffic) -> int:
    """Bytes of memory when a third of the requests have been asked."""
    while traffic.asked < REQUESTS / 3:
        await asyncio.sleep(0.01)
    return rss()


def rss() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_oracle_tells_contents_apart(tmp_path: Path) -> None:
    base = base_model()
    model = patched(base, adapters(tmp_path, base, CONTENTS)).model
    answers = [tuple(alone(model, prompt(3), entry, KINDS[0])) for entry in [None, *CONTENTS]]
    assert len(set(answers)) == len(answers)
