"""Calls of a patched model: entries, what stays after an error, threads, gradients."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    HIDDEN,
    assert_close,
    build,
    inputs_for,
    logits,
    peft_alone,
    refused,
    served,
)
from torch import Tensor

import mlora
from mlora import errors
from mlora.routing import assembly
from mlora.routing.assembly import Assembly

MIXED = ["r3", None, "dora1", {"rs16": 0.5, "bias8": -1.0}]


# Plans, which serve the same rows again as long as nothing moves


def test_the_same_rows_need_no_new_plan(
    patched: Any, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    real = Assembly.plan
    monkeypatch.setattr(Assembly, "plan", lambda *args: made.append(args[1]) or real(*args))
    wanted = {name: logits(patched, batch, adapter_names=name) for name in ("r3", "rs16")}
    for name in ("r3", "r3", "rs16", "rs16", "r3"):
        assert torch.equal(logits(patched, batch, adapter_names=name), wanted[name])
    assert len(made) == 2 + 3  # r3, rs16; r3, rs16, r3
    mixed = logits(patched, batch, adapter_names=MIXED)
    assert torch.equal(logits(patched, batch, adapter_names=MIXED), mixed)
    other = [*MIXED[:3], {"rs16": 0.5, "bias8": -0.5}]
    assert not torch.equal(logits(patched, batch, adapter_names=other)[3], mixed[3])
    assert len(made) == 5 + 2


def test_a_plan_does_not_outlive_what_it_names(llama: Any, folders: dict[str, Path], batch: dict[str, Tensor]) -> None:
    model = copy.deepcopy(llama)
    runtime = mlora.patch(model, memory=1 << 20, max_adapters=2)
    wanted = {}
    for name in ("r3", "bias8"):  # which change different modules
        runtime.load_adapter(folders[name], name)
        wanted[name] = logits(model, batch, adapter_names=name)
        runtime.delete_adapter(name)
    for name in ("r3", "bias8", "r3"):
        runtime.load_adapter(folders[name], "same")
        assert torch.equal(logits(model, batch, adapter_names="same"), wanted[name])
        runtime.delete_adapter("same")


# Entries, names, and what stays after an error


@pytest.mark.parametrize(
    ("entries", "error", "wanted"),
    (
        ("nobody", errors.UnknownAdapterError, ("'nobody'", "'r3'", "'rs16'")),
        (["r3", "nobody", None, None], errors.UnknownAdapterError, ("'nobody'", "'r3'")),
        ({"r3": 1, "nobody": 1}, errors.UnknownAdapterError, ("'nobody'", "'r3'")),
        (["r3"] * 3, errors.EntryError, ("3 entries", "4 rows")),
        (["r3"] * 5, errors.EntryError, ("5 entries", "4 rows")),
        (["r3"], errors.EntryError, ("1 entries", "4 rows")),
        ([], errors.EntryError, ("0 entries", "4 rows")),
        ({"r3": float("nan")}, errors.EntryError, ("'r3'", "nan", "finite")),
        (["r3", {"rs16": float("inf")}, None, None], errors.EntryError, ("'rs16'", "inf", "finite")),
        (5, errors.EntryError, ("5", "int")),
        ([5, None, None, None], errors.EntryError, ("5", "int")),
    ),
    ids=(
        "name", "name-in-row", "name-in-mix", "few", "many", "one-in-a-list", "empty", "nan", "inf", "int",
        "int-in-row",
    ),
)  # fmt: skip
@pytest.mark.parametrize("how", ("call", "generate", "context"))
def test_bad_entries(
    patched: Any,
    batch: dict[str, Tensor],
    entries: Any,
    error: type[Exception],
    wanted: tuple[str, ...],
    how: str,
) -> None:
    with refused(patched, error, *wanted):
        if how == "call":
            patched(**batch, adapter_names=entries)
        elif how == "generate":
            patched.generate(**batch, adapter_names=entries, max_new_tokens=2)
        else:
            with patched.mlora.use_adapters(entries):
                patched(**batch)


@pytest.mark.parametrize("entry", (["r3"], 3, "nobody", {"r3": float("nan")}), ids=("list", "int", "name", "nan"))
def test_bad_defaults(patched: Any, entry: Any) -> None:
    patched.mlora.set_adapter("rs16")
    with refused(patched, errors.MloraError):
        patched.mlora.set_adapter(entry)


@pytest.mark.parametrize("name", ("r3", "", "__base__", None, 5), ids=("taken", "empty", "base", "none", "int"))
def test_names_that_cannot_be_given(patched: Any, folders: dict[str, Path], name: Any) -> None:
    adapter = mlora.Adapter.from_pretrained(folders["rs16"])
    error = errors.DuplicateAdapterError if name == "r3" else errors.EntryError
    with refused(patched, error, repr(name), *([str(folders["r3"])] if name == "r3" else [])):
        patched.mlora.add_adapter(name, adapter)
    if name is not None:
        with refused(patched, error, repr(name)):
            patched.mlora.load_adapter(folders["rs16"], name)


def test_deleting(patched: Any, folders: dict[str, Path], batch: dict[str, Tensor]) -> None:
    runtime = patched.mlora
    want = logits(patched, batch, adapter_names="rs16")
    with refused(patched, errors.UnknownAdapterError, "'nobody'", "'r3'"):
        runtime.delete_adapter("nobody")
    runtime.delete_adapter("r3")
    assert "r3" not in runtime.adapters
    with refused(patched, errors.UnknownAdapterError, "'r3'", "'rs16'"):
        patched(**batch, adapter_names="r3")
    runtime.load_adapter(folders["rs16"], "r3")  # the name is free again, for other weights
    assert torch.equal(logits(patched, batch, adapter_names="r3"), want)


def test_deleting_what_is_in_use(patched: Any, batch: dict[str, Tensor]) -> None:
    runtime = patched.mlora
    with runtime.use_adapters(["r3", None, {"rs16": 1.0}, None]):
        for name in ("r3", "rs16"):
            with refused(patched, errors.AdapterInUseError, f"'{name}'", "use_adapters"):
                runtime.delete_adapter(name)
        want = logits(patched, batch)
        runtime.delete_adapter("dora1")  # nobody uses it
        assert torch.equal(logits(patched, batch), want)
    runtime.set_adapter("r3")
    with refused(patched, errors.AdapterInUseError, "'r3'", "set_adapter(None)"):
        runtime.delete_adapter("r3")
    runtime.set_adapter(None)
    runtime.delete_adapter("r3")
    runtime.delete_adapter("rs16")


def test_unpatching_while_routed(patched: Any) -> None:
    with patched.mlora.use_adapters("r3"), refused(patched, errors.PatchError, "use_adapters"):
        mlora.unpatch(patched)
    patched.mlora.set_adapter("r3")
    mlora.unpatch(patched)


@pytest.mark.parametrize("how", ("call", "generate", "context", "submodule"))
def test_an_exception_in_mid_forward_leaves_no_routing(
    patched: Any, llama: Any, batch: dict[str, Tensor], how: str
) -> None:
    want = logits(patched, batch, adapter_names=MIXED)

    class Boom(Exception):
        pass

    def fail(*_: Any) -> None:
        raise Boom

    hook = patched.model.layers[1].register_forward_pre_hook(fail)
    before_pins = [patched.mlora._store[n].pins for n in patched.mlora.adapters]
    with refused(patched, Boom):
        if how == "call":
            patched(**batch, adapter_names=MIXED)
        elif how == "generate":
            patched.generate(**batch, adapter_names=MIXED, max_new_tokens=3)
        else:
            with patched.mlora.use_adapters(MIXED):
                (patched if how == "context" else patched.model)(**batch)
    hook.remove()
    assert [patched.mlora._store[n].pins for n in patched.mlora.adapters] == before_pins
    assert torch.equal(logits(patched, batch), logits(llama, batch))
    assert torch.equal(logits(patched, batch, adapter_names=MIXED), want)
    for name in ("r3", "rs16", "dora1", "bias8"):
        patched.mlora.delete_adapter(name)
    mlora.unpatch(patched)


def test_a_plan_that_does_not_reach_the_device_pins_nothing(
    patched: Any, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory for the plan")

    monkeypatch.setattr(assembly, "to_device", full)
    with refused(patched, torch.OutOfMemoryError, "no memory"):
        patched(**batch, adapter_names=MIXED)


def test_wrong_number_of_rows_inside_use_adapters(patched: Any, batch: dict[str, Tensor]) -> None:
    with patched.mlora.use_adapters(["r3", "rs16"]):
        with refused(patched, errors.EntryError, "2 entries", "4 rows"):
            patched(**batch)
        logits(patched, {key: value[:2] for key, value in batch.items()})
        with refused(patched, errors.MloraError, "4"), torch.no_grad():
            patched.model(**batch)


def test_continuous_batching_follows_the_default_and_refuses_names(patched: Any, batch: dict[str, Tensor]) -> None:
    """It packs prompts into one row and runs in another thread, so that names would be ignored."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    runtime, length = patched.mlora, batch["input_ids"].shape[1]
    small = ContinuousBatchingConfig(block_size=32, num_blocks=16, max_batch_tokens=64)
    settings = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    with refused(patched, errors.EntryError, "adapter_names", "generate_batch", "set_adapter"):
        patched.generate_batch(prompts, settings, adapter_names=["r3"] * 4)
    with runtime.use_adapters("r3"), refused(patched, errors.EntryError, "use_adapters", "set_adapter"):
        patched.generate_batch(prompts, settings, small)
    runtime.set_adapter("r3")
    got = [one.generated_tokens for one in patched.generate_batch(prompts, settings, small).values()]
    runtime.set_adapter(None)
    for prompt, tokens in zip(prompts, got, strict=True):
        alone = torch.tensor([prompt])
        want = patched.generate(alone, adapter_names="r3", generation_config=settings)[0, len(prompt) :]
        assert tokens == want.tolist()
    assert {len(prompt) for prompt in prompts} > {length}


