# SPDX-License-Identifier: Apache-2.0
"""The device that a model runs on, and the precision of its products there."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import torch

from drseg_core.errors import BackendUnavailableError, ConfigError

__all__ = ["PrecisionName", "select_device", "select_precision"]

PrecisionName = Literal["float32", "bfloat16", "auto"]
CPUINFO = Path("/proc/cpuinfo")
# of x86 and of ARM; avx512f alone computes them in float32, which takes longer than float32 does
BFLOAT16_UNITS = {"avx512_bf16", "amx_bf16", "bf16"}


def select_device(name: str | None, *, local_rank: int = 0) -> torch.device:
    """A device by name; None takes CUDA if there is one. ``mps`` (Apple's) is taken only if named and torch has it.

    Raises:
        ConfigError: the name of no device.
        BackendUnavailableError: this machine does not have the device.

    Examples:
        >>> from drseg_core.device import select_device
        >>> select_device("cpu")
        device(type='cpu')
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: name is unknown; expected cpu, cuda, cuda:N or mps, got {name!r}") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = local_rank if device.index is None else device.index
        if index >= count:
            build = f"with CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
            raise BackendUnavailableError(
                f"device: {name} is not available; {count} CUDA devices found, torch is built {build}"
            )
        return torch.device("cuda", index)
    if device.type == "mps":
        if not torch.backends.mps.is_available():
            why = "the system is too old" if torch.backends.mps.is_built() else "torch is built without it"
            raise BackendUnavailableError(f"device: {name} is not available; {why}")
    elif device.type != "cpu":
        raise ConfigError(f"device: type is not supported; expected cpu, cuda, cuda:N or mps, got {name!r}")
    return device


def has_bfloat16_units(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32 ones, as the processor's flags or CUDA say."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not CPUINFO.exists():
        return False
    lines = (line.partition(":") for line in CPUINFO.read_text().splitlines())
    flags = next((value for name, _, value in lines if name.strip() in ("flags", "Features")), "")
    return not BFLOAT16_UNITS.isdisjoint(flags.split())


def select_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of linear maps and convolutions; ``auto`` takes bfloat16 where ``device`` has units for it.

    Raises:
        ConfigError: the name of no precision.
        BackendUnavailableError: torch has no autocast to bfloat16 on the device.

    Examples:
        >>> import torch
        >>> from drseg_core.device import select_precision
        >>> select_precision("bfloat16", torch.device("cpu"))
        torch.bfloat16
    """
    if name not in get_args(PrecisionName):
        raise ConfigError(f"precision: name is unknown; expected {', '.join(get_args(PrecisionName))}, got {name!r}")
    if name == "float32" or (name == "auto" and not has_bfloat16_units(device)):
        return torch.float32
    if not torch.amp.is_autocast_available(device.type):
        raise BackendUnavailableError(f"precision: bfloat16 is not available on {device.type}; expected float32")
    return torch.bfloat16
