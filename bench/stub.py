# SPDX-License-Identifier: Apache-2.0
"""A card that is not there: launchers take CPU tensors as if they lay on it, and kernels are compiled for it."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from bench.aot_build import Target

# launches by the kernel's name
launched: collections.Counter[str] = collections.Counter()


class _Launcher:
    """In the place of the driver's call: what is launched is counted and does not run."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = str(metadata.name)

    def __call__(self, *arguments: Any) -> None:
        launched[self.name] += 1


class _Utils:
    def __init__(self, target: Target) -> None:
        self.target = target

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.target.shared_bytes, "multiprocessor_count": self.target.processors}

    def load_binary(self, *arguments: Any) -> tuple[Any, ...]:
        # module, function, registers, spills, most threads
        return self, self, 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        pass


class _Driver:
    """As much of Triton's driver as a launch asks for."""

    launcher_cls = _Launcher

    def __init__(self, target: Target) -> None:
        self.arch, self.utils = target.arch, _Utils(target)

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        # kernels are kept by device
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def card(target: Target) -> Iterator[None]:
    """Within the block the Triton backend runs on CPU tensors, and its kernels are those of ``target``."""
    from drseg_kernels import _launch
    from triton.runtime.driver import driver

    from drseg_core.ops import _triton

    # for the rest of the process: without a card Triton has no driver to go back to
    driver.set_active(_Driver(target))
    with (
        mock.patch.object(_triton, "_why_not", lambda device, interpreted: None),
        mock.patch.object(_launch, "known_device", lambda device: target.device),
    ):
        yield
