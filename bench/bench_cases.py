# SPDX-License-Identifier: Apache-2.0
"""The named cases as pytest-benchmark entries: ``make bench``, or ``pytest bench/bench_cases.py --benchmark-only``.

Nothing is compared here; bench/run.py does that.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [
    str(path) for path in (Path(__file__).parent, *(Path(__file__).parents[1] / n for n in ("", "kernels")))
]

import jobs  # noqa: E402
import ops  # noqa: E402
import torch  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
JOBS = [
    job
    for case in ("paper_vitl_24x24", "pdgr_1x576", "knn_4096")
    for op in ("pdgr", *ops.with_kernel(DEVICE))
    for job in jobs.jobs_of(op, case, list(jobs.MODES), ["dino"], "float32", None)
]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: "-".join(str(job).split()))
def test_bench(job: jobs.Job, benchmark: Any) -> None:
    engine = jobs.build(job, DEVICE)
    assert engine.wrong is None, engine.wrong

    def run() -> None:
        engine.run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info["backends"] = engine.backends
    benchmark(run)
