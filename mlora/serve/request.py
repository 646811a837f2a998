"""A request on its way through the engine, and its sequences: what the worker's steps read and write."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..routing.entries import Entry
from .answers import LENGTH, STOP
from .drawing import Drawing
from .sampling import Sampling

NEW, WAITING, PREPARING, READY, RUNNING, DONE = range(6)


@dataclass(frozen=True, slots=True)
class Event:
    """What the worker tells of a sequence: a token; or its end without one, cancelled or by `error`."""

    sequence: SequenceState
    token: int | None = None
    logprob: float | None = None
    top_logprobs: Mapping[int, float] | None = None
    finish_reason: str | None = None
    error: Exception | None = None


@dataclass(eq=False, slots=True)
class SequenceState:
    """One answer of a request.

    Args:
        id: its name in transformers' batches.
        index: of which of the request's answers it is. `drawing`: chooses its tokens, and keeps their random numbers.
        tokens: those so far. `cached`: how many of the prompt were there already.
        ended: whether nothing more is told of it. `left`: whether it is out of the batches for good.
        reruns: how often it was run again after a failure.
    """

    request: Request
    id: str
    index: int
    drawing: Drawing
    tokens: list[int] = field(default_factory=list)
    cached: int = 0
    ended: bool = False
    left: bool = False
    reruns: int = 0

    def add(self, token: int) -> str | None:
        """Keep a new token; why it is the last one, if it is."""
        self.tokens.append(token)
        if token in self.request.ends:
            return STOP
        return LENGTH if len(self.tokens) >= self.request.sampling.max_new_tokens else None


@dataclass(eq=False, slots=True)
class Request:
    """A prompt under an entry.

    Args:
        prompt: token ids. `entry`: as the user wrote it; `key`: equal for entries that are the same; `names`: its
            adapters.
        ends: tokens that end an answer.
        post: takes the events of a step to who waits for them, from any thread; there `receive` gets each.
        size: tokens of the cache that it needs at most, all its answers together.
        state: NEW; WAITING in the queue; PREPARING while its adapters are loaded; READY with them pinned; RUNNING;
            DONE.
        tokens, scores: how many its embedding and its head have, which its adapters may bring.
        pin: of its adapters, while it holds one; `content`: what that was.
        starts: of its aLoRAs, where in the prompt each begins to apply.
        passed: see `queue.Waiting`. `came`: when, by `time.monotonic`; `started`: when it began to run, or `came`.
    """

    prompt: Sequence[int]
    entry: Entry
    key: Any
    names: Sequence[str]
    sampling: Sampling
    ends: frozenset[int]
    size: int
    post: Callable[[Sequence[Event]], None]
    receive: Callable[[Event], None] | None = None
    state: int = NEW
    tokens: int = 0
    scores: int = 0
    pin: Any = None
    content: Any = None
    starts: Mapping[str, int | None] = field(default_factory=dict)
    sequences: list[SequenceState] = field(default_factory=list)
    passed: int = 0
    came: float = field(default_factory=time.monotonic)
    started: float = 0.0

    def __post_init__(self) -> None:
        self.started = self.came
