"""The run that a machine with a GPU is given: what ends a step, what it leaves, and what must not be timed."""

from __future__ import annotations

import copy
import json
import sys
import time
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))
import gpu  # noqa: E402
import gpu_layer  # noqa: E402


def test_a_step_that_hangs_is_cut_off_with_what_it_started(tmp_path: Path) -> None:
    code = "import os, time; child = os.fork(); print(f'found {child}' if child else '', flush=True); time.sleep(60)"
    record = gpu.run(gpu.Step("hangs", 9, ("-I", "-S", "-c", code)), 5, tmp_path / "log", smoke=False)
    assert record["result"] == "cut off" and record["seconds"] < 30
    (child,) = (line.split()[1] for line in record["tail"] if line)
    for _ in range(100):
        if not alive(int(child)):
            return
        time.sleep(0.1)
    raise AssertionError("what it started runs on")


def alive(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def test_a_failure_does_not_stop_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = [
        gpu.Step("breaks", 60, ("-c", "print('why'); raise SystemExit(3)")),
        gpu.Step("works", 60, ("-c", "print('fine')")),
    ]
    monkeypatch.setattr(gpu, "steps", lambda args, temp: planned)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", "--out", str(tmp_path)])
    (tmp_path / "gpu_layer.jsonl").write_text("of an earlier run\n")
    assert gpu.main() == 1
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [(r["step"], r["result"], r["tail"]) for r in lines] == [
        ("breaks", "failed (3)", ["why"]),
        ("works", "passed", ["fine"]),
    ]
    printed = capsys.readouterr().out
    assert "nothing was timed on a GPU" in printed and "Failed or cut off: breaks" in printed
    assert not (tmp_path / "gpu_layer.jsonl").exists()


def test_steps_that_find_no_time_are_said(tmp_path: Path) -> None:
    record = gpu.run(gpu.Step("late", 60, ("-c", "")), 1.0, tmp_path / "log", smoke=False)
    assert record["result"] == "no time left" and not (tmp_path / "log").exists()


def test_a_layer_that_is_wrong_is_not_timed(tmp_path: Path) -> None:
    models = gpu_layer.load(tmp_path, "cpu", 2, (4,))
    ids = torch.arange(3, 11).view(4, 2)
    batch = gpu_layer.Batch(4, ["r4a0", "r4a0", "r4a1", "r4a1"])
    with torch.no_grad():
        assert gpu_layer.judged(models, ids, batch)[2] == ""
        runtime = models.served.mlora
        other = gpu_layer.Batch(4, ["r4a0", "r4a0", "r4a0", "r4a1"])
        wrong = copy.copy(models)
        wrong.served = lambda **call: models.served(
            **{**call, **({"adapter_names": other.names} if "adapter_names" in call else {})}
        )
        assert "against PEFT in fp32" in gpu_layer.judged(wrong, ids, batch)[2]
        with runtime.use_adapters("r4a0"):
            assert "without adapters" in gpu_layer.judged(models, ids, batch)[2]


def test_the_table_tells_what_was_refused() -> None:
    what = {"phase": "decode", "tokens": 64, "rank": 16}
    text = gpu_layer.table(
        [
            {**what, "adapters": 1, "case": "mlora", "way": "graph", "ratio": 1.234},
            {**what, "adapters": 1, "case": "PEFT", "way": "eager", "skipped": "why"},
            {**what, "adapters": 8, "refused": "why"},
        ]
    )
    one, eight = text.splitlines()[2:]
    assert one == "| decode, 64 tokens, 1 of rank 16 |  | 1.23 |  |  | not run |"
    assert eight.count("refused") == 5
