# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys

HEAVY = ["timm", "open_clip", "torchvision", "rasterio", "matplotlib", "triton"]

CODE = """
import sys
import drseg_core.data, drseg_core.data.folder, drseg_core.data.synthetic, drseg_core.data.loader
import drseg_core.data.transforms, drseg_core.data.palette, drseg_core.data.benchmark_dataset
import drseg_core.data.prepare, drseg_core.data.check, drseg_core.data.protocols, drseg_core.evaluation.views
import drseg_core.evaluation.evaluate, drseg_core.evaluation.inference, drseg_core.evaluation.metrics
import drseg_core.evaluation.report
import drseg_core.scenes.predict, drseg_core.scenes.synthetic
print(",".join(name for name in {heavy!r} if name in sys.modules))
"""


def test_importing_loads_no_heavy_package():
    # torch itself imports triton where it is installed
    probe = f"import sys, torch; print(','.join(n for n in {HEAVY!r} if n in sys.modules))"
    alone = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout.strip()
    result = subprocess.run([sys.executable, "-c", CODE.format(heavy=HEAVY)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == alone and "rasterio" not in alone
