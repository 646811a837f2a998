"""The engine's parts without a model: turns in the queue, text from tokens, and what options may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import letters

from mlora import errors
from mlora.serve import Sampling
from mlora.serve.queue import Full, Queue
from mlora.serve.text import Detokenizer, StopStrings


@dataclass(eq=False)
class Item:
    key: str
    number: int = 0
    passed: int = 0


def everything(queue: Queue[Item], fits: Any = lambda item: True) -> str:
    return "".join(item.key for item in iter(lambda: queue.take(fits), None))


def test_lines_take_turns_and_are_in_order() -> None:
    queue: Queue[Item] = Queue(100, 100, 5)
    for number, key in enumerate("aaaaaabcab"):
        queue.put(Item(key, number))
    assert len(queue) == 10
    taken = [queue.take(lambda item: True) for _ in range(10)]
    assert "".join(item.key for item in taken) == "abcabaaaaa"
    assert all(
        [item.number for item in taken if item.key == key] == sorted(item.number for item in taken if item.key == key)
        for key in "abc"
    )
    assert queue.take(lambda item: True) is None and len(queue) == 0


def test_one_that_comes_late_waits_for_one_of_each_line() -> None:
    queue: Queue[Item] = Queue(10_000, 10_000, 5)
    for number in range(3000):
        queue.put(Item("ab"[number % 2]))
    queue.put(Item("c"))
    assert "c" in [queue.take(lambda item: True).key for _ in range(3)]


def test_a_full_queue_and_a_full_line() -> None:
    queue: Queue[Item] = Queue(3, 2, 5)
    queue.put(Item("a"))
    queue.put(Item("a"))
    with pytest.raises(Full):
        queue.put(Item("a"))
    queue.put(Item("b"))
    with pytest.raises(Full):
        queue.put(Item("c"))
    queue.take(lambda item: True)
    queue.put(Item("c"))


def test_what_does_not_fit_is_passed_over_a_bounded_number_of_times() -> None:
    queue: Queue[Item] = Queue(100, 100, 3)
    big = Item("big")
    queue.put(big)
    for _ in range(10):
        queue.put(Item("s"))
    assert everything(queue, lambda item: item.key != "big") == "sss"
    assert queue.take(lambda item: True) is big


def test_put_back_is_first_again() -> None:
    queue: Queue[Item] = Queue(100, 100, 3)
    for key in "aabb":
        queue.put(Item(key))
    first = queue.take(lambda item: True)
    queue.put_back(first)
    assert first.passed == 1 and queue.take(lambda item: True) is first
    queue.remove(next(item for item in queue if item.key == "b"))
    assert sorted(everything(queue)) == ["a", "b"]


@given(st.lists(st.integers(2, 66), max_size=30), st.lists(st.integers(2, 66), max_size=8))
def test_pieces_of_text_are_the_text(tokens: list[int], prompt: list[int]) -> None:
    """Whatever bytes of letters come, in whatever order; and no letter is told before it is whole."""
    tokenizer = TOKENIZER
    text = Detokenizer(tokenizer, prompt, True)
    pieces = [text.push(token) for token in tokens]
    assert all(not piece.endswith("\ufffd") for piece in pieces)
    before = tokenizer.decode(prompt)
    whole = tokenizer.decode([*prompt, *tokens])
    if not before.endswith("\ufffd") and "\ufffd" not in whole:
        assert "".join(pieces) + text.rest() == whole[len(before) :]


TOKENIZER = letters()


def test_letters_of_several_tokens_come_whole() -> None:
    bytes_of = [TOKENIZER.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "a€🦀".encode()[1:]]
    text = Detokenizer(TOKENIZER, [], True)
    assert [text.push(token) for token in bytes_of] == ["", "", "€", "", "", "", "🦀"]
    cut = Detokenizer(TOKENIZER, [], True)
    assert cut.push(bytes_of[0]) == "" and "\ufffd" in cut.rest()


@given(
    st.text("abc", max_size=40),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 5), min_size=1, max_size=40),
    st.booleans(),
)
def test_stop_strings(text: str, stops: list[str], sizes: list[int], include: bool) -> None:
    """However the text is cut into pieces: it ends with the first stop string that is complete."""
    ends = sorted((text.find(stop) + len(stop), -len(stop)) for stop in stops if stop in text)
    wanted = text
    if ends:
        end, length = ends[0]
        wanted = text[: end if include else end + length]
    got, at, watch = "", 0, StopStrings(stops, include)
    while at < len(text) and not watch.found:
        size = sizes[at % len(sizes)]
        if include or size == 1 or not ends:  # or a piece may have several
            got += watch.push(text[at : at + size])
        else:
            for letter in text[at : at + size]:
                if not watch.found:
                    got += watch.push(letter)
        assert wanted.startswith(got)
        at += size
    got += watch.rest()
    assert got == wanted and watch.found == bool(ends)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 1.5),
        ("max_new_tokens", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.5),
        ("repetition_penalty", 0),
        ("frequency_penalty", 2.5),
        ("presence_penalty", "1"),
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", {1: float("inf")}),
        ("seed", -1),
        ("seed", 1 << 63),
        ("stop", [""]),
        ("stop", 7),
        ("stop_token_ids", [-1]),
        ("min_tokens", 65),
        ("n", 0),
        ("logprobs", 1),
        ("top_logprobs", -1),
    ],
)
def test_options_name_what_is_wrong(field: str, value: Any) -> None:
    with pytest.raises(errors.RequestError, match=rf"^{field} is .* must be "):
        Sampling(**{field: value})


def test_options_take_what_clients_send() -> None:
    sampling = Sampling(stop="x", stop_token_ids=[3], temperature=0, top_p=1, seed=0)
    assert sampling.stop == ("x",) and sampling.stop_token_ids == (3,) and sampling.greedy
