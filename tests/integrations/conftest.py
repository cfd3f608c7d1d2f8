# SPDX-License-Identifier: Apache-2.0
"""A scene, and the command as people have it on PATH."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import pytest

from drseg_core.scenes.synthetic import write_synthetic_scene

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def executable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file ``drseg`` that runs this tree in this Python."""
    path = tmp_path_factory.mktemp("bin") / "drseg"
    modules = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    command = f"{shlex.quote(sys.executable)} -m drseg_core"
    path.write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(modules)} OMP_NUM_THREADS=1 exec {command} "$@"\n')
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("rasterio")
    return write_synthetic_scene(tmp_path_factory.mktemp("scene") / "a scene.tif", width=70, height=50, collar=4)
