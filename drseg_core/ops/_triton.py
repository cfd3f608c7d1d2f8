# SPDX-License-Identifier: Apache-2.0
"""Where the Triton kernels (``drseg_kernels``) can run, and in which dtypes."""

from __future__ import annotations

import importlib.util
import os

import torch

# looked for once: torch.compile cannot follow a search
_FOUND = importlib.util.find_spec("triton") is not None

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_not(device: str) -> str | None:
    """Why the Triton kernels cannot run on ``device``; None when they can."""
    if not _FOUND:
        return "triton is not installed"
    if device == "cuda" or (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    return "Triton kernels need a CUDA device (TRITON_INTERPRET=1 interprets them on the CPU, slowly)"
