"""What goes wrong, and how each dialect says it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import Response

from ... import errors
from ..sampling import Sampling

INVALID = "invalid"
UNAUTHORIZED = "unauthorized"
FORBIDDEN = "forbidden"
NOT_FOUND = "not_found"
NO_METHOD = "no_method"
TOO_LARGE = "too_large"
ADAPTER = "adapter"
OVERLOADED = "overloaded"
FAILED = "failed"
UNAVAILABLE = "unavailable"

_STATUS = {
    INVALID: 400,
    UNAUTHORIZED: 401,
    FORBIDDEN: 403,
    NOT_FOUND: 404,
    NO_METHOD: 405,
    TOO_LARGE: 413,
    ADAPTER: 400,
    OVERLOADED: 429,
    FAILED: 500,
    UNAVAILABLE: 503,
}
_OPENAI = {
    UNAUTHORIZED: "authentication_error",
    FORBIDDEN: "permission_error",
    OVERLOADED: "rate_limit_error",
    FAILED: "server_error",
    UNAVAILABLE: "service_unavailable",
}
_LORAX_STATUS = {INVALID: 422, ADAPTER: 424, FAILED: 424}
_LORAX = {INVALID: "validation", ADAPTER: "generation", FAILED: "generation", UNAVAILABLE: "healthcheck"}
_FIELDS = ("prompt", *Sampling.__dataclass_fields__)
_VLLM = {
    INVALID: "InvalidUserInput",
    UNAUTHORIZED: "AuthenticationError",
    FORBIDDEN: "PermissionDeniedError",
    NOT_FOUND: "NotFoundError",
    TOO_LARGE: "BadRequestError",
    ADAPTER: "BadRequestError",
}
# Routes with LoRAX's errors, and those with vLLM's. All others have OpenAI's.
LORAX_PATHS = frozenset(["/", "/generate", "/generate_stream", "/info", "/tokenize", "/health", "/ping", "/ready"])
VLLM_PATHS = frozenset(["/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
SGLANG_PATHS = frozenset(["/load_lora_adapter", "/unload_lora_adapter"])


class Problem(Exception):
    """Why a request is not served.

    Args:
        kind: one of the names above. `field`: of the request, if it is one's fault. `code`: OpenAI's, where it has one.
        retry_after: seconds.
    """

    def __init__(
        self,
        kind: str,
        message: str,
        field: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.field = field
        self.code = code
        self.retry_after = retry_after

    def status(self, path: str) -> int:
        """The HTTP status on a route."""
        own = _LORAX_STATUS if path in LORAX_PATHS else {}
        return own.get(self.kind, _STATUS[self.kind])

    def body(self, path: str) -> dict[str, Any]:
        """What is answered on a route."""
        if path in LORAX_PATHS:
            return {"error": self.message, "error_type": _LORAX.get(self.kind, self.kind)}
        if path in SGLANG_PATHS:
            return {"success": False, "error_message": self.message}
        if path in VLLM_PATHS:
            kind, code = _VLLM.get(self.kind, "InternalServerError"), self.status(path)
            return {"error": {"message": self.message, "type": kind, "param": self.field, "code": code}}
        kind = _OPENAI.get(self.kind, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.field, "code": self.code}}

    def response(self, path: str, **more: Any) -> Response:
        """The whole answer. `more`: of its body."""
        return Response(
            json.dumps({**self.body(path), **more}),
            self.status(path),
            self.headers(),
            "application/json",
        )

    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after)))
        if self.kind == UNAUTHORIZED:
            headers["www-authenticate"] = "Bearer"
        return headers


def problem_of(error: Exception, asked: Mapping[str, str] | None = None) -> Problem:
    """What an error of the engine or the runtime means to who asked.

    Args:
        asked: fields of `Sampling` -> what the dialect calls them, where it calls them otherwise.
    """
    if isinstance(error, Problem):
        return error
    message = str(error)
    if isinstance(error, errors.UnknownAdapterError):
        return Problem(NOT_FOUND, message, "model", "model_not_found")
    if isinstance(error, errors.Overloaded):
        return Problem(OVERLOADED, message, code="rate_limit_exceeded", retry_after=error.retry_after)
    if isinstance(error, errors.RequestError):
        names = {**{name: name for name in _FIELDS}, **(asked or {})}
        words = re.split(r"(\w+)", message)
        own = [names[word] for word in words if word in names]
        return Problem(
            INVALID, "".join(names.get(word, word) for word in words), min(own, key="prompt".__eq__, default=None)
        )
    if isinstance(error, (errors.EntryError, errors.MergeError)):
        return Problem(INVALID, message, "model")
    if isinstance(error, (errors.AdapterError, errors.CapacityError, errors.DuplicateAdapterError)):
        return Problem(ADAPTER, message, "model")
    return Problem(FAILED, message if isinstance(error, errors.MloraError) else "the server failed; its log says why")


def invalid_body(found: Sequence[Mapping[str, Any]]) -> Problem:
    """Of pydantic's errors: the fields, and what each must be."""
    messages: dict[str, list[str]] = {}
    # Where text could be something else, too, what is wrong with the text is what counts.
    for one in [one for one in found if one["type"] == "string_unicode"] or found:
        name = "" if one["type"] == "json_invalid" else _field(one["loc"])
        messages.setdefault(name, [])
        text = _message(one)
        if text not in messages[name]:
            messages[name].append(text)
    parts = [_joined(name, texts) for name, texts in messages.items()]
    return Problem(INVALID, "; ".join(parts), next(iter(messages), None) or None)


def _joined(name: str, texts: Sequence[str]) -> str:
    text = " or ".join(texts)
    return text if not name else f"{name} {text}" if text.startswith("is ") else f"{name}: {text}"


def _field(location: Sequence[Any]) -> str:
    """messages.0.content, without what pydantic puts between for the members of a union."""
    if location and location[-1] == "[key]":
        location = location[:-2]
    parts = [str(part) for part in location if part != "body"]
    return ".".join(part for part in parts if part.isdigit() or (part.isidentifier() and not _is_type(part)))


def _is_type(part: str) -> bool:
    return part in ("str", "int", "float", "bool", "dict") or part[0].isupper()


_KINDS = {
    "extra_forbidden": "is not served",
    "none_required": "is not served",
    "missing": "is missing",
    "string_unicode": "is no text: it has half of a surrogate pair",
}


def _message(one: Mapping[str, Any]) -> str:
    kind, text = one["type"], str(one["msg"])
    if kind == "json_invalid":
        return f"the body is no JSON: {one.get('ctx', {}).get('error', text)} at character {one['loc'][-1]}"
    if kind == "missing" and one["loc"] == ("body",):
        return "the body is missing"
    if kind in _KINDS:
        return _KINDS[kind]
    if one["loc"] == ("body",):
        return "the body must be a JSON object, sent as application/json"
    text = text.removeprefix("Value error, ")
    text = text[:1].lower() + text[1:]
    if kind == "literal_error":
        value = repr(one.get("input"))
        return f"is {value if len(value) < 80 else value[:80] + '...'}, which is not served: {text}"
    return text
