# SPDX-License-Identifier: Apache-2.0
"""The CUDA C++ kernels (csrc/cuda) as a backend: small graphs, where their library was built for the device.

``DRSEG_NATIVE_CUDA_LIBRARY`` names another file than the one that the build has put into ``drseg_core/_lib``. The same
kernels run on the CPU where that is a build for the emulator (``tests/emulator``).
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from drseg_core.ops._dispatch import Backend, Run
from drseg_core.ops._library import Library

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LIBRARY = Library("drseg_native_cuda", "DRSEG_NATIVE_CUDA_LIBRARY")


@functools.cache
def _load() -> tuple[str | None, tuple[str, ...]]:
    """Why the library is not there, or None. And its build target: ``cpu``, or architectures such as ``90a``."""
    reason = LIBRARY.load()
    if reason is not None:
        return reason, ()
    try:
        built_for = ctypes.CDLL(str(LIBRARY.path())).drseg_native_cuda_built_for
    except AttributeError as error:
        return f"native CUDA library is another one: {error}", ()
    built_for.restype = ctypes.c_char_p
    return None, tuple(built_for().decode().split())


@functools.cache
def _versions() -> tuple[int, int]:
    """The CUDA version of the library's own runtime, and the newest that the driver knows, as 13020."""
    own, driver = ctypes.c_int(), ctypes.c_int()
    try:
        ctypes.CDLL(str(LIBRARY.path())).drseg_native_cuda_versions(ctypes.byref(own), ctypes.byref(driver))
    except AttributeError:
        # of an earlier build, which does not say it
        return 0, 0
    return own.value, driver.value


def too_old(own: int, driver: int) -> str | None:
    """Why a driver that knows CUDA ``driver`` does not run code of CUDA ``own``; a major version goes together.

    torch may have been built for an older CUDA than this library, so that its own kernels run and these would not.
    """
    if driver // 1000 >= own // 1000:
        return None
    return f"the native CUDA library was built with CUDA {own // 1000}; the driver is for CUDA {driver // 1000}"


def runs_on(capability: tuple[int, int], built_for: tuple[str, ...]) -> bool:
    """Whether a device has code among what was built: its own, that of a lower minor version, or PTX to compile."""
    major, minor = capability
    for name in built_for:
        number, exact = int(name.rstrip("a+")), name.endswith("a")
        of = divmod(number, 10)
        if name.endswith("+") and of <= capability:
            return True
        if of == capability or (not exact and of[0] == major and of[1] <= minor):
            return True
    return False


def why_not(device: str, *symbols: str) -> str | None:
    """Why the CUDA kernels cannot run on ``device``; None when they can."""
    reason, built_for = _load()
    if reason is not None:
        return reason
    if (device == "cpu") != (built_for == ("cpu",)):
        if device == "cpu":
            return "CUDA C++ kernels need a CUDA device"
        return f"the native CUDA library was built for {' '.join(built_for)}, not for {device}"
    if device not in ("cpu", "cuda"):
        return f"the native CUDA library has no {device} kernels"
    if device == "cuda" and torch.cuda.is_available():
        own = torch.cuda.get_device_capability()
        if not runs_on(own, built_for):
            names = ", ".join(built_for)
            return f"the native CUDA library was built for sm {names}; this device is sm {own[0]}{own[1]}"
        if (reason := too_old(*_versions())) is not None:
            return reason
    return LIBRARY.lacks(*symbols)


def aligned(rows: Tensor) -> Tensor:
    """Rows that the kernels read 16 bytes at a time: contiguous, from an address that is a multiple of 16."""
    rows = rows.contiguous()
    return rows if rows.data_ptr() % 16 == 0 else rows.clone()


def backend(run: Run, run_backward: Run | None, *symbols: str, **traits: Any) -> Backend:
    """What calls the library's operators ``symbols``; ``traits`` as in ``Backend``."""
    # on a CPU they are emulated, for tests
    given = {"dtypes": DTYPES, "by_name_only": ("cpu",), **traits}
    return Backend("cuda", run, run_backward, lambda device: why_not(device, *symbols), **given)
