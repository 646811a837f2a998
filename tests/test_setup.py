"""Installing: without a compiler there is one warning, and the reference serves; what is too old is named."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What pip has setup.py do, where there is no compiler."""
    gone = {"CC": "/no/such/cc", "CXX": "/no/such/c++", "CUDA_HOME": "", "PATH": str(folder), "MLORA_WERROR": ""}
    places = ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", *places],
        cwd=ROOT,
        env={**os.environ, **gone, **environment},
        capture_output=True,
        text=True,
    )


def test_a_build_without_a_compiler_warns_once(tmp_path: Path) -> None:
    done = build(tmp_path)
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: mlora")]
    assert len(warnings) == 1 and "without its C++ operators and will be slow" in warnings[0], done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_a_build_that_has_to_succeed_fails(tmp_path: Path) -> None:
    assert build(tmp_path, MLORA_WERROR="1").returncode != 0


def test_a_build_that_fails_where_there_is_a_compiler_fails(tmp_path: Path) -> None:
    """Or a package would be installed that is many times as slow as it should be."""
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    done = build(tmp_path, CXX=str(compiler))
    assert done.returncode != 0 and "set MLORA_NO_EXT=1" in done.stderr, done.stderr
    assert build(tmp_path, CXX=str(compiler), MLORA_NO_EXT="1").returncode == 0


@pytest.mark.parametrize(
    "old, wanted",
    [
        ("import torch; torch.__version__ = '2.9.1+cpu'", "torch 2.10 or later, this is 2.9.1+cpu"),
        ("import setuptools; setuptools.__version__ = '76.1'", "setuptools 77 or later, this is 76.1: pip install"),
        ("import sys; sys.modules['torch'] = None", "torch, which is not there"),
    ],
)
def test_what_is_too_old_or_missing_is_named(old: str, wanted: str) -> None:
    code = f"{old}; import sys; sys.argv = ['setup.py', '--version']; import runpy; runpy.run_path('setup.py')"
    environment = {**os.environ, "MLORA_NO_CUDA": "1", "MLORA_NO_EXT": "", "MLORA_WERROR": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and wanted in done.stderr, done.stderr


def test_the_floors_are_those_of_the_project() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    torch, setuptools = re.findall(r'"torch>=([\d.]+)"', project), re.findall(r'"setuptools>=(\d+)"', project)
    assert len(torch) == 2 and f"= ({torch[0].replace('.', ', ')}), {setuptools[0]}" in setup and torch[0] == torch[1]


def test_a_package_without_its_library_says_so_once_and_serves() -> None:
    code = """
import sys, warnings
sys.modules["mlora._C"] = None
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import torch, mlora
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    runtime = mlora.patch(model)
    tensors = {"0.lora_A.weight": torch.ones(1, 4), "0.lora_B.weight": torch.ones(4, 1)}
    runtime.add_adapter("a", mlora.Adapter({"peft_type": "LORA", "r": 1, "lora_alpha": 1}, tensors))
    with torch.no_grad():
        changed = model(torch.ones(2, 4), adapter_names=["a", None]) - model(torch.ones(2, 4))
    assert torch.allclose(changed, torch.tensor([[4.0], [0.0]]).expand(2, 4))
print([(str(w.message), w.filename, w.lineno) for w in seen if "mlora" in str(w.message)])
"""
    environment = {name: value for name, value in os.environ.items() if name != "MLORA_BACKEND"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    message = "mlora uses its reference backend; build with a C++ compiler for speed"
    assert done.stdout.strip() == str([(message, "<string>", 8)])  # the line that first uses it


@pytest.mark.parametrize(
    ("library", "why"), [(b"no library", "file too short"), (b"..libcudart.so.7.", "they are built with CUDA 7, torch")]
)
def test_cuda_operators_that_do_not_load_are_told_of_once_and_missed(tmp_path: Path, library: bytes, why: str) -> None:
    """As beside a torch of another CUDA, whether or not the libraries of theirs are there."""
    (tmp_path / "_C_cuda.abi3.so").write_bytes(library)
    code = f"""
import importlib.util, warnings
import torch
torch.backends.cuda.is_built = lambda: True
find = importlib.util.find_spec
broken = importlib.util.spec_from_file_location("mlora._C_cuda", {str(tmp_path / "_C_cuda.abi3.so")!r})
importlib.util.find_spec = lambda name, *rest: broken if name == "mlora._C_cuda" else find(name, *rest)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import mlora
    from mlora.ops import dispatch, library
print([str(w.message) for w in seen if "mlora" in str(w.message)])
assert not library.HAS_CUDA and dispatch.backend("cuda", torch.float32) != "cuda"
"""
    environment = {name: value for name, value in os.environ.items() if name != "MLORA_BACKEND"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("CUDA operators do not load beside torch") == 1 and why in done.stdout, done.stdout
    forced = {**environment, "MLORA_BACKEND": "cuda"}
    done = subprocess.run([sys.executable, "-c", code], env=forced, capture_output=True, text=True)
    assert done.returncode != 0 and "CUDA operators do not load: " in done.stderr, done.stderr
