"""Many runs on one base. The oracle of a run is PEFT with that adapter alone, in a loop of this file."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import identity, logits, peft_alone, state_hash
from serving import letters

import mlora
from mlora import Run, Trainer, errors
from mlora.data import Form, batch_of, check_rows, encode
from mlora.trainer import checkpoint
from mlora.trainer.curves import read_log
from mlora.trainer.order import rows_of, total_steps

ROOM = 1 << 23
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WORDS = ["cat", "dog", "a house", "the tree", "stone", "in the garden", "on a hill", "water"]
ROWS = [{"prompt": f"say {word}, ", "completion": word} for word in WORDS]
OTHERS = [{"prompt": f"{word}: ", "completion": word[::-1]} for word in WORDS[:5]]


def lora(rank: int = 4, **options: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": LINEARS, **options}


def runtime_of(base: Any) -> mlora.Runtime:
    return mlora.patch(copy.deepcopy(base), memory=ROOM)


def trained(base: Any, runs: dict[str, Run], folder: Path, **options: Any) -> mlora.Runtime:
    runtime = runtime_of(base)
    Trainer(runtime, letters(), runs, folder, progress=False, **options).train()
    return runtime


def curve(folder: Path, key: str = "loss") -> list[float]:
    return [record[key] for record in read_log(folder) if key in record]


def weights(runtime: mlora.Runtime, name: str) -> list[torch.Tensor]:
    return [parameter.detach().clone() for _, parameter in runtime.named_parameters(name)]


def alone_with_peft(base: Any, run: Run) -> list[float]:
    """The losses of a run that PEFT trains alone, each step's rows as one batch."""
    from peft import LoraConfig, get_peft_model
    from transformers import get_scheduler

    torch.manual_seed(run.seed)
    config = LoraConfig(**{key: value for key, value in run.config.items() if key != "peft_type"})
    model = get_peft_model(copy.deepcopy(base), config).train()
    examples = encode(check_rows(run.data, run.form), letters(), run.form).examples
    total = total_steps(len(examples), run.rows_per_step, run.num_train_epochs, run.max_steps)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=run.learning_rate, weight_decay=run.weight_decay)
    schedule = get_scheduler(run.lr_scheduler_type, optimizer, int(run.warmup_steps), total)
    found = []
    for step in range(total):
        rows = rows_of(step, len(examples), run.rows_per_step, run.seed)
        batch = batch_of([examples[row] for row in rows], 0)
        loss = model(**batch.inputs, labels=batch.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, run.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


RUNS = {
    "a": Run(ROWS, lora(), learning_rate=1e-2, batch_size=2, num_train_epochs=3, seed=0),
    "b": Run(OTHERS, lora(2, use_rslora=True), learning_rate=3e-3, batch_size=3, max_steps=9, weight_decay=0.1, seed=1),
    "c": Run(
        [{"text": word} for word in WORDS],
        lora(3, use_dora=True),
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=4,
        max_grad_norm=0.5,
    ),
}


@pytest.mark.parametrize("max_tokens", [4096, 40])
def test_each_run_is_what_peft_makes_of_it_alone(llama: Any, tmp_path: Path, max_tokens: int) -> None:
    trained(llama, RUNS, tmp_path, max_tokens=max_tokens)
    for name, run in RUNS.items():
        wanted = alone_with_peft(llama, run)
        got = curve(tmp_path / name)
        assert len(got) == len(wanted)
        assert wanted[-1] < wanted[0]
        torch.testing.assert_close(torch.tensor(got), torch.tensor(wanted), rtol=0, atol=1e-4)


def test_a_run_among_others_is_the_run_alone(llama: Any, tmp_path: Path) -> None:
    together = trained(llama, RUNS, tmp_path / "together")
    for name, run in RUNS.items():
        one = trained(llama, {name: run}, tmp_path / "alone")
        for mine, theirs in zip(weights(together, name), weights(one, name), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-4)


def test_adapters_are_served_as_they_are_saved(llama: Any, tmp_path: Path, batch: dict[str, Any]) -> None:
    runtime = trained(llama, RUNS, tmp_path)
    names = list(RUNS)
    got = logits(runtime.model.eval(), batch, adapter_names=(names * 3)[: len(batch["input_ids"])])
    for row in range(len(batch["input_ids"])):
        alone = peft_alone(llama, tmp_path / names[row % 3])
        one = {key: value[row : row + 1] for key, value in batch.items()}
        torch.testing.assert_close(got[row : row + 1], logits(alone, one), rtol=1e-4, atol=1e-4)
    assert not any(one.requires_grad for _, one in runtime.named_parameters("a"))  # so that it can be merged


def test_a_run_that_diverges_leaves_the_others_every_bit(llama: Any, tmp_path: Path) -> None:
    runs = {"a": RUNS["a"], "b": RUNS["b"]}
    wild = Run(OTHERS, lora(), learning_rate=1e-3, batch_size=2, max_steps=12)
    calm = trained(llama, {**runs, "wild": wild}, tmp_path / "calm")
    runtime = runtime_of(llama)
    broken = Run(OTHERS, lora(), learning_rate=1e38, optimizer="sgd", batch_size=2, max_steps=12, max_grad_norm=0)
    found = Trainer(runtime, letters(), {**runs, "wild": broken}, tmp_path / "wild", progress=False).train()
    assert found["wild"].ended == "diverged"
    assert all(bool(one.isfinite().all()) for one in weights(runtime, "wild"))
    for name in runs:
        assert found[name].ended == "finished"
        assert curve(tmp_path / "calm" / name) == curve(tmp_path / "wild" / name)
        assert all(torch.equal(x, y) for x, y in zip(weights(calm, name), weights(runtime, name), strict=True))


def test_what_diverged_keeps_its_last_finite_weights(llama: Any, tmp_path: Path, monkeypatch: Any) -> None:
    from mlora.trainer.active import Active

    seen: dict[int, list[torch.Tensor]] = {}
    step = Active.step

    def poisoned(run: Active, loss: torch.Tensor) -> dict[str, float]:
        seen[run.state.step] = [one.detach().clone() for one in run.parameters]
        if run.state.step == 3:
            run.parameters[0].grad[0, 0] = math.nan
        return step(run, loss)

    monkeypatch.setattr(Active, "step", poisoned)
    runtime = runtime_of(llama)
    (found,) = Trainer(runtime, letters(), {"a": RUNS["a"]}, tmp_path, progress=False).train().values()
    assert (found.ended, found.steps) == ("diverged", 3)
    assert all(torch.equal(x, y) for x, y in zip(weights(runtime, "a"), seen[3], strict=True))
    saved = mlora.Adapter.from_pretrained(tmp_path / "a")
    assert all(tensor.isfinite().all() for tensor in saved.tensors.values())


# Going on


@pytest.mark.parametrize("stop", [4, 7])
def test_a_run_goes_on_to_the_bit(llama: Any, tmp_path: Path, monkeypatch: Any, stop: int) -> None:
    """With the masks of its dropout, where it has some."""
    from mlora.trainer.active import Active

    runs = {name: Run(**{**vars(run), "save_steps": 3}) for name, run in RUNS.items()}
    runs["b"] = Run(**{**vars(runs["b"]), "config": lora(2, lora_dropout=0.2)})
    whole = trained(llama, runs, tmp_path / "whole")
    step = Active.step

    def interrupted(run: Active, loss: torch.Tensor) -> dict[str, float]:
        if run.state.step == stop:
            raise KeyboardInterrupt
        return step(run, loss)

    with monkeypatch.context() as context:
        context.setattr(Active, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trained(llama, runs, tmp_path / "parts")
    again = trained(llama, runs, tmp_path / "parts")
    for name in runs:
        assert curve(tmp_path / "parts" / name) == curve(tmp_path / "whole" / name)
        assert all(torch.equal(x, y) for x, y in zip(weights(whole, name), weights(again, name), strict=True))


KILLED = """
import sys
sys.path[:0] = sys.argv[2:]
from conftest import build
from test_trainer import RUNS, Run, letters, runtime_of, Trainer
runs = {"a": Run(**{**vars(RUNS["a"]), "save_steps": 1, "num_train_epochs": 500})}
Trainer(runtime_of(build("llama")), letters(), runs, sys.argv[1], progress=False).train()
"""


def test_a_killed_process_leaves_whole_checkpoints(llama: Any, tmp_path: Path) -> None:
    here = Path(__file__).resolve()
    paths = [str(here.parent), str(here.parents[1]), str(here.parents[1] / "serve")]
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path), *paths], cwd=here.parents[2])
    try:
        for _ in range(2400):
            if (there := checkpoint.checkpoints(tmp_path / "a")) and there[-1].name != "checkpoint-1":
                break
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    state, where = checkpoint.newest(tmp_path / "a")
    assert state.step >= 2 and checkpoint.read_optimizer(where)["optimizer"]["state"]
    run = Run(**{**vars(RUNS["a"]), "save_steps": 1, "num_train_epochs": 500})
    Trainer(runtime_of(llama), letters(), {"a": run}, tmp_path, progress=False)._active("a", run, True)


