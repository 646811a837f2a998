"""Adapters between files, host and device. The oracle is PEFT with one adapter alone."""

from __future__ import annotations

import gc
import os
import random
import shutil
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_close, build, inputs_for, logits, make_adapter, peft_alone, rewrite, row_of, served

import mlora
from mlora import errors
from mlora.routing.files import Files

LORA = {"target_modules": ["q_proj", "down_proj"]}
NAMES = "abcdefgh"
WEIGHTS = "adapter_model.safetensors"


class World:
    """Eight LoRAs of ranks 2 to 4, a DoRA, and what each gives alone."""

    def __init__(self, root: Path) -> None:
        self.base, self.root = build("llama"), root
        self.folders = {n: make_adapter(root / n, self.base, s, r=2 + s % 3, **LORA) for s, n in enumerate(NAMES)}
        self.batch = inputs_for("llama", 3)
        self.rows = [row_of(self.batch, row) for row in range(3)]
        self.alone = {n: [logits(peft_alone(self.base, folder), row) for row in self.rows]
                      for n, folder in self.folders.items()}  # fmt: skip
        self.alone[None] = [logits(self.base, row) for row in self.rows]
        model = served(self.base, self.folders, memory=1 << 22)
        self.held = max(packed.held for packed in model.mlora._store._adapters.values())

    def runtime(self, adapters: float = 3, **options: Any) -> mlora.Runtime:
        """With all of them registered, and host memory for some."""
        options = {"memory": 1 << 22, "host_memory": int(adapters * self.held), **options}
        runtime = served(self.base, {}, **options).mlora
        assert runtime.register_adapters(self.root) == sorted(self.folders)
        return runtime

    def check(self, runtime: mlora.Runtime, *entries: str | None, contents: dict[str, str] | None = None) -> None:
        got = logits(runtime.model, self.batch, adapter_names=list(entries))
        for row, name in enumerate(entries):
            wanted = (contents or {}).get(name or "", name)
            assert_close(got[row : row + 1], self.alone[wanted][row])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("tiers"))


@contextmanager
def told(runtime: mlora.Runtime, error: type[BaseException], *wanted: str) -> Iterator[None]:
    """The block raises an error that says all of `wanted`, and nothing of the model has run."""
    ran: list[Any] = []
    hook = runtime.model.model.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(error) as caught:
        yield
    hook.remove()
    assert all(part in str(caught.value) for part in wanted), str(caught.value)
    assert not ran


def places(runtime: mlora.Runtime) -> str:
    """Of each adapter, the first letter of where it is."""
    return "".join(runtime.adapter(name).location[0] for name in NAMES)


def rss() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_answers_are_right_and_the_bound_holds_whatever_is_asked_for(world: World) -> None:
    runtime, draw = world.runtime(4), random.Random(1)
    host = runtime._store.host
    seen: list[int] = []
    give = host.give_back
    host.give_back = lambda *a: (seen.append(host.used), give(*a))[1]  # type: ignore[method-assign]
    assert places(runtime) == "ffffffff" and runtime.host.used == 0
    for _ in range(40):
        world.check(runtime, *draw.choices([*NAMES, None], k=3))
        assert runtime.host.used <= 4 * world.held
    use = runtime.host
    assert use.registered == 8 and 3 <= use.loaded <= 5 and use.drops == use.loads - use.loaded > 20
    assert seen and max(seen) <= 4 * world.held
    assert host.used == sum(packed.held for packed in runtime._store._adapters.values())


def test_what_was_used_longest_ago_goes(world: World) -> None:
    runtime = world.runtime(3)
    for name in "abcad":
        world.check(runtime, name, None, name)
    assert places(runtime) == "dfddffff"  # b
    assert runtime.adapter("b").ranks == (3,) and runtime.adapter("b").modules == runtime.adapter("a").modules
    never = runtime.adapter("h")
    assert (never.name, never.source, never.location) == ("h", str(world.folders["h"]), "files")
    assert not never.peft_type and not never.modules
    table = runtime.status()
    assert f"{runtime.host.used:,} of {3 * world.held:,} bytes; 5 adapters in files only" in table
    assert [line.split()[0] for line in table.splitlines()[1:4]] == ["a", "c", "d"]


