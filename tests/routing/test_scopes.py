"""What is routed where: in tasks, generators and threads, whatever order they run and end in."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mlora
from mlora import errors
from mlora.plan.scope import Scope


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class World:
    """A model with the adapters "a" and "b", which tells by what it returns under which of them it runs."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.model = Tiny()
        self.x = torch.randn(2, 8, generator=draw)
        linear, self.want = self.model.body[0], {}
        weight, bias = linear.weight.detach().double(), linear.bias.detach().double()
        self.runtime = mlora.patch(self.model)
        for name in ("a", "b", None):
            a, b = torch.randn(2, 8, generator=draw), torch.randn(8, 2, generator=draw)
            delta = 0 if name is None else b.double() @ a.double()
            self.want[name] = torch.tanh(self.x.double() @ (weight + delta).t() + bias)
            if name is not None:
                tensors = {"body.0.lora_A.weight": a, "body.0.lora_B.weight": b}
                config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["0"]}
                self.runtime.add_adapter(name, mlora.Adapter(config, tensors))

    def use(self, entries: Any) -> Any:
        return self.runtime.use_adapters(entries)

    def now(self, **options: Any) -> str | None:
        """The adapter of a call of the model; a call of a part of it alone has the same."""
        return self._told(lambda: self.model(self.x, **options), None if options else lambda: self.model.body(self.x))

    def _told(self, call: Callable[[], Tensor], part: Callable[[], Tensor] | None) -> str | None:
        with torch.no_grad():
            got = call()
            (found,) = [name for name, want in self.want.items() if (got.double() - want).abs().max() < 1e-5]
            assert part is None or torch.equal(part(), got), "a part of the model is under another"
        return found

    def refused(self, words: str = "has ended") -> None:
        """Neither the model nor a part of it answers."""
        for part in (self.model, self.model.body):
            with pytest.raises(errors.RoutingError, match=words):
                part(self.x)

    @property
    def pins(self) -> list[int]:
        return [self.runtime._store[name].pins for name in "ab"]


@pytest.fixture
def world() -> Iterator[World]:
    """When a test has ended nothing may be routed or pinned."""
    made = World()
    yield made
    gc.collect()
    assert made.now() is None and made.pins == [0, 0] and made.runtime._readers.count == 0
    assert len(made.runtime._shared.scopes._lasting) == 1 and not made.runtime._shared.scopes._suspendable
    mlora.unpatch(made.model)


# Tasks


def test_tasks_of_one_thread_have_their_own(world: World) -> None:
    async def task(name: str | None) -> list[str | None]:
        got = []
        with world.use(name):
            for _ in range(3):
                got.append(world.now())
                await asyncio.sleep(0)
                assert world.now(adapter_names="b") == "b"
        return [*got, world.now()]

    async def main() -> list[Any]:
        return await asyncio.gather(task("a"), task("b"), task(None))

    assert asyncio.run(main()) == [["a"] * 3 + [None], ["b"] * 3 + [None], [None] * 4]


def test_a_task_has_what_was_open_where_it_was_started_until_that_ends(world: World) -> None:
    async def child(go_on: asyncio.Event) -> None:
        assert world.now() == "a"
        await go_on.wait()
        world.refused()
        assert world.now(adapter_names="b") == "b"
        with world.use("b"):
            assert world.now() == "b"
        world.refused()  # and not what was there before it

    async def main() -> None:
        before = asyncio.create_task(outside())
        go_on = asyncio.Event()
        with world.use("a"):
            task = asyncio.create_task(child(go_on))
            await asyncio.sleep(0)
            assert world.now() == "a"
        go_on.set()
        assert world.now() is None
        await task
        await before

    async def outside() -> None:
        for _ in range(3):
            assert world.now() is None
            await asyncio.sleep(0)

    asyncio.run(main())


def test_a_cancelled_task_leaves_nothing(world: World) -> None:
    async def task() -> None:
        with world.use("a"):
            await asyncio.sleep(60)

    async def main() -> None:
        running = asyncio.create_task(task())
        await asyncio.sleep(0)
        assert world.pins == [1, 0]
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert world.pins == [0, 0] and world.now() is None

    asyncio.run(main())


def test_a_call_that_runs_as_its_use_adapters_ends_keeps_its_adapters(world: World) -> None:
    inside, go_on, got = threading.Event(), threading.Event(), []
    hook = world.model.body[0].register_forward_pre_hook(lambda *_: inside.set() or (go_on.wait(10), None)[1])
    thread = threading.Thread(target=lambda: got.append(world.now(adapter_names=None)))
    with world.use("a"):
        thread.start()
        assert inside.wait(10)
    with pytest.raises(errors.AdapterInUseError):
        world.runtime.delete_adapter("a")
    hook.remove()
    go_on.set()
    thread.join()
    assert got == ["a"]


