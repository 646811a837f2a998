"""Host memory of blobs: what is counted, and whose memory the next blob gets."""

from __future__ import annotations

import threading

import pytest
import torch

from mlora import errors
from mlora.arena.host import Host
from mlora.arena.size import size_of

BESIDE = 100


def host_of(most: int | None) -> Host:
    return Host(torch.float32, False, BESIDE, most)


def test_memory_is_used_again_when_nobody_reads_it() -> None:
    host = host_of(9000)
    first = host.block(1000, "a")
    where = first.blob.data_ptr()
    first.blob.fill_(7)
    reader = first.blob[10:12]
    assert host.used == 4000 + BESIDE and first.nbytes == host.used
    host.give_back(first.nbytes, first.memory)
    del first
    second = host.block(1000, "b")
    second.blob.fill_(5)
    assert reader.tolist() == [7, 7], "what somebody reads stays as it is"
    del reader
    where = second.blob.data_ptr()
    host.give_back(second.nbytes, second.memory)
    del second
    third = host.block(990, "c")
    assert third.blob.data_ptr() == where and third.blob.numel() == 990
    host.give_back(third.nbytes, third.memory)
    del third
    fourth = host.block(500, "d")  # half of it would be lost
    assert fourth.blob.numel() == 500 and host.used == 2000 + BESIDE
    assert host.block(0, "e").blob.numel() == 0


def test_room_is_made_or_refused() -> None:
    host, made = host_of(9000), []
    blocks = [host.block(1000, "a"), host.block(1000, "b")]
    with pytest.raises(errors.CapacityError, match="c needs 4,100 bytes on the host; host_memory has 9,000, 8,200"):
        host.block(1000, "c")
    assert host.used == 8200

    def make_room(nbytes: int, label: str) -> None:
        made.append((nbytes, label))
        block = blocks.pop()
        host.give_back(block.nbytes, block.memory)

    host.make_room = make_room
    host.count(4000, "d")
    assert made == [(4000, "d")] and host.used == 8100
    free = host_of(None)
    free.count(1 << 60, "anything")
    assert free.block(10, "e").memory is None


def test_many_threads_stay_within_the_bound() -> None:
    host, lock = host_of(10 * (4000 + BESIDE)), threading.Lock()
    blocks = []
    over = []

    def make_room(nbytes: int, label: str) -> None:
        with lock:
            block = blocks.pop() if blocks else None
        if block is not None:
            host.give_back(block.nbytes, block.memory)

    def work(number: int) -> None:
        for _ in range(300):
            block = host.block(1000, "a")
            block.blob.fill_(number)
            over.append(host.used > host.most)
            assert bool((block.blob == number).all()), "nobody else has this memory"
            with lock:
                blocks.append(block)

    host.make_room = make_room
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(over) == 1200 and not any(over)


@pytest.mark.parametrize(
    "text, size",
    [(5, 5), ("5", 5), ("2GiB", 2 << 30), ("2 GB", 2_000_000_000), ("1.5k", 1500), ("64MiB", 64 << 20), (0, None),
     ("0", None), (-1, None), ("-1", None), ("2 lots", None), (2.5, None), (None, None), ("", None)],
)  # fmt: skip
def test_sizes(text: object, size: int | None) -> None:
    assert size_of(text) == size
