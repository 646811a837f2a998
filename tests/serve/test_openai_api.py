"""OpenAI's routes: each answer is what `generate` gives that request alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from http_serving import Served, serving
from serving import alone, letters

import mlora
from mlora.serve import Sampling

TIES = {"ids": ["a", "b"], "weights": [0.6, 0.4], "merge_strategy": "ties", "density": 0.5}
MERGE = mlora.Merge(("a", "b"), (0.6, 0.4), "ties", density=0.5)
# How a request says it -> the entry
ENTRIES: list[tuple[dict[str, Any], Any]] = [
    ({"model": "tiny"}, None),
    ({"model": ""}, None),
    ({"model": "a"}, "a"),
    ({"model": "tiny:b"}, "b"),
    ({"model": json.dumps({"c": 0.5, "d": -0.25})}, {"c": 0.5, "d": -0.25}),
    ({"model": json.dumps(TIES)}, MERGE),
    ({"model": "tiny", "adapter": "d"}, "d"),
    ({"model": "tiny", "adapter": {"a": 0.5, "b": 1.0}}, {"a": 0.5, "b": 1.0}),
    ({"model": "tiny", "merged_adapters": TIES}, MERGE),
    ({"model": "tiny", "merged_adapters": {**TIES, "merge_strategy": "linear", "density": 0.0}}, {"a": 0.6, "b": 0.4}),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("adapters")) as served:
        yield served


@pytest.fixture
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def ask(served: Served, **body: Any) -> Any:
    """A completion, greedy and of 8 tokens where `body` does not say otherwise."""
    body = {"model": "a", "prompt": "hello", "temperature": 0, "max_tokens": 8, **body}
    return served.post("/v1/completions", body)


def events(text: str) -> list[Any]:
    """The data of server-sent events, up to the end that OpenAI has."""
    found = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert found[-1] == "[DONE]"
    return [json.loads(one) for one in found[:-1]]


@pytest.mark.parametrize(
    ("fields", "entry"), ENTRIES, ids=lambda value: json.dumps(value) if type(value) is dict else ""
)
def test_entries(served: Served, fields: dict[str, Any], entry: Any) -> None:
    answer = ask(served, **fields).json()
    assert answer["choices"][0]["text"] == served.text("hello", entry, max_new_tokens=8)
    assert answer["model"] == fields["model"]


def test_entries_differ(served: Served) -> None:
    """Or the test above would show nothing."""
    texts = {served.text("hello", entry, max_new_tokens=8) for entry in (None, "a", "b", "d", MERGE)}
    assert len(texts) == 5


@pytest.mark.parametrize("fields", [{"model": "e"}, {"model": "tiny", "adapter": "e"}, {"model": '{"a": 1, "e": 0}'}])
def test_an_unknown_name_is_never_the_base(served: Served, fields: dict[str, Any]) -> None:
    for body in (fields, {**fields, "stream": True}):
        answer = ask(served, **body)
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found" and "'e'" in answer.json()["error"]["message"]
    assert served.client.get("/v1/models/e").status_code == 404


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_of_all_kinds(served: Served, stream: bool) -> None:
    """A text, several, token ids, several; n answers to each, the i-th with seed + i."""
    ids = [served.tokenizer(text)["input_ids"] for text in ("hello", "a bad")]
    for prompt, wanted in (("hello", ids[:1]), (["hello", "a bad"], ids), (ids[1], ids[1:]), (ids, ids)):
        options = {"temperature": 0.9, "seed": 7}
        answer = ask(served, prompt=prompt, n=2, stream=stream, stream_options={"include_usage": True}, **options)
        chunks = events(answer.text) if stream else [answer.json()]
        texts: dict[int, str] = {}
        for chunk in chunks:
            for choice in chunk["choices"]:
                texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        for index, text in texts.items():
            sampling = Sampling(max_new_tokens=8, temperature=0.9, seed=7 + index % 2)
            tokens = alone(served.engine.runtime.model, wanted[index // 2], "a", sampling)
            assert text == served.tokenizer.decode(tokens, skip_special_tokens=True)
        assert sorted(texts) == list(range(2 * len(wanted)))
        usage = chunks[-1]["usage"]
        assert usage["prompt_tokens"] == sum(map(len, wanted)) and usage["completion_tokens"] == 8 * len(texts)


def test_options(served: Served) -> None:
    """Those whose names are not the engine's."""
    free = served.text("hello", "a", max_new_tokens=20)
    stop = free[3:5]
    cut = free[: free.index(stop)]
    assert ask(served, stop=stop, max_tokens=20).json()["choices"][0] == {
        "index": 0, "text": cut, "logprobs": None, "finish_reason": "stop"
    }  # fmt: skip
    kept = ask(served, stop=[stop], include_stop_str_in_output=True, max_tokens=20).json()
    assert kept["choices"][0]["text"] == cut + stop
    first = served.tokens("hello", "a", max_new_tokens=1)[0]
    banned = ask(served, logit_bias={str(first): -100}).json()["choices"][0]["text"]
    assert banned != free[: len(banned)]
    assert ask(served, echo=True).json()["choices"][0]["text"].startswith("hello" + free[:5])
    assert ask(served, max_tokens=None).json()["usage"]["completion_tokens"] == 16
    drawn = [ask(served, temperature=1.0, seed=3, top_k=5).json()["choices"][0]["text"] for _ in range(2)]
    assert drawn[0] == drawn[1] == served.text("hello", "a", max_new_tokens=8, temperature=1.0, top_k=5, seed=3)


