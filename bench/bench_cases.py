# SPDX-License-Identifier: Apache-2.0
"""The named cases as pytest-benchmark entries: ``make bench``, or ``pytest bench/bench_cases.py --benchmark-only``.

Nothing is compared here; ``python -m bench run`` does that.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import jobs, one_op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
JOBS = jobs.quick_jobs(("pdgr", *one_op.OPS), jobs.MODES, ("case", "dino"))


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