def test_half_a_checkpoint_is_none(llama: Any, tmp_path: Path) -> None:
    run = Run(**{**vars(RUNS["a"]), "save_steps": 2, "save_total_limit": 9})
    trained(llama, {"a": run}, tmp_path)
    kept = curve(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").unlink()  # as if it had not come to its end
    newest = checkpoint.checkpoints(tmp_path / "a")[-1]
    newest.rename(newest.with_name(f"{newest.name}.part"))
    trained(llama, {"a": run}, tmp_path)
    assert curve(tmp_path / "a") == kept
    damaged = checkpoint.checkpoints(tmp_path / "a")[-1] / "optimizer.pt"
    damaged.write_bytes(damaged.read_bytes()[:100])
    (tmp_path / "a" / "adapter_config.json").unlink()
    with pytest.raises(errors.TrainError, match=r"checkpoint-12 cannot be read"):
        trained(llama, {"a": run}, tmp_path)


def test_other_settings_do_not_go_on(llama: Any, tmp_path: Path) -> None:
    trained(llama, {"a": RUNS["a"]}, tmp_path)
    other = Run(**{**vars(RUNS["a"]), "learning_rate": 2e-2})
    with pytest.raises(errors.TrainError, match=r"learning_rate was 0.01 in .*, and is 0.02; resume=False"):
        trained(llama, {"a": other}, tmp_path)
    for change, words in (
        ({"data": ROWS[:4]}, "rows was 8"),
        ({"data": [*ROWS[:-1], {"prompt": "say it, ", "completion": "it"}]}, "'a': data has other examples than in"),
        ({"config": lora(3)}, r"config\.r was 4 in .*, and is 3"),
        ({"config": lora(use_dora=True)}, r"config\.use_dora was None in .*, and is True"),
        ({"form": Form(completion_only=False)}, r"form was 'Form\("),
    ):
        with pytest.raises(errors.TrainError, match=words):
            trained(llama, {"a": Run(**{**vars(RUNS["a"]), **change})}, tmp_path)
    from peft import LoraConfig

    same = LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS)
    trained(llama, {"a": Run(**{**vars(RUNS["a"]), "config": same})}, tmp_path / "of an object")
    trained(llama, {"a": Run(**{**vars(RUNS["a"]), "config": same})}, tmp_path / "of an object")
    Trainer(runtime_of(llama), letters(), {"a": other}, tmp_path, progress=False).train(resume=False)
    assert curve(tmp_path / "a")[1] != curve(tmp_path / "a")[0]


