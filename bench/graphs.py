# SPDX-License-Identifier: Apache-2.0
"""Graphs as PDGR has them: neighbours drawn from anywhere would measure what no model has."""

from __future__ import annotations

import functools

from torch import Tensor

from drseg_core import ops
from drseg_core.testing import Case, dino_like_prior, generator

# enough for the neighbours, and quick
_CHANNELS = 64


@functools.cache
def dino_like_index(case: Case) -> Tensor:
    """(B, N, K) int32 neighbours of a DINO-like prior, mostly close to their node; on the CPU, not to be changed."""
    grid = (case.height, case.width)
    prior = dino_like_prior(case.batch, *grid, _CHANNELS, generator(case))
    return ops.knn_graph(prior, grid, case.neighbours, backend="reference")
