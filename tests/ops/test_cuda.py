"""The CUDA sources on the CPU, and bugs planted in kernels, each of which the emulation has to catch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import emulation
import pytest

HERE = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(emulation.missing() is not None, reason=str(emulation.missing()))


def test_operators_under_emulation():
    """emulated_ops.py, and what the other files ask of every backend."""
    select = (
        "emulated_ops or siblings or scale_input or any_strides or opcheck or one_graph or wrong_tensors or subnormals"
    )
    select += " or fp64 and (20x855 or 2049x20) and (empty or all-base or decode)"
    run = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", "--durations=5", "-k", select]
    env = {**os.environ, "MLORA_BACKEND": "emulation", "MLORA_EMULATION_LIBRARY": str(emulation.library())}
    files = [str(HERE / name) for name in ("emulated_ops.py", "layers/test_siblings.py", "ops/test_ops.py")]
    done = subprocess.run([*run, *files], env=env, capture_output=True, text=True)
    print(done.stdout[-2000:])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def planted() -> dict[str, Path]:
    source = [HERE / "planted.cu"]
    return {
        "checked": emulation.build(source, emulation.CHECKED, [], []),
        "sanitized": emulation.build(source, emulation.SANITIZED, [], []),
    }


@pytest.mark.parametrize(
    "bug, build, message",
    [
        ("no barrier", "checked", "no barrier since the write|uninitialised shared read"),
        ("no barrier after read", "checked", "a write with no barrier since a read"),
        ("no cluster barrier", "checked", "no barrier since the write|block that has not started"),
        ("warp only", "checked", "no barrier since the write"),
        ("uninitialised", "checked", "uninitialised shared read"),
        ("divergent shuffle", "checked", "divergent shuffle"),
        ("other shuffle", "checked", "divergent shuffle"),
        ("divergent barrier", "checked", "not every thread reaches a barrier"),
        ("beyond shared", "checked", "an access beyond the end"),
        ("unaligned", "checked", "not aligned"),
        ("beyond shared", "sanitized", "out of bounds|heap-buffer-overflow"),
        ("beyond global", "sanitized", "heap-buffer-overflow"),
    ],
)
def test_a_planted_bug_is_caught(planted, bug, build, message):
    done = subprocess.run([planted[build], bug], capture_output=True, text=True)
    assert done.returncode not in (0, 2)
    assert re.search(message, done.stderr), done.stderr


@pytest.mark.parametrize("build", ["checked", "sanitized"])
def test_the_kernel_without_a_bug_passes(planted, build):
    done = subprocess.run([planted[build], "none"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
