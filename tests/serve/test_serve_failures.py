"""What is left when a step fails, when its thread is killed, and when no worker comes up."""

from __future__ import annotations

import asyncio
import ctypes
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import adapters, alone, base_model, engine, ids, patched, prompt, slow, until

import mlora
from mlora import errors
from mlora.serve import Sampling
from mlora.serve.batching import Worker

LONG = Sampling(max_new_tokens=30)
DRAWN = Sampling(max_new_tokens=30, temperature=1.0, seed=7, repetition_penalty=1.1)


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> mlora.Runtime:
    base = base_model()
    return patched(base, adapters(tmp_path_factory.mktemp("adapters"), base))


killed = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


class Boom(RuntimeError):
    pass


def fail_once(monkeypatch: pytest.MonkeyPatch, when: Any) -> list[Any]:
    """Let the first step for which `when(worker)` raise within the model."""
    step, raised = Worker._generation_step, []

    def failing(worker: Worker) -> None:
        batch = [one.state.request_id for one in worker.batch_processor.inputs_and_outputs.requests_in_batch]
        if not raised and when(worker, batch):
            raised.append(batch)
            handle = worker.model.lm_head.register_forward_pre_hook(explode)
            try:
                step(worker)
            finally:
                handle.remove()
        else:
            step(worker)

    def explode(*_: Any) -> None:
        raise Boom("a step failed")

    monkeypatch.setattr(Worker, "_generation_step", failing)
    return raised


def test_a_failing_step(runtime: mlora.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its requests get the error. Others, in the batches or not, are run again from their tokens, as they would have
    been: also what they draw."""
    slow(monkeypatch)
    raised = fail_once(monkeypatch, lambda worker, batch: worker.steps >= 8 and len(batch) < len(worker._sequences))

    async def run() -> list[Any]:
        # A step of 9 tokens: the prompts behind the first two are read piece by piece, so not all are in each step.
        async with engine(runtime, max_running=5, batch_tokens=9) as served:
            asked = [(prompt(seed, 30), entry, DRAWN) for seed, entry in enumerate(["a", None, "b", "c", "d", "a"])]
            got = await asyncio.gather(*(ids(served, *one) for one in asked), return_exceptions=True)
            stats = served.stats()
            assert stats.alive and stats.restarts == 1 and stats.running == stats.reserved_tokens == stats.adapters == 0
            again = await ids(served, *asked[0])
            assert again == alone(runtime.model, *asked[0])
            return list(zip(got, asked, strict=True))

    results = asyncio.run(run())
    failed = [got for got, _ in results if isinstance(got, Exception)]
    assert len(failed) == len(raised[0]) < len(results)
    assert all(isinstance(error, errors.ServeError) and isinstance(error.__cause__, Boom) for error in failed)
    for got, one in results:
        assert isinstance(got, Exception) or got == alone(runtime.model, *one)
    assert all(not packed.pins for packed in runtime._store._adapters.values())


@killed
def test_a_killed_thread(runtime: mlora.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """No request is to blame: all are run again from their tokens."""
    slow(monkeypatch)

    async def run() -> list[list[int]]:
        async with engine(runtime) as served:
            tasks = [asyncio.create_task(ids(served, prompt(seed), "abcd"[seed], DRAWN)) for seed in range(4)]
            await until(lambda: served.stats().tokens > 20)
            thread = served._runner._worker._generation_thread
            assert ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)
            )
            await until(lambda: served.stats().restarts == 1 and served.stats().alive)
            return await asyncio.gather(*tasks)

    for seed, got in enumerate(asyncio.run(run())):
        assert got == alone(runtime.model, prompt(seed), "abcd"[seed], DRAWN)


def test_a_step_that_always_fails(runtime: mlora.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of a step there is nobody to blame, and no end: after three times those that run fail."""

    def failing(*_: Any, **__: Any) -> None:
        raise Boom("scheduling failed")

    async def run() -> None:
        async with engine(runtime) as served:
            assert await ids(served, prompt(1), "a", Sampling(max_new_tokens=2))
            with monkeypatch.context() as patch:
                patch.setattr(
                    "transformers.generation.continuous_batching.scheduler.FIFOScheduler.schedule_batch", failing
                )
                with pytest.raises(errors.ServeError, match="scheduling failed"):
                    await ids(served, prompt(1), "a", LONG)
            await until(lambda: served.stats().alive)
            assert await ids(served, prompt(1), "a", LONG) == alone(runtime.model, prompt(1), "a", LONG)
            assert served.stats().restarts == 4

    asyncio.run(run())


def test_scores_that_are_not_finite(runtime: mlora.Runtime) -> None:
    """Of one request: it fails, and the step goes on. In the last layer's queries, so that no others see them."""
    bad = patched(base_model(), {})
    tensors = {
        f"model.layers.1.self_attn.q_proj.lora_{part}.weight": torch.full(shape, 1e30)
        for part, shape in {"A": (1, 32), "B": (32, 1)}.items()
    }
    bad.add_adapter("inf", mlora.Adapter({"peft_type": "LORA", "r": 1, "lora_alpha": 1}, tensors))

    async def run() -> None:
        async with engine(bad) as served:
            good = asyncio.create_task(ids(served, prompt(1), None, LONG))
            with pytest.raises(errors.ServeError, match="not finite"):
                await ids(served, prompt(2), "inf", LONG)
            assert await good == alone(bad.model, prompt(1), None, LONG)
            assert served.stats().restarts == 0

    asyncio.run(run())


@killed
def test_no_worker_comes_up(runtime: mlora.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """At first it is an error of the engine's making; later of all requests."""

    def failing(*_: Any) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "_create_batch_processor", failing)
        with pytest.raises(errors.ServeError, match="no room"):
            engine(runtime)

    async def run() -> None:
        slow(monkeypatch)
        async with engine(runtime, max_running=1) as served:
            running, waiting = served.generate(prompt(1), "a", LONG), served.generate(prompt(2), "b", LONG)
            await anext(running)
            monkeypatch.setattr(Worker, "_create_batch_processor", failing)
            thread = served._runner._worker._generation_thread
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
            for stream in (running, waiting):
                with pytest.raises(errors.ServeError, match="no room"):
                    while True:
                        await asyncio.wait_for(anext(stream), 20)
            with pytest.raises(errors.ServeError):
                served.generate(prompt(1), "a", LONG)
            assert not served.stats().alive

    asyncio.run(run())


def test_an_engine_that_is_let_go_keeps_nothing(runtime: mlora.Runtime, tmp_path: Path) -> None:
    """After `close` neither thread nor cache is left."""
    import threading
    import weakref

    before = threading.active_count()
    served = engine(runtime)
    list(served.generate_many([(prompt(1), "a")], Sampling(max_new_tokens=2)))
    cache = weakref.ref(served._runner._worker.batch_processor.cache)
    served.close()
    assert threading.active_count() == before
    del served
    gc.collect()
    assert cache() is None


def test_names_of_transformers_that_changed_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlora.serve import versions

    versions.check_names()
    with monkeypatch.context() as patch:
        patch.setitem(versions.NAMES["scheduler"], "FIFOScheduler", {"clear_cancelled_requests": ("self", "all")})
        with pytest.raises(errors.ServeError, match="has FIFOScheduler"):
            versions.check_names()
    with monkeypatch.context() as patch:
        patch.setitem(versions.NAMES["cache"], "PagedCache", {})
        with pytest.raises(errors.ServeError, match="PagedCache"):
            versions.check_names()
    with pytest.raises(errors.ServeError, match="without requests"):
        versions.has([], "requests")
