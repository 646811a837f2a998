"""Models that accelerate has spread over several devices, host memory and a disk, and the arena on each device.

The devices are the CPU, a disk, and two that stand in for GPUs (`standin.py`): code that mixes them fails there. The
oracle is PEFT with one adapter alone, on a model in one piece.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import standin
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from conftest import (
    assert_close,
    build,
    identity,
    inputs_for,
    logits,
    make_adapter,
    peft_alone,
    resized,
    row_of,
)
from test_store import CPU, check_rows, deltas_of, store_of
from torch import Tensor

import mlora
from mlora import errors
from mlora.arena.space import Space

ONE, TWO = standin.DEVICES
PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


def spread(*devices: Any) -> dict[str, Any]:
    return dict(zip(PARTS, devices, strict=True))


# name -> (device map, options of dispatch_model)
MAPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "two devices": (spread(ONE, ONE, TWO, TWO, ONE, TWO), {}),
    "there and back": (spread(TWO, ONE, TWO, ONE, TWO, TWO), {}),
    "the CPU and a device": (spread("cpu", "cpu", TWO, TWO, "cpu", "cpu"), {"main_device": "cpu"}),
    "offloaded to a device": (spread(ONE, "cpu", "disk", TWO, ONE, "cpu"), {"main_device": ONE}),
    "offloaded, blocks at once": (
        spread("cpu", "cpu", "disk", "cpu", "cpu", "cpu"),
        {"main_device": ONE, "preload_module_classes": ["LlamaDecoderLayer"]},
    ),
    "the CPU and a disk": (spread("cpu", "disk", "cpu", "disk", "cpu", "disk"), {"main_device": "cpu"}),
}


@pytest.fixture(scope="module")
def devices() -> None:
    if reason := standin.missing():
        pytest.skip(reason)
    standin.load()


on_devices = pytest.mark.usefixtures("devices")


@pytest.fixture(params=MAPS)
def each_map(request: pytest.FixtureRequest) -> str:
    """A name of `MAPS`."""
    if request.param != "the CPU and a disk":
        request.getfixturevalue("devices")
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def base() -> Any:
    return build("llama").eval()


KINDS: dict[str, dict[str, Any]] = {
    "all": {"r": 3, "target_modules": "all-linear"},
    "dora": {"r": 2, "target_modules": ["q_proj", "down_proj"], "use_dora": True, "lora_bias": False},
    "tokens": {"r": 2, "target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "last": {"r": 4, "target_modules": ["up_proj"], "layers_to_transform": [1]},
}


@pytest.fixture(scope="module")
def adapters(base: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from peft import IA3Config, OFTConfig, get_peft_model

    root = tmp_path_factory.mktemp("adapters")
    found = {name: make_adapter(root / name, base, seed, **config) for seed, (name, config) in enumerate(KINDS.items())}
    found["wide"] = make_adapter(
        root / "wide", resized(base, 71), 9, r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    generator = torch.Generator().manual_seed(5)
    for name, config in {
        "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "oft": OFTConfig(target_modules=["q_proj", "up_proj"], oft_block_size=4, use_cayley_neumann=False),
    }.items():
        wrapped = get_peft_model(copy.deepcopy(base), config)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        wrapped.save_pretrained(root / name)
        found[name] = root / name
    return found


@pytest.fixture(scope="module")
def alone(base: Any, adapters: dict[str, Path]) -> dict[str | None, Any]:
    """Adapter -> its logits for each row of the batch, by PEFT."""
    batch = inputs_for("llama", 4)
    wanted = {}
    for name, folder in adapters.items():
        model = resized(base, 71) if name == "wide" else base
        wanted[name] = logits(peft_alone(model, folder), batch)
    return {None: logits(base, batch), **wanted}


def placed(base: Any, which: str, tmp_path: Path) -> Any:
    """A copy of the model, spread as `MAPS` says."""
    device_map, options = MAPS[which]
    return dispatch_model(copy.deepcopy(base), device_map, offload_dir=tmp_path / "offload", **options)


def answers(model: Any, batch: dict[str, Tensor], **options: Any) -> Tensor:
    """`logits`, wherever the model gives them."""
    with torch.no_grad():
        return model(**batch, **options).logits.cpu() * batch["attention_mask"][..., None]


def check(
    model: Any,
    names: list[str | None],
    alone: Mapping[str | None, Tensor],
    batch: dict[str, Tensor],
    named: bool = True,
) -> None:
    got = answers(model, batch, adapter_names=names) if named else answers(model, batch)
    for row, name in enumerate(names):
        width = alone[name].shape[-1]
        assert_close(got[row, :, :width], alone[name][row])
        assert not got[row, :, width:].isfinite().any() or width == got.shape[-1]


def test_each_row_gets_what_its_adapter_gives_alone(
    base: Any, adapters: dict[str, Path], alone: dict[str | None, Tensor], tmp_path: Path, each_map: str
) -> None:
    model, batch = placed(base, each_map, tmp_path), inputs_for("llama", 4)
    before, hooks = identity(model), [getattr(m, "_hf_hook", None) for m in model.modules()]
    bare = answers(model, batch)
    runtime = mlora.patch(model, memory=1 << 20)
    for name, folder in adapters.items():
        runtime.load_adapter(folder, name)
    assert torch.equal(answers(model, batch), bare)
    check(model, ["all", "dora", None, "tokens"], alone, batch)
    check(model, ["last", "ia3", "oft", "all"], alone, batch)
    check(model, ["wide", "all", None, "wide"], alone, batch)
    for space in runtime._store.spaces:
        assert f"bytes, torch.float32 on {space.device}" in runtime.status()
    mlora.unpatch(model)
    assert identity(model) == before and [getattr(m, "_hf_hook", None) for m in model.modules()] == hooks
    assert torch.equal(answers(model, batch), bare)


def test_a_device_holds_what_its_modules_need(
    base: Any, adapters: dict[str, Path], tmp_path: Path, each_map: str
) -> None:
    model = placed(base, each_map, tmp_path)
    device_map, options = MAPS[each_map]
    runtime = mlora.patch(model, memory=1 << 20)
    for name, folder in adapters.items():
        runtime.load_adapter(folder, name)
    store = runtime._store
    wanted = {options.get("main_device", d) if d in ("cpu", "disk") else d for d in device_map.values()}
    assert set(store.devices) == {torch.device(device) for device in wanted}
    last = store["last"]
    home = store.homes[runtime._indices["model.layers.1.mlp.up_proj"]]
    assert [bool(last.size(at)) for at in range(len(store.spaces))] == [at == home for at in range(len(store.spaces))]
    assert sum(space.used for space in store.spaces) == sum(info.bytes for info in runtime.adapters.values())
    assert sum(len(space.tables) for space in store.spaces) == store.modules
    for space in store.spaces:
        assert space.arena.device == space.tables.device == space.device


@on_devices
def test_generate(base: Any, adapters: dict[str, Path], tmp_path: Path) -> None:
    model = placed(base, "the CPU and a device", tmp_path)
    runtime = mlora.patch(model, memory=1 << 20)
    for name, folder in adapters.items():
        runtime.load_adapter(folder, name)
    prompt = inputs_for("llama", 1, length=5)["input_ids"].repeat(3, 1)
    names = ["all", None, "dora"]
    got = model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False, adapter_names=names)
    for row, name in enumerate(names):
        oracle = base if name is None else peft_alone(base, adapters[name])
        want = oracle.generate(input_ids=prompt[:1], max_new_tokens=6, do_sample=False)
        assert torch.equal(got[row], want[0])


@on_devices
def test_fused_experts_and_routers_on_two_devices(tmp_path: Path) -> None:
    base = build("mixtral")
    base.config._experts_implementation = "eager"  # others count experts as only GPUs do
    folder = make_adapter(
        tmp_path / "a", base, 1, r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"]
    )
    batch = inputs_for("llama", 2)
    want = logits(peft_alone(base, folder), batch)
    model = dispatch_model(copy.deepcopy(base), spread(ONE, ONE, TWO, TWO, ONE, TWO))
    runtime = mlora.patch(model, memory=1 << 20)
    runtime.load_adapter(folder, "a")
    got = answers(model, batch, adapter_names=["a", None])
    assert_close(got[0], want[0])
    assert_close(got[1], logits(base, batch)[1])


@on_devices
def test_what_is_folded_into_two_devices_comes_out_to_the_bit(
    base: Any, adapters: dict[str, Path], alone: dict[str | None, Tensor], tmp_path: Path
) -> None:
    model, batch = placed(base, "two devices", tmp_path), inputs_for("llama", 4)
    runtime = mlora.patch(model, memory=1 << 20)
    for name in ("all", "dora", "oft"):
        runtime.load_adapter(adapters[name], name)
    before = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    for name, keep in (("all", "corrections"), ("dora", "copy"), ("oft", "copy")):
        runtime.merge_adapter(name, keep=keep)
        assert_close(answers(model, batch), alone[name], 1e-4)
        check_beside(model, alone, batch, name)
        runtime.unmerge_adapter()
        assert all(torch.equal(tensor.cpu(), before[key]) for key, tensor in model.state_dict().items())


def check_beside(model: Any, alone: Mapping[str | None, Tensor], batch: dict[str, Tensor], name: str) -> None:
    other = "dora" if name == "all" else "all"
    got = answers(model, batch, adapter_names=[other, None, name, other])
    for row, own in enumerate((other, None, name, other)):
        assert_close(got[row], alone[own][row], 1e-4)


@on_devices
@pytest.mark.parametrize("which", ("offloaded to a device", "the CPU and a disk"))
def test_nothing_is_folded_into_what_is_offloaded(
    base: Any, adapters: dict[str, Path], alone: dict[str | None, Tensor], tmp_path: Path, which: str
) -> None:
    model, batch = placed(base, which, tmp_path), inputs_for("llama", 4)
    runtime = mlora.patch(model, memory=1 << 20)
    runtime.load_adapter(adapters["all"], "all")
    bare = answers(model, batch)
    for call in (runtime.merge_adapter, runtime.merge_and_unload):
        with pytest.raises(errors.MergeError, match=r"model\.layers\.\d.*offloaded"):
            call("all")
        assert not runtime.merged and torch.equal(answers(model, batch), bare)
    check(model, ["all", None, None, "all"], alone, batch)


@on_devices
@pytest.mark.parametrize("how", ("cpu", "disk", "whole"))
def test_offloading_of_all_to_one_device(
    base: Any, adapters: dict[str, Path], alone: dict[str | None, Tensor], tmp_path: Path, how: str
) -> None:
    model, batch = copy.deepcopy(base), inputs_for("llama", 4)
    if how == "cpu":
        cpu_offload(model, ONE)
    elif how == "disk":
        disk_offload(model, tmp_path, ONE)
    else:
        model, hook = cpu_offload_with_hook(model, ONE)
    runtime = mlora.patch(model, memory=1 << 20)
    assert runtime._store.devices == (ONE,)
    for name in ("all", "dora", "tokens"):
        runtime.load_adapter(adapters[name], name)
    check(model, ["all", "dora", None, "tokens"], alone, batch)
    if how == "whole":
        hook.offload()
        check(model, ["tokens", "dora", None, "all"], alone, batch)
    with pytest.raises(errors.MergeError, match="offloaded"):
        runtime.merge_adapter("all")


def test_training_on_two_devices(tmp_path: Path) -> None:
    """The gradients and the steps of one device, in a process of its own: see `standin.load`."""
    if reason := standin.missing():
        pytest.skip(reason)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    code = f"import pathlib, test_devices; test_devices.train(pathlib.Path({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def train(tmp_path: Path) -> None:
    standin.load(accelerator=True)
    base, batch = build("llama"), inputs_for("llama", 3)
    found = []
    for which in (None, "two devices"):
        model = copy.deepcopy(base) if which is None else placed(base, which, tmp_path)
        runtime = mlora.patch(model, memory=1 << 20)
        for seed, config in enumerate(({"r": 3, "target_modules": "all-linear"}, KINDS["tokens"], KINDS["dora"])):
            runtime.add_adapter(str(seed), {"peft_type": "LORA", **config}, seed=seed)
        parameters = [p for name in "012" for _, p in runtime.named_parameters(name)]
        with torch.no_grad():
            for number, parameter in enumerate(parameters):
                draw = torch.Generator().manual_seed(number)
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw).to(parameter.device))
        optimizer = torch.optim.SGD(parameters, lr=0.1, foreach=False)
        for _ in range(2):
            optimizer.zero_grad()
            out = model(**batch, adapter_names=["0", "1", "2"]).logits
            out.float().pow(2).mean().backward()
            optimizer.step()
        found.append([(p.detach().cpu(), p.grad.cpu()) for p in parameters])
        if which is not None:
            assert {parameter.device for parameter in parameters} == {ONE, TWO}
    for (one, gradient), (other, other_gradient) in zip(*found, strict=True):
        assert_close(other, one, 1e-4)
        assert_close(other_gradient, gradient, 1e-3)


SPLIT = spread("cpu", "disk", "cpu", "cpu", "cpu", "disk")


@pytest.mark.parametrize("how", ({"device_map": SPLIT}, {"device_map": "auto", "max_memory": {"cpu": 60_000}}))
def test_device_maps_of_transformers(
    base: Any, adapters: dict[str, Path], alone: dict[str | None, Tensor], tmp_path: Path, how: dict[str, Any]
) -> None:
    """From its files, in eager code and compiled."""
    from transformers import AutoModelForCausalLM

    batch = inputs_for("llama", 4)
    base.save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, offload_folder=tmp_path / "offload", **how
    )
    assert any(parameter.is_meta for parameter in model.parameters())
    runtime = mlora.patch(model, memory=1 << 20)
    for name in ("all", "dora"):
        runtime.load_adapter(adapters[name], name)
    check(model, ["all", None, "dora", "all"], alone, batch)
    compiled = torch.compile(model, backend="aot_eager")
    for names in (["dora", None, "all", None], [None, "all", "dora", "all"]):
        with runtime.use_adapters(names):
            check(compiled, names, alone, batch, named=False)


@on_devices
def test_memory_of_each_device(base: Any, adapters: dict[str, Path], tmp_path: Path) -> None:
    model = placed(base, "two devices", tmp_path)
    with pytest.raises(errors.PatchError, match=r"memory names cpu; .*privateuseone:0, privateuseone:1"):
        mlora.patch(model, memory={"cpu": 1 << 20})
    with pytest.raises(errors.PatchError, match="whole number"):
        mlora.patch(model, memory={ONE: 1 << 20, TWO: 0})
    runtime = mlora.patch(model, memory={ONE: 1 << 20, TWO: 1 << 12})
    assert [space.capacity for space in runtime._store.spaces] == [1 << 20, 1 << 12]
    runtime.load_adapter(adapters["last"], "last")
    before = runtime.adapters
    with pytest.raises(errors.CapacityError, match="bytes on privateuseone:1; the arena has 4,096"):
        runtime.load_adapter(adapters["all"], "all")
    assert runtime.adapters == before


@on_devices
def test_a_live_peft_model_on_two_devices(
    base: Any, adapters: dict[str, Path], alone: dict[str | None, Tensor], tmp_path: Path
) -> None:
    from peft import PeftModel

    live = PeftModel.from_pretrained(placed(base, "two devices", tmp_path), adapters["all"], adapter_name="all")
    live.load_adapter(adapters["dora"], "dora")
    model = mlora.patch(live, memory=1 << 20).model
    check(model, ["all", "dora", None, "all"], alone, inputs_for("llama", 4))


def test_a_live_peft_adapter_that_is_offloaded_is_refused(base: Any, adapters: dict[str, Path]) -> None:
    live = peft_alone(base, adapters["all"])
    cpu_offload(live, CPU)
    before = identity(live)
    with pytest.raises(errors.AdapterError, match=r"'oracle-0' of this PeftModel\w* is offloaded: .*lora_A.* 'meta'"):
        mlora.patch(live, memory=1 << 20)
    assert identity(live) == before


# The store, on two arenas of the CPU's.


def sizes_of(ranks: tuple[int, int]) -> list[int]:
    packed = store_of(1 << 14, homes=(0, 1)).pack(deltas_of(0, ranks), "x")
    return [packed.size(0) * 4, packed.size(1) * 4]


def test_what_is_short_on_one_device_is_on_none() -> None:
    first, second = sizes_of((2, 2))
    store = store_of(2 * max(first, second), homes=(0, 1))
    store.register("a", store.pack(deltas_of(1, (2, 2)), "a"))
    store.register("b", store.pack(deltas_of(2, (0, 4)), "b"))
    store.register("c", store.pack(deltas_of(3, (2, 0)), "c"))
    assert store["a"].resident and store["c"].resident and not store["b"].resident
    store.acquire(["a"])
    used = [space.used for space in store.spaces]
    with pytest.raises(errors.CapacityError, match=r"bytes of adapters on cpu"):
        store.acquire(["c", "b"])
    assert [space.used for space in store.spaces] == used
    assert [store[name].pins for name in "abc"] == [1, 0, 0] and store["b"].offsets == [-1, -1]
    store.release(["a"])
    store.acquire(["b"])
    assert not store["a"].resident, "its part on the second device made room"
    assert store["c"].resident, "which holds nothing there"
    check_rows(store, store["b"], deltas_of(2, (0, 4)))


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Space]]:
    """Arenas that cannot be written to: a copy there raises."""
    spaces: list[Space] = []
    place = Space.place

    class Lost:
        def copy_(self, *_: Any, **__: Any) -> None:
            raise ConnectionError("the device is lost")

    monkeypatch.setattr(Space, "place", lambda space, *at: Lost() if space in spaces else place(space, *at))
    yield spaces


def test_a_copy_that_fails_on_the_second_device_undoes_the_first(failing: list[Space]) -> None:
    store = store_of(1 << 14, homes=(0, 1))
    store.register("a", store.pack(deltas_of(1, (2, 2)), "a"))
    failing.append(store.spaces[1])
    empty, used = store.table(0).clone(), [space.used for space in store.spaces]
    store._adapters["b"] = store.pack(deltas_of(2, (3, 3)), "b")
    with pytest.raises(ConnectionError):
        store.acquire(["b"])
    packed = store["b"]
    assert not packed.resident and packed.offsets == [-1, -1] and packed.pins == 0
    assert [space.used for space in store.spaces] == used and torch.equal(store.table(0), empty)
    assert len(store._free_slots) == store.slots - 1
    failing.clear()
    store.acquire(["a", "b"])
    check_rows(store, store["a"], deltas_of(1, (2, 2)))
    check_rows(store, packed, deltas_of(2, (3, 3)))


def test_what_cannot_be_moved_together_leaves_all_devices(failing: list[Space]) -> None:
    unit = sizes_of((2, 2))
    store = store_of(4 * max(unit), homes=(0, 1))
    for name in "abcd":
        store.register(name, store.pack(deltas_of(ord(name), (2, 2)), name))
    assert all(store[name].resident for name in "abcd")
    store.unregister("a")
    store.unregister("c")
    store._adapters["wide"] = store.pack(deltas_of(9, (0, 4)), "wide")
    failing.append(store.spaces[1])
    with pytest.raises(ConnectionError):
        store.acquire(["wide"])
    assert not any(store[name].resident for name in ("b", "d", "wide"))
    assert [space.used for space in store.spaces] == [0, 0]
    failing.clear()
    store.acquire(["b", "wide"])
    check_rows(store, store["b"], deltas_of(ord("b"), (2, 2)))
    check_rows(store, store["wide"], deltas_of(9, (0, 4)))


def test_hooks_of_accelerate_can_be_removed_while_the_model_is_patched(
    base: Any, adapters: dict[str, Path], alone: dict[str | None, Tensor]
) -> None:
    model, batch = copy.deepcopy(base), inputs_for("llama", 4)
    cpu_offload(model, CPU)
    runtime = mlora.patch(model, memory=1 << 20)
    runtime.load_adapter(adapters["all"], "all")
    remove_hook_from_submodules(model)
    check(model, ["all", None, None, "all"], alone, batch)
    assert_close(logits(model, row_of(batch, 1), adapter_names="all"), alone["all"][1:2])
