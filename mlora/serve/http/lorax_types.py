"""The bodies of LoRAX's requests. A field of type None, and a value that a Literal does not list, are not served."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .openai_types import Body, MergedAdapters


class Parameters(Body):
    """Null is as good as nothing in every field. What draws: `do_sample`, a temperature other than 0 and 1, `top_k` or
    a `top_p` below 1."""

    adapter_id: Annotated[str, Field(max_length=512)] | None = None
    adapter_source: Literal["hub", "local"] | None = None
    merged_adapters: MergedAdapters | None = None

    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_k: Annotated[int, Field(gt=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None

    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    ignore_eos_token: bool | None = None
    stop: list[Annotated[str, Field(min_length=1)]] | None = None
    truncate: Annotated[int, Field(ge=1)] | None = None
    apply_chat_template: bool | None = None

    return_full_text: bool | None = None
    details: bool | None = None
    return_k_alternatives: Annotated[int, Field(gt=0)] | None = None

    best_of: Literal[1] | None = None
    watermark: Literal[False] | None = None
    decoder_input_details: Literal[False] | None = None
    typical_p: None = None
    api_token: None = None
    response_format: None = None


class GenerateRequest(Body):
    """`stream`: of the route `/`; the others do what their names say."""

    inputs: Annotated[str, Field(min_length=1)]
    parameters: Parameters | None = None
    stream: bool | None = None


class TokenizeRequest(Body):
    inputs: Annotated[str, Field(min_length=1)]
    add_special_tokens: bool | None = None
