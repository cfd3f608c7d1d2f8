# SPDX-License-Identifier: Apache-2.0
"""What the bits of a map depend on besides its options: scene, versions and device."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch

from drseg_core.checkpoints.versions import library_versions
from drseg_core.ops import backend_report
from drseg_core.scenes.reader import SceneReader


def scene_facts(scene: SceneReader, aoi: str | Path | None = None) -> dict[str, Any]:
    """The content of all files of a scene, such as the members of a mosaic; of remote ones what their headers say."""
    names = [str(name) for name in (*scene.source.files, *([] if aoi is None else [aoi]))]
    return {
        "scene": [_content(name) for name in names if Path(name).is_file()],
        "remote": [name for name in names if not Path(name).is_file()],
        "size": [scene.height, scene.width, scene.dtype, tuple(scene.transform), str(scene.crs)],
    }


def _content(name: str) -> str:
    status = Path(name).stat()
    return _hash(name, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=10_000)
def _hash(name: str, size: int, time: int) -> str:
    """SHA-256 of a file; read again where its size or time is another."""
    digest = hashlib.sha256()
    with open(name, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def computing_facts(predictor: Any) -> dict[str, Any]:
    """What else decides how sums are rounded: libraries, backends, device, and on a CPU the threads."""
    device = torch.device(getattr(predictor, "device", "cpu"))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "versions": library_versions(),
        "device": [device.type, where, torch.get_num_threads() if device.type == "cpu" else None],
        "backends": [[row["op"], row["backend"], row["device"]] for row in backend_report() if row["available"]],
    }
