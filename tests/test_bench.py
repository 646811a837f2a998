"""The benchmarks' own parts that a wrong figure could come from; what they time is no test's business."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))
import kernels  # noqa: E402


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said():
    run = [sys.executable, str(BENCH / "kernels.py"), "--device", "cuda"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 2 and "torch sees no GPU" in done.stderr


@pytest.mark.parametrize("load", list(kernels.gpu_workloads(True)), ids=lambda load: load.label)
def test_gpu_workloads_are_checked_against_fp64(load, monkeypatch):
    buffers = kernels.Buffers(load, 1)
    buffers.check()
    monkeypatch.setattr(buffers, "call", lambda i: buffers.ys[i])  # does nothing
    with pytest.raises(SystemExit, match="refused to report"):
        buffers.check()
