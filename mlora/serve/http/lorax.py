"""LoRAX's routes: /, /generate, /generate_stream, /info, /tokenize, and what tells of health."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ...routing.entries import Entry
from ..answers import LENGTH, Token
from ..sampling import Sampling
from .describe import GENERATED, GENERATED_LIST, INFO, TOKENS, answered
from .lorax_types import GenerateRequest, Parameters, TokenizeRequest
from .names import header_of, merge_of
from .problems import INVALID, UNAVAILABLE, Problem
from .server import Server
from .streams import Answers, Events, begun, or_gone

NAMES = {"min_tokens": "min_new_tokens", "top_logprobs": "return_k_alternatives"}


@dataclass
class Asked:
    """A request that was checked.

    Args:
        prompt: token ids. `seed`: of what is drawn, None where nothing is. `came`: when, by `time.monotonic`.
        checked: seconds that the checking took.
    """

    inputs: str
    parameters: Parameters
    prompt: list[int]
    entry: Entry
    sampling: Sampling
    seed: int | None
    came: float
    checked: float


def routes(server: Server) -> APIRouter:
    router = APIRouter(tags=["LoRAX"])

    @router.post("/", responses=answered(GENERATED_LIST, events=True))
    async def compat(body: GenerateRequest, request: Request) -> Response:
        """As `/generate` in a list of one, or with `stream` as `/generate_stream`."""
        if body.stream:
            return await _stream(server, request, body)
        return await _generate(server, request, body, lambda answer: [answer])

    @router.post("/generate", responses=answered(GENERATED))
    async def generate(body: GenerateRequest, request: Request) -> Response:
        """The answer to a prompt."""
        return await _generate(server, request, body, lambda answer: answer)

    @router.post("/generate_stream", response_class=Response, responses=answered(None, events=True))
    async def generate_stream(body: GenerateRequest, request: Request) -> Response:
        """Its tokens as they come. The last has the whole text and the details."""
        return await _stream(server, request, body)

    @router.get("/info", responses=answered(INFO))
    async def info() -> dict[str, Any]:
        """Of the model and the limits."""
        return _info(server)

    @router.post("/tokenize", responses=answered(TOKENS))
    async def tokenize(body: TokenizeRequest) -> list[dict[str, Any]]:
        """The tokens of a text, and where in it they are."""
        ids, places = await server.prompts.places(body.inputs, body.add_special_tokens is not False)
        return [
            {"id": token, "text": server.token_text(token), "start": start, "stop": stop}
            for token, (start, stop) in zip(ids, places, strict=True)
        ]

    async def health() -> Response:
        """200 while the engine is at work."""
        if not server.engine.stats().alive:
            raise Problem(UNAVAILABLE, "unhealthy", retry_after=5.0)
        return Response()

    async def ready() -> Response:
        """200 while requests are taken."""
        if not server.ready:
            raise Problem(UNAVAILABLE, "the server takes no requests", retry_after=5.0)
        return Response()

    for path, answer in (("/health", health), ("/ping", health), ("/ready", ready)):
        router.get(path, response_class=Response, responses=answered(None))(answer)
        router.head(path, include_in_schema=False)(answer)
    return router


async def _asked(server: Server, body: GenerateRequest) -> Asked:
    """Raises Problem."""
    came = time.monotonic()
    parameters = body.parameters or Parameters()
    limits = server.limits
    stops, top = parameters.stop or [], parameters.return_k_alternatives or 0
    if len(stops) > limits.stops:
        raise Problem(INVALID, f"parameters.stop lists {len(stops)}; at most {limits.stops} are served")
    if top > limits.logprobs:
        raise Problem(INVALID, f"parameters.return_k_alternatives is {top}; at most {limits.logprobs} are served")
    entry: Entry = parameters.adapter_id or None
    if parameters.merged_adapters is not None:
        if entry is not None:
            raise Problem(INVALID, "adapter_id and merged_adapters name adapters; one of them may")
        entry = merge_of(parameters.merged_adapters.model_dump())
    if entry == server.model and entry not in server.names:
        entry = None
    entry = await server.names.entry(entry, parameters.adapter_source)
    tokenizer = await server.prompts.check(entry)
    if parameters.apply_chat_template:
        prompt = await server.prompts.chat(_messages(body.inputs), tokenizer, {})
    else:
        prompt = await server.prompts.encode(body.inputs)
    if parameters.truncate is not None:
        prompt = prompt[-parameters.truncate :]
    sampling, seed = _sampling(server, parameters, prompt)
    return Asked(body.inputs, parameters, prompt, entry, sampling, seed, came, time.monotonic() - came)


def _messages(inputs: str) -> list[dict[str, Any]]:
    """A chat as JSON, or the text of its only message."""
    try:
        found = json.loads(inputs)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, list) and found and all(isinstance(one, dict) and "role" in one for one in found):
        return found
    return [{"role": "user", "content": inputs}]


def _sampling(server: Server, parameters: Parameters, prompt: list[int]) -> tuple[Sampling, int | None]:
    """And the seed of what is drawn."""
    temperature = 1.0 if parameters.temperature is None else parameters.temperature
    warped = temperature != 1 or parameters.top_k is not None or (parameters.top_p or 1.0) < 1
    draws = temperature > 0 and bool(parameters.do_sample or warped)
    seed = (secrets.randbits(63) if parameters.seed is None else parameters.seed) if draws else None
    sampling = Sampling(
        max_new_tokens=parameters.max_new_tokens or server.room(prompt),
        temperature=temperature if draws else 0.0,
        top_k=parameters.top_k or 0,
        top_p=parameters.top_p or 1.0,
        repetition_penalty=parameters.repetition_penalty or 1.0,
        frequency_penalty=parameters.frequency_penalty or 0.0,
        presence_penalty=parameters.presence_penalty or 0.0,
        seed=seed,
        stop=tuple(parameters.stop or ()),
        include_stop=True,
        ignore_eos=bool(parameters.ignore_eos_token),
        logprobs=True,
        top_logprobs=parameters.return_k_alternatives or 0,
    )
    return sampling, seed


async def _generate(
    server: Server, request: Request, body: GenerateRequest, form: Callable[[dict[str, Any]], Any]
) -> Response:
    asked = await _asked(server, body)
    tokens, first = await or_gone(request, _all(server, asked))
    text = "".join(token.text for token in tokens)
    details = None
    if asked.parameters.details:
        details = {**_details(server, asked, tokens[-1]), "prefill": [], "tokens": [_token(server, t) for t in tokens]}
    full = (asked.inputs if asked.parameters.return_full_text else "") + text
    headers = {**_headers(server, asked), **_times(asked, tokens, first)}
    return Response(
        json.dumps(form({"generated_text": full, "details": details})), 200, headers, media_type="application/json"
    )


async def _all(server: Server, asked: Asked) -> tuple[list[Token], float]:
    """The tokens, and when the first came."""
    async with Answers(server, NAMES) as answers:
        answers.submit([asked.prompt], asked.entry, [asked.sampling])
        tokens = [token async for _, token in answers]
        return tokens, answers.followed[0].first or asked.came


async def _stream(server: Server, request: Request, body: GenerateRequest) -> Response:
    """What goes wrong before the first token is told by the status, and later by an event."""
    asked = await _asked(server, body)
    return Events(await begun(request, _events(server, asked)), _headers(server, asked))


async def _events(server: Server, asked: Asked) -> AsyncIterator[str]:
    texts = [asked.inputs if asked.parameters.return_full_text else ""]
    any_yet = False
    async with Answers(server, NAMES) as answers:
        answers.submit([asked.prompt], asked.entry, [asked.sampling])
        try:
            async for _, token in answers:
                texts.append(token.text)
                event: dict[str, Any] = {"token": _token(server, token), "generated_text": None, "details": None}
                if token.finish_reason is not None:
                    event["generated_text"] = "".join(texts)
                    event["details"] = _details(server, asked, token)
                any_yet = True
                yield _event(event)
        except Problem as problem:
            if not any_yet:
                raise
            yield _event(problem.body("/"))


def _event(value: Mapping[str, Any]) -> str:
    return f"data:{json.dumps(value)}\n\n"


def _token(server: Server, token: Token) -> dict[str, Any]:
    assert token.id is not None
    own = {"id": token.id, "text": token.text, "logprob": token.logprob, "special": server.is_special(token.id)}
    own["skipped"] = False
    if token.top_logprobs is not None:
        own["alternative_tokens"] = [
            {"id": id, "text": server.token_text(id), "logprob": logprob} for id, logprob in token.top_logprobs.items()
        ]
    return own


def _details(server: Server, asked: Asked, last: Token) -> dict[str, Any]:
    assert last.usage is not None
    reason = "length"
    if last.finish_reason != LENGTH:
        ended = last.id in server.ends and not asked.sampling.ignore_eos
        reason = "eos_token" if ended else "stop_sequence"
    return {
        "finish_reason": reason,
        "prompt_tokens": last.usage.prompt,
        "generated_tokens": last.usage.completion,
        "skipped_tokens": 0,
        "seed": asked.seed,
    }


def _headers(server: Server, asked: Asked) -> dict[str, str]:
    device = server.engine.runtime.model.device.type
    headers: dict[str, str] = {"x-compute-type": str(device), "x-model-id": header_of(server.model)}
    headers["x-prompt-tokens"] = str(len(asked.prompt))
    if asked.entry is not None:
        headers["x-adapter-id"] = header_of(asked.entry)
        headers["x-adapter-source"] = asked.parameters.adapter_source or "local"
    return headers


def _times(asked: Asked, tokens: list[Token], first: float) -> dict[str, str]:
    """Of an answer that is whole; milliseconds."""
    now = time.monotonic()
    total = now - asked.came
    count, usage = len(tokens), tokens[-1].usage
    queued = 0.0 if usage is None else usage.waited
    seconds = {
        "x-compute-time": total,
        "x-total-time": total,
        "x-validation-time": asked.checked,
        "x-queue-time": queued,
        "x-inference-time": total - asked.checked - queued,
        "x-time-per-token": (now - first) / max(1, count - 1),
        "x-time-to-first-token": first - asked.came,
    }
    counts = {"x-generated-tokens": str(count), "x-total-tokens": str(len(asked.prompt) + count)}
    return {**{name: str(round(value * 1000)) for name, value in seconds.items()}, **counts}


def _info(server: Server) -> dict[str, Any]:
    from mlora import __version__

    model, limits, own = server.engine.runtime.model, server.engine.limits, server.limits
    return {
        "model_id": server.model,
        "model_sha": None,
        "model_dtype": str(model.dtype).removeprefix("torch."),
        "model_device_type": model.device.type,
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": limits.running + limits.waiting,
        "max_best_of": 1,
        "max_stop_sequences": own.stops,
        "max_input_length": server.longest - 1,
        "max_total_tokens": server.longest,
        "waiting_served_ratio": 0.0,
        "max_batch_total_tokens": limits.tokens,
        "max_waiting_tokens": 0,
        "validation_workers": 1,
        "eager_prefill": False,
        "version": __version__,
        "sha": None,
        "docker_label": None,
        "request_logger_url": "",
    }
