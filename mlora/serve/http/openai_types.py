"""The bodies of OpenAI's requests, with the fields that vLLM and LoRAX add. A field of type None is one of OpenAI's
that is not served; so are fields that are not here, and values that a Literal does not list."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Id = Annotated[int, Field(ge=0, le=(1 << 31) - 1)]
Weight = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=0)]
"""With a length to check pydantic reads the letters: JSON may have halves of surrogate pairs, which are no text."""


class Body(BaseModel):
    """Strict: "5" is no number, and a field that nobody knows is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class StreamOptions(Body):
    """`include_usage`: one more chunk at the end, with the counts."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class MergedAdapters(Body):
    """LoRAX's merge of adapters `ids`, with its strategies and all others of `Merge`."""

    ids: Annotated[list[Text], Field(min_length=1)]
    weights: list[Weight] | None = None
    merge_strategy: str | None = None
    density: Annotated[float, Field(ge=0, le=1)] | None = None
    majority_sign_method: Literal["total", "frequency"] | None = None


class Request(Body):
    """What both of OpenAI's routes take. Null is as good as nothing in every field."""

    model: Annotated[str, Field(max_length=16384)]
    adapter: Text | dict[Text, Any] | None = None
    merged_adapters: MergedAdapters | None = None

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stop: Text | list[Text] | None = None
    seed: int | None = None

    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    stop_token_ids: list[Id] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    skip_special_tokens: bool | None = None

    # They say nothing of the answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None


class CompletionRequest(Request):
    """`prompt`: a text, token ids, or a list of either. `best_of`: n, or nothing."""

    prompt: Text | list[Text] | list[Id] | list[list[Id]]
    logprobs: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    suffix: None = None


class TextPart(Body):
    type: Literal["text"]
    text: Text


class Message(Body):
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Text | list[TextPart]
    name: Text | None = None
    refusal: None = None
    audio: None = None
    tool_calls: None = None
    function_call: None = None


class TextFormat(Body):
    type: Literal["text"]


class ChatRequest(Request):
    """`chat_template_kwargs`: for the template (vLLM)."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    function_call: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    tools: None = None
    functions: None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None
