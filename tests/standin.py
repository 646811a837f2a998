"""Two devices without any: "privateuseone:0" and ":1", see standin.cpp. They are there in a process that called `load`.

Of what torch offers, this catches code that mixes devices. "cpu:1" is one more name of the CPU, and tensors do not
keep the index. "meta" and fake tensors have no numbers. torch's own `torch_openreg` is not in its wheels. The backend
written in Python (`_setup_privateuseone_for_python_backend`) makes subclasses of tensors, which are no plain weights.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import types
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "tests" / "standin.cpp"
COMPILER = os.environ.get("CXX", "g++")
DEVICES = tuple(torch.device("privateuseone", index) for index in range(2))


def missing() -> str | None:
    """Why they cannot be had here, or None."""
    return None if shutil.which(COMPILER) else f"no {COMPILER}"


@functools.cache
def load(accelerator: bool = False) -> None:
    """Build it, once for each torch, in build/standin; and register it.

    Args:
        accelerator: make it torch's accelerator for the rest of the process, under the name "standin": autograd runs
            its backward passes on no other.
    """
    from torch.utils.cpp_extension import include_paths, library_paths

    flags = ["-std=c++20", "-O0", "-fPIC", "-shared", *(f"-I{path}" for path in include_paths())]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    link = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    link += ["-ltorch", "-ltorch_cpu", "-lc10"]
    digest = hashlib.sha256(repr((torch.__version__, flags, link)).encode() + SOURCE.read_bytes()).hexdigest()[:16]
    library = ROOT / "build" / "standin" / digest / "library.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        partial = library.with_name(f"partial.{os.getpid()}")
        subprocess.run([COMPILER, *flags, str(SOURCE), "-o", str(partial), *link], check=True)
        partial.rename(library)
    torch.ops.load_library(str(library))
    name = "standin" if accelerator else "privateuseone"
    if accelerator:
        torch._C._rename_privateuse1_backend(name)
        ctypes.CDLL(str(library)).standin_accelerate()
    module = types.ModuleType(f"torch.{name}")
    module._lazy_init = lambda: None  # type: ignore[attr-defined]
    torch._register_device_module(name, module)