# Exits in any order


def test_exits_out_of_order_bring_nothing_back(world: World) -> None:
    first, second, third = world.use("a"), world.use("b"), world.use("a")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert world.now() == "b" and world.pins == [0, 1]
    third.__enter__()
    second.__exit__(None, None, None)
    assert world.now() == "a" and world.pins == [1, 0]
    third.__exit__(None, None, None)
    assert world.now() is None


def test_scopes_that_overlap_for_ever_leave_no_chain(world: World) -> None:
    open_ = world.use("a")
    open_.__enter__()
    for name in "ba" * 20:
        following = world.use(name)
        following.__enter__()
        open_.__exit__(None, None, None)
        open_ = following
    gc.collect()
    kept = [o for o in gc.get_objects() if type(o) is Scope and o._scopes is world.runtime._shared.scopes]
    assert world.now() == "a" and len(kept) < 6
    open_.__exit__(None, None, None)


def test_nested_ones_and_names_inside_of_them(world: World) -> None:
    world.runtime.set_adapter("b")
    with world.use("a"):
        assert world.now() == "a"
        with world.use(None):
            assert world.now() is None and world.now(adapter_names="b") == "b"
        assert world.now() == "a"
        world.runtime.set_adapter(None)
    assert world.now() is None


def test_use_adapters_inside_of_a_call(world: World) -> None:
    seen = []

    def hook(*_: Any) -> None:
        if not seen:
            seen.append(None)
            seen[0] = world.now()
            with world.use("b"):
                seen.append(world.now())
            seen.append(world.now())

    world.model.body.register_forward_pre_hook(hook)
    assert world.now(adapter_names="a") == "a"
    assert seen == ["a", "b", "a"]


# Generators


def stream(world: World, name: str, steps: int = 9) -> Iterator[str | None]:
    with world.use(name):
        for _ in range(steps):
            yield world.now()


def test_generators_in_turn_have_their_own(world: World) -> None:
    one, two = stream(world, "a", 2), stream(world, "b", 3)
    assert [next(s, "end") for s in (one, two, one, two, one, two, two)] == ["a", "b", "a", "b", "end", "b", "end"]
    assert world.now() is None


def test_a_waiting_generator_is_not_its_callers(world: World) -> None:
    one = stream(world, "a")
    next(one)
    world.refused("generator")
    assert world.now(adapter_names="b") == "b" and world.now(adapter_names="__base__") is None
    with world.use("b"):
        assert world.now() == "b" and next(one) == "a" and world.now() == "b"
        two = stream(world, "b")
        assert [next(two), next(one), next(two)] == ["b", "a", "b"]
        one.close()
        world.refused("generator")  # the other one still waits
        two.close()
        assert world.now() == "b"
    assert world.now() is None


def close_in_a_thread(generator: Any) -> None:
    thread = threading.Thread(target=generator.close)
    thread.start()
    thread.join()


@pytest.mark.parametrize(
    "end",
    (lambda g: g.close(), lambda g: contextvars.Context().run(g.close), close_in_a_thread, lambda g: None),
    ids=("closed", "in-another-context", "in-a-thread", "collected"),
)
def test_a_generator_that_is_not_run_to_its_end(world: World, end: Callable[[Any], None]) -> None:
    one, two = stream(world, "a"), stream(world, "b")
    next(one), next(two)
    end(one)
    del one
    assert world.pins == [0, 1]
    assert next(two) == "b"
    end(two)
    del two
    assert world.pins == [0, 0] and world.now() is None


def test_a_generator_is_run_in_a_new_context_each_time(world: World) -> None:
    """As servers do that stream what it yields from threads of a pool."""
    one, two = stream(world, "a", 3), stream(world, "b", 2)
    with ThreadPoolExecutor(2) as pool:
        got = [pool.submit(contextvars.copy_context().run, next, s, "end").result() for s in (one, two, one, two) * 2]
    assert got == ["a", "b", "a", "b", "a", "end", "end", "end"]
    assert world.now() is None


def test_context_managers_are_for_their_callers(world: World) -> None:
    @contextmanager
    def routed(name: str) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(world.use(name))
            yield

    @routed("b")
    def decorated() -> str | None:
        return world.now()

    def within() -> Iterator[str | None]:
        with routed("b"):
            yield world.now()
            yield decorated()

    with routed("a"):
        assert world.now() == "a" and decorated() == "b" and world.now() == "a"
        one = within()
        assert next(one) == "b"
        world.refused("generator")
        assert list(one) == ["b"] and world.now() == "a"
    assert world.now() is None


