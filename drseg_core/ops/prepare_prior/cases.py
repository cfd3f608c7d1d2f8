# SPDX-License-Identifier: Apache-2.0
"""Seeded inputs of ``prepare_prior`` at the named sizes."""

from __future__ import annotations

from typing import Any

import torch

from drseg_core.ops._cases import CASES, Case
from drseg_core.ops.knn_graph import cases

__all__ = ["CASES", "make_inputs"]


def make_inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of ``prepare_prior``: the features of which ``knn_graph`` chooses."""
    return {"prior": cases.make_inputs(case, dtype, device, seed)["prior"]}
