"""The allocator and the store: adapters move between host and arena, and no byte of them changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mlora import errors, layout
from mlora.arena.allocator import Allocator
from mlora.arena.bits import GAIN, INPUT, LORA, SHIFT, TURN
from mlora.arena.pack import Packed
from mlora.arena.store import Store
from mlora.lowering import Delta, Turn

CPU = torch.device("cpu")


class AllocatorMachine(RuleBasedStateMachine):
    """The allocator drives a real buffer: each span is filled with its own number, which has to survive."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = Allocator(97)
        self.memory = [0] * 97
        self.live: dict[int, tuple[int, int]] = {}  # number -> (offset, size)
        self.next = 1

    @rule(size=st.integers(1, 40))
    def alloc(self, size: int) -> None:
        hole = self.largest_hole()
        offset = self.allocator.alloc(size)
        assert (offset is not None) == (size <= hole), "it fits where there is a hole and only there"
        if offset is None:
            return
        before = [o + s for o, s in self.live.values()]
        assert offset == 0 or offset in before, "first fit starts where another span ends"
        self.memory[offset : offset + size] = [self.next] * size
        self.live[self.next] = (offset, size)
        self.next += 1

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        offset, _ = self.live.pop(data.draw(st.sampled_from(sorted(self.live))))
        self.allocator.free(offset)

    @rule(offset=st.integers(-1, 98))
    def free_nothing(self, offset: int) -> None:
        if offset not in {o for o, _ in self.live.values()}:
            with pytest.raises(ValueError, match=str(offset)):
                self.allocator.free(offset)

    @rule(data=st.data())
    def compact(self, data: st.DataObject) -> None:
        fixed = data.draw(st.sets(st.sampled_from(sorted(self.live)))) if self.live else set()
        pinned = {self.live[number] for number in fixed}
        free = self.allocator.free_size
        for source, target, size in self.allocator.compact([offset for offset, _ in pinned]):
            number = next(n for n, span in self.live.items() if span == (source, size))
            assert target < source and number not in fixed
            self.memory[target : target + size] = self.memory[source : source + size]
            self.live[number] = (target, size)
        assert all(self.live[n] in pinned for n in fixed)
        assert self.allocator.free_size == free
        if not fixed and self.live:
            assert max(o + s for o, s in self.live.values()) == 97 - free, "nothing pinned: one hole, at the end"

    def largest_hole(self) -> int:
        end = best = 0
        for offset, size in [*sorted(self.live.values()), (97, 0)]:
            best, end = max(best, offset - end), offset + size
        return best

    @invariant()
    def spans_are_disjoint_and_keep_their_content(self) -> None:
        assert self.allocator.spans == sorted(self.live.values())
        end = 0
        for offset, size in self.allocator.spans:
            assert offset >= end and size > 0
            end = offset + size
        assert end <= 97
        assert self.allocator.free_size == 97 - sum(size for _, size in self.live.values())
        for number, (offset, size) in self.live.items():
            assert self.memory[offset : offset + size] == [number] * size


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

PLAIN, GAINS = (layout.A, layout.B, layout.SHIFT), (layout.GAIN, layout.IN_GAIN)
TURNS = (layout.TURN, layout.IN_TURN)
WIDTHS = [(8, 5), (3, 33)]  # (in, out) of the store's two modules


