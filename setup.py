# SPDX-License-Identifier: Apache-2.0
"""Builds the native library (csrc, by CMake) into the package; everything else is in pyproject.toml.

No C++ compiler: the package installs without it, and says so here and in ``drseg doctor``. A compiler that fails:
the install fails with the compiler's own message. ``DRSEG_NATIVE=0`` leaves the library out by choice. The CUDA kernels
come in a second library where nvcc is found and torch has CUDA; ``DRSEG_CUDA=0`` leaves that one out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
LIBRARY, CUDA_LIBRARY = f"libdrseg_native{SUFFIX}", f"libdrseg_native_cuda{SUFFIX}"


def native_wanted() -> bool:
    if os.environ.get("DRSEG_NATIVE") == "0":
        print("drseg: DRSEG_NATIVE=0, installing without the native library")
        return False
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        print("drseg: no C++ compiler found, installing without the native library (slower on the CPU)")
        return False
    return True


class BuildNative(build_ext):
    """Runs CMake where setuptools would run the compiler."""

    def get_ext_filename(self, fullname: str) -> str:
        # loaded by torch, not imported by Python: no interpreter tag in its name
        return os.path.join(*fullname.split(".")[:-1], LIBRARY)

    def copy_extensions_to_source(self) -> None:
        # an editable install copies into the checkout, where the folder of built files is not tracked
        (ROOT / "drseg_core" / "_lib").mkdir(exist_ok=True)
        super().copy_extensions_to_source()
        built = Path(self.build_lib) / "drseg_core" / "_lib" / CUDA_LIBRARY
        if built.is_file():
            shutil.copy2(built, ROOT / "drseg_core" / "_lib")

    def build_extension(self, ext: Extension) -> None:
        import torch

        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "native"
        # what an earlier install found may be gone: its tools lay in an environment of its own
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        subprocess.run(
            ["cmake", *generator, "-S", ROOT, "-B", build, "-DCMAKE_BUILD_TYPE=Release"]
            + [f"-DDRSEG_TORCH_DIR={Path(torch.__file__).parent}", f"-DDRSEG_OUTPUT_DIR={output}"]
            + [f"-DDRSEG_CUDA={'OFF' if os.environ.get('DRSEG_CUDA') == '0' else 'AUTO'}"],
            check=True,
        )
        subprocess.run(["cmake", "--build", build, "--config", "Release"], check=True)


class PlatformWheel(bdist_wheel):
    """The library uses PyTorch's stable ABI and no Python header: one wheel serves every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    packages=[
        "drseg_kernels",
        *(".".join(path.parent.relative_to(ROOT).parts) for path in sorted(ROOT.glob("drseg_core/**/__init__.py"))),
    ],
    ext_modules=[Extension("drseg_core._lib.drseg_native", sources=[])] if native_wanted() else [],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
