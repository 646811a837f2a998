"""Each answer of an engine is what `generate` gives that request alone, whatever else runs."""

from __future__ import annotations

import asyncio
import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCAB
from serving import adapters, alone, base_model, engine, ids, letters, patched, prompt, slow, tokens, until

import mlora
from mlora import errors
from mlora.serve import Engine, Sampling
from mlora.serve.batching import Worker

ENTRIES = ["a", None, "b", {"c": 0.5, "d": -0.25}, "d", "a", mlora.Merge(("a", "b"), (0.6, 0.4), "ties", density=0.5)]


@pytest.fixture(scope="module")
def base() -> Any:
    return base_model()


@pytest.fixture(scope="module")
def folders(base: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return adapters(tmp_path_factory.mktemp("adapters"), base)


@pytest.fixture(scope="module")
def runtime(base: Any, folders: dict[str, Path]) -> mlora.Runtime:
    return patched(base, folders)


def test_mixed_entries_and_lengths(runtime: mlora.Runtime) -> None:
    """More requests than may run, prompts that are read in pieces, and entries of every kind."""
    sampling = Sampling(max_new_tokens=11)
    asked = [(prompt(seed, 3 + 7 * (seed % 7)), ENTRIES[seed % len(ENTRIES)]) for seed in range(20)]

    async def run() -> list[list[int]]:
        async with engine(runtime, max_running=6, batch_tokens=16) as served:
            return await asyncio.gather(*(ids(served, *request, sampling) for request in asked))

    for got, (x, entry) in zip(asyncio.run(run()), asked, strict=True):
        assert got == alone(runtime.model, x, entry, sampling), entry


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 9},
        {"temperature": 1.3, "top_p": 0.6},
        {"temperature": 0.9, "min_p": 0.1, "top_k": 30, "top_p": 0.9, "repetition_penalty": 1.3},
        {"repetition_penalty": 1.7},
    ],
    ids=lambda options: ",".join(options),
)
def test_what_is_drawn_depends_on_the_request_alone(runtime: mlora.Runtime, options: dict[str, float]) -> None:
    """The tokens of `generate` after `torch.manual_seed(seed)`, though others draw in between."""
    asked = [
        (prompt(seed), ENTRIES[seed % 6], Sampling(max_new_tokens=9, seed=seed + 3, **options)) for seed in range(8)
    ]

    async def run() -> list[list[int]]:
        async with engine(runtime, max_running=5) as served:
            return await asyncio.gather(*(ids(served, *request) for request in asked))

    got = asyncio.run(run())
    for one, (x, entry, sampling) in zip(got, asked, strict=True):
        assert one == alone(runtime.model, x, entry, sampling)
    if "temperature" in options:
        assert got[0] != alone(runtime.model, *asked[0][:2], Sampling(max_new_tokens=9, seed=77, **options))


def test_biases_and_counted_penalties(runtime: mlora.Runtime) -> None:
    """Against the scores of one forward a token, written out."""
    sampling = Sampling(
        max_new_tokens=12, frequency_penalty=0.7, presence_penalty=0.4, logit_bias={5: 2.5, 9: -100.0, 11: 1.0}
    )
    x, wanted = prompt(1), []
    for _ in range(sampling.max_new_tokens):
        with torch.no_grad():
            scores = runtime.model(torch.tensor([x + wanted]), adapter_names=["b"]).logits[0, -1].double()
        for token, bias in sampling.logit_bias.items():
            scores[token] += bias
        for token in set(wanted):
            scores[token] -= 0.7 * wanted.count(token) + 0.4
        wanted.append(int(scores.argmax()))

    async def run() -> list[int]:
        async with engine(runtime) as served:
            return await ids(served, x, "b", sampling)

    assert asyncio.run(run()) == wanted != alone(runtime.model, x, "b", Sampling(max_new_tokens=12))


def test_biases_are_those_of_generate(runtime: mlora.Runtime) -> None:
    x, sampling = prompt(2), Sampling(max_new_tokens=8, temperature=0.8, seed=5, logit_bias={5: 2.5, 9: -3.0})

    async def run() -> list[int]:
        async with engine(runtime) as served:
            return await ids(served, x, "a", sampling)

    bias = [[[token], value] for token, value in sampling.logit_bias.items()]
    assert asyncio.run(run()) == alone(runtime.model, x, "a", sampling, sequence_bias=bias)


