"""Builds mlora._C, the CPU operators, and where nvcc is mlora._C_cuda. Without a C++ compiler the package installs
without them; where there is one, a failed build of the CPU operators is an error.

MLORA_NO_EXT=1, MLORA_NO_CUDA=1: leave out both, the second. MLORA_WERROR=1: warnings and any failed build are errors.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import setup

OLDEST_TORCH, OLDEST_SETUPTOOLS = (2, 10), 77  # as in pyproject.toml
ARCHITECTURES = (80, 90, 100, 120)
LOST = {
    "mlora._C": "C++ operators and will be slow on the CPU",
    "mlora._C_cuda": "CUDA operators; its Triton kernels serve GPUs",
}
NO_EXT = "or set MLORA_NO_EXT=1 for an mlora without its C++ operators, which is many times as slow on the CPU"


def must_build(name):
    """Whether the package may not install without this library."""
    if os.environ.get("MLORA_WERROR") == "1":
        return True
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return name == "mlora._C" and any(map(shutil.which, compilers))


def toolkit():
    """The CUDA toolkit's folder: CUDA_HOME where that is set, else what nvcc says, which may be a wrapper elsewhere."""
    home = os.environ.get("CUDA_HOME")
    if home is not None:
        return home if home and Path(home, "bin", "nvcc").exists() else None
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    said = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull], capture_output=True, text=True
    )
    tops = [line.split("=", 1)[1].strip() for line in said.stderr.splitlines() if line.startswith("#$ TOP=")]
    return str(Path(tops[0]).resolve()) if tops else None


def cuda_extension():
    """(the CUDA operators, in a library of their own that loads where torch has CUDA; None), or (None, why not)."""
    if os.environ.get("MLORA_NO_CUDA") == "1":
        return None, "MLORA_NO_CUDA=1"
    import torch

    if not torch.backends.cuda.is_built():
        return None, "this torch is built without CUDA"
    home = toolkit()
    if home is None:
        return None, "no nvcc"
    version = subprocess.check_output([str(Path(home, "bin", "nvcc")), "--version"], text=True)
    release = version.split("release ")[1].split(",")[0]
    if release.split(".")[0] != torch.version.cuda.split(".")[0]:
        return None, f"nvcc is of CUDA {release}, torch of CUDA {torch.version.cuda}"
    os.environ["CUDA_HOME"] = home
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = home
    werror = os.environ.get("MLORA_WERROR") == "1"
    common = ["-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    newest = ARCHITECTURES[-1]
    nvcc = [*common, *codes, f"-gencode=arch=compute_{newest},code=compute_{newest}"]
    cxx = [*common, "-g0", "-fvisibility=hidden"]
    if werror:
        cxx += ["-Wall", "-Werror"]
        nvcc += ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Werror"]
    return cpp_extension.CUDAExtension(
        "mlora._C_cuda",
        sorted(str(path) for pattern in ("*.cu", "*.cpp") for path in Path("csrc/cuda").glob(pattern)),
        depends=sorted(str(path) for pattern in ("*.h", "*.cuh") for path in Path("csrc").rglob(pattern)),
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        py_limited_api=True,
    ), None


def extension():
    """(ext_modules, cmdclass) for the operators; raises ImportError without torch."""
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        wanted = ".".join(map(str, OLDEST_TORCH))
        raise SystemExit(
            f"mlora builds with torch {wanted} or later, this is {torch.__version__}: upgrade it, {NO_EXT}"
        )
    # Without what debuggers read, which would be nine tenths of the library; Python's own flags ask for it.
    flags = ["-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    if os.environ.get("MLORA_WERROR") == "1":
        flags += ["-Wall", "-Werror"]
    flags += os.environ.get("MLORA_CXXFLAGS", "").split()
    library = CppExtension(
        "mlora._C",
        sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")),
        depends=sorted(str(path) for path in Path("csrc").glob("**/*.h")),
        extra_compile_args={"cxx": flags},
        extra_link_args=os.environ.get("MLORA_LDFLAGS", "").split(),
        py_limited_api=True,
    )

    class Build(BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:
                if must_build("mlora._C"):
                    print(f"error: mlora's C++ operators do not build: mend it, {NO_EXT}", file=sys.stderr)
                    raise
                without(error)

        def build_extensions(self):
            self.failed = []
            super().build_extensions()
            self.extensions = [one for one in self.extensions if one not in self.failed]

        def build_extension(self, ext):
            """Builds one library; where that fails, the other one is built all the same."""
            try:
                super().build_extension(ext)
            except Exception as error:
                if must_build(ext.name):
                    raise
                self.failed.append(ext)
                print(f"warning: mlora installs without its {LOST[ext.name]}: {error}", file=sys.stderr)

    libraries = [library]
    cuda, reason = cuda_extension()
    if cuda is None:
        print(f"mlora builds without its CUDA operators: {reason}", file=sys.stderr)
    else:
        libraries.append(cuda)
    return libraries, {"build_ext": Build}


def without(reason):
    print(f"warning: mlora installs without its C++ operators and will be slow: {reason}", file=sys.stderr)
    return [], {}


def configure():
    if os.environ.get("MLORA_NO_EXT") == "1":
        return without("MLORA_NO_EXT=1")
    try:
        return extension()
    except ImportError as error:
        if must_build("mlora._C"):
            raise SystemExit(
                f"mlora builds with torch, which is not there ({error}): install it first, {NO_EXT}"
            ) from None
        return without(error)


if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    raise SystemExit(
        f"mlora builds with setuptools {OLDEST_SETUPTOOLS} or later, this is {setuptools.__version__}: "
        f"pip install -U setuptools"
    )
ext_modules, cmdclass = configure()
setup(
    ext_modules=ext_modules,
    cmdclass=cmdclass,
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ext_modules else {},
)
