"""Prompts that begin alike share blocks, where their keys and values are the same, and nowhere else."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from serving import adapters, alone, base_model, engine, ids, patched, prompt, tokens

from mlora.serve import Sampling

SAMPLING = Sampling(max_new_tokens=8)
PREFIX = prompt(50, 20)


@pytest.fixture(scope="module")
def base() -> Any:
    return base_model()


@pytest.fixture(scope="module")
def folders(base: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return adapters(tmp_path_factory.mktemp("adapters"), base)


async def cached(served: Any, x: list[int], entry: Any, model: Any, like: Any = ...) -> int:
    """How many of the prompt's tokens were there, of an answer that is right."""
    got = await tokens(served, x, entry, SAMPLING)
    assert [token.id for token in got] == alone(model, x, entry if like is ... else like, SAMPLING)
    return got[-1].usage.cached


def test_shared_within_a_content_only(base: Any, folders: dict[str, Path]) -> None:
    runtime = patched(base, folders)
    model = runtime.model

    async def run() -> None:
        async with engine(runtime) as served:
            entries = ["a", "b", None, {"a": 0.5, "b": 0.5}, {"a": 0.5, "b": 0.25}]
            for entry in entries:  # nobody's are anybody else's
                assert await cached(served, [*PREFIX, 3, 4], entry, model) == 0, entry
            for entry in [*entries, {"b": 0.5, "a": 0.5}, "__base__"]:
                assert await cached(served, [*PREFIX, 5, 6, 7], entry, model) == 20, entry
            assert await cached(served, [9, *PREFIX[1:]], "a", model) == 0  # another first token
            assert await cached(served, [*PREFIX[:8], 9, *PREFIX[9:]], "a", model) == 8

    asyncio.run(run())


def test_a_reloaded_name_reads_nothing_of_the_old(base: Any, folders: dict[str, Path]) -> None:
    """Replaced, deleted and loaded again, or dropped and read again from other files."""
    runtime, oracle = patched(base, {"x": folders["a"]}), patched(base, folders).model

    async def run() -> None:
        async with engine(runtime) as served:
            assert await cached(served, PREFIX, "x", oracle, "a") == 0
            assert await cached(served, PREFIX, "x", oracle, "a") == 16
            await served.replace_adapter("x", folders["b"])
            assert await cached(served, PREFIX, "x", oracle, "b") == 0
            assert await cached(served, PREFIX, "x", oracle, "b") == 16
            await served.delete_adapter("x")
            await served.load_adapter(folders["c"], "x")
            assert await cached(served, PREFIX, "x", oracle, "c") == 0

    asyncio.run(run())


def test_what_is_folded_in_counts(base: Any, folders: dict[str, Path]) -> None:
    runtime, oracle = patched(base, folders), patched(base, folders).model

    async def run() -> None:
        async with engine(runtime) as served:
            assert await cached(served, PREFIX, "a", oracle) == 0
            runtime.merge_adapter("b")
            assert await cached(served, PREFIX, "a", oracle) == 0
            assert await cached(served, PREFIX, "a", oracle) == 16
            runtime.unmerge_adapter()
            assert await cached(served, PREFIX, "a", oracle) == 16

    asyncio.run(run())


def test_identical_blocks_of_others_are_not_adopted(base: Any, folders: dict[str, Path]) -> None:
    """Requests of one prompt at the same time: transformers puts one block in place of another that has the same hash
    when it is complete."""
    runtime = patched(base, folders)
    entries = ["a", "b", "c", None, "a", "b", "c", None]

    async def run() -> list[list[int]]:
        async with engine(runtime, batch_tokens=200) as served:
            return await asyncio.gather(*(ids(served, PREFIX, entry, Sampling(max_new_tokens=20)) for entry in entries))

    for got, entry in zip(asyncio.run(run()), entries, strict=True):
        assert got == alone(runtime.model, PREFIX, entry, Sampling(max_new_tokens=20))


def test_answers_are_shared_too_and_short_ones(base: Any, folders: dict[str, Path]) -> None:
    """A prompt that goes on where an answer ended, as chats do; and the prompt of an answer of one token."""
    runtime = patched(base, folders)

    async def run() -> None:
        async with engine(runtime) as served:
            got = await ids(served, PREFIX, "a", SAMPLING)
            assert await cached(served, [*PREFIX, *got, 5], "a", runtime.model) >= 24
            await ids(served, [7, *PREFIX], "a", Sampling(max_new_tokens=1))
            assert await cached(served, [7, *PREFIX, 8], "a", runtime.model) == 20

    asyncio.run(run())


def test_memory_of_contents_is_bounded(base: Any, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is forgotten is not shared, and nothing is shared wrongly."""
    monkeypatch.setattr("mlora.serve.batching._SALTS", 3)
    runtime = patched(base, folders)

    async def run() -> None:
        async with engine(runtime) as served:
            for turn in range(3):
                for entry in ("a", "b", "c", "d", None):
                    await cached(served, [*PREFIX, turn + 2], entry, runtime.model)

    asyncio.run(run())


def test_a_small_cache(base: Any, folders: dict[str, Path]) -> None:
    """Blocks that nobody uses give way, and requests wait for room; all are right."""
    runtime = patched(base, folders)
    asked = [([*PREFIX, seed % 5], "abcd"[seed % 4]) for seed in range(16)]

    async def run() -> list[list[int]]:
        async with engine(runtime, cache_tokens=96) as served:
            return await asyncio.gather(*(ids(served, *one, SAMPLING) for one in asked))

    for got, one in zip(asyncio.run(run()), asked, strict=True):
        assert got == alone(runtime.model, *one, SAMPLING)


def test_without_sharing(base: Any, folders: dict[str, Path]) -> None:
    runtime = patched(base, folders)

    async def run() -> None:
        async with engine(runtime, share_prefixes=False) as served:
            for _ in range(2):
                assert await cached(served, PREFIX, "a", runtime.model) == 0

    asyncio.run(run())
