"""The benchmarks' own parts that a wrong figure could come from; what they time is no test's business."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))
import workloads  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from mlora.cli import app  # noqa: E402


def test_all_figures_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(subprocess, "call", lambda command: ran.append(Path(command[1]).name) or 0)
    result = CliRunner().invoke(app, ["bench", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    figures = (BENCH.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`bench/(\w+\.py)`", figures))
    assert len(named) > 3 and named < set(ran) and ran[-1] == "plot.py"
    for number, script in enumerate(ran, start=1):
        assert f"[{number}/{len(ran)}] bench/{script}" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["operators.py --device cuda", "gpu.py", "gpu_layer.py", "gpu_peers.py"])
def test_a_missing_gpu_is_said(command: str) -> None:
    script, *options = command.split()
    done = subprocess.run([sys.executable, str(BENCH / script), *options], capture_output=True, text=True)
    assert done.returncode == 2 and "torch sees no GPU" in done.stderr


@pytest.mark.parametrize("load", list(workloads.gpu_workloads(True)), ids=lambda load: load.label)
def test_gpu_workloads_are_checked_against_fp64(load, monkeypatch):
    buffers = workloads.Buffers(load, 1)
    buffers.check()
    monkeypatch.setattr(buffers, "call", lambda i: buffers.y)  # does nothing
    with pytest.raises(SystemExit, match="refused to report"):
        buffers.check()
