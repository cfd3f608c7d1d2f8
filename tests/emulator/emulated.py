# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels built for the CPU, on the emulator of this folder."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
VARIABLE = "DRSEG_NATIVE_CUDA_LIBRARY"


def library() -> Path:
    """The library, built again where its sources have changed.

    Raises:
        RuntimeError: with what the compiler said.
    """
    import torch

    build = ROOT / "build" / "emulated"
    build.mkdir(parents=True, exist_ok=True)
    # the build's own tools are those of the environment
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=environment["PATH"]) else []
    configure = ["cmake", *generator, "-S", str(ROOT), "-B", str(build), "-DDRSEG_EMULATE=ON"]
    configure += ["-DCMAKE_BUILD_TYPE=RelWithDebInfo", f"-DDRSEG_OUTPUT_DIR={build}"]
    configure += [f"-DDRSEG_TORCH_DIR={Path(torch.__file__).parent}"]
    with (build / "lock").open("w") as lock:
        # several processes of one test run may ask
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, ["cmake", "--build", str(build), "--target", "drseg_native_cuda"]):
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"emulator: {' '.join(command)} failed\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return build / "libdrseg_native_cuda.so"
