# SPDX-License-Identifier: Apache-2.0
"""Where the Triton kernels (``drseg_kernels``) can run, and in which dtypes."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from drseg_core.errors import BackendDtypeError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_not(device: str) -> str | None:
    """Why the Triton kernels cannot run on ``device``; None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device == "cuda" or (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    return "Triton kernels need a CUDA device (TRITON_INTERPRET=1 interprets them on the CPU, slowly)"


def check_dtypes(op: str, **tensors: Tensor) -> None:
    """Refuse float64 beside a narrower first tensor: the result would be float64 in name only."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise BackendDtypeError(
                f"{op}: backend triton cannot take {name} in {tensor.dtype}; "
                f"expected one of {', '.join(map(str, DTYPES))}, got {tensor.dtype}"
            )
