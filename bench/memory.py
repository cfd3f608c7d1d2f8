# SPDX-License-Identifier: Apache-2.0
"""Peak memory: on a GPU from torch's allocator, on the CPU from the system.

The system's high-water mark never comes down. So on the CPU a measurement that must not see earlier ones gets a process
of its own.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from drseg_core.testing import high_water

_CODE = "import json, sys, {0}; print(json.dumps({0}.{1}(*json.loads(sys.argv[1]))))"


def settle() -> int:
    """Give free memory back and start the high-water mark anew where the system can; resident bytes by then."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        # the peak is then counted above that of making the inputs, which is the mark's only other owner
        pass
    return high_water()


def rise(run: Callable[[], object], device: str = "cpu") -> float:
    """MiB by which one call raises the peak of this process, or of torch's allocator, above what is taken before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        taken = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - taken) / 2**20
    before = settle()
    run()
    return (high_water() - before) / 2**20


def in_child(module: str, function: str, *arguments: Any) -> Any:
    """What a function of a module returns in a fresh process; arguments and result are JSON."""
    done = subprocess.run(
        [sys.executable, "-c", _CODE.format(module, function), json.dumps(arguments)],
        # it imports from where this process does
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{module}.{function}: failed in its own process:\n{done.stderr}")
    return json.loads(done.stdout)