def test_async_generators(world: World) -> None:
    async def streamed(name: str) -> AsyncIterator[str | None]:
        with world.use(name):
            while True:
                await asyncio.sleep(0)
                assert await asyncio.to_thread(world.now) == name
                yield world.now()

    @asynccontextmanager
    async def routed(name: str) -> AsyncIterator[None]:
        with world.use(name):
            yield

    async def main() -> None:
        one, two = streamed("a"), streamed("b")
        assert [await anext(s) for s in (one, two, one, two)] == ["a", "b", "a", "b"]
        world.refused("generator")
        await one.aclose()
        assert await anext(two) == "b"
        async with routed("a"):
            assert world.now() == "a" and await anext(two) == "b"
        del two  # asyncio closes it in a task of its own
        gc.collect()
        await asyncio.sleep(0.01)
        assert world.now() is None

    asyncio.run(main())


def test_coroutines_that_are_run_by_hand(world: World) -> None:
    class Pause:
        def __await__(self) -> Iterator[None]:
            yield

    async def work(name: str) -> None:
        with world.use(name):
            for _ in range(2):
                assert world.now() == name
                await Pause()

    one, two = work("a"), work("b")
    for coroutine in (one, two, one, two):
        coroutine.send(None)
    world.refused("generator")
    for coroutine in (one, two):
        with pytest.raises(StopIteration):
            coroutine.send(None)


# Threads


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    out: list[Any] = []
    thread = threading.Thread(target=lambda: out.append(work()))
    thread.start()
    return thread, out


def test_a_thread_has_what_was_open_where_it_was_started(world: World) -> None:
    go_on, wait = threading.Event(), threading.Event()
    early, told = in_thread(lambda: (go_on.wait(10), world.now())[-1])
    with world.use("a"):
        go_on.set()
        early.join()
        thread, got = in_thread(world.now)
        thread.join()
        late, refused = in_thread(lambda: (wait.wait(10), world.refused(), world.now(adapter_names="b"))[-1])
    wait.set()
    late.join()
    assert (told, got, refused) == ([None], ["a"], ["b"])


def test_a_thread_that_a_generator_starts(world: World) -> None:
    """As one does that streams what `generate` writes in another thread."""

    def streamed(name: str) -> Iterator[Any]:
        with world.use(name):
            for _ in range(2):
                thread, got = in_thread(world.now)
                thread.join()
                yield got[0]

    one, two = streamed("a"), streamed("b")
    assert [next(s) for s in (one, two, one, two)] == ["a", "b", "a", "b"]
    thread, refused = in_thread(lambda: world.refused("generator"))
    thread.join()
    assert refused == [None]
    one.close(), two.close()


def test_work_for_a_pool_has_what_was_open_where_it_was_given(world: World) -> None:
    def streamed(pool: ThreadPoolExecutor) -> Iterator[Any]:
        with world.use("b"):
            yield pool.submit(world.now).result()
            yield pool.submit(lambda: in_pool.submit(world.now).result()).result()

    wait = threading.Event()
    with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(1) as in_pool:
        with world.use("a"):
            assert pool.submit(world.now).result() == "a"  # and starts its thread, which is not a's
            assert list(pool.map(lambda _: world.now(), range(2))) == ["a", "a"]
            late = pool.submit(lambda: (wait.wait(10), world.refused())[-1])
        wait.set()
        assert late.result() is None and pool.submit(world.now).result() is None
        one = streamed(pool)
        assert next(one) == "b"
        assert next(one) == "b"
        one.close()
        assert pool.submit(world.now).result() is None


def test_a_thread_started_where_nothing_was_opened_outlives_the_call(world: World) -> None:
    """It has what any thread has: the default."""
    go_on, started = threading.Event(), []
    hook = world.model.body.register_forward_hook(
        lambda *_: started or started.extend(in_thread(lambda: (go_on.wait(10), world.now())[-1]))
    )
    assert world.now(adapter_names=None) is None
    hook.remove()
    world.runtime.set_adapter("b")
    go_on.set()
    started[0].join()
    assert started[1] == ["b"]
    world.runtime.set_adapter(None)


def test_unpatching_while_a_generator_waits(world: World) -> None:
    one = stream(world, "a")
    next(one)
    with pytest.raises(errors.PatchError, match="use_adapters"):
        mlora.unpatch(world.model)
    one.close()