# Evaluation


def test_the_best_is_kept_and_patience_ends_a_run(llama: Any, tmp_path: Path) -> None:
    """Answers that are judged are others than those it learns: they get worse after a while."""
    judged = [{"prompt": row["prompt"], "completion": "zzzz"} for row in ROWS[:3]]
    run = Run(
        ROWS, lora(), judged, learning_rate=2e-2, batch_size=4, num_train_epochs=40, eval_steps=2, save_steps=50,
        early_stopping_patience=2, load_best_model_at_end=True,
    )  # fmt: skip
    runtime = runtime_of(llama)
    (found,) = Trainer(runtime, letters(), {"a": run}, tmp_path, progress=False).train().values()
    losses = curve(tmp_path / "a", "eval_loss")
    assert found.ended == "early" and found.steps < 80
    assert found.eval_loss == min(losses) and losses.index(min(losses)) == len(losses) - 3
    assert found.best_step == 2 * (len(losses) - 2)
    examples = encode(check_rows(judged), letters()).examples
    batch = batch_of(examples, 0)
    with torch.no_grad():
        out = peft_alone(llama, tmp_path / "a")(**batch.inputs, labels=batch.labels)
    assert float(out.loss) == pytest.approx(min(losses), abs=1e-4)


def test_models_with_something_around_their_head(tmp_path: Path) -> None:
    """A cap on logits: the head alone would not give them."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": 67, "num_key_value_heads": 1, "head_dim": 8}
    config = Gemma2Config(final_logit_softcapping=0.5, attn_implementation="eager", **sizes)
    base = Gemma2ForCausalLM(config).eval()
    trained(base, {"a": RUNS["a"]}, tmp_path)
    torch.testing.assert_close(
        torch.tensor(curve(tmp_path / "a")), torch.tensor(alone_with_peft(base, RUNS["a"])), rtol=0, atol=1e-4
    )


# What is left, and what is refused


def test_the_model_is_as_it_was(llama: Any, tmp_path: Path) -> None:
    base = copy.deepcopy(llama)
    before, modules, training = state_hash(base), identity(base), base.training
    runtime = mlora.patch(base, memory=ROOM)
    Trainer(runtime, letters(), {"a": RUNS["a"]}, tmp_path / "kept", progress=False).train()
    assert base.training is training and state_hash(base) == before
    mlora.unpatch(base)
    assert identity(base) == modules and state_hash(base) == before
    trained(llama, {"a": RUNS["a"]}, tmp_path / "made again", gradient_checkpointing=True)
    assert curve(tmp_path / "kept" / "a") == curve(tmp_path / "made again" / "a")


def test_an_adapter_that_is_there_is_trained_further(llama: Any, tmp_path: Path) -> None:
    trained(llama, {"a": RUNS["a"]}, tmp_path / "first")
    runtime = runtime_of(llama)
    runtime.load_adapter(tmp_path / "first" / "a", "a", is_trainable=True)
    run = Run(ROWS, batch_size=2, max_steps=3, learning_rate=1e-3)
    Trainer(runtime, letters(), {"a": run}, tmp_path / "second", progress=False).train()
    assert curve(tmp_path / "second" / "a")[0] < curve(tmp_path / "first" / "a")[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learning_rate": "fast"}, "learning_rate is 'fast'; it must be a finite number above 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"batch_size": 0}, "batch_size is 0; it must be a positive integer"),
        ({"optimizer": "lion"}, "optimizer is 'lion'; it must be one of adamw, adam, sgd"),
        ({"lr_scheduler_type": "steep"}, "lr_scheduler_type is 'steep'"),
        ({"early_stopping_patience": 2}, "early_stopping_patience needs eval_data"),
        ({"betas": (0.9, 1.0)}, "betas is"),
        ({"max_length": 1}, "max_length is 1"),
    ],
)
def test_values_are_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(errors.TrainError, match=words.replace("(", r"\(")):
        Run(ROWS, lora(), **change)


def test_runs_are_refused_by_name_and_change_nothing(llama: Any, tmp_path: Path) -> None:
    runtime = runtime_of(llama)
    cases = [
        ({}, errors.TrainError, "no runs"),
        ({"a": Run(ROWS)}, errors.TrainError, "run 'a' has no config, and no adapter of that name"),
        ({"../a": RUNS["a"]}, errors.TrainError, "the name of a run is '../a'"),
        ({"a": Run([{"prompt": "x"}], lora())}, errors.DataError, "data of 'a' row 1"),
        ({"a": Run(ROWS, lora(), max_length=3)}, errors.DataError, "no row of it has a target within 3 tokens"),
        ({"a": Run(ROWS, lora(), form=Form(completion="answer"))}, errors.DataError, "no column 'answer'"),
    ]
    for runs, error, words in cases:
        with pytest.raises(error, match=words):
            Trainer(runtime, letters(), runs, tmp_path / "out")
    assert not runtime.adapters and not (tmp_path / "out").exists()


def test_the_log_is_json(llama: Any, tmp_path: Path) -> None:
    trained(llama, {"a": Run(ROWS, lora(), learning_rate=1e38, optimizer="sgd", max_grad_norm=0)}, tmp_path)
    for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(word))
    assert (tmp_path / "losses.png").stat().st_size > 1000
