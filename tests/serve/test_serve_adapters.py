"""Adapters under traffic: loaded, replaced, deleted, damaged, more than fit; and those known by path only."""

from __future__ import annotations

import asyncio
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from serving import adapters, alone, base_model, engine, ids, patched, prompt, rest, slow, until

import mlora
from mlora import errors
from mlora.routing.entries import key_of, names_of
from mlora.routing.files import Files
from mlora.serve import Engine, Sampling

SAMPLING = Sampling(max_new_tokens=12)
LONG = Sampling(max_new_tokens=40)


@pytest.fixture(scope="module")
def base() -> Any:
    return base_model()


@pytest.fixture(scope="module")
def folders(base: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return adapters(tmp_path_factory.mktemp("adapters"), base, "abcdefgh")


@pytest.fixture(scope="module")
def oracle(base: Any, folders: dict[str, Path]) -> Any:
    """A model that has them all, and that no engine uses."""
    return patched(base, folders).model


def some(folders: dict[str, Path], names: str) -> dict[str, Path]:
    return {name: folders[name] for name in names}


def test_replace_under_traffic(
    base: Any, folders: dict[str, Path], oracle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs finishes with the old content, what comes later gets the new; a merge of it, too."""
    slow(monkeypatch)
    runtime = patched(base, some(folders, "ab"))
    mix = {"a": 0.5, "b": 0.5}

    async def run() -> list[list[int]]:
        async with engine(runtime) as served:
            before = [served.generate(prompt(1), entry, LONG) for entry in ("a", mix)]
            firsts = [(await anext(stream)).id for stream in before]
            await served.replace_adapter("a", folders["c"])
            after = [served.generate(prompt(1), entry, LONG) for entry in ("a", mix)]
            rests = [await rest(stream) for stream in [*before, *after]]
            return [[first, *rests[at]] for at, first in enumerate(firsts)] + rests[2:]

    got = asyncio.run(run())
    wanted = ["a", mix, "c", {"c": 0.5, "b": 0.5}]
    assert got == [alone(oracle, prompt(1), entry, LONG) for entry in wanted]
    assert len(runtime._store._adapters) == 2  # the old content is gone with its last request


def test_what_is_asked_of_one_name_keeps_its_order(
    base: Any, folders: dict[str, Path], oracle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the files of the first take longer; other names do not wait for them."""
    read, order, others = Files.read, [], threading.Event()

    def slowly(files: Files, name: str, again: bool = True) -> Any:
        if files.source == str(folders["b"]):
            assert others.wait(60)
        order.append(Path(files.source).name)
        if name != "a":
            others.set()
        return read(files, name, again)

    monkeypatch.setattr(Files, "read", slowly)
    runtime = patched(base, some(folders, "a"))
    order.clear()
    others.clear()

    async def run() -> list[int]:
        async with engine(runtime) as served:
            loads = [served.load_adapter(folders[name], name) for name in "defgh"]
            await asyncio.gather(
                served.replace_adapter("a", folders["b"]),
                served.replace_adapter("a", folders["d"]),
                served.delete_adapter("a"),
                served.load_adapter(folders["c"], "a"),
                *loads,
            )
            return await ids(served, prompt(1), "a", LONG)

    assert asyncio.run(run()) == alone(oracle, prompt(1), "c", LONG)
    assert order.index("b") > 0
    assert [name for name in order if name in "bc"] == ["b", "c"]
    with pytest.raises(errors.ServeError, match="closed"):
        asyncio.run(closed(runtime).load_adapter(folders["c"], "z"))


def closed(runtime: mlora.Runtime) -> Engine:
    with engine(runtime) as served:
        return served


def test_delete_under_traffic(
    base: Any, folders: dict[str, Path], oracle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs finishes, the name is free at once, and what waits for it fails by its name."""
    slow(monkeypatch)
    runtime = patched(base, some(folders, "ab"))

    async def run() -> list[int]:
        async with engine(runtime, max_running=1, ahead=0) as served:
            running = served.generate(prompt(1), "a", LONG)
            first = (await anext(running)).id
            waits = served.generate(prompt(2), "a", SAMPLING)
            await served.delete_adapter("a")
            with pytest.raises(errors.UnknownAdapterError, match="'a'"):
                served.generate(prompt(2), "a", SAMPLING)
            with pytest.raises(errors.UnknownAdapterError):
                await served.delete_adapter("a")
            got = [first, *await rest(running)]
            with pytest.raises(errors.UnknownAdapterError, match="'a'"):
                await anext(waits)
            info = await served.load_adapter(folders["d"], "a")
            assert info.name == "a"
            assert await ids(served, prompt(2), "a", SAMPLING) == alone(oracle, prompt(2), "d", SAMPLING)
            assert served.stats().waiting == served.stats().running == 0
            return got

    assert asyncio.run(run()) == alone(oracle, prompt(1), "a", LONG)


def test_registered_by_path(base: Any, folders: dict[str, Path], oracle: Any) -> None:
    """Read when first asked for, dropped when host memory is full, and read again."""
    most = 3 * max(packed.held for packed in oracle.mlora._store._adapters.values())
    runtime = patched(base, {}, host_memory=most)

    async def run() -> None:
        async with engine(runtime) as served:
            for name, folder in folders.items():
                served.register(name, folder)
            with pytest.raises(errors.DuplicateAdapterError):
                served.register("a", folders["a"])
            assert served.stats().registered == 8 and not served.stats().host_bytes
            assert {info.location for info in runtime.adapters.values()} == {"files"}
            for turn in range(2):
                names = list(folders) * 2
                got = await asyncio.gather(*(ids(served, prompt(turn), name, SAMPLING) for name in names))
                assert got == [alone(oracle, prompt(turn), name, SAMPLING) for name in names]
                mix = {"a": 0.5, "h": 0.25, "c": 1.0}
                assert await ids(served, prompt(3), mix, SAMPLING) == alone(oracle, prompt(3), mix, SAMPLING)
            stats = served.stats()
            assert stats.drops >= 5 and stats.loads > 8 and stats.host_bytes <= most
            there = [name for name, info in runtime.adapters.items() if info.location != "files"]
            assert 1 <= len(there) <= 4
            loads, hot = stats.loads, there[-1]
            await asyncio.gather(*(ids(served, prompt(5), hot, SAMPLING) for _ in range(5)))
            assert served.stats().loads == loads

    asyncio.run(run())


def test_one_flight_a_name(base: Any, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """However many ask for an adapter at once, alone and in mixes, it is read once."""
    runtime, reads, read = patched(base, {}), [], Files.read
    monkeypatch.setattr(
        Files, "read", lambda files, name, again=True: (reads.append(name), read(files, name, again))[1]
    )

    async def run() -> None:
        async with engine(runtime) as served:
            for name in "abc":
                served.register(name, folders[name])
            entries = ["a", "b", {"a": 0.5, "b": 0.5}, {"b": 1.0, "c": 0.5}, "a", "c"] * 3
            await asyncio.gather(*(ids(served, prompt(1), entry, SAMPLING) for entry in entries))

    asyncio.run(run())
    assert sorted(reads) == ["a", "b", "c"]


def test_replace_and_delete_of_registered(base: Any, folders: dict[str, Path], oracle: Any) -> None:
    """Whether it is loaded or not."""
    runtime = patched(base, {})

    async def run() -> None:
        async with engine(runtime) as served:
            served.register("x", folders["a"])
            await served.replace_adapter("x", folders["b"])
            assert await ids(served, prompt(1), "x", SAMPLING) == alone(oracle, prompt(1), "b", SAMPLING)
            await served.replace_adapter("x", folders["c"])
            assert await ids(served, prompt(1), "x", SAMPLING) == alone(oracle, prompt(1), "c", SAMPLING)
            await served.delete_adapter("x")
            assert not runtime.adapters and served.stats().registered == 0 and served.stats().host_bytes == 0
            served.register("x", folders["d"])
            await served.delete_adapter("x")
            with pytest.raises(errors.UnknownAdapterError):
                served.generate(prompt(1), "x", SAMPLING)

    asyncio.run(run())


def test_a_damaged_adapter_fails_its_own_requests(
    base: Any, folders: dict[str, Path], oracle: Any, tmp_path: Path
) -> None:
    """And nobody else's; when it has been mended, it serves."""
    runtime = patched(base, some(folders, "a"))
    bad = tmp_path / "bad"
    shutil.copytree(folders["b"], bad)
    weights = (bad / "adapter_model.safetensors").read_bytes()
    (bad / "adapter_model.safetensors").write_bytes(weights[:-40])

    async def run() -> None:
        async with engine(runtime) as served:
            served.register("bad", bad)
            served.register("gone", tmp_path / "nothing")
            good = [asyncio.create_task(ids(served, prompt(seed), "a", SAMPLING)) for seed in range(3)]
            for name in ("bad", "gone", {"a": 0.5, "bad": 0.5}):
                with pytest.raises(errors.AdapterError):
                    await ids(served, prompt(1), name, SAMPLING)
            with pytest.raises(errors.AdapterError):
                await served.load_adapter(bad, "other")
            with pytest.raises(errors.AdapterError):
                await served.replace_adapter("a", bad)
            for seed, task in enumerate(good):
                assert await task == alone(oracle, prompt(seed), "a", SAMPLING)
            (bad / "adapter_model.safetensors").write_bytes(weights)
            assert await ids(served, prompt(1), "bad", SAMPLING) == alone(oracle, prompt(1), "b", SAMPLING)
            assert served.stats().adapters == 0 and served.stats().restarts == 0

    asyncio.run(run())


def test_a_full_arena_waits(base: Any, folders: dict[str, Path], oracle: Any) -> None:
    """There is room for two adapters, and eight are asked for: in turns, and never an error."""
    sizes = [info.bytes for info in oracle.mlora.adapters.values()]
    runtime = patched(base, folders, memory=2 * max(sizes) + 256)
    entries = [*folders, *folders, None, {"a": 0.5, "b": 0.5}]

    async def run() -> list[list[int]]:
        async with engine(runtime) as served:
            return await asyncio.gather(*(ids(served, prompt(1), entry, SAMPLING) for entry in entries))

    for got, entry in zip(asyncio.run(run()), entries, strict=True):
        assert got == alone(oracle, prompt(1), entry, SAMPLING)


def test_what_never_fits_is_an_error(base: Any, folders: dict[str, Path], oracle: Any) -> None:
    sizes = [info.bytes for info in oracle.mlora.adapters.values()]
    runtime = patched(base, folders, memory=2 * max(sizes) + 256)

    async def run() -> None:
        async with engine(runtime) as served:
            others = [asyncio.create_task(ids(served, prompt(seed), "a", SAMPLING)) for seed in range(3)]
            with pytest.raises(errors.CapacityError):
                await ids(served, prompt(1), dict.fromkeys("abcd", 0.25), SAMPLING)
            await asyncio.gather(*others)
            assert served.stats().waiting == 0

    asyncio.run(run())


def test_adapters_in_flight(base: Any, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """No more at once than `max_adapters`."""
    slow(monkeypatch, 0.002)
    runtime, most = patched(base, folders), 0

    async def run() -> None:
        nonlocal most
        async with engine(runtime, max_adapters=2, max_running=5) as served:
            tasks = [asyncio.create_task(ids(served, prompt(1), name, SAMPLING)) for name in [*folders, *folders]]
            while not all(task.done() for task in tasks):
                most = max(most, served.stats().adapters)
                await asyncio.sleep(0.002)
            await asyncio.gather(*tasks)

    asyncio.run(run())
    assert most == 2


def test_what_packed_calls_refuse_is_refused_at_admission(base: Any, folders: dict[str, Path]) -> None:
    """By name, and not in a step."""
    runtime = patched(base, some(folders, "ab"))
    check = runtime.check_packed

    def refuse(entry: Any) -> None:
        check(entry)
        if entry == "a":
            raise errors.AttributionError("adapter 'a' cannot be told token by token")

    runtime.check_packed = refuse  # type: ignore[method-assign]

    async def run() -> None:
        async with engine(runtime) as served:
            with pytest.raises(errors.AttributionError, match="adapter 'a'"):
                await ids(served, prompt(1), "a", SAMPLING)
            assert await ids(served, prompt(1), "b", SAMPLING)
            assert served.stats().restarts == 0

    asyncio.run(run())


def test_entries_that_say_the_same_share_a_line() -> None:
    merge = {"ids": ["a", "b"], "weights": [1.0, 2.0], "merge_strategy": "ties", "density": 0.5}
    same = mlora.Merge(("b", "a"), (2.0, 1.0), "ties", density=0.5)
    assert key_of(merge) == key_of(same) and set(names_of(merge)) == {"a", "b"}
    assert key_of({"a": 1.0, "b": 2.0}) == key_of({"b": 2.0, "a": 1.0}) != key_of({"a": 1.0, "b": 2.5})
    assert key_of("__base__") == key_of(None) and names_of(None) == ()


def test_a_removed_file_matters_when_it_is_read_again(base: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    """An adapter that was removed while it ran: what runs is not disturbed, what comes later says what is missing."""
    copy = tmp_path / "copy"
    shutil.copytree(folders["a"], copy)
    runtime = patched(base, {}, host_memory=13000)

    async def run() -> None:
        async with engine(runtime) as served:
            served.register("x", copy)
            stream = served.generate(prompt(1), "x", LONG)
            await anext(stream)
            shutil.rmtree(copy)
            assert len(await rest(stream)) == 39
            await until(lambda: served.stats().adapters == 0)
            served.register("y", folders["b"])
            await ids(served, prompt(1), "y", SAMPLING)
            with pytest.raises(errors.AdapterError):
                await ids(served, prompt(1), "x", SAMPLING)

    asyncio.run(run())
