"""Builds csrc/cuda for the CPU, out of csrc/emulation; see the headers there for what that checks.

python tests/emulation.py    build, and print the library's path
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
COMPILER = os.environ.get("CXX", "g++")

# The hooks of -fsanitize=thread are csrc/emulation/hooks.cpp, not that sanitizer's library.
CHECKED = ("-O1", "-fsanitize=thread")
SANITIZED = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")


def missing() -> str | None:
    """Why nothing can be built here, or None."""
    if platform.machine() != "x86_64":
        return "the emulation switches stacks in x86-64 assembly"
    if shutil.which(COMPILER) is None:
        return f"no {COMPILER}"
    return None


def build(sources: list[Path], flags: tuple[str, ...], link: list[str], include: list[str]) -> Path:
    """Compile and link, once for the same contents; the result lies in build/emulation."""
    common = ["-std=c++20", "-fPIC", "-g1", "-Wall", "-Wno-unknown-pragmas", "-DMLORA_EMULATION"]
    common += [f"-I{path}" for path in (CSRC / "emulation", CSRC / "cuda", *include)]
    emulation = sorted((CSRC / "emulation").glob("*.cpp"))
    digest = hashlib.sha256(repr((flags, link, common)).encode())
    for path in sorted({*CSRC.glob("*.h"), *CSRC.glob("cuda/*"), *CSRC.glob("emulation/*"), Path(__file__), *sources}):
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "emulation" / digest.hexdigest()[:16]
    result = folder / "library.so"
    if result.exists():
        return result
    folder.mkdir(parents=True, exist_ok=True)
    objects = []
    plain = [flag for flag in flags if flag != "-fsanitize=thread"]
    for source in [*sources, *emulation]:
        # Kernels alone: the scheduler looks into their memory, and is no part of what is checked for races.
        own = flags if source.suffix == ".cu" else plain
        output = folder / f"{source.name}.o"
        language = ["-x", "c++"] if source.suffix == ".cu" else []
        subprocess.run([COMPILER, *language, *common, *own, "-c", str(source), "-o", str(output)], check=True)
        objects.append(str(output))
    partial = folder / f"partial.{os.getpid()}"
    subprocess.run([COMPILER, *plain, *objects, "-o", str(partial), *link], check=True)
    partial.rename(result)
    return result


def library(flags: tuple[str, ...] = CHECKED) -> Path:
    """The operators, to be named by MLORA_EMULATION_LIBRARY."""
    from torch.utils.cpp_extension import include_paths, library_paths

    link = ["-shared", "-ltorch", "-ltorch_cpu", "-lc10"]
    link += [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    sources = sorted([*(CSRC / "cuda").glob("*.cu"), *(CSRC / "cuda").glob("*.cpp")])
    return build(sources, (*flags, "-DTORCH_TARGET_VERSION=0x020a000000000000"), link, include_paths())


if __name__ == "__main__":
    reason = missing()
    if reason:
        sys.exit(reason)
    print(library())
