# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels (``drseg_kernels``) as a backend: where they run, in which dtypes, how they are reached."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil
from typing import Any

import torch

from drseg_core.ops._dispatch import Backend, Run

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# compiled ahead of time for this capability and later ones; bfloat16 begins with it
_LEAST_CAPABILITY = (8, 0)


def why_not(device: str) -> str | None:
    """Why the Triton kernels cannot run on ``device``; None when they can."""
    return _why_not(device, os.environ.get("TRITON_INTERPRET") == "1")


# every call of an op asks
@functools.cache
def _why_not(device: str, interpreted: bool) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device == "cpu" and interpreted:
        return None
    if device != "cuda":
        return "Triton kernels need a CUDA device (TRITON_INTERPRET=1 interprets them on the CPU, slowly)"
    # Triton builds the launcher of a kernel when it is first called
    if not os.environ.get("CC") and not any(shutil.which(name) for name in ("clang", "gcc", "cc")):
        return "Triton needs a C compiler (gcc, clang, or CC in the environment)"
    if torch.cuda.is_available():
        found = torch.cuda.get_device_capability()
        if found < _LEAST_CAPABILITY:
            least, own = (".".join(map(str, version)) for version in (_LEAST_CAPABILITY, found))
            return f"the Triton kernels need a device of compute capability {least}, this one has {own}"
    return None


def launcher(op: str, function: str) -> Run:
    """A function of ``drseg_kernels.<op>``, imported when it is first called: that imports triton."""

    @functools.cache
    def found() -> Run:
        function_of_it: Run = getattr(importlib.import_module(f"drseg_kernels.{op}"), function)
        return function_of_it

    return lambda *arguments, **options: found()(*arguments, **options)


def backend(op: str, backward: bool = True, **traits: Any) -> Backend:
    """The launchers ``<op>`` and ``<op>_backward`` of ``drseg_kernels.<op>``; ``traits`` as in ``Backend``."""
    run_backward = launcher(op, f"{op}_backward") if backward else None
    # on a CPU they are interpreted, for tests
    return Backend("triton", launcher(op, op), run_backward, why_not, DTYPES, ("cpu",), **traits)
