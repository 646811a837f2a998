"""The order of copies and callers on CUDA streams, by streams that only keep a log: no GPU has run this."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch

from mlora.arena.streams import Streams


class Stream:
    def __init__(self, log: list[Any], name: str) -> None:
        self.log, self.name = log, name

    def wait_stream(self, other: Stream) -> None:
        self.log.append((self.name, "waits for", other.name))

    def wait_event(self, event: str) -> None:
        self.log.append((self.name, "waits for", event))

    def record_event(self) -> str:
        self.log.append((self.name, "is marked"))
        return f"copies of {self.name}"


def test_copies_wait_for_callers_and_callers_for_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []
    current = [Stream(log, "call")]

    @contextmanager
    def active(stream: Stream) -> Any:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(log, "copy"))
    monkeypatch.setattr(torch.cuda, "stream", active)
    streams = Streams([torch.device("cuda", 0), torch.device("cpu")])
    streams.follow()
    assert not log, "nothing was copied yet"
    with streams.beside():
        assert current[-1].name == "copy"
        streams.follow()
        log.append("copying")
    assert log == [("copy", "waits for", "call"), "copying", ("copy", "is marked")] and current[-1].name == "call"
    log.clear()
    current[0] = Stream(log, "another")
    streams.follow()
    assert log == [("another", "waits for", "copies of copy")]
    log.clear()
    with streams.beside():
        pass
    assert sorted(log[:2]) == [("copy", "waits for", "another"), ("copy", "waits for", "call")]


def test_other_devices_have_none() -> None:
    streams = Streams([torch.device("cpu")])
    streams.follow()
    with streams.beside():
        pass
    assert not streams._copies and not streams._copied
