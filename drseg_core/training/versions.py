# SPDX-License-Identifier: Apache-2.0
"""What ran: versions of the libraries and of the source."""

from __future__ import annotations

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


def library_versions() -> dict[str, str]:
    """Installed versions by distribution name, without importing any of them; what is absent is left out."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """Commit of the checkout this package runs from, ``+changes`` when files differ; None outside a checkout."""
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
