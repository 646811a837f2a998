"""What a request gives: tokens as they come, or whole answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STOP = "stop"
LENGTH = "length"
CANCELLED = "cancelled"
ERROR = "error"


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts of one answer, in tokens. `cached`: those of the prompt whose keys and values were there already.
    `waited`: seconds from the request's coming until it ran."""

    prompt: int
    completion: int
    cached: int
    waited: float = 0.0


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer.

    Args:
        id: None in the last one of an answer that was cancelled.
        text: what became certain with it, which may be nothing, or more than its own letters.
        logprob: log-probability in the model's own distribution, if `Sampling.logprobs` asks for it.
        top_logprobs: token id -> the same of the likeliest tokens, likeliest first, as many as `Sampling.top_logprobs`.
        index: of which of the request's `Sampling.n` answers it is.
        finish_reason: of the last one: "stop" (a stop string or token, or the model's end), "length" or "cancelled".
        usage: of the last one.
    """

    id: int | None
    text: str
    logprob: float | None = None
    top_logprobs: Mapping[int, float] | None = None
    index: int = 0
    finish_reason: str | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer of `generate_many`.

    Args:
        request: the number of the request in the list that was given. `index`: of which of its n answers this is.
        text: of all tokens.
        tokens: all of them, in order.
        finish_reason: as `Token` has it, or "error". `error`: what went wrong then.
        usage: None if the request never ran.
    """

    request: int
    index: int
    text: str
    tokens: Sequence[Token]
    finish_reason: str
    usage: Usage | None = None
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Stats:
    """What an engine does and has done.

    Args:
        running: requests' answers that are being generated. `waiting`: requests that came and do not run yet.
        adapters: adapters of requests that run or are about to. `registered`: those that there are.
        host_bytes, loads, drops: see `mlora.HostUse`.
        steps: of the model. `tokens`: that were generated. `restarts`: workers that died and had others take over.
        answers: finish reason -> how many answers ended so.
        alive: whether a worker is at work. `cache_tokens`: room for keys and values, `reserved_tokens` of which are for
            what runs.
    """

    running: int
    waiting: int
    adapters: int
    registered: int
    host_bytes: int
    loads: int
    drops: int
    steps: int
    tokens: int
    restarts: int
    answers: dict[str, int]
    alive: bool
    cache_tokens: int
    reserved_tokens: int