def test_logprobs(served: Served) -> None:
    """Against the model's own log-softmax, in both forms, whole and streamed."""
    import torch

    ids = served.tokenizer("hello")["input_ids"]
    tokens = served.tokens("hello", "a", max_new_tokens=4)
    with torch.no_grad():
        logits = served.engine.runtime.model(torch.tensor([ids + tokens]), adapter_names=["a"]).logits[0]
    wanted = logits[len(ids) - 1 : -1].log_softmax(-1)
    own = [float(row[token]) for row, token in zip(wanted, tokens, strict=True)]

    found = ask(served, max_tokens=4, logprobs=3).json()["choices"][0]["logprobs"]
    assert found["token_logprobs"] == pytest.approx(own, abs=1e-4)
    assert found["tokens"] == [served.tokenizer.decode([token]) for token in tokens]
    assert found["text_offset"] == [sum(map(len, found["tokens"][:at])) for at in range(4)]
    assert [max(top.values()) for top in found["top_logprobs"]] == pytest.approx(own, abs=1e-4)
    chunks = events(ask(served, max_tokens=4, logprobs=3, stream=True).text)
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    for key in ("tokens", "token_logprobs", "text_offset"):
        wanted_list = found[key] if key != "token_logprobs" else pytest.approx(own, abs=1e-4)
        assert [one for part in parts for one in part[key]] == wanted_list

    chat = {"model": "a", "messages": [{"role": "user", "content": "x"}], "temperature": 0, "max_tokens": 3}
    answer = served.post("/v1/chat/completions", {**chat, "logprobs": True, "top_logprobs": 2}).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == 3 and all(len(one["top_logprobs"]) == 2 for one in content)
    assert content[0]["logprob"] == content[0]["top_logprobs"][0]["logprob"]


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"guided_json": {}}, "guided_json"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "0"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10_000}, "max_tokens"),
        ({"n": 17}, "n"),
        ({"n": 1.5}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stream_options": {"x": 1}}, "stream_options"),
        ({"model": "{"}, "model"),
        ({"model": '{"a": "x"}'}, "weight"),
        ({"model": '{"a": NaN}'}, "weight"),
        ({"merged_adapters": {"ids": ["a"], "weights": [1, 2]}, "model": "tiny"}, "merged_adapters"),
        ({"merged_adapters": {"ids": ["a"], "merge_strategy": "what"}, "model": "tiny"}, "merged_adapters"),
        ({"adapter": "b"}, "adapter"),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_what_is_not_served_is_named(served: Served, fields: dict[str, Any], name: str) -> None:
    answer = ask(served, **fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and name in error["message"]
    assert error["param"].split(".")[0] in (name, "model")


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_what_a_chat_is_not_served_is_named(served: Served, fields: dict[str, Any], name: str) -> None:
    body = {"model": "a", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2, **fields}
    answer = served.post("/v1/chat/completions", body)
    assert answer.status_code == 400, answer.text
    assert name in answer.json()["error"]["message"] and answer.json()["error"]["param"].split(".")[0] == name


def test_what_asks_for_nothing_is_taken(served: Served) -> None:
    """Clients send fields that say what is so anyway."""
    same = {"best_of": 1, "suffix": None, "user": "me", "metadata": {"x": "y"}, "store": False, "top_k": -1}
    assert ask(served, **same).json()["choices"] == ask(served).json()["choices"]
    chat = {"model": "a", "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "max_tokens": 2}
    same = {"tools": None, "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"]}
    assert served.post("/v1/chat/completions", {**chat, **same}).status_code == 200


def test_the_client_unmodified(served: Served, client: openai.OpenAI) -> None:
    models = {card.id: card for card in client.models.list()}
    assert set(models) == {"tiny", "a", "b", "c", "d"}
    assert models["a"].parent == "tiny" and models["a"].root == str(served.folders["a"])  # type: ignore[attr-defined]
    assert client.models.retrieve("b").id == "b"

    wanted = served.text("hello", "b", max_new_tokens=8)
    options: dict[str, Any] = {"prompt": "hello", "temperature": 0, "max_tokens": 8}
    assert client.completions.create(model="b", **options).choices[0].text == wanted
    chunks = list(client.completions.create(model="b", stream=True, **options))
    assert "".join(chunk.choices[0].text for chunk in chunks) == wanted
    mixed = client.completions.create(model="tiny", extra_body={"adapter": {"a": 0.5, "b": 1.0}}, **options)
    assert mixed.choices[0].text == served.text("hello", {"a": 0.5, "b": 1.0}, max_new_tokens=8)

    messages: Any = [{"role": "system", "content": "be"}, {"role": "user", "content": "good"}]
    wanted = served.text("s be u good a", "c", max_new_tokens=8)
    whole = client.chat.completions.create(model="c", messages=messages, temperature=0, max_tokens=8)
    assert whole.choices[0].message.content == wanted and whole.object == "chat.completion"
    stream = client.chat.completions.create(
        model="c", messages=messages, temperature=0, max_completion_tokens=8, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    *parts, last = list(stream)
    assert parts[0].choices[0].delta.role == "assistant" and parts[-1].choices[0].finish_reason == "length"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in parts) == wanted
    assert not last.choices and last.usage is not None and last.usage.completion_tokens == 8

    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nobody", **options)
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model="c", messages=messages, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}]
        )