def deltas_of(seed: int, ranks: tuple[int, int], extras: int = 0) -> dict[int, Delta]:
    """Random deltas for the two modules; bits of `extras` add gain, in_gain, shift and turns to the second."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    deltas = {}
    for index, rank in enumerate(ranks):
        if rank:
            width_in, width_out = WIDTHS[index]
            more = extras if index else 0
            deltas[index] = Delta(
                random(rank, width_in),
                random(width_out, rank).t(),  # as the lowering hands it over: a transposed view
                scale=0.1 + seed,
                gain=random(width_out) if more & 1 else None,
                in_gain=random(width_in) if more & 2 else None,
                shift=random(width_out) if more & 4 else None,
                turn=Turn(random(3, width_out), 11) if more & 8 else None,
                in_turn=Turn(random(3, width_in)) if more & 8 else None,
            )
    return deltas


def store_of(
    capacity: int, slots: int = 8, dtype: torch.dtype = torch.float32, homes: tuple[int, int] = (0, 0)
) -> Store:
    devices = 1 + max(homes)
    return Store([CPU] * devices, dtype, [capacity] * devices, homes, slots)


def check_rows(store: Store, packed: Packed, deltas: dict[int, Delta]) -> None:
    """The table rows of a resident adapter lead to exactly its parts, in the arena's dtype."""
    for index in range(len(WIDTHS)):
        arena = store.spaces[store.homes[index]].arena
        row, rest_row = store.table(index)[packed.slot :: store.slots].tolist()
        delta = deltas.get(index)
        assert row[layout.RANK] == (delta.rank if delta else 0)
        parts = {layout.A: delta.a, layout.B: delta.b, layout.GAIN: delta.gain, layout.IN_GAIN: delta.in_gain,
                 layout.SHIFT: delta.shift, layout.TURN: delta.turn, layout.IN_TURN: delta.in_turn
                 } if delta else {}  # fmt: skip
        for column in (*PLAIN, *GAINS, *TURNS):
            part = parts.get(column)
            if isinstance(part, Turn):
                assert row[column + 1] == layout.turn_shape(part.size, part.stride)
                assert rest_row[column] == -1 or rest_row[column + 1] == row[column + 1]
                part = part.values
            if part is None:
                assert row[column] == rest_row[column] == -1
                continue
            assert row[column] * arena.element_size() % 64 == 0, "parts are aligned to a cache line"
            held = arena[row[column] : row[column] + part.numel()].view(part.shape)
            assert torch.equal(held, part.to(arena.dtype))
            if rest_row[column] >= 0:
                assert column in (*GAINS, *TURNS) and packed.rests
                rest = arena[rest_row[column] : rest_row[column] + part.numel()].view(part.shape)
                assert torch.equal(rest, (part - held.float()).to(arena.dtype))
            elif column in TURNS:
                eye = torch.arange(part.shape[1]) // parts[column].stride % len(part) == torch.arange(3)[:, None]
                assert ((part - held.float()).abs() <= torch.finfo(arena.dtype).eps / 2 * (eye + part).abs()).all()
            elif column in GAINS:
                unit = torch.finfo(arena.dtype).eps / 2
                assert ((part - held.float()).abs() <= unit * (1 + part).abs()).all()
        assert rest_row[layout.RANK] == 0 and rest_row[layout.A] == rest_row[layout.B] == -1
        if delta:
            bits = torch.tensor([row[layout.SCALE]]).to(torch.int32).view(torch.float32)
            assert bits.item() == torch.tensor(delta.scale, dtype=torch.float32).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("extras", range(16))
def test_parts_are_where_the_table_says(dtype: torch.dtype, extras: int) -> None:
    store = store_of(1 << 14, dtype=dtype)
    filler, deltas = deltas_of(1, (4, 0)), deltas_of(2, (3, 7), extras)
    store.register("filler", store.pack(filler, "filler"))  # so that offsets do not start at 0
    packed = store.pack(deltas, "x")
    store.register("x", packed)
    check_rows(store, packed, deltas)
    check_rows(store, store["filler"], filler)
    wanted = LORA | (GAIN if extras & 1 else 0) | (INPUT if extras & 10 else 0) | (SHIFT if extras & 4 else 0)
    wanted |= TURN if extras & 8 else 0
    assert packed.touches.tolist() == [LORA, wanted]


def test_a_blob_has_no_padding_to_a_maximum_rank() -> None:
    store = store_of(1 << 14)
    small = store.pack(deltas_of(1, (2, 0)), "small")
    store.register("large", store.pack(deltas_of(2, (40, 40)), "large"))
    # rank 2: A is 16 floats, one line; B is 10 floats, one line
    assert small.nbytes == 128
    assert store.pack(deltas_of(1, (2, 0)), "again").nbytes == 128


