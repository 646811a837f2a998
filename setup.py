"""Builds mlora._C, the CPU operators. Without a working C++ compiler the package installs without it."""

import os
import sys
from pathlib import Path

from setuptools import setup


def extension():
    """(ext_modules, cmdclass) for the CPU operators; raises ImportError without torch."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    flags = ["-O3", "-fvisibility=hidden", "-ffp-contract=off", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
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
                if os.environ.get("MLORA_WERROR") == "1":
                    raise
                without(error)

    return [library], {"build_ext": Build}


def without(reason):
    print(f"warning: mlora installs without its C++ operators and will be slow: {reason}", file=sys.stderr)
    return [], {}


def configure():
    if os.environ.get("MLORA_NO_EXT") == "1":
        return without("MLORA_NO_EXT=1")
    try:
        return extension()
    except ImportError as error:
        return without(error)


ext_modules, cmdclass = configure()
setup(
    ext_modules=ext_modules,
    cmdclass=cmdclass,
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ext_modules else {},
)
