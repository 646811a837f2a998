"""What the routes answer, for the app's OpenAPI description."""

from __future__ import annotations

from typing import Any


def _object(*required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": [*required, *properties], "properties": properties}


_TEXT = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}
_USAGE = _object(prompt_tokens=_COUNT, completion_tokens=_COUNT, total_tokens=_COUNT)
_REASON = {"enum": ["stop", "length"]}
_CHOICE = _object("logprobs", index=_COUNT, finish_reason=_REASON)


def _answer(**choice: Any) -> dict[str, Any]:
    choices = {"type": "array", "items": {"allOf": [_CHOICE, _object(**choice)]}}
    return _object(id=_TEXT, object=_TEXT, created=_COUNT, model=_TEXT, choices=choices, usage=_USAGE)


COMPLETION = _answer(text=_TEXT)
CHAT = _answer(message=_object(role={"enum": ["assistant"]}, content=_TEXT))
CARD = _object("parent", id=_TEXT, object={"enum": ["model"]}, created=_COUNT, owned_by=_TEXT, root=_TEXT)
CARDS = _object(object={"enum": ["list"]}, data={"type": "array", "items": CARD})
GENERATED = _object("details", generated_text=_TEXT)
GENERATED_LIST = {"type": "array", "items": GENERATED, "minItems": 1, "maxItems": 1}
TOKENS = {"type": "array", "items": _object("start", "stop", id=_COUNT, text=_TEXT)}
INFO = _object(model_id=_TEXT, model_dtype=_TEXT, model_device_type=_TEXT, version=_TEXT)
CHANGED = _object("loaded_adapters", success={"type": "boolean"}, error_message=_TEXT)
STOCK = _object(model=_TEXT, running=_COUNT, waiting=_COUNT, adapters={
    "type": "array", "items": _object(name=_TEXT, source=_TEXT, where=_TEXT, running=_COUNT, waiting=_COUNT)
})  # fmt: skip
ANYTHING: dict[str, Any] = {"type": "object"}


def answered(schema: dict[str, Any] | None, *, events: bool = False, media_type: str = "application/json") -> Any:
    """The `responses` of a route. `schema`: of its answer, None for an empty one. `events`: it may also be a stream."""
    content: dict[str, Any] = {} if schema is None else {media_type: {"schema": schema}}
    if events:
        content["text/event-stream"] = {"schema": _object(data=_TEXT)}  # of each event
    failed = {"description": "Why not", "content": {"application/json": {"schema": ANYTHING}}}
    return {200: {"description": "Served", "content": content}, "4XX": failed, "5XX": failed}
