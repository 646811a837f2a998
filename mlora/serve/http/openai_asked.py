"""What OpenAI's requests ask for, checked."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ... import errors
from ...routing.entries import Entry
from ..sampling import MAX_SEED, Sampling
from .openai_types import ChatRequest, CompletionRequest, MergedAdapters, Request
from .problems import INVALID, Problem, problem_of
from .server import Server

NAMES = {"max_new_tokens": "max_tokens"}  # of `Sampling` -> OpenAI's
_FEW = 16  # tokens of a completion, where the request does not say (OpenAI)


@dataclass
class Asked:
    """A request that was checked: what to serve, and how to write the answers.

    Args:
        prompts: token ids of each. `echoes`: what goes before each one's answers. `logprobs`: whether it wants them.
        chat: whether it is one, whose answers have another form.
    """

    body: Request
    prompts: list[list[int]]
    entry: Entry
    samplings: list[Sampling]
    chat: bool
    logprobs: bool
    echoes: list[str]
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"

    @property
    def answers(self) -> int:
        return len(self.prompts) * self.samplings[0].n

    def echo(self, index: int) -> str:
        return self.echoes[index // self.samplings[0].n]

    def head(self, stream: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if stream else "chat.completion") if self.chat else "text_completion"
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.body.model}
        return {**head, "system_fingerprint": None}


async def completion_asked(server: Server, body: CompletionRequest) -> Asked:
    """Raises Problem."""
    limits = server.limits
    prompt = body.prompt
    one = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], int))
    prompts: Sequence[Any] = [prompt] if one else prompt
    if not prompts or not all(prompts):
        raise Problem(INVALID, "prompt is empty", "prompt")
    if len(prompts) > limits.prompts:
        raise Problem(INVALID, f"prompt lists {len(prompts)}; at most {limits.prompts} are served at once", "prompt")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise Problem(INVALID, f"best_of is {body.best_of}, which is not served; it may be n, {body.n or 1}", "best_of")
    if body.echo and body.logprobs is not None:
        raise Problem(INVALID, "echo is not served together with logprobs, which a prompt has none of", "echo")
    entry = await server.names.of_model(body.model, body.adapter, _fields(body.merged_adapters))
    await server.prompts.check(entry)
    special = body.add_special_tokens is not False
    texts = [isinstance(one, str) for one in prompts]
    ids = [await server.prompts.encode(one, special) if text else one for one, text in zip(prompts, texts, strict=True)]
    echoes = [""] * len(ids)
    if body.echo:
        echoes = [one if text else _decoded(server, one) for one, text in zip(prompts, texts, strict=True)]
    sampling = _sampling(server, body, body.max_tokens or _FEW, body.logprobs)
    return Asked(body, ids, entry, [sampling] * len(ids), False, body.logprobs is not None, echoes)


async def chat_asked(server: Server, body: ChatRequest) -> Asked:
    """Raises Problem."""
    if body.top_logprobs is not None and not body.logprobs:
        raise Problem(INVALID, "top_logprobs needs logprobs to be true", "top_logprobs")
    entry = await server.names.of_model(body.model, body.adapter, _fields(body.merged_adapters))
    tokenizer = await server.prompts.check(entry)
    messages = [message.model_dump(exclude_none=True) for message in body.messages]
    for message in messages:
        if isinstance(message["content"], list):
            message["content"] = "".join(part["text"] for part in message["content"])
    own = {
        name: value
        for name in ("add_generation_prompt", "continue_final_message")
        if (value := getattr(body, name)) is not None
    }
    if own.get("continue_final_message"):
        own.setdefault("add_generation_prompt", False)
    prompt = await server.prompts.chat(messages, tokenizer, body.chat_template_kwargs or {}, **own)
    most = body.max_completion_tokens or body.max_tokens or server.room(prompt)
    sampling = _sampling(server, body, most, (body.top_logprobs or 0) if body.logprobs else None)
    return Asked(body, [prompt], entry, [sampling], True, bool(body.logprobs), [""])


def _sampling(server: Server, body: Request, most: int, logprobs: int | None) -> Sampling:
    """`logprobs`: how many beside each token; None for none at all."""
    limits = server.limits
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    for name, value, limit in (
        ("n", body.n or 1, limits.answers),
        ("stop", len(stop), limits.stops),
        ("top_logprobs" if isinstance(body, ChatRequest) else "logprobs", logprobs or 0, limits.logprobs),
    ):
        if value > limit:
            what = "lists" if name == "stop" else "is"
            raise Problem(INVALID, f"{name} {what} {value}; at most {limit} are served", name)
    if "" in stop:
        raise Problem(INVALID, "stop has an empty string", "stop")
    try:
        bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    except ValueError:
        raise Problem(INVALID, "logit_bias must have token ids for keys", "logit_bias") from None
    given = {
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": body.top_p,
        "top_k": None if body.top_k == -1 else body.top_k,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "frequency_penalty": body.frequency_penalty,
        "presence_penalty": body.presence_penalty,
        "logit_bias": bias,
        "seed": None if body.seed is None else body.seed % (MAX_SEED + 1),
        "stop": tuple(stop),
        "stop_token_ids": None if body.stop_token_ids is None else tuple(body.stop_token_ids),
        "include_stop": body.include_stop_str_in_output,
        "ignore_eos": body.ignore_eos,
        "min_tokens": body.min_tokens,
        "n": body.n,
        "skip_special_tokens": body.skip_special_tokens,
    }
    own: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    try:
        return Sampling(max_new_tokens=most, logprobs=logprobs is not None, top_logprobs=logprobs or 0, **own)
    except errors.RequestError as error:
        raise problem_of(error, NAMES) from None


def _fields(merged: MergedAdapters | None) -> dict[str, Any] | None:
    return None if merged is None else merged.model_dump()


def _decoded(server: Server, ids: Sequence[int]) -> str:
    """Of a prompt that is echoed, checked as the engine does."""
    if max(ids) >= server.vocabulary:
        raise Problem(INVALID, f"prompt has the token {max(ids)}; the model has 0 to {server.vocabulary - 1}", "prompt")
    return str(server.engine.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