def test_template_of_an_adapter(tmp_path: Any) -> None:
    """An adapter's own chat template is its chats', and mixes of two templates are refused."""
    with serving(tmp_path) as served:
        (served.folders["b"] / "chat_template.jinja").write_text("{{ messages[0]['content'] }} b")
        body = {"messages": [{"role": "user", "content": "good"}], "temperature": 0, "max_tokens": 6}
        for model, text in (("b", "good b"), ("a", "u good a")):
            answer = served.post("/v1/chat/completions", {"model": model, **body}).json()
            assert answer["choices"][0]["message"]["content"] == served.text(text, model, max_new_tokens=6)
        answer = served.post("/v1/chat/completions", {"model": '{"a": 1, "b": 1}', **body})
        assert answer.status_code == 400 and "different chat templates" in answer.json()["error"]["message"]


def test_tokenizer_of_an_adapter(tmp_path: Any) -> None:
    """One with other tokens than the base's would be read and written in wrong ones: refused, or ignored if told to.
    A merge that the server was given is a name like others."""
    for base_tokenizer in (False, True):
        with serving(tmp_path / str(base_tokenizer), base_tokenizer=base_tokenizer) as served:
            changed = letters()
            changed.add_tokens(["hello"])
            changed.save_pretrained(served.folders["b"])
            how = mlora.Merge(("a", "c"), (0.5, 0.5), "ties", density=0.5)
            served.engine.runtime.add_merge("a long name " * 30, how)
            assert ask(served, model="a long name " * 30).json()["choices"][0]["text"]
            for model in ("b", '{"a": 1, "b": 1}'):
                for _ in range(2):
                    answer = ask(served, model=model)
                    assert answer.status_code == (200 if base_tokenizer else 400)
                    assert base_tokenizer or "tokenizer" in answer.json()["error"]["message"]
            assert ask(served, model="a").status_code == 200
