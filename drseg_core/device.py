# SPDX-License-Identifier: Apache-2.0
"""The device that a model runs on."""

from __future__ import annotations

import torch

from drseg_core.errors import BackendUnavailableError, ConfigError

__all__ = ["select_device"]


def select_device(name: str | None, *, local_rank: int = 0) -> torch.device:
    """A device by name; None takes CUDA where there is one. ``mps`` (Apple's) is taken by its name, where torch has it.

    Raises:
        ConfigError: no name of a device.
        BackendUnavailableError: the device is not here.

    Example:
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
