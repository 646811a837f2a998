"""How OpenAI's answers are written, whole or as they come."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ..answers import Token, Usage
from .logprobs import chat_logprobs, completion_logprobs
from .names import header_of
from .openai_asked import NAMES, Asked
from .problems import Problem
from .server import Server
from .streams import Answers, Events, begun, or_gone


async def respond(server: Server, request: HttpRequest, asked: Asked) -> Response:
    """Serve a request.

    Raises:
        Problem: the engine refuses it, or it fails before its first token.
    """
    headers = {} if asked.entry is None else {"x-adapter-id": header_of(asked.entry)}
    if asked.body.stream:
        return Events(await begun(request, _events(server, asked)), headers)
    whole = await or_gone(request, _whole(server, asked))
    return Response(json.dumps(whole), 200, headers, "application/json")


async def _whole(server: Server, asked: Asked) -> dict[str, Any]:
    texts = [[asked.echo(index)] for index in range(asked.answers)]
    tokens: list[list[Token]] = [[] for _ in texts]
    async with Answers(server, NAMES) as answers:
        answers.submit(asked.prompts, asked.entry, asked.samplings)
        async for index, token in answers:
            texts[index].append(token.text)
            tokens[index].append(token)
    choices = []
    for index, own in enumerate(tokens):
        text = "".join(texts[index])
        if asked.chat:
            choice: dict[str, Any] = {"message": {"role": "assistant", "content": text, "refusal": None}}
        else:
            choice = {"text": text}
        logprobs = _logprobs(server, asked, own, 0) if asked.logprobs else None
        choices.append({"index": index, **choice, "logprobs": logprobs, "finish_reason": own[-1].finish_reason})
    ends = {index: own[-1].usage for index, own in enumerate(tokens)}
    return {**asked.head(False), "choices": choices, "usage": _usage(asked, ends)}


async def _events(server: Server, asked: Asked) -> AsyncIterator[str]:
    """Server-sent events, up to `[DONE]`. What goes wrong before the first token is raised; later it is an event."""
    options = asked.body.stream_options
    usage: dict[str, Any] = {"usage": None} if options is not None and options.include_usage else {}
    head = {**asked.head(True), **usage}
    ends: dict[int, Usage | None] = {}
    told: set[int] = set()
    offsets = [0] * asked.answers
    async with Answers(server, NAMES) as answers:
        answers.submit(asked.prompts, asked.entry, asked.samplings)
        try:
            async for index, token in answers:
                first = index not in told
                told.add(index)
                logprobs = None
                if asked.logprobs and token.id is not None:
                    logprobs = _logprobs(server, asked, [token], offsets[index])
                    offsets[index] += len(server.token_text(token.id))
                if token.finish_reason is not None:
                    ends[index] = token.usage
                elif not (first or token.text or logprobs):
                    continue
                yield _event({**head, "choices": [_choice(asked, index, token, first, logprobs)]})
        except Problem as problem:
            if not told:
                raise
            yield _event(problem.body("/v1"))
            yield "data: [DONE]\n\n"
            return
    if usage:
        yield _event({**head, "choices": [], "usage": _usage(asked, ends)})
    yield "data: [DONE]\n\n"


def _choice(asked: Asked, index: int, token: Token, first: bool, logprobs: Any) -> dict[str, Any]:
    end = {"logprobs": logprobs, "finish_reason": token.finish_reason}
    if asked.chat:
        delta = {"role": "assistant", "content": token.text} if first else {"content": token.text} if token.text else {}
        return {"index": index, "delta": delta, **end}
    return {"index": index, "text": (asked.echo(index) if first else "") + token.text, **end}


def _logprobs(server: Server, asked: Asked, tokens: list[Token], offset: int) -> dict[str, Any]:
    told = [token for token in tokens if token.id is not None]
    return chat_logprobs(server, told) if asked.chat else completion_logprobs(server, told, offset)


def _usage(asked: Asked, ends: Mapping[int, Usage | None]) -> dict[str, Any]:
    prompt = sum(len(ids) for ids in asked.prompts)
    completion = sum(usage.completion for usage in ends.values() if usage is not None)
    n = asked.samplings[0].n
    cached = sum(usage.cached for index, usage in ends.items() if usage is not None and index % n == 0)
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return {**counts, "prompt_tokens_details": {"cached_tokens": cached}}


def _event(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
