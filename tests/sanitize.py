"""Run the tests of the operators with the C++ library built under AddressSanitizer and UndefinedBehaviorSanitizer,
then those of the CUDA sources with their emulation built in the same way.

    python tests/sanitize.py [pytest arguments]

Works on a copy: the library in use is left alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import emulation

ROOT = Path(__file__).resolve().parent.parent
OPERATORS = ("ops", "direct", "along", "attend", "attend_step", "dots", "gradients", "phases", "row_norms", "wide")
TESTS = (*(f"tests/ops/test_{name}.py" for name in OPERATORS), "tests/layers/test_pointwise.py")
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
# Strided views with sentinels, every shape of tile, wrong plans; once more with the lowest instruction set. Left out:
# what starts processes or traces, which tells nothing about memory.
SELECT = (
    "fp64 and not 855x2049 and not softcap or see_its_batch and 576 or delta_of_apply or scale_input or merge"
    " or refused or strides or subnormals or test_direct and not traces or ring or no_number or nothing_to_do"
    " or gradient or phases or torchs_bits and not 2048 and not 11008 and not 20000 or left_alone"
)


def library(name: str) -> str:
    compiler = os.environ.get("CXX", "g++")
    return subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("csrc", "mlora", "tests"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        for part in ("setup.py", "pyproject.toml", "README.md"):
            if (ROOT / part).exists():
                shutil.copy(ROOT / part, copy / part)
        env = {
            **os.environ,
            "MLORA_WERROR": "1",
            # Unoptimized: optimizing the sanitizers' code takes minutes and trips warnings.
            "MLORA_CXXFLAGS": f"{SANITIZE} -O0 -Wno-error",
            "MLORA_LDFLAGS": SANITIZE,
            "MLORA_NO_CUDA": "1",
        }
        subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=copy,
            env=env,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        env = {
            **os.environ,
            "PYTHONPATH": str(copy),
            "LD_PRELOAD": f"{library('libasan.so')} {library('libubsan.so')}",
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        arguments = sys.argv[1:] or ["-k", SELECT]
        for isa in ("", "avx2", "scalar"):
            run = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", *TESTS, *arguments]
            done = subprocess.run(run, cwd=copy, env={**env, "MLORA_CPU_ISA": isa})
            if done.returncode:
                return done.returncode
    return emulated()


def emulated() -> int:
    """The CUDA sources under emulation; the model is left out, since it tells nothing new about memory."""
    if emulation.missing():
        print(f"The CUDA sources are left out: {emulation.missing()}")
        return 0
    env = {
        **os.environ,
        "MLORA_BACKEND": "emulation",
        "MLORA_EMULATION_LIBRARY": str(emulation.library(emulation.SANITIZED)),
        "LD_PRELOAD": f"{library('libasan.so')} {library('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    run = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", "tests/emulated_ops.py"]
    run += sys.argv[1:] or ["-k", "not tiny_model and not float16 and not (float32 and 576)"]
    return subprocess.run(run, cwd=ROOT, env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