def test_registered_adapters_are_not_opened_and_cost_little(world: World, tmp_path: Path) -> None:
    """Links to one file beside one config. What is left of them is counted, with their names."""
    shutil.copy(world.folders["a"] / "adapter_config.json", tmp_path)
    shutil.copy(world.folders["a"] / WEIGHTS, tmp_path / "one")
    for number in range(2000):
        (tmp_path / f"adapter-{number:05}.safetensors").symlink_to("one")
    (tmp_path / ".hidden").mkdir()
    runtime = served(world.base, {}, memory=1 << 22, host_memory=1 << 16).mlora
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    names = runtime.register_adapters(tmp_path)
    del names[:]
    gc.collect()
    each = (tracemalloc.get_traced_memory()[0] - before) / 2000
    tracemalloc.stop()
    assert each <= 500, each
    assert runtime.host.registered == 2000 and runtime.host.loaded == 0 and not runtime._store._adapters
    world.check(runtime, "adapter-01234", None, "adapter-00005", contents=dict.fromkeys(list(runtime.adapters), "a"))
    assert len(runtime.sources) == len(runtime.adapters) == 2000
    with told(runtime, errors.UnknownAdapterError, "no adapter 'nobody'", "1,980 more"):
        logits(runtime.model, world.batch, adapter_names="nobody")


def test_names_that_cannot_be_registered(world: World, tmp_path: Path) -> None:
    runtime = world.runtime()
    with pytest.raises(errors.DuplicateAdapterError, match="'a' is registered already"):
        runtime.register_adapter(world.folders["b"], "a")
    with pytest.raises(errors.DuplicateAdapterError, match="'a' is registered already"):
        runtime.load_adapter(world.folders["b"], "a")
    with pytest.raises(errors.DuplicateAdapterError, match="'a'"):
        runtime.register_adapters(world.root)
    with pytest.raises(errors.EntryError, match="''"):
        runtime.register_adapter(world.folders["b"], "")
    with pytest.raises(errors.AdapterError, match="not from this int"):
        runtime.register_adapter(5, "number")  # type: ignore[arg-type]
    with pytest.raises(errors.AdapterError, match="approximate is 0"):
        runtime.register_adapter(world.folders["b"], "b2", approximate=0)
    with pytest.raises(errors.AdapterError, match="cannot be read as a folder of adapters"):
        runtime.register_adapters(tmp_path / "nothing")
    (tmp_path / "x").mkdir()
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(errors.DuplicateAdapterError, match="has x twice"):
        runtime.register_adapters(tmp_path)
    assert len(runtime.adapters) == 8


def test_what_is_damaged_or_gone_is_told_by_name_before_anything_runs(world: World, tmp_path: Path) -> None:
    runtime = world.runtime()
    spoilt = rewrite(world.folders["b"], tmp_path / "spoilt")
    data = (spoilt / WEIGHTS).read_bytes()
    (spoilt / WEIGHTS).write_bytes(data[:-8])
    runtime.register_adapter(spoilt)
    runtime.register_adapter(tmp_path / "nowhere")
    for name, why in (("spoilt", "damaged"), ("nowhere", "there is no folder")):
        with told(runtime, errors.AdapterError, f"adapter '{name}' cannot be loaded", why):
            logits(runtime.model, world.batch, adapter_names=["a", name, None])
        with pytest.raises(errors.AdapterError, match=f"adapter '{name}' cannot be loaded"):
            runtime.prefetch(["a", name]).result(60)
        with pytest.raises(errors.AdapterError):
            runtime.save_adapter(name, tmp_path / "saved")
    world.check(runtime, "a", "b", None)
    (spoilt / WEIGHTS).write_bytes(data)
    world.check(runtime, "spoilt", "b", None, contents={"spoilt": "b"})
    runtime.delete_adapter("nowhere")
    assert runtime.adapter("nowhere") is None and runtime.host.used == sum(
        packed.held for packed in runtime._store._adapters.values()
    )


