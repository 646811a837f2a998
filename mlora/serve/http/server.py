"""What all routes share: the engine, its names and prompts, limits, keys and counts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..engine import Engine
from ..sizes import ends, longest, text_config
from .metrics import Metrics
from .names import Names
from .prompts import Prompts


@dataclass(frozen=True)
class Limits:
    """Of one HTTP request. Those of all together are the engine's.

    Args:
        body: bytes of it. `prompts`: how many it may list. `answers`: n, of each of them.
        default_tokens: of an answer, where the request does not say; OpenAI's `/v1/completions` has 16.
        stops: strings in `stop`. `logprobs`: likeliest tokens that may be asked for beside each token.
    """

    body: int = 8 << 20
    prompts: int = 64
    answers: int = 16
    default_tokens: int = 512
    stops: int = 16
    logprobs: int = 20


@dataclass(frozen=True)
class Access:
    """Who may do what.

    Args:
        keys: of which each request has to bring one, as `Authorization: Bearer KEY`; none lets everybody in.
        admin_key: opens what the keys do, and loads and unloads adapters, which nobody may without it.

    Raises:
        ValueError: a key is empty, which who brings none would have, or has space around it, which no request can send.
    """

    keys: Sequence[str] = ()
    admin_key: str | None = None

    def __post_init__(self) -> None:
        for what, keys in (("API", self.keys), ("admin", () if self.admin_key is None else (self.admin_key,))):
            if any(not key or key != key.strip() for key in keys):
                raise ValueError(f"an {what} key is empty, or has space around it")


@dataclass
class Server:
    """Args:
    model: what the base is called. `draining`: whether it takes no more requests.
    """

    engine: Engine
    model: str
    names: Names
    prompts: Prompts
    limits: Limits
    access: Access
    metrics: Metrics
    draining: bool = False
    started: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        model = self.engine.runtime.model
        self.ends = ends(model)
        self.vocabulary: int = text_config(model).vocab_size
        self.longest = min(self.engine.stats().cache_tokens, longest(text_config(model)))

    @property
    def ready(self) -> bool:
        """Whether a request would be taken."""
        return not self.draining and self.engine.stats().alive

    def room(self, prompt: Sequence[int]) -> int:
        """Tokens of an answer behind it where the request does not say."""
        return max(1, min(self.limits.default_tokens, self.longest - len(prompt)))

    def token_text(self, token: int) -> str:
        """Of one by itself."""
        return str(self.engine.tokenizer.decode([token], clean_up_tokenization_spaces=False))

    def is_special(self, token: int) -> bool:
        return token in self.prompts.special


def build(
    engine: Engine,
    model: str,
    limits: Limits,
    access: Access,
    roots: Sequence[Any],
    hub_ids: Sequence[str],
    base_tokenizer: bool,
) -> Server:
    """See `create_app`."""
    names = Names(engine, model, roots, hub_ids)
    prompts = Prompts(engine.tokenizer, names, base_tokenizer)
    return Server(engine, model, names, prompts, limits, access, Metrics(engine, model))