class StoreMachine(RuleBasedStateMachine):
    """A store beside a model of it: names with deltas, pins, and the order of use."""

    SLOTS, CAPACITY, HOMES = 4, 64 * 40, (0, 0)

    def __init__(self) -> None:
        super().__init__()
        self.store = store_of(self.CAPACITY, self.SLOTS, torch.bfloat16, self.HOMES)  # in which some gains have rests
        self.deltas: dict[str, dict[int, Delta]] = {}
        self.order: list[str] = []  # least recently used first
        self.held: list[list[str]] = []
        self.count = 0

    @rule(ranks=st.tuples(st.integers(0, 6), st.integers(0, 6)), extras=st.integers(0, 7))
    def register(self, ranks: tuple[int, int], extras: int) -> None:
        name, deltas = f"a{self.count}", deltas_of(self.count, ranks, extras)
        self.count += 1
        resident = self.resident()
        self.store.register(name, self.store.pack(deltas, name))
        assert resident <= self.resident(), "registering evicts nobody"
        self.deltas[name] = deltas
        self.order.append(name)

    @precondition(lambda self: self.deltas)
    @rule(data=st.data())
    def acquire(self, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.deltas)), min_size=1, max_size=4, unique=True))
        pinned = {n for held in self.held for n in held}
        union = pinned | set(names)
        devices = range(len(self.store.spaces))
        needed = [sum(self.store[n].size(device) for n in union) * 2 for device in devices]
        beyond = [size for size in needed if size > self.CAPACITY]
        before = self.resident()
        pins = {n: self.store[n].pins for n in self.deltas}
        try:
            self.store.acquire(names)
        except errors.CapacityError as error:
            too_many = len(union) > self.SLOTS
            if beyond:
                assert f"{beyond[0]:,} bytes" in str(error) and f"{self.CAPACITY:,}" in str(error)
            elif too_many:
                assert str(len(union)) in str(error) and str(self.SLOTS) in str(error)
            else:
                assert pinned, "only holes between pinned adapters are an excuse"
                assert "contiguous" in str(error)
            assert pins == {n: self.store[n].pins for n in self.deltas}, "all of them or none"
            if beyond or too_many:
                assert before == self.resident()
            else:
                self.order = list(self.store._adapters)
            return
        assert not beyond and len(union) <= self.SLOTS
        for name in names:
            self.order.remove(name)
            self.order.append(name)
        self.held.append(names)
        assert union <= self.resident()
        evicted = before - self.resident()
        kept = self.resident() - union
        # Who was evicted had been used less recently than everyone who could have gone and stayed: those that hold
        # nothing on a device do not make room there.
        for gone in evicted:
            for stayed in kept & before:
                whole = all(self.store[stayed].size(device) for device in devices)
                assert not whole or self.order.index(gone) < self.order.index(stayed)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.store.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule(data=st.data())
    def unregister(self, data: st.DataObject) -> None:
        idle = sorted(set(self.deltas) - {n for held in self.held for n in held})
        if idle:
            name = data.draw(st.sampled_from(idle))
            self.store.unregister(name)
            del self.deltas[name]
            self.order.remove(name)
            assert name not in self.store

    def resident(self) -> set[str]:
        return {n for n, p in self.store._adapters.items() if p.resident}

    @invariant()
    def every_resident_adapter_is_whole(self) -> None:
        slots = set()
        used = [0] * len(self.store.spaces)
        for name in self.resident():
            packed = self.store[name]
            assert packed.slot not in slots
            slots.add(packed.slot)
            used = [had + packed.size(device) * 2 for device, had in enumerate(used)]
            check_rows(self.store, packed, self.deltas[name])
            assert packed.nbytes == sum(packed.size(device) for device in range(len(used))) * 2
        assert [space.used for space in self.store.spaces] == used
        empty = torch.full((len(WIDTHS), 2, layout.TABLE_WIDTH), -1)
        empty[..., (layout.RANK, layout.SCALE)] = 0
        for slot in set(range(self.SLOTS)) - slots:
            assert torch.equal(
                torch.stack([self.store.table(i)[slot :: self.SLOTS] for i in range(len(WIDTHS))]), empty
            )

    @invariant()
    def pinned_adapters_are_resident(self) -> None:
        held = [n for names in self.held for n in names]
        for name in self.deltas:
            assert self.store[name].pins == held.count(name)
        assert set(held) <= self.resident()


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


class TwoDevicesMachine(StoreMachine):
    """A device for each of the two modules: some adapters lie on both, some on one of them."""

    CAPACITY, HOMES = 64 * 24, (0, 1)


TestTwoDevices = TwoDevicesMachine.TestCase
TestTwoDevices.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_the_least_recently_used_goes_first() -> None:
    size = store_of(1 << 14).pack(deltas_of(0, (2, 2)), "x").nbytes
    store = store_of(3 * size)
    for name in "abc":
        store.register(name, store.pack(deltas_of(ord(name), (2, 2)), name))
    store.acquire(["a"])
    store.release(["a"])
    store.register("d", store.pack(deltas_of(4, (2, 2)), "d"))
    assert not store["d"].resident, "loading evicts nobody"
    store.acquire(["d"])
    assert [store[n].resident for n in "abcd"] == [True, False, True, True], "b was used longest ago"


def test_a_pinned_adapter_neither_leaves_nor_moves() -> None:
    size = store_of(1 << 14).pack(deltas_of(0, (2, 2)), "x").nbytes
    store = store_of(3 * size)
    for name in "abc":
        store.register(name, store.pack(deltas_of(ord(name), (2, 2)), name))
    store.acquire(["b"])
    place = store["b"].offsets, store["b"].slot
    store.register("d", store.pack(deltas_of(4, (2, 2)), "d"))
    store.register("e", store.pack(deltas_of(5, (2, 2)), "e"))
    store.acquire(["d", "e"])
    assert (store["b"].offsets, store["b"].slot) == place
    check_rows(store, store["b"], deltas_of(ord("b"), (2, 2)))