class Decoder(torch.nn.Module):
    """Called as transformers calls a decoder whose encoder has run: other tensors may come before its input."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(HIDDEN, HIDDEN)

    def forward(self, cache_position: Tensor, decoder_inputs_embeds: Tensor) -> Tensor:
        return self.q_proj(decoder_inputs_embeds + cache_position[:, None])


def test_rows_are_those_of_a_decoders_input() -> None:
    model = Decoder()
    given = {"cache_position": torch.zeros(1), "decoder_inputs_embeds": torch.randn(3, 1, HIDDEN)}
    bare = model(**given)
    runtime = mlora.patch(model)
    a, b = torch.randn(2, HIDDEN), torch.randn(HIDDEN, 2)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    tensors = {"q_proj.lora_A.weight": a, "q_proj.lora_B.weight": b}
    runtime.add_adapter("one", mlora.Adapter(config, tensors))
    with runtime.use_adapters([None, "one", None]):
        got = model(**given)
    assert torch.equal(got[0::2], bare[0::2])
    assert_close(got[1], bare[1] + given["decoder_inputs_embeds"][1] @ a.t() @ b.t())


def test_a_batch_that_needs_more_than_the_arena(model: Any, folders: dict[str, Path], batch: Any) -> None:
    sizes = {}
    probe = mlora.patch(model, memory=1 << 20)
    for name, folder in folders.items():
        sizes[name] = probe.load_adapter(folder, name).bytes
    mlora.unpatch(model)
    room = sizes["rs16"] + 128
    runtime = mlora.patch(model, memory=room)
    for name, folder in folders.items():
        runtime.load_adapter(folder, name)
    needed = sizes["rs16"] + sizes["r3"]
    with refused(model, errors.CapacityError, f"{needed:,} bytes", f"{runtime._store.spaces[0].capacity:,}", "memory="):
        model(**batch, adapter_names=["rs16", "r3", None, None])
    # One after another they all fit, whatever was there before.
    fresh = copy.deepcopy(build("llama"))
    whole = mlora.patch(fresh, memory=1 << 20)
    for name, folder in folders.items():
        whole.load_adapter(folder, name)
    for name in [*folders, *reversed(folders)]:
        got = logits(model, batch, adapter_names=name)
        assert torch.equal(got, logits(fresh, batch, adapter_names=name))
        assert runtime.adapters[name].location == "device"
    runtime.set_adapter("r3")
    with refused(model, errors.CapacityError, f"{needed:,} bytes", "active already"):
        runtime.set_adapter("rs16")  # the old default stays until the new one is there
    runtime.set_adapter(None)
    runtime.set_adapter("rs16")


def test_a_thousand_adapters_through_an_arena_of_sixteen(llama: Any) -> None:
    """Rows have the bits that they have where all adapters lie side by side, whatever was evicted in between."""
    draw = torch.Generator().manual_seed(0)
    names = [f"x{number}" for number in range(1000)]
    shapes = {"model.layers.0.self_attn.q_proj": (HIDDEN, HIDDEN), "model.layers.1.mlp.down_proj": (48, HIDDEN)}
    small, large = copy.deepcopy(llama), copy.deepcopy(llama)
    few, all_ = mlora.patch(small, memory=28 << 10, max_adapters=16), mlora.patch(large, max_adapters=1000)
    for number, name in enumerate(names):
        rank, tensors = 1 + number % 3, {}
        for path, (inputs, outputs) in shapes.items():
            tensors[f"{path}.lora_A.weight"] = torch.randn(rank, inputs, generator=draw)
            tensors[f"{path}.lora_B.weight"] = torch.randn(outputs, rank, generator=draw)
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2, "target_modules": list(shapes)}
        for runtime in (few, all_):
            runtime.add_adapter(name, mlora.Adapter(config, tensors))
    assert {info.location for info in all_.adapters.values()} == {"device"}
    batch, moved, served = inputs_for("llama", 16, length=2), 0, {}
    for order in (torch.randperm(1000, generator=draw)[:992], torch.arange(128)):
        for numbers in order.split(16):
            rows = [names[number] for number in numbers]
            moved += sum(not few._store[name].resident for name in rows)
            got = logits(small, batch, adapter_names=rows)
            assert torch.equal(got, logits(large, batch, adapter_names=rows))
            served.update(zip(rows, got, strict=True))
    assert moved > 1000 and sum(info.location == "device" for info in few.adapters.values()) == 16
    assert len({row.numpy().tobytes() for row in served.values()}) == len(served) > 990


def test_an_adapter_larger_than_the_arena(model: Any, folders: dict[str, Path]) -> None:
    runtime = mlora.patch(model, memory=4096)
    with refused(model, errors.CapacityError, "'rs16'", "4,096", "memory="):
        runtime.load_adapter(folders["rs16"], "rs16")


# Threads


def test_two_threads_get_their_own_rows(patched: Any, llama: Any) -> None:
    batch = inputs_for("llama", 2)
    jobs = {"one": ["r3", None], "two": ["rs16", "bias8"], "three": None}

    def run(entries: Any) -> list[Tensor]:
        options = {"max_new_tokens": 5, "adapter_names": entries}
        return [patched.generate(**batch, **options), logits(patched, batch, adapter_names=entries)]

    want = {name: run(entries) for name, entries in jobs.items()}
    assert not torch.equal(want["one"][1], want["two"][1])
    failures: list[str] = []
    barrier = threading.Barrier(len(jobs))

    def work(name: str) -> None:
        barrier.wait()
        for _ in range(6):
            got = run(jobs[name])
            if not all(torch.equal(g, w) for g, w in zip(got, want[name], strict=True)):
                failures.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert patched.mlora._readers.count == 0


def test_threads_load_and_delete_while_others_run(patched: Any, folders: dict[str, Path]) -> None:
    batch = inputs_for("llama", 2)
    want = logits(patched, batch, adapter_names=["r3", "rs16"])
    stop = threading.Event()
    problems: list[str] = []

    def churn() -> None:
        try:
            adapters = [mlora.Adapter.from_pretrained(folders[name]) for name in ("bias8", "dora1")]
            while not stop.is_set():
                for index, adapter in enumerate(adapters):
                    patched.mlora.add_adapter(f"x{index}", adapter)
                for index in range(2):
                    patched.mlora.delete_adapter(f"x{index}")
        except Exception as error:
            problems.append(repr(error))

    thread = threading.Thread(target=churn)
    thread.start()
    for _ in range(15):
        if not torch.equal(logits(patched, batch, adapter_names=["r3", "rs16"]), want):
            problems.append("other rows")
    stop.set()
    thread.join()
    assert not problems


def test_adapters_are_told_while_another_thread_deletes_one(patched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store, deleting = type(patched.mlora._store), []
    find = store.__getitem__

    def hooked(self: Any, name: str) -> Any:
        if not deleting:
            deleting.append(threading.Thread(target=lambda: patched.mlora.delete_adapter("bias8")))
            deleting[0].start()
            deleting[0].join(0.5)
        return find(self, name)

    monkeypatch.setattr(store, "__getitem__", hooked)
    assert "bias8" in patched.mlora.adapters
    deleting[0].join()
    assert "bias8" not in patched.mlora.adapters


def test_a_default_set_by_one_thread_serves_another(patched: Any) -> None:
    batch = inputs_for("llama", 2)
    want = logits(patched, batch, adapter_names="r3")
    patched.mlora.set_adapter("r3")
    out: list[Tensor] = []
    go_on = threading.Event()
    thread = threading.Thread(target=lambda: go_on.wait(10) and out.append(logits(patched, batch)))
    thread.start()
    with patched.mlora.use_adapters("rs16"):  # this thread's own routing is not that of one started before
        go_on.set()
        thread.join()
    assert torch.equal(out[0], want)


# Gradients


def test_gradients_of_the_inputs_equal_pefts(patched: Any, llama: Any, folders: dict[str, Path]) -> None:
    mask = torch.ones(2, 5, dtype=torch.long)
    embeds = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(1))
    direction = torch.randn(2, 5, 67, generator=torch.Generator().manual_seed(2))

    def gradient(model: Any, rows: slice, **options: Any) -> Tensor:
        x = embeds[rows].clone().requires_grad_()
        (model(inputs_embeds=x, attention_mask=mask[rows], **options).logits * direction[rows]).sum().backward()
        return x.grad

    for first, second in (("r3", "dora1"), ("rs16", "bias8")):
        want = [gradient(peft_alone(llama, folders[n]), slice(i, i + 1)) for i, n in enumerate((first, second))]
        got = gradient(patched, slice(None), adapter_names=[first, second])
        assert_close(got, torch.cat(want), 2e-5)
    assert torch.equal(gradient(patched, slice(None)), gradient(llama, slice(None)))


def test_results_with_and_without_gradients_agree(patched: Any, batch: dict[str, Tensor]) -> None:
    patched.zero_grad()
    with_graph = patched(**batch, adapter_names=MIXED).logits * batch["attention_mask"][..., None]
    assert with_graph.requires_grad
    assert_close(with_graph.detach(), logits(patched, batch, adapter_names=MIXED), 2e-6)
    with torch.inference_mode():
        inside = patched(**batch, adapter_names=MIXED).logits * batch["attention_mask"][..., None]
    assert torch.equal(inside, logits(patched, batch, adapter_names=MIXED))


# A call for the very entries of the last one


def test_the_same_list_of_names_asks_anew_where_something_has_changed(
    llama: Any, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = served(llama, {name: folders[name] for name in ("r3", "rs16", "bias8")})
    runtime, batch, names = model.mlora, inputs_for("llama", 2), ["r3", None]

    def alone(*entries: Any) -> Tensor:
        return logits(served(llama, {n: folders[n] for n in ("r3", "rs16", "bias8")}), batch, adapter_names=[*entries])

    first = logits(model, batch, adapter_names=names)
    with monkeypatch.context() as patching:
        patching.setattr(type(runtime._registry), "recipes", lambda *_: pytest.fail("resolved again"))
        assert torch.equal(logits(model, batch, adapter_names=names), first)
    assert not any(runtime._store[name].pins for name in ("r3", "rs16", "bias8"))
    names[1] = "rs16"  # the same list, of other names
    assert torch.equal(logits(model, batch, adapter_names=names), alone("r3", "rs16"))
    runtime.delete_adapter("r3")
    with pytest.raises(mlora.errors.UnknownAdapterError, match="'r3'"):
        model(**batch, adapter_names=names)
    runtime.load_adapter(str(folders["bias8"]), "r3")  # another one of that name
    assert torch.equal(logits(model, batch, adapter_names=names), alone("bias8", "rs16"))
    runtime.merge_adapter("rs16")
    beside = logits(model, batch, adapter_names=names)
    assert_close(beside, alone("bias8", "rs16"), 1e-5)
    assert torch.equal(logits(model, batch, adapter_names=names), beside)
    runtime.unmerge_adapter()
    assert torch.equal(logits(model, batch, adapter_names=names), alone("bias8", "rs16"))
    with pytest.raises(mlora.errors.EntryError, match="2 entries for a batch of 4 rows"):
        model(**inputs_for("llama", 4), adapter_names=names)