def test_files_that_changed_are_an_error_and_never_other_weights(world: World, tmp_path: Path) -> None:
    """Also of the same size and time; the same bytes in another file are the same adapter."""
    runtime = world.runtime()
    own = rewrite(world.folders["a"], tmp_path / "own")
    runtime.register_adapter(own)

    def drop() -> None:
        world.check(runtime, *"bcd")
        assert runtime.adapter("own").location == "files"

    world.check(runtime, "own", None, "own", contents={"own": "a"})
    drop()
    data = (own / WEIGHTS).read_bytes()
    (own / "again").write_bytes(data)
    (own / "again").rename(own / WEIGHTS)
    world.check(runtime, "own", None, "own", contents={"own": "a"})
    drop()
    at = len(data) - 5
    (own / WEIGHTS).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    for _ in range(2):
        with told(runtime, errors.AdapterError, "'own'", "have changed", "replace_adapter('own'"):
            logits(runtime.model, world.batch, adapter_names=["own", None, "a"])
    with pytest.raises(errors.AdapterError, match="have changed"):
        runtime.add_weighted_adapter(["own", "b"], [0.5, 0.5], "sum")
    shutil.copy(world.folders["e"] / WEIGHTS, own)
    shutil.copy(world.folders["e"] / "adapter_config.json", own)
    runtime.replace_adapter("own", own)
    for _ in range(2):
        world.check(runtime, "own", None, "own", contents={"own": "e"})
        drop()
    (own / WEIGHTS).unlink()
    with told(runtime, errors.AdapterError, "'own'", f"has no {WEIGHTS}"):
        logits(runtime.model, world.batch, adapter_names=["own", None, "a"])


def test_what_was_made_in_memory_stays_and_counts(world: World) -> None:
    runtime = world.runtime(5)
    runtime.add_adapter("memory", mlora.Adapter.from_pretrained(world.folders["a"]))
    runtime.add_weighted_adapter(["b", "c"], [0.5, 0.5], "merged")
    for name in NAMES:
        world.check(runtime, name, "memory", None, contents={"memory": "a"})
        assert runtime.host.used <= 5 * world.held
    assert {runtime.adapter(name).location for name in ("memory", "merged")} == {"device"}
    with runtime.pin("a") as pin:
        with told(runtime, errors.CapacityError, "'a' (", "in use)", "'memory' (", "of no files", "host_memory"):
            logits(runtime.model, world.batch, adapter_names=["b", "c", "d"])
        world.check(runtime, "a", "memory", None, contents={"memory": "a"})
        assert pin.entry is not None
    runtime.delete_adapter("memory")
    with pytest.raises(errors.CapacityError, match=r"adapter 'more.*' needs .* cannot be dropped: "):
        for _ in range(8):
            runtime.add_adapter("more", mlora.Adapter.from_pretrained(world.folders["a"]))
            runtime.add_adapter(f"more {_}", mlora.Adapter.from_pretrained(world.folders["a"]))
            runtime.delete_adapter("more")
    assert runtime.host.used == sum(packed.held for packed in runtime._store._adapters.values()) <= 5 * world.held


def test_a_trained_one_stays_and_counts(world: World) -> None:
    runtime = world.runtime(6)
    runtime.load_adapter(world.folders["a"], "trained", is_trainable=True)
    assert runtime.host.used >= world.held  # its parameters beside its blob
    for name in NAMES:
        world.check(runtime, name, "trained", None, contents={"trained": "a"})
    assert runtime.adapter("trained").location == "device"
    small = world.runtime(1)
    with pytest.raises(errors.CapacityError, match="adapter 'trained'"):
        small.load_adapter(world.folders["c"], "trained", is_trainable=True)
    assert small.adapter("trained") is None and small.host.used == 0


