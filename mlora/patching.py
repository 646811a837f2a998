"""`patch`: turn a model into a multi-adapter runtime, in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from numbers import Integral
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn

from . import errors
from .adapters.adapter import Adapter
from .arena.memory import Room, default_room, fixed
from .arena.size import WANTED, size_of
from .arena.store import Store
from .layers import (
    DENSE,
    LayerState,
    LoraLayer,
    ParametersState,
    Shard,
    ShardedLayer,
    Shares,
    compute_dtype,
    cuts_choices,
    devices_of,
    find_layers,
    find_stacks,
    group_of,
    guard_moves,
    is_norm_like,
    mixin_of,
    model_dtype,
    moves,
    order_of,
    own_part,
    sharded_cut,
    swap_class,
    swap_forward,
    unpacked,
)
from .patched import PatchedModel, ancestors, mix_in, unpatch
from .plan.modality import foreign_in, placeholders_of
from .plan.shared import Fused, Shared
from .routing.ranks import Ranks
from .runtime import Runtime
from .takeover import has_peft, taken_over

PLAN_WORDS = 1 << 16  # the plan buffer of compiled code: room for batches of some ten thousand rows


Memory: TypeAlias = int | str | Mapping[int | str | torch.device, int | str] | None
"""Bytes of each device's arena; see `patch`."""


def patch(
    model: nn.Module,
    *,
    memory: Memory = None,
    max_adapters: int = 256,
    max_merges: int = 64,
    dtype: torch.dtype | None = None,
    fused: Fused = True,
    host_memory: int | str | None = None,
    packed_cache: str | Path | None = None,
    fully_sharded: bool = False,
) -> Runtime:
    """Patch every linear, convolution, norm, token embedding and fused experts of `model` in place, so that each row of
    a batch can use its own adapter.

    Until an adapter is used the model computes the same bits as before. Its class, `state_dict`,
    hooks and `save_pretrained` stay as they are.

    A model that transformers has split over processes (`tp_plan="auto"`) is patched in each of them, and each holds its
    part of the adapters. All of them must load, route and call the same from then on.

    Args:
        model: a Hugging Face model, or any module with linears or convolutions in it. A `PeftModel`, or a transformers
            model with adapters, hands its adapters over: PEFT's layers are taken out, its adapters are
            loaded under their names, and the active one becomes the default (`Runtime.set_adapter`). Of a
            `PeftModel` it is the model inside that is patched, `runtime.model`; the wrapper refuses calls.
        memory: bytes of device memory for resident adapters, or a size such as "2GiB"; the others wait on the host. The
            default is a quarter of what is free, on the CPU of what the machine and a container's limits leave, where
            pages that no adapter needs are not taken; or half the size of the model's weights, where that is more and
            free twice over. Of a model on several devices it is so much on each of them, or of each what a mapping
            device -> bytes says (`{0: 1 << 30, "cpu": "4GiB"}`), and the default on others. `Runtime.status` tells it.
        max_adapters: how many adapters can be resident at once.
        max_merges: how many results of merges in requests are kept; of more, those that were not used for longest are
            forgotten, and computed again when asked for.
        dtype: in which adapters are stored on the device; the default is the linears' own. With torch.float32 on a
            model in 16 bits they are not rounded, as in PEFT, and take twice the bytes.
        fused: compute base product and LoRA in one op where that is bit-equal to the library (on x86 CPUs with
            AVX2 or AVX-512), and where it is faster. With "always" also in an order of addition of mlora's own, which
            is faster up to some hundred tokens, and the attention of decode steps on CPUs with AVX2 where the model's
            is transformers' "sdpa": base rows are as close to the exact result as the library's, in other bits, and
            rows still do not see each other. The order goes by the number of tokens; where the library is faster, it
            is used. What is faster is measured once a shape and process, so that from one process to the
            next, too, bits can differ.
        host_memory: bytes of host memory for all adapters, or a size; default: no bound. When it is short, adapters
            from files that were not used for longest are dropped, also from the device, and made again from their files
            when a call needs them. Those that were made in memory count, and stay.
        packed_cache: a folder in which adapters are kept as they lie in memory, where to make that of their files takes
            more than to read them (DoRA, LoKr, VB-LoRA, PiSSA, `dense=True`, ...), also for later processes. It may be
            deleted at any time; default: none is kept.
        fully_sharded: of a model that is split over processes, split both A and B of its linears, so that each process
            holds its share of them and no more, at the price of exchanges between the processes; see docs/parallel.md.
            It changes nothing on a model in one process.

    Returns:
        The runtime, also reachable as `model.mlora`.

    Raises:
        PatchError: it is patched already, has no linear, or has PEFT adapters merged or several active; or `memory`
            names a device on which no module is called.
        AdapterError, UnsupportedAdapterError, CapacityError: an adapter in it cannot be served.
    """
    with patching(
        model, memory, max_adapters, max_merges, dtype, fused, host_memory, packed_cache, fully_sharded
    ) as runtime:
        return runtime


