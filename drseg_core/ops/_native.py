# SPDX-License-Identifier: Apache-2.0
"""Finds and loads the native library (csrc) once, and says why it cannot.

Looked for in this order: the path in ``DRSEG_NATIVE_LIBRARY``, then ``drseg_core/_lib`` where the build puts it.
``DRSEG_NATIVE=0`` leaves it out by choice.
"""

from __future__ import annotations

import functools
import os
import struct
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

from drseg_core.ops._dispatch import Backend, Run

_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")


def library_path() -> Path:
    """Where the CPU library is expected."""
    named = os.environ.get("DRSEG_NATIVE_LIBRARY")
    return Path(named) if named else Path(__file__).parents[1] / "_lib" / f"libdrseg_native{_SUFFIX}"


def _cut_short(path: Path) -> bool:
    """Whether an ELF file ends before its own section table: loading it would end the process with a bus error."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or not header.startswith(b"\x7fELF\x02\x01"):
        return False
    (offset,) = struct.unpack_from("<Q", header, 40)
    entry, count = struct.unpack_from("<HH", header, 58)
    return path.stat().st_size < offset + entry * count


@functools.cache
def _load() -> str | None:
    """Load the library; None, or the reason why it is not there."""
    path = library_path()
    if os.environ.get("DRSEG_NATIVE") == "0":
        reason = "native library left out by DRSEG_NATIVE=0"
    elif not path.is_file():
        reason = f"native library not built: {path.name} is not in {path.parent.name}/"
    else:
        try:
            if _cut_short(path):
                raise OSError(f"{path.name} is cut short")
            torch.ops.load_library(str(path))
            return None
        except OSError as error:
            reason = f"native library does not load: {error.__cause__ or error}"
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
    reason = _load()
    if reason is None:
        missing = [symbol for symbol in symbols if not hasattr(torch.ops.drseg_native, symbol)]
        if missing:
            reason = f"native library is older than this package: it lacks {', '.join(missing)}; build it again"
    return reason


def backend(run: Run, run_backward: Run | None, *symbols: str) -> Backend:
    """What calls the library's operators ``symbols``."""
    return Backend("native", run, run_backward, lambda device: why_not(device, *symbols))