def test_several_answers(runtime: mlora.Runtime) -> None:
    """The i-th of n is that of seed + i; their prompt is read once."""
    x = prompt(3, 13)
    sampling = Sampling(max_new_tokens=7, temperature=1.0, seed=40, n=5)

    async def run() -> list[Any]:
        async with engine(runtime) as served:
            return await tokens(served, x, "c", sampling)

    got = asyncio.run(run())
    for index in range(5):
        own = [token for token in got if token.index == index]
        one = Sampling(max_new_tokens=7, temperature=1.0, seed=40 + index)
        assert [token.id for token in own] == alone(runtime.model, x, "c", one)
        assert own[-1].usage.cached == (12 if index else 0)
        assert [token.finish_reason for token in own] == [None] * 6 + ["length"]


def test_ends(base: Any, folders: dict[str, Path]) -> None:
    """The model's end tokens, those of a request, `ignore_eos` and `min_tokens`."""
    runtime = patched(base, folders)
    x = prompt(4)
    free = alone(runtime.model, x, "a", Sampling(max_new_tokens=20), eos_token_id=None)
    end = free[6]
    first = free.index(end)
    runtime.model.generation_config.eos_token_id = end
    other = free[3]

    async def run() -> list[Any]:
        async with engine(runtime, letters()) as served:
            return await asyncio.gather(
                tokens(served, x, "a", Sampling(max_new_tokens=20)),
                tokens(served, x, "a", Sampling(max_new_tokens=20, ignore_eos=True)),
                tokens(served, x, "a", Sampling(max_new_tokens=20, stop_token_ids=[other])),
                tokens(served, x, "a", Sampling(max_new_tokens=20, min_tokens=first + 3)),
            )

    plain, ignored, stopped, least = asyncio.run(run())
    assert [token.id for token in plain] == free[: first + 1] and plain[-1].finish_reason == "stop"
    assert plain[-1].text == "" and plain[-1].usage.completion == first + 1
    assert [token.id for token in ignored] == free and ignored[-1].finish_reason == "length"
    place = min(free.index(other), first)
    assert [token.id for token in stopped] == free[: place + 1] and stopped[-1].finish_reason == "stop"
    want = alone(runtime.model, x, "a", Sampling(max_new_tokens=20), min_new_tokens=first + 3)
    assert [token.id for token in least] == want


def test_text_and_stops_across_tokens(runtime: mlora.Runtime) -> None:
    """A stop string that begins within one token and ends within another: the answer ends before it."""
    tokenizer, x = letters(), prompt(5)
    free = alone(runtime.model, x, "b", Sampling(max_new_tokens=24))
    text = tokenizer.decode(free, skip_special_tokens=True)
    start = len(tokenizer.decode(free[:9], skip_special_tokens=True)) - 1
    stop = text[start : start + 4]
    where = text.index(stop)

    async def run() -> list[Any]:
        async with engine(runtime, tokenizer) as served:
            return await asyncio.gather(
                tokens(served, x, "b", Sampling(max_new_tokens=24)),
                tokens(served, x, "b", Sampling(max_new_tokens=24, stop=["never there", stop])),
                tokens(served, x, "b", Sampling(max_new_tokens=24, stop=stop, include_stop=True)),
            )

    whole, stopped, included = asyncio.run(run())
    assert "".join(token.text for token in whole) == text and whole[-1].finish_reason == "length"
    assert "".join(token.text for token in stopped) == text[:where] and stopped[-1].finish_reason == "stop"
    assert stopped[-1].usage.completion == len(stopped) < 24
    assert "".join(token.text for token in included) == text[: where + 4]


def test_text_prompts(runtime: mlora.Runtime) -> None:
    tokenizer = letters()

    async def run() -> list[int]:
        async with engine(runtime, tokenizer) as served:
            return await ids(served, "the hen", "a", Sampling(max_new_tokens=5))

    x = tokenizer("the hen")["input_ids"]
    assert asyncio.run(run()) == alone(runtime.model, x, "a", Sampling(max_new_tokens=5))


def test_logprobs_are_the_models_own(runtime: mlora.Runtime) -> None:
    """Before temperature and bias, whether drawn or not."""
    x = prompt(6)
    sampling = Sampling(max_new_tokens=6, temperature=1.5, seed=1, logit_bias={7: 3.0}, logprobs=True, top_logprobs=4)

    async def run() -> list[Any]:
        async with engine(runtime) as served:
            return await tokens(served, x, "d", sampling)

    got = asyncio.run(run())
    with torch.inference_mode():
        out = runtime.model(torch.tensor([x + [token.id for token in got]]), adapter_names=["d"]).logits[0]
    own = out[len(x) - 1 :].log_softmax(-1)
    for at, token in enumerate(got):
        assert token.logprob == pytest.approx(float(own[at, token.id]), abs=1e-4)
        values, best = own[at].topk(4)
        assert list(token.top_logprobs) == best.tolist()
        assert list(token.top_logprobs.values()) == pytest.approx(values.tolist(), abs=1e-4)


