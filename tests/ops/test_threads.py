"""Threads that torch computes with: who computes now and then keeps none."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import adapters, base_model, engine, patched, prompt

from mlora.ops import threads
from mlora.serve import Sampling

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux tells them")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def computing() -> int:
    """Threads that are none of Python's."""
    return len(os.listdir("/proc/self/task")) - threading.active_count()


def work(*_: Any) -> None:
    torch.randn(1 << 20).relu_()


def test_a_team_goes_and_comes_back() -> None:
    threads.let_go()
    before = computing()
    work()
    assert computing() == before + 1
    threads.let_go()
    assert computing() == before
    work()
    assert computing() == before + 1


def test_loads_and_prefetches_keep_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_model()
    folders = adapters(tmp_path, base)
    runtime = patched(base, {})
    for name, folder in folders.items():
        runtime.register_adapter(folder, name)
    bring = type(runtime._planner).bring

    def brought(planner: Any, entry: Any) -> None:
        work()
        bring(planner, entry)

    monkeypatch.setattr(type(runtime._planner), "bring", brought)
    runtime._prefetch._bring = runtime._planner.bring
    threads.let_go()
    before = computing()
    runtime.prefetch(list(folders)).result(60)
    assert computing() == before
    work()
    with engine(runtime) as served:
        (answer,) = served.generate_many([(prompt(1), "a")], Sampling(max_new_tokens=4))
        assert answer.error is None
        assert computing() <= before + 1  # the worker's own team, if it has computed
        held = computing()
        load = type(runtime).load_adapter

        def loaded(self: Any, *args: Any, **options: Any) -> Any:
            work()
            return load(self, *args, **options)

        monkeypatch.setattr(type(runtime), "load_adapter", loaded)
        served._adapters.ask("load", "new", folders["a"], {}).result(60)
        assert computing() <= max(held, before + 1)
