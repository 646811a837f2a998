"""Which replica a request goes to."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("ray.serve", reason="replicas need Ray Serve")

from mlora.serve.affinity import SLACK, ranked

REPLICAS = st.lists(st.text(max_size=8), min_size=1, max_size=8, unique=True)


def idle(replicas: list[str]) -> dict[str, int]:
    return dict.fromkeys(replicas, 0)


@given(st.text(max_size=8), REPLICAS, st.randoms())
def test_the_order_is_of_the_names_alone(adapter: str, replicas: list[str], shuffled: random.Random) -> None:
    order = ranked(adapter, idle(replicas), 4)
    assert sorted(order) == sorted(replicas)
    shuffled.shuffle(replicas)
    assert ranked(adapter, idle(replicas), 4) == order


@given(st.text(max_size=8), REPLICAS)
def test_who_goes_moves_nothing_else(adapter: str, replicas: list[str]) -> None:
    order = ranked(adapter, idle(replicas), 4)
    for gone in replicas:
        assert ranked(adapter, idle([r for r in replicas if r != gone]), 4) == [r for r in order if r != gone]


def test_adapters_are_spread() -> None:
    homes = Counter(ranked(f"adapter-{i}", idle(["r0", "r1", "r2", "r3"]), 4)[0] for i in range(4000))
    assert len(homes) == 4 and all(900 < count < 1100 for count in homes.values()), homes


@given(REPLICAS, st.integers(1, 5), st.integers(1, 60))
def test_one_adapter_alone_fills_no_replica_beyond_its_share(replicas: list[str], most: int, count: int) -> None:
    requests = idle(replicas)
    order = ranked("a", requests, most)
    for number in range(min(count, most * len(replicas))):
        taker = ranked("a", requests, most)[0]
        assert taker == next(r for r in order if requests[r] < most and requests[r] < share(number, len(replicas)))
        requests[taker] += 1


def test_when_all_are_full_the_order_is_the_same() -> None:
    replicas = ["x", "y", "z"]
    assert ranked("a", dict.fromkeys(replicas, 4), 4) == ranked("a", idle(replicas), 4)


def test_under_a_mixed_load_nearly_all_stay_at_home() -> None:
    """60 requests at a time of 400 adapters with Zipf's popularity, over 4 replicas that take 32."""
    draw, replicas = random.Random(3), ["r0", "r1", "r2", "r3"]
    requests, running, at_home, count = idle(replicas), [], 0, 4000
    weights = [1 / (i + 1) for i in range(400)]
    for name in draw.choices(range(400), weights, k=count):
        if len(running) == 60:
            requests[running.pop(draw.randrange(60))] -= 1
        taker = ranked(f"adapter-{name}", requests, 32)[0]
        at_home += taker == ranked(f"adapter-{name}", idle(replicas), 32)[0]
        requests[taker] += 1
        running.append(taker)
        assert max(requests.values()) <= share(len(running) - 1, 4)
    assert at_home > 0.8 * count, at_home


def share(others: int, replicas: int) -> int:
    return math.ceil(SLACK * (others + 1) / replicas)
