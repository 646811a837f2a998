"""Log-probabilities in the forms of OpenAI's two routes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from ..answers import Token
from .server import Server


def completion_logprobs(server: Server, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
    """Lists of one item a token. `offset`: of the first one's letters in the answer."""
    texts = [server.token_text(token.id) for token in tokens if token.id is not None]
    offsets = list(accumulate(map(len, texts[:-1]), initial=offset)) if texts else []
    return {
        "tokens": texts,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_top(server, token) for token in tokens],
        "text_offset": offsets,
    }


def _top(server: Server, token: Token) -> dict[str, float]:
    """Text -> log-probability, also of the token itself; of two with the same text, the likelier."""
    found: dict[str, float] = {}
    likely = dict(token.top_logprobs or {})
    if token.id is not None and token.logprob is not None:
        likely[token.id] = token.logprob
    for id, logprob in likely.items():
        text = server.token_text(id)
        found[text] = max(logprob, found.get(text, logprob))
    return found


def chat_logprobs(server: Server, tokens: Sequence[Token]) -> dict[str, Any]:
    """An object a token, with the likeliest ones in it."""
    content = []
    for token in tokens:
        assert token.id is not None and token.logprob is not None
        top = [_letters(server, id, logprob) for id, logprob in (token.top_logprobs or {}).items()]
        content.append({**_letters(server, token.id, token.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _letters(server: Server, id: int, logprob: float) -> dict[str, Any]:
    """`bytes`: null of a token that is no whole letter."""
    text = server.token_text(id)
    return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}
