"""Rows become examples: the tokens of a text, and which of them are targets.

The columns are those that the field's data sets have:

    prompt, completion          strings, or lists of messages
    messages                    [{"role": "user", "content": "..."}, ...]
    text                        all of it is a target
    instruction, input, output  Alpaca's, in Alpaca's words

Other columns are named by a `Form`, which may also have a template for the prompt. As in TRL, the end-of-text token
follows a text that is no chat, a completion begins where the tokens of the prompt with it and without it part, and what
is beyond `max_length` is cut off at the end. Messages are written by the tokenizer's chat template.
"""

from __future__ import annotations

import difflib
import math
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from .. import errors
from .rows import Row

IGNORED = -100  # transformers' label of what is no target
Messages: TypeAlias = list[dict[str, str]]

_KINDS = (("messages",), ("prompt", "completion"), ("text",), ("instruction", "output"))
_BEFORE = "Below is an instruction that describes a task"
_AFTER = "Write a response that appropriately completes the request."
_ALPACA = f"{_BEFORE}. {_AFTER}\n\n### Instruction:\n{{instruction}}\n\n### Response:\n"
_ALPACA_INPUT = (
    f"{_BEFORE}, paired with an input that provides further context. {_AFTER}\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)  # the words of Stanford Alpaca, which made the columns


@dataclass(frozen=True)
class Form:
    """How rows are read, where it is not by the columns that are usual.

    Args:
        prompt: the column of the prompt. `completion`: that of the wanted answer.
        template: a prompt with columns in braces, as in `"Translate: {english}"`; `{{` is a brace.
        chat: a prompt that is a string is a user's message, and its completion the answer to it, in the tokenizer's
            chat template. Without it strings are taken as they are.
        completion_only: prompts are no targets.
    """

    prompt: str | None = None
    completion: str | None = None
    template: str | None = None
    chat: bool = False
    completion_only: bool = True


class Pair(NamedTuple):
    """The text of a row. `prompt`: None where all is a target."""

    prompt: str | Messages | None
    completion: str | Messages


class Example(NamedTuple):
    """`ids`: tokens. `labels`: one a token, itself or -100 where it is no target."""

    ids: list[int]
    labels: list[int]

    @property
    def targets(self) -> int:
        """How many tokens are predicted: the first never is."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass
class Encoded:
    """`truncated`: how many examples were cut off. `dropped`: the numbers of the rows, from 1, that had no target left
    then."""

    examples: list[Example] = field(default_factory=list)
    truncated: int = 0
    dropped: list[int] = field(default_factory=list)


def check_rows(rows: Sequence[Row], form: Form = Form(), name: str = "the data set") -> list[Pair]:
    """The text of each row, before any tokenizer is there.

    Args:
        name: what errors call it.

    Raises:
        DataError: a row has not the columns, or no target; the message names the row and the nearest column.
    """
    if form.template is not None and not fields_of(form.template):
        raise errors.DataError(
            f"the template {form.template!r} names no column, so that every prompt would be the same; wanted one in "
            f"braces, as in 'Translate: {{english}}'"
        )
    pairs = []
    for number, row in enumerate(rows, start=1):
        try:
            pairs.append(_pair(row, form))
        except errors.DataError as error:
            raise errors.DataError(f"{name} row {number}: {error}") from None
    return pairs


def encode(
    pairs: Iterable[Pair],
    tokenizer: Any,
    form: Form = Form(),
    max_length: int | None = None,
    name: str = "the data set",
) -> Encoded:
    """The examples of texts.

    Args:
        tokenizer: of transformers. `max_length`: of an example, in tokens. `name`: as `check_rows` has it.

    Raises:
        DataError: the tokenizer has no chat template and there are messages, or the template refuses them.
    """
    found = Encoded()
    for number, example, cut in _examples(pairs, tokenizer, form, max_length, name):
        found.truncated += cut
        if example.targets:
            found.examples.append(example)
        else:
            found.dropped.append(number)
    return found


def find_target(
    pairs: Iterable[Pair],
    tokenizer: Any,
    form: Form = Form(),
    max_length: int | None = None,
    name: str = "the data set",
) -> None:
    """Raise DataError where no row has a target within `max_length`, or `encode` raises for one before the first that
    has."""
    if not any(example.targets for _, example, _ in _examples(pairs, tokenizer, form, max_length, name)):
        raise errors.DataError(f"{name}: no row of it has a target within {max_length} tokens")


def prompt_ids(pair: Pair, tokenizer: Any) -> list[int]:
    """The tokens that a model is given to answer: those of the prompt, and of the template what opens an answer."""
    if isinstance(pair.prompt, list):
        return _ids(tokenizer, _chat(tokenizer, pair.prompt, True))
    return list(tokenizer(pair.prompt or "")["input_ids"])


def reference_of(pair: Pair) -> str:
    """The wanted answer, as text."""
    return pair.completion if isinstance(pair.completion, str) else pair.completion[-1]["content"]


def _pair(row: Row, form: Form) -> Pair:
    if not isinstance(row, Mapping):
        raise errors.DataError(f"it is {row!r}; wanted a mapping of columns")
    if form.template is None and form.prompt is None and form.completion is None:
        kind = next((kind for kind in _KINDS if all(column in row for column in kind)), None)
        if kind is None:
            raise errors.DataError(
                f"its columns are {', '.join(map(repr, row)) or 'none'}; wanted 'prompt' and 'completion', 'messages', "
                f"'text', or 'instruction' and 'output'; or name yours: in Python by a Form, in a config file by "
                f"prompt.template and output_features, on the command line by --template and --completion"
            )
        if kind == ("messages",):
            return _conversation(row["messages"])
        if kind == ("text",):
            return Pair(None, _target(row, "text"))
        if kind == ("instruction", "output"):
            template = _ALPACA_INPUT if row.get("input") else _ALPACA
            return _asked(_fill(template, row), _target(row, "output"), form)
    prompt = _fill(form.template, row) if form.template is not None else _column(row, form.prompt or "prompt")
    if prompt is None:
        raise errors.DataError(f"its column {form.prompt or 'prompt'!r} is null; wanted text or messages")
    return _asked(prompt, _target(row, form.completion or "completion"), form)


def _asked(prompt: Any, completion: Any, form: Form) -> Pair:
    if isinstance(prompt, str) and isinstance(completion, str):
        if not form.chat:
            return Pair(prompt, completion)
        return Pair([{"role": "user", "content": prompt}], [{"role": "assistant", "content": completion}])
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _messages(prompt)
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else _messages(completion)
    return Pair(asked, answer)


def _conversation(value: Any) -> Pair:
    """The last answer is the completion."""
    messages = _messages(value)
    if not messages or messages[-1]["role"] != "assistant":
        raise errors.DataError("its 'messages' do not end with one of the role 'assistant', which would be the target")
    if not messages[-1]["content"]:
        raise errors.DataError("its last message is empty: there is no target")
    return Pair(messages[:-1], messages[-1:])


def _messages(value: Any) -> Messages:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise errors.DataError(f'it has {value!r} where text or messages ({{"role": ..., "content": ...}}) belong')
    for message in value:
        parts = [message.get(key) for key in ("role", "content")] if isinstance(message, Mapping) else [None]
        if not all(isinstance(part, str) for part in parts):
            raise errors.DataError(f'it has the message {message!r}; wanted {{"role": TEXT, "content": TEXT}}')
    return [{**message, "content": _whole(message["content"])} for message in value]


def _whole(text: str) -> str:
    """JSON may have half of a character, as \\ud83d, which tokenizers do not take."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise errors.DataError(f"it has {half!r}, which is half of a surrogate pair and no character") from None
    return text


def _target(row: Row, column: str) -> Any:
    value = _column(row, column)
    if value is None or not len(value):
        raise errors.DataError(f"its column {column!r} is empty: there is no target")
    return value


def _column(row: Row, column: str) -> Any:
    if column not in row:
        near = difflib.get_close_matches(column, [str(key) for key in row], 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise errors.DataError(f"it has no column {column!r}{hint}; it has {', '.join(map(repr, row))}")
    value = row[column]
    if isinstance(value, str):
        return _whole(value)
    if value is None or isinstance(value, Sequence):
        return value
    if isinstance(value, (int, float)) and math.isfinite(value):
        return str(value)
    raise errors.DataError(f"its column {column!r} is {value!r}; wanted text or messages")


def fields_of(template: str) -> list[str]:
    """The columns that a template names. Raises DataError if it is none."""
    try:
        fields = [parts[1:] for parts in string.Formatter().parse(template) if parts[1] is not None]
    except ValueError as error:
        raise errors.DataError(f"the template {template!r} cannot be read: {error}; {{{{ and }}}} are braces") from None
    for name, form, conversion in fields:
        if form or conversion:
            raise errors.DataError(f"the template {template!r} has a format for {name!r}; wanted a column's name alone")
    return [str(name) for name, _, _ in fields]


def _fill(template: str, row: Row) -> str:
    filled = []
    for text, name, _, _ in string.Formatter().parse(template):
        filled.append(text)
        if name is not None:
            value = _column(row, name)
            if not isinstance(value, (str, type(None))):
                raise errors.DataError(f"its column {name!r} is {value!r}; wanted text, which the template takes")
            filled.append(value or "")
    return "".join(filled)


def _examples(
    pairs: Iterable[Pair], tokenizer: Any, form: Form, max_length: int | None, name: str
) -> Iterator[tuple[int, Example, bool]]:
    """The number of each row, its example, and whether that was cut off."""
    for number, pair in enumerate(pairs, start=1):
        try:
            ids, labels = _tokens(pair, tokenizer, form)
        except errors.DataError as error:
            raise errors.DataError(f"{name} row {number}: {error}") from None
        cut = max_length is not None and len(ids) > max_length
        yield number, Example(ids[:max_length], labels[:max_length]), cut


def _tokens(pair: Pair, tokenizer: Any, form: Form) -> tuple[list[int], list[int]]:
    """An example's ids and labels."""
    if isinstance(pair.completion, list):
        assert isinstance(pair.prompt, list)
        return _chat_tokens([*pair.prompt, *pair.completion], tokenizer, form)
    prompt = pair.prompt or ""
    assert isinstance(prompt, str)
    ids = list(tokenizer(prompt + pair.completion)["input_ids"])
    if ids[-1:] != [tokenizer.eos_token_id] and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    start = (
        _common(list(tokenizer(prompt)["input_ids"]), ids) if pair.prompt is not None and form.completion_only else 0
    )
    return ids, [IGNORED] * start + ids[start:]


def _chat_tokens(messages: Messages, tokenizer: Any, form: Form) -> tuple[list[int], list[int]]:
    """What the assistant said is the target. An earlier turn that the template writes in another way once others follow
    (without its thoughts, say) is none: it would not be asked for so."""
    text = _chat(tokenizer, messages, False)
    ids = _ids(tokenizer, text)
    if not form.completion_only:
        return ids, list(ids)
    labels = [IGNORED] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _chat(tokenizer, messages[:turn], True)
        until = _chat(tokenizer, messages[: turn + 1], False)
        last = turn == len(messages) - 1
        if last or (text.startswith(before) and text.startswith(until)):
            start = _common(_ids(tokenizer, before), ids)
            end = len(ids) if last else _common(_ids(tokenizer, until), ids)
            labels[start:end] = ids[start:end]
    return ids, labels


def _chat(tokenizer: Any, messages: Messages, asks: bool) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise errors.DataError("the tokenizer has no chat template, which messages need")
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=asks, tokenize=False))
    except Exception as error:  # templates raise what they like
        raise errors.DataError(f"the chat template refuses {messages!r}: {error}") from None


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Of what a chat template wrote, which has its special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens they begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
