# SPDX-License-Identifier: Apache-2.0
"""The named sizes and their inputs, which lie with the ops."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from drseg_core.ops._cases import CASES, Case, dino_like_prior, generator, random_index, vit_like_prior

__all__ = ["CASES", "Case", "dino_like_prior", "generator", "make_inputs", "random_index", "vit_like_prior"]


def make_inputs(
    op: str, case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Seeded keyword arguments of an op at a case, as ``drseg_core/ops/<op>/cases.py`` makes them.

    Examples:
        >>> from drseg_core.testing import CASES, make_inputs
        >>> sorted(make_inputs("knn_graph", CASES[0]))
        ['decay', 'grid', 'k', 'prior']
    """
    inputs: dict[str, Any] = importlib.import_module(f"drseg_core.ops.{op}.cases").make_inputs(
        case, dtype, device, seed
    )
    return inputs
