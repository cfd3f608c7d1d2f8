# SPDX-License-Identifier: Apache-2.0
"""Seeded inputs of ``csc`` at the named sizes."""

from __future__ import annotations

from typing import Any

import torch

from drseg_core.ops._cases import CASES, Case, generator, random_index

__all__ = ["CASES", "make_inputs"]


def make_inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of ``csc``: a graph with a few nodes in which many edges end; ``dtype`` says nothing here."""
    return {"index": random_index(case, generator(case, seed)).to(device)}