def test_alora_applies_from_its_invocation_on(base: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    """Also where prompts are read in pieces, found in the cache, or have no invocation."""
    from conftest import make_adapter

    invocation = [5, 6, 7]
    folder = make_adapter(
        tmp_path / "alora", base, 9, strength=4.0, r=2, target_modules=["q_proj", "v_proj"],
        alora_invocation_tokens=invocation,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    runtime = patched(base, folders | {"alora": folder})
    x = [token if token not in invocation else 8 for token in prompt(7, 24)]
    prompts = [[*x[:12], *invocation, *x[12:]], x, [*x, *invocation], [*invocation, *x, *invocation, 9]]
    sampling = Sampling(max_new_tokens=8)
    asked = [(one, entry) for entry in ("alora", "a", {"alora": 0.5, "b": 0.5}) for one in prompts]

    async def run() -> list[list[list[int]]]:
        async with engine(runtime, batch_tokens=10) as served:
            again = [await asyncio.gather(*(ids(served, *request, sampling) for request in asked)) for _ in range(2)]
            return again

    for got in asyncio.run(run()):
        for one, (ids_, entry) in zip(got, asked, strict=True):
            assert one == alone(runtime.model, ids_, entry, sampling)


def test_adapters_with_other_vocabularies(base: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    """More tokens than the model has, in prompts and answers; and drawn as if no row had more."""
    from conftest import make_adapter, resized

    wide = make_adapter(
        tmp_path / "wide", resized(base, VOCAB + 40), 3, strength=2.0, r=2, target_modules=["q_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
    )  # fmt: skip
    runtime = patched(base, folders | {"wide": wide}, memory=1 << 24)
    drawn = Sampling(max_new_tokens=8, temperature=1.0, seed=2)
    asked = [([*prompt(1), VOCAB + 7], "wide", drawn), (prompt(2), "a", drawn), (prompt(3), None, drawn)]
    asked += [([VOCAB + 1, *prompt(4)], "wide", Sampling(max_new_tokens=8, logprobs=True))]

    async def run() -> list[list[int]]:
        async with engine(runtime) as served:
            got = await asyncio.gather(*(ids(served, *one) for one in asked))
            for x, entry, options in (
                ([VOCAB], "a", Sampling(max_new_tokens=2)),
                ([VOCAB + 40], "wide", Sampling(max_new_tokens=2)),
                ([1], "a", Sampling(max_new_tokens=2, logit_bias={VOCAB: 1.0})),
            ):
                with pytest.raises(errors.RequestError, match="there are 0 to"):
                    await ids(served, x, entry, options)
            assert served.stats().restarts == 0
            return got

    got = asyncio.run(run())
    assert got == [alone(runtime.model, *one) for one in asked] and max(got[0] + got[3]) >= VOCAB


@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "gemma2", "mixtral"])
def test_other_models(kind: str, tmp_path: Path) -> None:
    """gpt2 has Conv1D; gemma2 has a sliding window, where nothing is shared."""
    from conftest import make_adapter

    base = base_model(kind)
    targets = ["c_attn", "c_fc"] if kind == "gpt2" else ["q_proj", "o_proj"]
    folders = {
        name: make_adapter(tmp_path / name, base, seed, strength=3.0, r=3, target_modules=targets)
        for seed, name in enumerate("ab")
    }
    runtime = patched(base, folders)
    asked = [(prompt(seed, 4 + 5 * seed), entry) for seed, entry in enumerate(["a", None, "b", "a"])]
    sampling = Sampling(max_new_tokens=8)

    async def run() -> list[list[int]]:
        async with engine(runtime, batch_tokens=12) as served:
            return await asyncio.gather(*(ids(served, *request, sampling) for request in asked))

    for got, (x, entry) in zip(asyncio.run(run()), asked, strict=True):
        assert got == alone(runtime.model, x, entry, sampling)


def test_leaving_the_loop_cancels(runtime: mlora.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that runs, one that waits, and one whose task is cancelled; the others are not disturbed."""
    slow(monkeypatch)
    sampling = Sampling(max_new_tokens=50)

    async def run() -> Any:
        async with engine(runtime, max_running=2) as served:
            first = [token async for token in served.generate(prompt(1), "a", Sampling(max_new_tokens=3))]
            assert len(first) == 3
            other = asyncio.create_task(ids(served, prompt(2), "b", sampling))
            left = served.generate(prompt(3), "c", sampling)
            waits = served.generate(prompt(4), "d", sampling)
            task = asyncio.create_task(ids(served, prompt(5), "a", sampling))
            async for token in left:
                assert token.finish_reason is None
                break
            del left
            assert served.stats().waiting >= 1
            assert served.stats().running == 2
            await waits.aclose()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            gc.collect()
            got = await other
            await until(lambda: served.stats().running == 0 and served.stats().waiting == 0)
            return got, served.stats()

    got, stats = asyncio.run(run())
    assert got == alone(runtime.model, prompt(2), "b", sampling)
    assert stats.answers == {"length": 2, "cancelled": 3} and stats.adapters == 0 and stats.reserved_tokens == 0
    assert all(not runtime._store[name].pins for name in "abcd")


def test_streams_that_are_collected_anywhere(runtime: mlora.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a thread that holds the engine's locks, and when their loop is closed."""
    slow(monkeypatch)
    sampling, kept = Sampling(max_new_tokens=50), []

    async def run(served: Engine) -> None:
        kept.extend(served.generate(prompt(seed), "a", sampling) for seed in range(2))
        await anext(kept[0])
        with runtime._lock, served._lock:
            await asyncio.to_thread(kept.pop)  # it goes in another thread, which must not wait for the locks
        await until(lambda: served.stats().answers.get("cancelled") == 1)

    with engine(runtime) as served:
        asyncio.run(run(served))
        kept.clear()
        asyncio.run(until(lambda: served.stats().running == 0))


def test_refusals_say_what_is_wrong(runtime: mlora.Runtime) -> None:
    async def run() -> None:
        async with engine(runtime, cache_tokens=512) as served:
            few = Sampling(max_new_tokens=4)
            cases: list[tuple[tuple[Any, ...], type[Exception], str]] = [
                (([],), errors.RequestError, "not empty"),
                (("text",), errors.RequestError, "without a tokenizer"),
                (([VOCAB], None, few), errors.RequestError, f"token {VOCAB}"),
                (([1] * 60, None, Sampling(max_new_tokens=10)), errors.RequestError, "make 70; at most 64"),
                (([1], None, Sampling(stop="x")), errors.RequestError, "stop"),
                (([1], None, Sampling(max_new_tokens=4, logit_bias={VOCAB: 1.0})), errors.RequestError, "logit_bias"),
                (([1], None, Sampling(max_new_tokens=9, n=70)), errors.RequestError, "n is 70"),
                (([1], "nobody", few), errors.UnknownAdapterError, "'nobody'"),
                (([1], {"a": float("nan")}, few), errors.EntryError, "finite"),
                (([1], 7, few), errors.EntryError, "7"),
            ]
            for request, error, words in cases:
                with pytest.raises(error, match=words):
                    served.generate(*request)
            assert await ids(served, [1, 2], "a", Sampling(max_new_tokens=2))

    asyncio.run(run())


def test_generate_many(runtime: mlora.Runtime) -> None:
    """Answers as they are done, more requests than may wait, and errors as answers."""
    sampling = Sampling(max_new_tokens=6)
    asked: list[tuple[Any, ...]] = [(prompt(seed, 3 + seed % 9), ENTRIES[seed % 6]) for seed in range(30)]
    asked[4] = (prompt(4), "a", Sampling(max_new_tokens=3, n=2, temperature=1.0, seed=8))
    asked[7] = ([VOCAB + 1], None)
    asked[9] = (prompt(9), "nobody", sampling)
    with engine(runtime, max_running=4, max_waiting=5) as served:
        answers = list(served.generate_many(iter(asked), sampling))
    assert sorted((one.request, one.index) for one in answers) == sorted([*((i, 0) for i in range(30)), (4, 1)])
    for one in answers:
        if one.request in (7, 9):
            assert one.finish_reason == "error" and isinstance(one.error, errors.MloraError) and one.usage is None
            continue
        x, entry, *own = asked[one.request]
        wanted = own[0] if own else sampling
        alone_one = Sampling(
            max_new_tokens=wanted.max_new_tokens, temperature=wanted.temperature, seed=(wanted.seed or 0) + one.index
        )
        assert [token.id for token in one.tokens] == alone(runtime.model, x, entry, alone_one)
        assert one.usage.prompt == len(x) and one.finish_reason == "length"


def test_the_prompts_of_a_list_are_read_in_one_step(runtime: mlora.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    own = Worker._generation_step

    def counted(self: Any) -> None:
        steps.append(len(self.batch_processor.inputs_and_outputs.requests_in_batch))
        own(self)

    monkeypatch.setattr(Worker, "_generation_step", counted)
    # Of names that are on the device; a mix is pinned by another thread, which may come later.
    asked = [(prompt(seed, 4 + seed), name) for seed, name in enumerate(["a", None, "b", "c", "d", "a"])]
    sampling = Sampling(max_new_tokens=3, ignore_eos=True)
    with engine(runtime) as served:
        answers = {one.request: [token.id for token in one.tokens] for one in served.generate_many(asked, sampling)}
    assert steps == [6, 6, 6]
    for number, (x, entry) in enumerate(asked):
        assert answers[number] == alone(runtime.model, x, entry, sampling)


def test_a_list_of_which_some_are_refused_and_more_than_may_wait(runtime: mlora.Runtime) -> None:
    asked: list[Any] = [(prompt(seed), ENTRIES[seed % 6]) for seed in range(12)]
    asked[3], asked[11] = (prompt(3), "unknown"), ([], None)
    sampling = Sampling(max_new_tokens=3, ignore_eos=True)
    with engine(runtime, max_running=2, max_waiting=3, ahead=1) as served:
        answers = {one.request: one for one in served.generate_many(asked, sampling)}
        assert {*answers} == {*range(12)}
        assert [number for number, one in sorted(answers.items()) if one.error is not None] == [3, 11]
    ended = list(served.generate_many(asked[:2], sampling))
    assert [type(one.error) for one in ended] == [errors.ServeError] * 2


def test_generate_many_left_early(runtime: mlora.Runtime) -> None:
    with engine(runtime) as served:
        for _ in served.generate_many((prompt(seed), "a", Sampling(max_new_tokens=30)) for seed in range(9)):
            break
        gc.collect()
        asyncio.run(until(lambda: served.stats().running == 0))
        assert served.stats().waiting == 0


def test_a_closed_engine(runtime: mlora.Runtime) -> None:
    """What waits and runs is told that it is cancelled; nothing more is taken; the model is as it was."""

    async def run() -> None:
        served = engine(runtime, max_running=1)
        streams = [served.generate(prompt(seed), "a", Sampling(max_new_tokens=50)) for seed in range(3)]
        await anext(streams[0])
        await asyncio.to_thread(served.close)
        for stream in streams:
            assert [token async for token in stream][-1].finish_reason == "cancelled"
        with pytest.raises(errors.ServeError, match="closed"):
            served.generate(prompt(1), None, Sampling(max_new_tokens=2))
        served.close()

    before = runtime.model.config._attn_implementation
    asyncio.run(run())
    assert runtime.model.config._attn_implementation == before
    assert alone(runtime.model, prompt(1), "a", Sampling(max_new_tokens=4))


def test_the_model_is_used_beside_it(runtime: mlora.Runtime) -> None:
    sampling = Sampling(max_new_tokens=30)

    async def run() -> list[int]:
        async with engine(runtime) as served:
            task = asyncio.create_task(ids(served, prompt(1), "a", sampling))
            beside = [await asyncio.to_thread(alone, runtime.model, prompt(2), "b", sampling) for _ in range(3)]
            assert beside[0] == beside[1] == beside[2] == alone(runtime.model, prompt(2), "b", sampling)
            return await task

    assert asyncio.run(run()) == alone(runtime.model, prompt(1), "a", sampling)


def test_several_event_loops(runtime: mlora.Runtime) -> None:
    """One engine, asked from loops in two threads."""
    import threading

    sampling, got = Sampling(max_new_tokens=8), {}

    def ask(served: Engine, seed: int) -> None:
        async def run() -> None:
            got[seed] = await ids(served, prompt(seed), "a", sampling)

        asyncio.run(run())

    with engine(runtime) as served:
        threads = [threading.Thread(target=ask, args=(served, seed)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert got == {seed: alone(runtime.model, prompt(seed), "a", sampling) for seed in range(4)}


def test_defaults_of_memory(base: Any) -> None:
    runtime = mlora.patch(copy.deepcopy(base), memory=1 << 20)
    with Engine(runtime, max_running=3) as served:
        assert served.stats().cache_tokens == 3 * 64  # the model's length, which is less than 1,024
