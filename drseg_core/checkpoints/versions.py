# SPDX-License-Identifier: Apache-2.0
"""What ran, and where: versions of the libraries and of the source, and the device."""

from __future__ import annotations

import functools
import platform
import subprocess
from importlib import metadata
from pathlib import Path

LIBRARIES = (
    "drseg",
    "torch",
    "torchvision",
    "triton",
    "timm",
    "open_clip_torch",
    "safetensors",
    "numpy",
    "rasterio",
    "jsonargparse",
)
CPUINFO = Path("/proc/cpuinfo")


def library_versions() -> dict[str, str]:
    """Installed versions by distribution name, without importing any of them; what is absent is left out.

    As they are when a process first asks.
    """
    return dict(_library_versions())


@functools.cache
def _library_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: str) -> str:
    """The GPU or CPU behind ``cpu``, ``cuda`` or ``cuda:N``."""
    if device != "cpu":
        import torch

        return torch.cuda.get_device_name(device)
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name") or platform.processor() or platform.machine()
    # a virtual machine may hide which of a maker's processors it is, and an ARM processor has numbers alone
    if "cpu family" in fields:
        return f"{name}, family {fields['cpu family']} model {fields['model']}"
    if "CPU part" in fields:
        return f"{name}, implementer {fields['CPU implementer']} part {fields['CPU part']}"
    return name


@functools.cache
def git_revision() -> str | None:
    """Commit of the checkout this package runs from, ``+changes`` when files differ; None outside a checkout.

    As it is when a process first asks: that is what it has loaded, or nearly so.
    """
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        revision = git("rev-parse", "HEAD")
        return revision + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
