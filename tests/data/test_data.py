"""Files become rows, rows become examples: what is a target, what is cut off, what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from http_serving import CHAT
from serving import letters

from mlora import errors
from mlora.data import Form, batch_of, check_rows, encode, prompt_ids, read_rows, reference_of

END = 1
USUAL = Form()


def one(row: dict[str, Any], form: Form = USUAL, tokenizer: Any = None, **options: Any) -> tuple[str, str]:
    """All of the text of a row, and the part of it that is a target, as the tokenizer's words."""
    tokenizer = tokenizer or letters()
    (example,) = encode(check_rows([row], form), tokenizer, form, **options).examples
    words = tokenizer.convert_ids_to_tokens(example.ids)
    wanted = [word for word, label in zip(words, example.labels, strict=True) if label != -100]
    assert all(label in (-100, id) for id, label in zip(example.ids, example.labels, strict=True))
    return "".join(words), "".join(wanted)


def chatting() -> Any:
    tokenizer = letters()
    tokenizer.chat_template = CHAT
    return tokenizer


def test_files_are_read_alike(tmp_path: Path) -> None:
    rows = [{"prompt": "a, b", "completion": 'say "c"\nd'}, {"prompt": "é\u2028f", "completion": "g"}]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    (tmp_path / "x.json").write_text(json.dumps(rows))
    quoted = [[f'"{value.replace(chr(34), chr(34) * 2)}"' for value in row.values()] for row in rows]
    (tmp_path / "x.csv").write_text("\ufeffprompt,completion\n" + "\n".join(",".join(row) for row in quoted))
    (tmp_path / "x.tsv").write_text("prompt\tcompletion\n" + "\n".join("\t".join(row) for row in quoted))
    for kind in ("jsonl", "json", "csv", "tsv"):
        assert list(read_rows(tmp_path / f"x.{kind}")) == rows, kind
    assert read_rows(iter(rows)) == rows


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("x.jsonl", '{"a": 1}\n{"a": \n', "line 2 column 7: Expecting value"),
        ("x.jsonl", '{"a": 1}\n[1]\n', r"line 2 is \[1\]; wanted an object"),
        ("x.json", "[1, 2", "wanted a list of objects"),
        ("x.json", '[{"a": 1}, 2]', "row 2 is 2"),
        ("x.csv", "a,b\n1,2\n3\n", "line 3 has another number of columns"),
        ("x.csv", "a,b\n1,2,3\n", "line 2 has another number of columns"),
        ("x.csv", "a,a\n1,2\n", "has a column twice"),
        ("x.csv", "a,b\n", "has no rows"),
        ("x.csv", "", "has no rows"),
        ("x.txt", "a", r"x.txt is none of the files that are read: .jsonl"),
        ("x.csv", "a;b\n1;2\n", "its header 'a;b' is one column with a ';' in it"),
        ("x.tsv", "a,b\n1,2\n", "its header 'a,b' is one column with a ',' in it"),
        ("x.jsonl", '{"a": 1}\n{"a": 1, "a": 2}\n', "line 2: the key 'a' comes twice"),
        ("x.json", "[" * 100000, "wanted a list of objects"),
        ("x.jsonl", "\n", "has no rows"),
    ],
)
def test_damaged_files_are_refused_by_line(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(errors.DataError, match=words):
        read_rows(tmp_path / name)


def test_text_is_utf_8(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n{"a": "\xe9"}\n')
    with pytest.raises(errors.DataError, match="its line 2 is not UTF-8"):
        read_rows(tmp_path / "x.jsonl")
    rows = [{"a": "\u00e9"}, {"a": "b"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert list(read_rows(tmp_path / "x.jsonl")) == rows


def test_a_field_of_a_table_may_be_long(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    (tmp_path / "x.csv").write_text("a,b\n1," + "2" * 200_000 + "\n")
    assert len(read_rows(tmp_path / "x.csv")[0]["b"]) == 200_000
    assert csv.field_size_limit() == limit


def test_what_is_no_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.DataError, match="cannot read"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(errors.DataError, match="wanted a file, a hub id, or rows"):
        read_rows({"prompt": "x"})  # type: ignore[arg-type]


def test_a_completion_is_the_target() -> None:
    assert one({"prompt": "say ", "completion": "cat"}) == ("say cat<end>", "cat<end>")
    assert one({"prompt": "say ", "completion": "cat"}, Form(completion_only=False))[1] == "say cat<end>"
    assert one({"text": "say cat"}) == ("say cat<end>", "say cat<end>")


def test_a_completion_begins_where_tokens_part() -> None:
    """`t` and `h` are one token together: the prompt's last one is another with the completion than without."""
    tokenizer = letters()

    class Joining:
        eos_token_id = END

        def __call__(self, text: str) -> dict[str, list[int]]:
            words = text.replace("th", "\0")
            found = [tokenizer.convert_tokens_to_ids("th" if letter == "\0" else letter) for letter in words]
            return {"input_ids": found}

    (example,) = encode(check_rows([{"prompt": "at", "completion": "he"}]), Joining()).examples
    assert tokenizer.convert_ids_to_tokens(example.ids) == ["a", "th", "e", "<end>"]
    assert [label != -100 for label in example.labels] == [False, True, True, True]


def test_a_template_and_columns() -> None:
    form = Form(template="{{q}} {q}, {n} times: ", completion="a")
    assert one({"q": "cat", "n": "two", "a": "cats"}, Form(template="{q}, {n}, ", completion="a")) == (
        "cat, two, cats<end>",
        "cats<end>",
    )
    assert check_rows([{"q": "x", "n": 3, "a": "y"}], form)[0].prompt == "{q} x, 3 times: "
    assert check_rows([{"q.x": "1", "a": "y"}], Form(template="{q.x}", completion="a"))[0].prompt == "1"
    assert one({"ask": "cat ", "say": "dog"}, Form("ask", "say")) == ("cat dog<end>", "dog<end>")


def test_alpaca_has_its_words() -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    (pair,) = check_rows([row])
    assert pair.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n"
        "### Response:\n"
    )
    (pair,) = check_rows([{**row, "input": ""}])
    assert "### Input" not in str(pair.prompt) and reference_of(pair) == "3"


def test_chats_in_the_template() -> None:
    user, answer = {"role": "user", "content": "say cat"}, {"role": "assistant", "content": "cat"}
    tokenizer = chatting()
    whole, wanted = one({"messages": [user, answer, user, answer]}, tokenizer=tokenizer)
    text = tokenizer.apply_chat_template([user, answer, user, answer], tokenize=False)
    assert whole == "".join(tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]))
    assert wanted.count("cat") == 2 and "say" not in wanted
    same = one({"prompt": "say cat", "completion": "cat"}, Form(chat=True), tokenizer)
    assert same == one({"messages": [user, answer]}, tokenizer=tokenizer)
    assert same == one({"prompt": [user], "completion": [answer]}, tokenizer=tokenizer)
    (pair,) = check_rows([{"messages": [user, answer]}])
    asked = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    assert prompt_ids(pair, tokenizer) == tokenizer(asked)["input_ids"]


def test_turns_that_are_written_otherwise_later_are_no_targets() -> None:
    """As templates do that leave out thoughts of earlier turns."""
    tokenizer = letters()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}{% if m.role == 'assistant' and loop.last %}zz{% endif %}{{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    )
    user, answer = {"role": "user", "content": "i"}, {"role": "assistant", "content": "cat"}
    whole, wanted = one({"messages": [user, answer, user, answer]}, tokenizer=tokenizer)
    assert whole == "uiacatuiazzcat" and wanted == "zzcat"


def test_what_is_cut_off_is_told() -> None:
    rows = [{"prompt": "a", "completion": "bcde"}, {"prompt": "abcdefgh", "completion": "b"}, {"text": "ab"}]
    found = encode(check_rows(rows), letters(), max_length=4)
    assert [len(example.ids) for example in found.examples] == [4, 3]
    assert (found.truncated, found.dropped) == (2, [2])
    assert [example.targets for example in found.examples] == [3, 2]


@pytest.mark.parametrize(
    ("row", "form", "words"),
    [
        ({"prompt": "x"}, Form(), r"row 1: its columns are 'prompt'; wanted 'prompt' and 'completion'"),
        ({"prompt": "x", "completion": ""}, Form(), "row 1: its column 'completion' is empty"),
        ({"prompt": "x", "completion": None}, Form(), "row 1: its column 'completion' is empty"),
        ({"text": ""}, Form(), "'text' is empty"),
        ({"messages": [{"role": "user", "content": "x"}]}, Form(), "do not end with one of the role 'assistant'"),
        ({"messages": [{"role": "user"}]}, Form(), "it has the message"),
        ({"messages": "x"}, Form(), "it has 'x' where text or messages"),
        (
            {"quest": "x", "completion": "y"},
            Form(prompt="question"),
            r"no column 'question' \(did you mean 'quest'\?\)",
        ),
        ({"q": "x", "a": "y"}, Form(template="{q} {w}", completion="a"), "no column 'w'"),
        ({"q": "x", "a": "y"}, Form(template="{q", completion="a"), "the template '{q' cannot be read"),
        ({"q": "x", "a": "y"}, Form(template="q", completion="a"), "the template 'q' names no column"),
        ({"q": "x", "a": "y"}, Form(template="{{q}}", completion="a"), "names no column"),
        ({"q": "x", "a": "y"}, Form(template="{q:d}", completion="a"), "has a format for 'q'"),
        ({"q": "x", "a": "y"}, Form(template="{q!r}", completion="a"), "has a format for 'q'"),
        ({"q": ["x"], "a": "y"}, Form(template="{q}", completion="a"), r"its column 'q' is \['x'\]; wanted text"),
        ({"prompt": float("nan"), "completion": "y"}, Form(), "its column 'prompt' is nan; wanted text"),
        ({"prompt": None, "completion": "y"}, Form(), "row 1: its column 'prompt' is null; wanted text or messages"),
        ({"prompt": "\ud83d", "completion": "y"}, Form(), "half of a surrogate pair"),
        ({"messages": [{"role": "assistant", "content": "\ud83d"}]}, Form(), "half of a surrogate pair"),
        ({"messages": [{"role": "assistant", "content": ""}]}, Form(), "its last message is empty: there is no target"),
        ({"prompt": {"x": 1}, "completion": "y"}, Form(), "its column 'prompt' is {'x': 1}"),
        ("x", Form(), "it is 'x'; wanted a mapping"),
    ],
)
def test_rows_are_refused_by_name(row: Any, form: Form, words: str) -> None:
    with pytest.raises(errors.DataError, match=words):
        check_rows([row], form)


def test_messages_need_a_template() -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(errors.DataError, match="rows row 2: the tokenizer has no chat template"):
        encode(check_rows([{"text": "a"}, row]), letters(), name="rows")


def test_batches_are_padded_on_the_right() -> None:
    examples = encode(check_rows([{"text": "ab"}, {"prompt": "a", "completion": "b"}]), letters()).examples
    longer = encode(check_rows([{"text": "abcd"}]), letters()).examples
    batch = batch_of([*examples, *longer], 0)
    assert batch.inputs["input_ids"].tolist()[0][3:] == [0, 0]
    assert batch.inputs["attention_mask"].sum(1).tolist() == [3, 3, 5]
    assert batch.labels.tolist()[1][0] == -100 and batch.labels.tolist()[0][3:] == [-100, -100]