def test_compaction_makes_room_without_an_eviction() -> None:
    # Two holes of one unit each, between adapters that stay; the new one takes two units.
    unit = deltas_of(0, (2, 0))
    size = store_of(1 << 14).pack(unit, "x").nbytes
    store = store_of(4 * size)
    for name in "abcd":
        store.register(name, store.pack(deltas_of(ord(name), (2, 0)), name))
    store.unregister("a")
    store.unregister("c")
    double = deltas_of(9, (4, 0))
    packed = store.pack(double, "double")
    assert packed.nbytes == 2 * size
    store.register("double", packed)
    assert packed.resident and store["b"].resident and store["d"].resident
    for name in "bd":
        check_rows(store, store[name], deltas_of(ord(name), (2, 0)))
    check_rows(store, packed, double)


def test_holes_between_pinned_adapters_are_a_clear_error_and_change_nothing() -> None:
    size = store_of(1 << 14).pack(deltas_of(0, (2, 0)), "x").nbytes
    store = store_of(4 * size)
    for name in "abcd":
        store.register(name, store.pack(deltas_of(ord(name), (2, 0)), name))
    store.acquire(["b", "d"])
    wide = deltas_of(9, (4, 0))
    packed = store.pack(wide, "wide")
    assert packed.nbytes == 2 * size
    store.register("wide", packed)
    with pytest.raises(errors.CapacityError, match="contiguous"):
        store.acquire(["wide"])
    assert packed.pins == 0 and store["b"].pins == 1
    assert store["b"].resident and store["d"].resident
    store.release(["b", "d"])
    store.acquire(["wide"])
    check_rows(store, packed, wide)


def test_what_only_this_batch_uses_may_move_to_make_room() -> None:
    size = store_of(1 << 14).pack(deltas_of(0, (2, 0)), "x").nbytes
    store = store_of(4 * size)
    for name in "abcd":
        store.register(name, store.pack(deltas_of(ord(name), (2, 0)), name))
    store.register("wide", store.pack(deltas_of(9, (4, 0)), "wide"))
    store.acquire(["b", "d", "wide"])  # they fill the arena exactly, but not where b and d are now
    for name in "bd":
        check_rows(store, store[name], deltas_of(ord(name), (2, 0)))
    check_rows(store, store["wide"], deltas_of(9, (4, 0)))


def test_a_thousand_adapters_through_an_arena_of_sixteen() -> None:
    size = store_of(1 << 14).pack(deltas_of(0, (3, 2)), "x").nbytes
    store = store_of(16 * size, slots=16)
    deltas = {str(i): deltas_of(i, (3, 2)) for i in range(1000)}
    for name, value in deltas.items():
        store.register(name, store.pack(value, name))
    assert sum(store[n].resident for n in deltas) == 16
    space = store.spaces[0]
    address, table = space.arena.data_ptr(), space.tables.data_ptr()
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        names = [str(i) for i in torch.randperm(1000, generator=generator)[:16].tolist()]
        store.acquire(names)
        for name in names[::5]:
            check_rows(store, store[name], deltas[name])
        store.release(names)
    assert (space.arena.data_ptr(), space.tables.data_ptr()) == (address, table), "graphs keep the addresses"


def test_more_than_fits_says_how_much_was_needed() -> None:
    size = store_of(1 << 14).pack(deltas_of(0, (2, 2)), "x").nbytes
    store = store_of(2 * size)
    for name in "abc":
        store.register(name, store.pack(deltas_of(1, (2, 2)), name))
    with pytest.raises(errors.CapacityError, match=rf"{3 * size:,} bytes.*{2 * size:,}"):
        store.acquire(["a", "b", "c"])
    assert [store[n].pins for n in "abc"] == [0, 0, 0]
    store.acquire(["a", "b"])
    with pytest.raises(errors.CapacityError, match=rf"{3 * size:,} bytes.*{2 * size:,} of them.*active already"):
        store.acquire(["c"])


def test_one_adapter_larger_than_the_arena_is_refused_when_it_is_packed() -> None:
    store = store_of(256)
    with pytest.raises(errors.CapacityError, match=r"'big' needs [\d,]+ bytes on cpu; the arena has 256"):
        store.pack(deltas_of(0, (30, 30)), "adapter 'big'")


def test_too_few_slots_says_so() -> None:
    store = store_of(1 << 14, slots=2)
    for name in "abc":
        store.register(name, store.pack(deltas_of(1, (1, 1)), name))
    with pytest.raises(errors.CapacityError, match=r"3 adapters.*2 slots"):
        store.acquire(["a", "b", "c"])


def test_a_value_that_overflows_the_arena_dtype_is_refused() -> None:
    store = store_of(1 << 14, dtype=torch.float16)
    delta = Delta(torch.full((1, 8), 70000.0), torch.ones(1, 5))
    with pytest.raises(errors.AdapterError, match="torch\\.float16"):
        store.pack({0: delta}, "x")


@given(capacity=st.integers(64, 5000))
def test_capacity_is_whole_lines_and_never_more_than_asked(capacity: int) -> None:
    held = store_of(capacity).spaces[0].capacity
    assert capacity - 64 < held <= capacity and held % 64 == 0
