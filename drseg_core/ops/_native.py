# SPDX-License-Identifier: Apache-2.0
"""The native CPU kernels (csrc/cpu) as a backend.

``DRSEG_NATIVE_LIBRARY`` names another file than the one that the build has put into ``drseg_core/_lib``.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from drseg_core.ops._dispatch import Backend, Run
from drseg_core.ops._library import Library

LIBRARY = Library("drseg_native", "DRSEG_NATIVE_LIBRARY")


@functools.cache
def _load() -> str | None:
    """Load the library; None, or the reason why it is not there."""
    reason = LIBRARY.load()
    if reason is not None:
        warnings.warn(f"drseg_core: {reason}; the CPU uses the slower reference", RuntimeWarning, stacklevel=2)
    return reason


def operands(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous and in float32, or all in float64, as the library takes them."""
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return tuple(tensor.to(wide).contiguous() for tensor in tensors)


def neighbours(index: Tensor) -> Tensor:
    """Contiguous int32, as the library takes them; it clamps them itself, but only after they fit."""
    if index.dtype == torch.int64:
        index = index.clamp(0, max(index.shape[1] - 1, 0))
    return index.int().contiguous()


def columns(csc: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """A graph's columns as the library takes them: int32, or none, and it makes its own."""
    if csc is None or csc[1].numel() >= 2**31:
        return None, None
    indptr, perm = (value.int().contiguous() for value in csc)
    return indptr, perm


def why_not(device: str, *symbols: str) -> str | None:
    """Why the native kernels cannot run on ``device``; None when they can.

    ``symbols`` are the operators that the library must define (an older build may lack some).
    """
    if device != "cpu":
        return f"the native library has no {device} kernels"
    return _load() or LIBRARY.lacks(*symbols)


def backend(run: Run, run_backward: Run | None, *symbols: str, **traits: Any) -> Backend:
    """What calls the library's operators ``symbols``; ``traits`` as in ``Backend``."""
    return Backend("native", run, run_backward, lambda device: why_not(device, *symbols), **traits)