def test_a_batch_that_host_memory_has_no_room_for_is_told_by_name(world: World) -> None:
    runtime = world.runtime(2)
    with told(runtime, errors.CapacityError, "adapter 'c' needs", "'a' (", "'b' ("):
        logits(runtime.model, world.batch, adapter_names=["a", "b", "c"])
    world.check(runtime, "a", "b", None)
    tiny = world.runtime(0.5)
    with told(tiny, errors.CapacityError, "adapter 'c' needs"):
        logits(tiny.model, world.batch, adapter_names="c")
    world.check(tiny, None, None, None)


def test_merges_mixes_and_folds_of_registered_names(world: World) -> None:
    wanted = served(world.base, world.folders, memory=1 << 22)
    runtime = world.runtime(7)
    model, batch = runtime.model, world.batch
    how = mlora.Merge(["e", "f"], [0.7, 0.3], "ties", density=0.5)
    for entry in ({"a": 0.5, "b": -1.0}, how, mlora.Merge(["g", "h"], [1.0, 0.5])):
        assert_close(logits(model, batch, adapter_names=[entry, None, "c"]),
                     logits(wanted, batch, adapter_names=[entry, None, "c"]))  # fmt: skip
    assert runtime.adapter("e").location == "files"  # only its tensors were needed
    for one in (runtime, wanted.mlora):
        one.merge_adapter({"a": 0.5, "d": 0.5})
    for name in "bcefgh":
        assert_close(logits(model, batch, adapter_names=[name, None, "d"]),
                     logits(wanted, batch, adapter_names=[name, None, "d"]))  # fmt: skip
        assert runtime.adapter("a").location != "files"  # folded in
    with pytest.raises(errors.AdapterInUseError, match="folded"):
        runtime.delete_adapter("a")
    for one in (runtime, wanted.mlora):
        one.unmerge_adapter()
    runtime.set_adapter("h")
    for name in "abcdefg":
        world.check(runtime, name, None, name)
    assert_close(logits(model, world.rows[0]), world.alone["h"][0])


def test_merges_of_requests_make_room_too(world: World) -> None:
    """They are computed again."""
    runtime, wanted = world.runtime(4), served(world.base, world.folders, memory=1 << 22)
    for turn in range(3):
        for pair in ("ab", "cd", "ef"):
            how = mlora.Merge(list(pair), [0.7, 0.3], "magnitude_prune", density=0.5, svd_rank=3)
            assert_close(logits(runtime.model, world.batch, adapter_names=[how, None, pair[0]]),
                         logits(wanted, world.batch, adapter_names=[how, None, pair[0]]), 1e-4)  # fmt: skip
            assert runtime.host.used <= 4 * world.held, turn


def test_saved_and_replaced_and_deleted_unloaded(world: World, tmp_path: Path) -> None:
    runtime = world.runtime()
    runtime.save_adapter("a", tmp_path / "saved")
    assert runtime.adapter("a").location == "files"
    for key, tensor in mlora.Adapter.from_pretrained(world.folders["a"]).tensors.items():
        assert tensor.equal(mlora.Adapter.from_pretrained(tmp_path / "saved").tensors[key])
    runtime.replace_adapter("a", world.folders["c"])
    world.check(runtime, "a", None, "b", contents={"a": "c"})
    world.check(runtime, *"def")
    world.check(runtime, "a", None, "b", contents={"a": "c"})
    with pytest.raises(TypeError, match="nonsense"):
        runtime.replace_adapter("a", world.folders["c"], nonsense=1)
    runtime.replace_adapter("b", mlora.Adapter.from_pretrained(world.folders["d"]))  # from memory: it stays
    for name in "efgh":
        world.check(runtime, name, "b", None, contents={"b": "d"})
    runtime.delete_adapter("g")
    runtime.delete_adapter("a")
    with told(runtime, errors.UnknownAdapterError, "'g'"):
        logits(runtime.model, world.batch, adapter_names="g")
    with runtime.pin("c") as pin:
        runtime.delete_adapter("c", when_unused=True)
        runtime.register_adapter(world.folders["e"], "c")
        entries = [pin.entry, "c", None]
        got = logits(runtime.model, world.batch, adapter_names=entries)
        assert_close(got[:1], world.alone["c"][0])
        assert_close(got[1:2], world.alone["e"][1])
        world.check(runtime, "b", "h", None, contents={"b": "d"})
    world.check(runtime, "f", "h", None)
    world.check(runtime, "c", "b", None, contents={"b": "d", "c": "e"})
    assert runtime.host.used == sum(packed.held for packed in runtime._store._adapters.values())


