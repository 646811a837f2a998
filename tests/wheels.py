"""Whether wheels hold what they must, and run: each is looked into, and installed beside the oldest torch that
pyproject.toml allows and beside the newest, in environments of their own that are thrown away.

    python tests/wheels.py dist/*.whl --oldest python3.10 --newest python3.13

An environment takes some 6 GB, one at a time, and minutes. --contents leaves them out. A Python that is not there is
told of, the other one is tried all the same, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
VERSION = re.findall(r'^version = "(.+)"$', PROJECT, re.M)[0]
OLDEST = re.findall(r'"torch>=([\d.]+)"', PROJECT)[0]
NAME = (
    rf"mlora_runtime-{re.escape(VERSION)}(\+cu\d+)?-cp310-abi3-(?:(?:many)?linux[\d_]*_{platform.machine()}\.?)+\.whl"
)
# The operators against fp64 loops and against Python's way past torch's dispatcher, and mixed batches against PEFT.
TESTS = ["tests/ops", "tests/layers/test_models.py"]
SELECT = "matches_fp64 or gives_the_operators_bits or test_every_row_its_own_adapter"
REPORT = """
import sys, warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import mlora
    from mlora.ops import dispatch, library
import torch
said = [str(one.message) for one in seen if "mlora" in str(one.message)]
own, release = sys.argv[1][3:5], torch.version.cuda or ""
print(f"python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {release}, operators: CPU {library.HAS_CPU},"
      f" CUDA {library.HAS_CUDA}", *said, sep=chr(10))
assert mlora.__file__.startswith(sys.prefix), mlora.__file__
assert library.HAS_CPU and dispatch.backend("cpu", torch.float32) == "cpu"
alike = bool(own) and own == release.split(".")[0]
assert library.HAS_CUDA or not alike, (own, release)
assert len(said) == (bool(own) and bool(release) and not library.HAS_CUDA), said  # what does not load is told of, once
"""


def look(wheel: Path) -> str:
    """Raises where the wheel is not as it must be; the CUDA that it is for, such as "+cu130", or ""."""
    name = re.fullmatch(NAME, wheel.name)
    assert name, f"{wheel.name} is not {NAME}"
    cuda = name[1] or ""
    with zipfile.ZipFile(wheel) as archive:
        files = {file for file in archive.namelist() if not file.endswith("/")}
        info = f"mlora_runtime-{VERSION}{cuda}.dist-info/"
        inside = {file for file in files if not file.startswith(info)}
        text = archive.read(info + "WHEEL").decode()
        libraries = {"mlora/_C.abi3.so"} | ({"mlora/_C_cuda.abi3.so"} if cuda else set())
        debugged = [file for file in libraries & inside if b".debug_info" in archive.read(file)]
    tracked = subprocess.check_output(["git", "ls-files", "mlora"], cwd=ROOT, text=True).split()
    wanted = libraries | set(tracked)
    assert inside == wanted, f"{wheel.name} lacks {sorted(wanted - inside)} and has {sorted(inside - wanted)}"
    assert info + "licenses/LICENSE" in files and info + "entry_points.txt" in files, files - inside
    assert "Root-Is-Purelib: false" in text and "Tag: cp310-abi3-" in text, text
    assert not debugged, f"{wheel.name}: {debugged} hold what debuggers read"
    print(f"{wheel.name}: {len(inside)} files, {wheel.stat().st_size / 2**20:.1f} MiB")
    return cuda


def runs(interpreter: str) -> bool:
    """Whether it is there and can make environments; pyenv has names of Pythons that are not."""
    try:
        return subprocess.run([interpreter, "-c", "import ensurepip, venv"], capture_output=True).returncode == 0
    except OSError:
        return False


def install(wheels: dict[Path, str], interpreter: str, torch: str, folder: Path) -> None:
    """Makes an environment with this torch, and runs every wheel in it."""
    environment, python = folder / "environment", str(folder / "environment" / "bin" / "python")
    subprocess.run([interpreter, "-m", "venv", str(environment)], check=True)
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--progress-bar", "off"]
    subprocess.run([*pip, torch, *map(str, list(wheels)[:1]), "pytest", "hypothesis", "peft", "accelerate"], check=True)
    for wheel, cuda in wheels.items():
        print(f"== {wheel.name} beside {torch}", flush=True)
        subprocess.run([*pip, "--force-reinstall", "--no-deps", str(wheel)], check=True)
        subprocess.run([python, "-c", REPORT, cuda], cwd=folder, check=True)
        subprocess.run([str(environment / "bin" / "mlora"), "--help"], cwd=folder, check=True, capture_output=True)
        subprocess.run([python, "-m", "pytest", "-qx", "-k", SELECT, *TESTS], cwd=folder, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("--contents", action="store_true", help="look into them only")
    parser.add_argument("--oldest", default="python3.10", help="the Python beside the oldest torch")
    parser.add_argument("--newest", default=sys.executable, help="the Python beside the newest one")
    arguments = parser.parse_args()
    wheels = {wheel.resolve(): look(wheel) for wheel in arguments.wheels}
    if arguments.contents:
        return
    left = []
    for interpreter, torch in ((arguments.oldest, f"torch=={OLDEST}.*"), (arguments.newest, "torch")):
        if not runs(interpreter):
            left.append(f"{interpreter} with {torch}")
            print(f"== not tried: {left[-1]}, since there is no such Python here", flush=True)
            continue
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copy(ROOT / "pyproject.toml", folder)  # and no mlora beside them
            install(wheels, interpreter, torch, folder)
    if left:
        raise SystemExit(f"not tried: {', '.join(left)}")


if __name__ == "__main__":
    main()
