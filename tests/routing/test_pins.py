"""Pins, and adapters that are replaced or deleted while something uses them. The oracle is PEFT with the content that
counts, alone."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_close, build, inputs_for, logits, make_adapter, peft_alone, refused, row_of, served
from torch import Tensor

import mlora
from mlora import errors

LORA = {"r": 3, "target_modules": ["q_proj", "down_proj"]}
CONFIGS: dict[str, dict[str, Any]] = {
    "old": LORA,
    "new": {"r": 2, "target_modules": ["v_proj", "up_proj"]},
    "other": LORA,
    "dora": {"r": 2, "target_modules": ["q_proj", "up_proj"], "use_dora": True},
}


class World:
    def __init__(self, root: Path) -> None:
        self.base = build("llama")
        self.folders = {
            name: make_adapter(root / name, self.base, seed, **how)
            for seed, (name, how) in enumerate(CONFIGS.items(), start=5)
        }
        self.alone = {name: peft_alone(self.base, folder) for name, folder in self.folders.items()}
        self.batch = inputs_for("llama", 3)

    def served(self, *names: str, **options: Any) -> Any:
        """Each under its own name; "old" is called "a"."""
        return served(self.base, {"a" if n == "old" else n: self.folders[n] for n in names}, memory=1 << 22, **options)

    def check(self, model: Any, entries: list[Any], wanted: list[str | None], relative: float = 1e-5) -> None:
        got = logits(model, self.batch, adapter_names=entries)
        for row, name in enumerate(wanted):
            oracle = self.base if name is None else self.alone[name]
            assert_close(got[row : row + 1], logits(oracle, row_of(self.batch, row)), relative)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("pins"))


def test_a_pin_keeps_what_it_pinned_when_the_name_gets_another(world: World) -> None:
    model = world.served("old")
    runtime = model.mlora
    with runtime.pin("a") as old:
        runtime.replace_adapter("a", world.folders["new"])
        assert list(runtime.adapters) == ["a"] and runtime.adapters["a"].source == str(world.folders["new"])
        world.check(model, [old.entry, "a", None], ["old", "new", None])
        with runtime.pin("a") as new:
            assert new.content != old.content
            world.check(model, [new.entry, old.entry, {"a": 1.0}], ["new", "old", "new"])
        runtime.replace_adapter("a", mlora.Adapter.from_pretrained(world.folders["other"]))
        world.check(model, [old.entry, "a", None], ["old", "other", None])
    world.check(model, ["a", "a", None], ["other", "other", None])
    assert runtime._store.used == runtime.adapters["a"].bytes  # the others went with their pins


def test_a_deleted_adapter_goes_with_its_last_user(world: World) -> None:
    model = world.served("old", "other")
    runtime = model.mlora
    first, second = runtime.pin("a"), runtime.pin("a")
    with refused(model, errors.AdapterInUseError, "'a'", "pin"):
        runtime.delete_adapter("a")
    runtime.delete_adapter("a", when_unused=True)
    assert list(runtime.adapters) == ["other"]
    with refused(model, errors.UnknownAdapterError, "'a'"):
        model(**world.batch, adapter_names="a")
    first.release()
    first.release()  # which does nothing
    world.check(model, [second.entry, None, "other"], ["old", None, "other"])
    runtime.load_adapter(world.folders["new"], "a")  # the name is free
    world.check(model, [second.entry, "a", "other"], ["old", "new", "other"])
    used = runtime._store.used
    second.release()
    assert runtime._store.used < used
    world.check(model, ["a", None, "other"], ["new", None, "other"])


def test_calls_that_run_keep_the_old_content(world: World) -> None:
    model = world.served("old")
    runtime = model.mlora
    layer = model.model.layers[0]
    seen: list[Tensor] = []

    def replace(*_: Any) -> None:
        if not seen:
            seen.append(torch.empty(0))
            worker = threading.Thread(target=runtime.replace_adapter, args=("a", world.folders["new"]))
            worker.start()
            worker.join()

    handle = layer.mlp.register_forward_pre_hook(replace)
    world.check(model, ["a", None, "a"], ["old", None, "old"])
    handle.remove()
    world.check(model, ["a", None, "a"], ["new", None, "new"])
    with runtime.use_adapters(["a", None, "a"]):
        runtime.replace_adapter("a", world.folders["other"])
        world.check(model, None, ["new", None, "new"])  # type: ignore[arg-type]
    world.check(model, ["a", None, "a"], ["other", None, "other"])


def test_contents(world: World) -> None:
    model = world.served("old", "other")
    runtime = model.mlora
    merge = mlora.Merge(["a", "other"], [0.5, 0.5], combination_type="ties", density=0.5)

    def content(entry: Any) -> Any:
        with runtime.pin(entry) as pin:
            return pin.content

    before = {name: content(name) for name in (None, "a", "other")}
    assert len(set(before.values())) == 3 and before[None] == content("__base__")
    assert (
        content({"a": 1.0}) == before["a"] and content({"a": 0.5}) != before["a"] and content({"a": 0}) == before[None]
    )
    assert content({"a": 0.5, "other": 0.2}) == content({"other": 0.2, "a": 0.5})
    assert content(merge) == content(merge) != content(mlora.Merge(["a", "other"], [0.5, 0.4]))
    merged = content(merge)
    runtime.replace_adapter("a", world.folders["old"])  # the same numbers, and yet not the same content
    assert content("a") != before["a"] and content("other") == before["other"] and content(merge) != merged
    runtime.merge_adapter("other")
    beside = {name: content(name) for name in before}
    assert not {*before.values()} & {*beside.values()}
    runtime.unmerge_adapter()
    assert content(None) == before[None] and content("other") == before["other"]


def test_a_pinned_merge_outlives_what_it_was_made_of(world: World) -> None:
    model = world.served("old", "other")
    runtime = model.mlora
    merge = mlora.Merge(["a", "other"], [0.7, 0.4], combination_type="ties", density=0.6)
    want = logits(model, world.batch, adapter_names=merge)
    with runtime.pin(merge) as pin:
        runtime.replace_adapter("a", world.folders["new"])
        runtime.delete_adapter("other", when_unused=True)
        assert torch.equal(logits(model, world.batch, adapter_names=pin.entry), want)
        runtime.load_adapter(world.folders["other"], "other")
        again = logits(model, world.batch, adapter_names=merge)  # of the new contents
        assert torch.equal(logits(model, world.batch, adapter_names=pin.entry), want)
        with runtime.pin(merge) as newer:
            both = logits(model, world.batch, adapter_names=[pin.entry, newer.entry, None])
    assert (again - want).abs().max() > 1e-2
    assert_close(both[:2], torch.stack([want[0], again[1]]))


def test_beside_what_is_folded_in(world: World) -> None:
    """A pin holds the weights: nothing is folded in or out. Its entry lies beside what is folded in already, through a
    bridge where that takes one, which stays for it."""
    model = world.served("old", "dora")
    runtime = model.mlora
    runtime.merge_adapter("dora")
    with runtime.pin("a") as pin, runtime.pin(None) as base:
        for change in (runtime.unmerge_adapter, lambda: runtime.merge_adapter("a")):
            with refused(model, errors.AdapterInUseError, "merge_adapter"):
                change()
        runtime.replace_adapter("a", world.folders["new"])
        world.check(model, [pin.entry, base.entry, "a"], ["old", None, "new"], 1e-4)
        runtime.delete_adapter("a")
        world.check(model, [pin.entry, base.entry, "dora"], ["old", None, "dora"], 1e-4)
        with refused(model, errors.AdapterInUseError, "folded"):
            runtime.replace_adapter("dora", world.folders["old"])
    runtime.unmerge_adapter()
    world.check(model, ["dora", None, None], ["dora", None, None])
    assert list(runtime.adapters) == ["dora"]


def test_what_cannot_be_replaced_or_pinned(world: World, tmp_path: Path) -> None:
    model = world.served("old", "other")
    runtime = model.mlora
    with refused(model, errors.UnknownAdapterError, "'b'"):
        runtime.replace_adapter("b", world.folders["new"])
    wrong = make_adapter(tmp_path / "wrong", build("gpt2"), 1, r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    for source in (tmp_path / "nothing", wrong):
        with refused(model, errors.AdapterError):
            runtime.replace_adapter("a", source)
    world.check(model, ["a", None, "other"], ["old", None, "other"])
    runtime.set_adapter("a")
    with refused(model, errors.AdapterInUseError, "set_adapter"):
        runtime.replace_adapter("a", world.folders["new"])
    with refused(model, errors.AdapterInUseError, "set_adapter"):
        runtime.delete_adapter("a", when_unused=True)
    runtime.set_adapter(None)
    with runtime.pin("a") as pin, refused(model, errors.EntryError, "set_adapter"):
        runtime.set_adapter(pin.entry)
    for entries in (["a"], ["a", "other"]):
        with refused(model, errors.EntryError, "pin takes one entry"):
            runtime.pin(entries)
    with refused(model, errors.UnknownAdapterError, "'nobody'"):
        runtime.pin("nobody")
    model.mlora._close()  # no reader is left


def test_an_arena_full_of_pins(world: World) -> None:
    model = world.served("old", "other", max_adapters=1)
    runtime = model.mlora
    with runtime.pin("a") as pin:
        with refused(model, errors.CapacityError, "slots"):
            runtime.pin("other")
        world.check(model, [pin.entry, None, pin.entry], ["old", None, "old"])
    with runtime.pin("other"):
        pass


def test_replacing_under_traffic(world: World) -> None:
    """Each answer is of one of the contents, and nothing is left of those that have gone."""
    model = world.served("old", "other")
    runtime = model.mlora
    want = {name: logits(world.alone[name], world.batch) for name in ("old", "new", "other")}
    wrong: list[str] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            with runtime.pin("a") as pin:
                first = logits(model, world.batch, adapter_names=[pin.entry] * 3)
                second = logits(model, world.batch, adapter_names=[pin.entry, "other", pin.entry])
            found = [name for name, wanted in want.items() if (first - wanted).abs().max() < 1e-4]
            if len(found) != 1 or (second[::2] - want[found[0]][::2]).abs().max() > 1e-4:
                wrong.append(f"{found}")

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for turn in range(12):
        runtime.replace_adapter("a", world.folders[("new", "old")[turn % 2]])
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert set(runtime._store._adapters) == {runtime._registry[name].key for name in ("a", "other")}
