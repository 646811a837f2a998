"""Installing and running without a compiler: one warning, and the reference serves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
