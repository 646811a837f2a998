"""Entries judged on data. The oracle is PEFT with one adapter alone, and `generate` of one row alone."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_model import save
from chat_model import tokenizer as numbers
from conftest import peft_alone
from serving import adapters
from typer.testing import CliRunner

import mlora
from mlora import Merge, errors
from mlora.cli import app
from mlora.data import batch_of, check_rows, encode
from mlora.evaluation import Score, evaluate, grid, kept, table_of

TASKS = {
    "count": [{"prompt": f"{n} {n + 1}", "completion": f" {n + 2} {n + 3}"} for n in range(3, 9)],
    "same": [{"prompt": f"{n} {n} {n}", "completion": f" {n}"} for n in range(9, 13)],
}
TIES = Merge(("a", "b"), (0.7, 0.3), "ties", density=0.5)


@pytest.fixture(scope="module")
def folders(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return adapters(tmp_path_factory.mktemp("adapters"), llama, ("a", "b", "c"))


@pytest.fixture(scope="module")
def runtime(llama: Any, folders: dict[str, Path]) -> mlora.Runtime:
    runtime = mlora.patch(copy.deepcopy(llama), memory=1 << 22)
    for name, folder in folders.items():
        runtime.load_adapter(folder, name)
    return runtime


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return numbers()


def loss_alone(model: Any, rows: Any, tokenizer: Any) -> float:
    """The mean over all targets, a row at a time."""
    total, count = 0.0, 0
    for example in encode(check_rows(rows), tokenizer).examples:
        batch = batch_of([example], 0)
        with torch.no_grad():
            total += float(model(**batch.inputs, labels=batch.labels).loss) * example.targets
        count += example.targets
    return total / count


ENTRIES = {"bare": None, "a": "a", "b": "b", "mix": {"a": 0.5, "b": 0.25}, "ties": TIES}


def test_losses_are_those_of_each_entry_alone(
    runtime: mlora.Runtime, llama: Any, folders: dict[str, Path], tokenizer: Any
) -> None:
    scores = evaluate(runtime, tokenizer, TASKS, ENTRIES, metrics=("loss", "perplexity"), max_tokens=64)
    assert [(score.entry, score.task) for score in scores] == [(e, t) for e in ENTRIES for t in TASKS]
    with torch.no_grad():
        merged = mlora.patch(copy.deepcopy(llama), memory=1 << 22)
        for name in "ab":
            merged.load_adapter(folders[name], name)
        merged.merge_adapter(TIES)
        oracles = {
            "bare": llama,
            "a": peft_alone(llama, folders["a"]),
            "b": peft_alone(llama, folders["b"]),
            "mix": peft_alone(llama, folders["a"], folders["b"], weights=(0.5, 0.25)),
            "ties": merged.model,
        }
    for score in scores:
        wanted = loss_alone(oracles[score.entry], TASKS[score.task], tokenizer)
        assert score.values["loss"] == pytest.approx(wanted, abs=2e-4)
        assert score.values["perplexity"] == pytest.approx(math.exp(wanted), rel=1e-3)
    assert list(runtime.adapters) == ["a", "b", "c"]  # the merge is gone


def test_answers_are_those_of_generate_alone(runtime: mlora.Runtime, tokenizer: Any) -> None:
    def length(answer: str, reference: str) -> float:
        return float(len(answer))

    scores = evaluate(
        runtime, tokenizer, TASKS, ENTRIES, metrics=("exact_match", length), max_new_tokens=4, max_running=7
    )
    for score in scores:
        alone = []
        for row in TASKS[score.task]:
            ids = tokenizer(row["prompt"], return_tensors="pt")
            out = runtime.model.generate(
                input_ids=ids["input_ids"], max_new_tokens=4, do_sample=False, adapter_names=[ENTRIES[score.entry]],
                pad_token_id=0,
            )  # fmt: skip
            alone.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
        assert list(score.answers) == alone
        right = [a.strip() == row["completion"].strip() for a, row in zip(alone, TASKS[score.task], strict=True)]
        assert score.values["exact_match"] == sum(right) / len(right)
        assert score.values["length"] == sum(map(len, alone)) / len(alone)


def test_entries_that_do_not_fit_together_take_turns(llama: Any, folders: dict[str, Path], tokenizer: Any) -> None:
    small = mlora.patch(copy.deepcopy(llama), memory=1 << 22, max_adapters=2)
    for name, folder in folders.items():
        small.load_adapter(folder, name)
    entries = {name: name for name in "abc"}
    turns = evaluate(small, tokenizer, TASKS, entries)
    roomy = mlora.patch(copy.deepcopy(llama), memory=1 << 22)
    for name, folder in folders.items():
        roomy.load_adapter(folder, name)
    for mine, theirs in zip(turns, evaluate(roomy, tokenizer, TASKS, entries), strict=True):
        assert mine.values["loss"] == pytest.approx(theirs.values["loss"], abs=1e-4)


def test_a_grid() -> None:
    found = grid(["a", "b"], ["linear", "ties"], [0.3, 0.6], [0.5, 1.0], 4)
    assert list(found) == [
        "linear r4 x0.5 a+b", "linear r4 x1 a+b",
        "ties 0.3 r4 x0.5 a+b", "ties 0.3 r4 x1 a+b", "ties 0.6 r4 x0.5 a+b", "ties 0.6 r4 x1 a+b",
    ]  # fmt: skip
    assert list(grid(["a", "b"], ["linear", "ties"])) == ["linear x1 a+b", "ties 0.5 x1 a+b"]
    assert found["ties 0.6 r4 x0.5 a+b"] == Merge(("a", "b"), (0.5, 0.5), "ties", density=0.6, svd_rank=4)
    with pytest.raises(errors.MergeError, match="two or more"):
        grid(["a"])
    with pytest.raises(errors.MergeError, match="combination_type"):
        grid(["a", "b"], ["best"])


def test_what_is_kept_is_the_least_share_of_the_best() -> None:
    losses = {
        ("bare", "x"): 4.0,
        ("bare", "y"): 3.0,
        ("a", "x"): 2.0,
        ("a", "y"): 3.5,
        ("b", "x"): 3.0,
        ("b", "y"): 1.0,
    }
    scores = [Score(entry, task, {"loss": value}) for (entry, task), value in losses.items()]
    assert kept(scores, "loss", "bare") == {"bare": 0.0, "a": -0.25, "b": 0.5}
    rows = list(zip(*[list(column.cells) for column in table_of(scores, "bare").columns], strict=True))
    assert rows[-1] == ("b", "3", "1", "50% *")


def test_what_is_none_is_refused(runtime: mlora.Runtime, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="metric 'bleu' is none"):
        evaluate(runtime, tokenizer, TASKS, {"a": "a"}, metrics=("bleu",))
    with pytest.raises(errors.UnknownAdapterError, match="'z'"):
        evaluate(runtime, tokenizer, TASKS, {"z": "z"})
    with pytest.raises(errors.DataError, match="task 'x' row 1"):
        evaluate(runtime, tokenizer, {"x": [{"prompt": "3"}]}, {"a": "a"})


def test_the_command(llama: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    base = save(llama, tmp_path / "base")
    for task, rows in TASKS.items():
        (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "judge.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\nclass Judge:\n"
        "    length: int\n\ndef starts(answer, reference):\n    return answer[:1] == reference.strip()[:1]\n"
    )
    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_module\n")
    given = ["evaluate", "--model", base, *(f"--adapter={name}={folders[name]}" for name in "ab")]
    given += [f"--data={tmp_path / task}.jsonl" for task in TASKS]

    def run(*options: Any) -> tuple[int, str]:
        result = CliRunner().invoke(app, [*map(str, given), *map(str, options)])
        return result.exit_code, " ".join(result.output.split())

    out = tmp_path / "out"
    code, output = run(
        "--strategy", "ties", "--strategy", "linear", "--density", 0.5, "--weight", 0.5, "--weight", 1, "--output", out,
        "--metric", "loss", "--metric", f"{tmp_path / 'judge.py'}:starts", "--max-new-tokens", 3,
    )  # fmt: skip
    assert code == 0, output
    assert "judging 7 entries on 10 rows" in output and "judged: 140 of 140" in output
    records = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert [r["entry"] for r in records[::2]] == [
        "base", "a", "b", "ties 0.5 x0.5 a+b", "ties 0.5 x1 a+b", "linear x0.5 a+b", "linear x1 a+b",
    ]  # fmt: skip
    assert records[0].keys() == {"entry", "task", "loss", "starts"}
    assert (out / "scores.png").stat().st_size > 1000
    assert len((out / "answers.jsonl").read_text().splitlines()) == 7 * 10
    for options, words in (
        (("--output", out), "has scores already; --force replaces them"),
        (("--metric", "bleu"), "--metric 'bleu'"),
        (("--entry", "z"), "unknown adapter 'z'"),
        (("--entry", '{"a": "much"}'), "the weight 'much' is no finite number"),
        (("--entry", '{"a": 1'), "is no JSON"),
        (("--density", 0.5), "--density is of merges, and there are none"),
        (("--metric", f"{broken}:f"), "broken.py cannot be run: ModuleNotFoundError"),
        (("--data", tmp_path / "none.jsonl"), "there is no file"),
        (("--completion", "answer"), "no column 'answer'"),
        (("--strategy", "best"), "combination_type"),
    ):
        code, output = run(*options)
        assert code == 2 and words in output, (options, output)