def test_what_a_backward_pass_needs_comes_back(world: World) -> None:
    """Dropped between the two; the content of a pin stays the same, too."""
    runtime = world.runtime(2)
    embeds = world.base.get_input_embeddings()(world.rows[0]["input_ids"]).detach().requires_grad_()

    def run(others: str) -> torch.Tensor:
        out = runtime.model(inputs_embeds=embeds, adapter_names="a").logits
        for name in others:
            world.check(runtime, name, None, name)
        assert (runtime.adapter("a").location == "files") == bool(others)
        (gradient,) = torch.autograd.grad(out.square().sum(), embeds)
        return gradient

    with runtime.pin("a") as pin:
        content = pin.content
    wanted = run("")
    assert_close(run("bcd"), wanted)
    with runtime.pin("a") as pin:
        assert pin.content == content


def test_a_call_waits_for_what_it_needs_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, read = world.runtime(8), Files.read
    go, reading, reads = threading.Event(), threading.Event(), []

    def slow(files: Files, name: str, again: bool = True) -> Any:
        reads.append(name)
        if name == "a":
            reading.set()
            assert go.wait(60)
        return read(files, name, again)

    monkeypatch.setattr(Files, "read", slow)
    whole = runtime.prefetch(["a", {"b": 0.5, "c": 0.5}, None])
    assert reading.wait(60)
    world.check(runtime, "d", None, "e")  # "a" is on its way still
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(world.check, runtime, "a", None, "d") for _ in range(2)]
        assert not whole.done() and not any(call.done() for call in calls)
        go.set()
        for call in calls:
            call.result(60)
    whole.result(60)
    assert sorted(reads) == list("abcde") and places(runtime)[:3] == "ddd"
    assert runtime.prefetch([]).done()


