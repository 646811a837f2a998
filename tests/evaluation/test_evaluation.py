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
import mlora.cli.models
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


def test_a_merge_is_computed_once(runtime: mlora.Runtime, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    add_merge = runtime.add_merge
    monkeypatch.setattr(runtime, "add_merge", lambda name, merge: made.append(name) or add_merge(name, merge))
    evaluate(runtime, tokenizer, TASKS, ENTRIES, metrics=("loss", "exact_match"), max_new_tokens=2)
    assert len(made) == 1


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


def test_the_command(llama: Any, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save(llama, tmp_path / "base")
    for task, rows in TASKS.items():
        (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "judge.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\nclass Judge:\n"
        "    length: int\n\ndef starts(answer, reference):\n    return answer[:1] == reference.strip()[:1]\n"
    )
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    (tmp_path / "exits.py").write_text("import sys\nsys.exit(3)\n")
    (tmp_path / "wrong.py").write_text(
        "def raises(answer, reference):\n    return reference['x']\n\n"
        "def starts(answer, reference):\n    return 'well'\n"
        "\ndef exits(answer, reference):\n    raise SystemExit(3)\n"
    )
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "3 " * 5000, "completion": " 4"}) + "\n")
    (tmp_path / "table.csv").write_text("prompt;completion\n3;4\n")
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
    assert json.loads((out / "answers.jsonl").read_text().splitlines()[0])["row"] == TASKS["count"][0]
    code, output = run("--output", out, "--force")
    assert code == 0 and not (out / "answers.jsonl").exists(), output  # those of before are of other metrics
    monkeypatch.setattr(mlora.cli.models, "load_model", lambda *_: pytest.fail("a model was loaded"))
    wrong = tmp_path / "wrong.py"
    for options, words in (
        (("--output", out), "has scores.jsonl already; --force replaces what is there"),
        (("--output", tmp_path / "judge.py"), "judge.py is a file; wanted a folder"),
        (("--output", "/proc/mlora"), "--output /proc/mlora: nothing can be written there"),
        (("--metric", "bleu"), "--metric 'bleu'"),
        (("--metric", f"{tmp_path / 'broken.py'}:f"), "broken.py cannot be run: ModuleNotFoundError"),
        (("--metric", f"{tmp_path / 'exits.py'}:f"), "exits.py cannot be run: SystemExit"),
        (("--metric", f"{wrong}:raises"), "metric 'raises' of task 'count' row 1"),
        (("--metric", f"{wrong}:starts"), "could not convert string to float: 'well'; wanted a number"),
        (("--metric", f"{wrong}:exits"), "SystemExit: 3"),
        (("--metric", f"{wrong}:starts", "--metric", f"{tmp_path / 'judge.py'}:starts"), "'starts' is there twice"),
        (("--metric", "exact_match", "--max-new-tokens", 5000), "max_new_tokens 5000 are more than the model's"),
        (("--entry", "z"), "unknown adapter 'z'"),
        (("--entry", '{"a": "much"}'), "the weight 'much' is no finite number"),
        (("--entry", '{"a": 1'), "is no JSON"),
        (("--entry", '{"a": 1, "a": 2}'), "a name comes twice"),
        (("--density", 0.5), "--density is of merges, and there are none"),
        (("--strategy", "linear", "--density", 0.5), "--density is of strategies that prune"),
        (("--strategy", "ties", "--density", 0), "density is 0.0; ties needs the share of values to keep"),
        (("--strategy", "best"), "combination_type"),
        (("--merge", "a,z"), "unknown adapter 'z'"),
        (("--merge", "a,a"), "has an adapter twice"),
        (("--adapter", f"base={folders['c']}"), "the name 'base', which is the bare model's"),
        (("--data", tmp_path / "none.jsonl"), "there is no file"),
        (("--data", f"={tmp_path / 'count.jsonl'}"), "wanted [TASK=]FILE"),
        (("--data", tmp_path / "long.jsonl"), "task 'long': no row of it has a target within"),
        (("--data", tmp_path / "table.csv"), "is one column with a ';' in it"),
        (("--completion", "answer"), "no column 'answer'"),
        (("--template", "Answer:"), "names no column"),
    ):
        code, output = run(*options)
        assert code == 2 and words in output, (options, output)


def test_the_command_does_not_judge_what_is_not_trained(llama: Any, tmp_path: Path) -> None:
    base = save(llama, tmp_path / "base")
    data, config = tmp_path / "data.jsonl", tmp_path / "config.yaml"
    data.write_text(json.dumps(TASKS["count"][0]) + "\n")
    fresh = {"base_model": str(base), "dataset": "data.jsonl", "adapters": {"adapters": {"x": {"type": "lora"}}}}
    config.write_text(json.dumps(fresh))
    result = CliRunner().invoke(app, ["evaluate", "--config", str(config), "--data", str(data)])
    assert result.exit_code == 2 and "adapter 'x' has no weights yet" in " ".join(result.output.split())


def test_what_is_cut_off_is_told(runtime: mlora.Runtime, tokenizer: Any) -> None:
    most = runtime.model.config.max_position_embeddings
    rows = [TASKS["count"][0], {"prompt": "3 " * most, "completion": " 4"}, {"prompt": "3", "completion": " 4" * most}]
    (score,) = evaluate(runtime, tokenizer, {"x": rows}, {"a": "a"})
    assert (score.truncated, score.dropped) == (2, (2,))


def test_a_metric_that_fails_later_is_named(runtime: mlora.Runtime, tokenizer: Any) -> None:
    references = [row["completion"] for rows in TASKS.values() for row in rows]

    def fussy(answer: str, reference: str) -> float:
        return 1.0 / references.count(answer)

    with pytest.raises(errors.MetricError, match=r"'fussy' of task 'count' row 1, answer .*: ZeroDivisionError"):
        evaluate(runtime, tokenizer, TASKS, {"a": "a"}, metrics=[fussy], max_new_tokens=2)