@contextmanager
def patching(
    model: nn.Module,
    memory: Memory,
    max_adapters: int,
    max_merges: int,
    dtype: torch.dtype | None,
    fused: Fused,
    host_memory: int | str | None,
    packed_cache: str | Path | None,
    fully_sharded: bool,
) -> Iterator[Runtime]:
    """`patch`, undone if the block fails: the model is unpatched, and has PEFT's layers again if it had some."""
    if not isinstance(model, nn.Module):
        raise errors.PatchError(f"patch takes a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, PatchedModel):
        raise errors.PatchError("this model is patched already; its runtime is model.mlora")
    if has_peft(model) and group_of(model):
        raise errors.PatchError(
            "this model has PEFT layers and is split over processes; patch it without PEFT, and load the adapters"
        )
    taken: AbstractContextManager[tuple[nn.Module, dict[str, Adapter], str | None]]
    taken = taken_over(model) if has_peft(model) else nullcontext((model, {}, None))
    with taken as (base, adapters, active):
        runtime = _patch(base, memory, max_adapters, max_merges, dtype, fused, host_memory, packed_cache, fully_sharded)
        try:
            for name, adapter in adapters.items():
                runtime.add_adapter(name, adapter)
            if active is not None:
                runtime.set_adapter(active)
            yield runtime
        except BaseException:
            unpatch(base)
            raise


def _patch(
    model: nn.Module,
    memory: Memory,
    max_adapters: int,
    max_merges: int,
    dtype: torch.dtype | None,
    fused: Fused,
    host_memory: int | str | None,
    packed_cache: str | Path | None,
    fully_sharded: bool,
) -> Runtime:
    """`patch` of a model without PEFT's layers."""
    paths = find_layers(model)
    if all(is_norm_like(module) for module in paths.values()):
        raise errors.PatchError(f"{type(model).__name__} has no linear, convolution or token embedding to patch")
    if any(isinstance(m, (LoraLayer, PatchedModel)) for m in model.modules()):
        raise errors.PatchError("a part of this model is patched already; unpatch it first")

    modules: dict[int, tuple[str, nn.Module]] = {}  # by identity: a shared module is one layer
    for name, module in paths.items():
        modules.setdefault(id(module), (name, module))
    stacks = find_stacks(model)
    called = devices_of(model)
    usual = model_dtype(model)
    dtypes = {key: compute_dtype(module, usual) for key, (_, module) in modules.items()}
    kinds = Counter(dtypes[key] for key, (_, module) in modules.items() if not is_norm_like(module))
    arena_dtype = dtype or kinds.most_common(1)[0][0]
    given = {f"memory[{key!r}]": value for key, value in memory.items()} if isinstance(memory, Mapping) else {}
    sizes = {**given, "memory": None if given else memory, "host_memory": host_memory}
    for option, size in sizes.items():
        if size is not None and size_of(size) is None:
            raise errors.PatchError(f"{option}={size!r}, wanted {WANTED}")
    for option, value, least in (("max_adapters", max_adapters, 1), ("max_merges", max_merges, 0)):
        if not isinstance(value, Integral) or value < least:
            raise errors.PatchError(f"{option}={value!r}, wanted a whole number of at least {least}")
    if fused not in (True, False, "always"):
        raise errors.PatchError(f"fused={fused!r}, wanted True, False or 'always'")
    if arena_dtype not in DENSE:
        raise errors.PatchError(f"dtype={dtype!r}, wanted one of {', '.join(sorted(map(str, DENSE)))}")
    split = {
        key: cut for key, (_, module) in modules.items() if fully_sharded and (cut := sharded_cut(module)) is not None
    }
    homes = [called[id(module)] for _, module in modules.values()] + [called[id(s.module)] for s in stacks.values()]
    homes += [called[key] for key in split]
    devices = list(dict.fromkeys(homes))
    ranks = group_of(model)
    if ranks and (host_memory is not None or packed_cache is not None):
        raise errors.PatchError(
            "host_memory and packed_cache are for models in one process; this one is split over several, which would "
            "have to drop and load the same adapters at the same time"
        )
    together = Ranks(ranks) if ranks else None
    rooms = _rooms(model, memory, arena_dtype, devices, called)
    if together is not None:  # what one has room for, all have
        rooms = [min(own, key=lambda room: room.size) for own in zip(*together.all_of(rooms), strict=True)]
    store = Store(
        devices, arena_dtype, rooms, [devices.index(device) for device in homes], max_adapters, size_of(host_memory)
    )
    numbers = {key: number for number, key in enumerate(modules)}
    indices = {name: numbers[id(module)] for name, module in paths.items()}
    indices.update({path: len(modules) + number for number, path in enumerate(stacks)})
    shards = {
        key: Shard.of(number, store.table(number), cut)
        for number, (key, cut) in enumerate(split.items(), len(modules) + len(stacks))
    }
    of_paths = {name: shards[id(module)] for name, module in paths.items() if id(module) in shards}
    foreign: set[int] = set()
    if placeholders := placeholders_of(model):
        is_foreign = foreign_in(model)
        foreign = {index for path, index in indices.items() if is_foreign(path)}
        foreign |= {shard.number for path, shard in of_paths.items() if is_foreign(path)}
    words = [torch.zeros(PLAN_WORDS, dtype=torch.int32, device=device) for device in devices]
    arenas = [space.arena for space in store.spaces]
    shared = Shared(arenas, words, fused, placeholders if foreign else (), foreign, cuts_choices(model))
    shared.moves = moves(model)
    states = {
        key: LayerState(
            name, index, store.homes[index], shared, store.table(index), module, dtypes[key], order_of(model, name)
        )
        for (key, (name, module)), index in zip(modules.items(), numbers.values(), strict=True)
    }
    if shards:
        shared.shares = Shares(store)
    for key, shard in shards.items():
        states[key].shard = shard
    runtime = Runtime(model, store, shared, indices, paths, stacks, max_merges, packed_cache, of_paths, together)
    for path, (module, _) in stacks.items():
        if id(module) not in modules:
            owner = path.rpartition(".")[0]
            own = {stack.name: indices[p] for p, stack in stacks.items() if stack.module is module}
            dtype = getattr(module, next(iter(own))).dtype
            modules[id(module)] = owner, module
            first = next(iter(own.values()))
            states[id(module)] = ParametersState(
                owner, store.homes[first], shared, store.table(first), module, dtype, own, order_of(model, owner)
            )

    shared.unpacked = {
        index: why for state, (_, module) in zip(states.values(), modules.values(), strict=True)
        if (why := unpacked(state, module)) for index in state.numbers_of("weight")
    }  # fmt: skip
    prefix = getattr(model, "base_model_prefix", "")
    shared.body = prefix if prefix in dict(model.named_children()) else ""
    for key, (_, module) in modules.items():
        if states[key].outer is not None:
            del module.__dict__["forward"]
        mixin = mixin_of(module) if states[key].shard is None else ShardedLayer
        swap_forward(module, type(module).forward, mixin.forward)
        module.__dict__["_mlora"] = states[key]
        swap_class(module, mixin)
    for module in ancestors(model, runtime.bases):
        guard_moves(module, shared)
    mix_in(model, runtime)
    return runtime


def _rooms(
    model: nn.Module,
    memory: Memory,
    dtype: torch.dtype,
    devices: Sequence[torch.device],
    called: Mapping[int, torch.device],
) -> list[Room]:
    """What the arena of each device takes. `called`: by the id of a module, where it is."""
    if memory is not None and not isinstance(memory, Mapping):
        return [fixed(size_of(memory) or 0)] * len(devices)
    asked = {torch.empty(0, device=device).device: size for device, size in (memory or {}).items()}
    if beyond := [device for device in asked if device not in devices]:
        raise errors.PatchError(
            f"memory names {', '.join(map(str, beyond))}; modules of this model are called on "
            f"{', '.join(map(str, devices))}"
        )
    weights = dict.fromkeys([*devices, *called.values()], 0)
    held = {id(tensor): (tensor, module) for module in model.modules() for tensor in module.parameters(recurse=False)}
    for tensor, module in held.values():
        weights[called[id(module)]] += own_part(tensor).numel() * tensor.element_size()
    return [
        fixed(size_of(asked[device]) or 0) if device in asked else default_room(weights[device], dtype, device)
        for device in devices
    ]