def test_one_that_is_deleted_or_replaced_while_it_is_read(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, read = world.runtime(3), Files.read

    def deleting(files: Files, name: str, again: bool = True) -> Any:
        found = read(files, name, again)
        monkeypatch.setattr(Files, "read", read)
        if name == "a":
            runtime.delete_adapter("a")
        else:
            runtime.replace_adapter("b", world.folders["c"])
        return found

    monkeypatch.setattr(Files, "read", deleting)
    with told(runtime, errors.UnknownAdapterError, "'a'"):
        logits(runtime.model, world.batch, adapter_names="a")
    assert not runtime.host.used
    monkeypatch.setattr(Files, "read", deleting)
    world.check(runtime, "b", None, "b", contents={"b": "c"})
    assert runtime.host.used == runtime._store["b"].held


def test_a_name_that_is_replaced_is_known_all_the_time(world: World) -> None:
    runtime = world.runtime(3)
    sources = [mlora.Adapter.from_pretrained(world.folders[name]) for name in "bc"]
    seen: list[Any] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            try:
                seen.append(runtime.adapter("a"))
            except KeyError as error:
                seen.append(error)
                return

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        for turn in range(200):
            runtime.replace_adapter("a", sources[turn % 2])
        done.set()
        looking.result(60)
    assert len(seen) > 200 and all(isinstance(info, mlora.AdapterInfo) and info.name == "a" for info in seen)


def test_threads_that_call_prefetch_drop_replace_and_delete(world: World) -> None:
    """Each answer is that of a content that its name had while it was asked for; nothing is left behind."""
    runtime = world.runtime(7, max_adapters=7)
    contents: dict[str, list[str]] = {name: [name] for name in NAMES}
    settled = dict.fromkeys(NAMES, 0)  # which of them it had when the last change had been made
    lock, stop, failed = threading.Lock(), threading.Event(), []

    def guarded(work: Any, seed: int) -> None:
        draw = random.Random(seed)
        try:
            while not stop.is_set():
                work(draw)
        except BaseException as error:
            failed.append(error)
            stop.set()

    def call(draw: random.Random) -> None:
        names = draw.sample(NAMES, 2)
        since = {name: settled[name] for name in names}
        try:
            got = logits(runtime.model, world.batch, adapter_names=[*names, None])
        except (errors.UnknownAdapterError, errors.CapacityError):  # deleted, or all is in use for now
            return
        for row, name in enumerate(names):
            had = contents[name][since[name] :]
            assert any(torch.allclose(got[row], world.alone[one][row][0], atol=1e-4) for one in had), (name, had)
        asked.append(1)

    def prefetch(draw: random.Random) -> None:
        runtime.prefetch(draw.sample(NAMES, 2)).exception(60)

    def change(draw: random.Random) -> None:
        name, other = draw.sample(NAMES, 2)
        with lock:
            contents[name].append(other)  # first, or a call could see it before
            if draw.random() < 0.5:
                runtime.replace_adapter(name, world.folders[other])
            else:
                runtime.delete_adapter(name, when_unused=True)
                runtime.register_adapter(world.folders[other], name)
            settled[name] = len(contents[name]) - 1

    def changing(draw: random.Random) -> None:
        with suppress(errors.CapacityError):
            change(draw)
        stop.wait(0.02)

    asked: list[int] = []
    works = [call, call, prefetch, changing]
    threads = [threading.Thread(target=guarded, args=(work, seed)) for seed, work in enumerate(works)]
    for thread in threads:
        thread.start()
    stop.wait(6)
    stop.set()
    for thread in threads:
        thread.join(120)
    assert not failed, failed
    assert len(asked) > 20 and runtime.host.drops > 20
    runtime.prefetch(list("ab")).exception(60)
    assert not runtime._tiers._flights and not runtime._tiers._held
    assert not any(packed.pins or packed.retired for packed in runtime._store._adapters.values())
    assert runtime.host.used == sum(packed.held for packed in runtime._store._adapters.values()) <= 7 * world.held


def test_memory_stays_flat(world: World, tmp_path: Path) -> None:
    """Of adapters of a megabyte each, over hundreds of drops."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(1024, 256))
    runtime = mlora.patch(net, memory=4 << 20, host_memory=3 << 20)
    config = {"peft_type": "LORA", "r": 200, "lora_alpha": 200, "target_modules": ["0"]}
    for number in range(6):
        tensors = {"0.lora_A.weight": torch.randn(200, 1024), "0.lora_B.weight": torch.randn(256, 200)}
        mlora.Adapter(config, tensors).save_pretrained(tmp_path / str(number))
    runtime.register_adapters(tmp_path)
    x, draw = torch.randn(1, 1, 1024), random.Random(3)

    def rounds(count: int) -> int:
        for _ in range(count):
            runtime.prefetch(draw.choice("012345")).result(60)
            with runtime.use_adapters(draw.choice("012345")):
                net(x)
        return rss()

    before = rounds(60)
    assert rounds(300) - before < 2 << 20
    assert runtime.host.drops > 100 and runtime.host.loaded <= 3
