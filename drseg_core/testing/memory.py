# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a process."""

from __future__ import annotations

import sys
from pathlib import Path


def high_water() -> int:
    """Largest resident size of this process so far, in bytes.

    Examples:
        >>> from drseg_core.testing import high_water
        >>> high_water() > 2**20
        True
    """
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would count what the parent process held when it started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
