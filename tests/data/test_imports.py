# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys

HEAVY = ["timm", "open_clip", "torchvision", "rasterio", "matplotlib", "triton"]

CODE = """
import sys
import torch
heavy = {heavy!r}
# torch itself imports triton where it is installed
given = [name for name in heavy if name in sys.modules]
import drseg_core.data, drseg_core.data.folder, drseg_core.data.synthetic, drseg_core.data.loader
import drseg_core.data.transforms, drseg_core.data.palette, drseg_core.data.benchmark_dataset
import drseg_core.data.prepare, drseg_core.data.check, drseg_core.data.protocols, drseg_core.evaluation.views
import drseg_core.evaluation.evaluate, drseg_core.evaluation.inference, drseg_core.evaluation.metrics
import drseg_core.evaluation.report
import drseg_core.scenes.predict, drseg_core.scenes.synthetic
print(",".join(name for name in heavy if name in sys.modules and name not in given))
"""


def test_importing_loads_no_heavy_package():
    result = subprocess.run([sys.executable, "-c", CODE.format(heavy=HEAVY)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""
