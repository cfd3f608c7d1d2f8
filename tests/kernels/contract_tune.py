# SPDX-License-Identifier: Apache-2.0
"""What the tuner times is right at the sizes that it tries first; ``test_interpreter.py`` runs it, and ``--gpu``."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from drseg_kernels import _launch
from edges import DEVICE, TINY

from bench.tune import TABLES, candidates
from bench.tune_runs import make

CASE = dataclasses.replace(TINY, name="tune_6x6", batch=1, height=6, width=6, prior=16, hidden=8, channels=20)


@pytest.mark.parametrize("table", sorted(sum(TABLES.values(), ())))
def test_the_first_candidate_passes_its_gate(table):
    options = candidates(table, _launch.known_device(torch.device(DEVICE)), CASE)[:1]
    run, wrong = make(table, CASE, torch.float32, DEVICE)
    if table.startswith(("edge", "degree", "graph")):
        # what is not a size reaches the kernels, and they refuse it
        with pytest.raises(AttributeError, match="'str' object has no attribute"):
            run("no tile")
    for option in options:
        assert wrong(run(option)) is None
        spoilt = list(run(option))
        spoilt[0] = spoilt[0] + 1
        assert wrong(tuple(spoilt)) is not None
