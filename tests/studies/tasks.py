# SPDX-License-Identifier: Apache-2.0
"""What the processes of tests do. They import this module, which needs no torch: that takes longer than all else."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from drseg_core.errors import NumericalError
from drseg_core.training.signals import TrainingStopped


def square(value: int) -> int:
    if value == 3:
        raise NumericalError("three")
    if value == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return value * value


def stop() -> None:
    raise TrainingStopped("train: stopped by SIGTERM", 15)


def pid() -> int:
    return os.getpid()


def sleep(path: Path) -> None:
    path.touch()
    time.sleep(600)


def threads() -> int:
    import torch

    return torch.get_num_threads()
