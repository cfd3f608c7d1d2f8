# SPDX-License-Identifier: Apache-2.0
"""The operators as plain ones of torch, for exporters and processes that have no ``drseg``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from drseg_core.ops._registration import PLAIN


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """A table for ``ExportedProgram.run_decompositions``: every operator by its reference, in plain PyTorch.

    A program without our operators runs where this package is not installed. It keeps the sizes it was exported for,
    dynamic ones too. It is slower than the references, and stores all N x N scores. With a dynamic batch or grid it
    also stores the hidden layer of every edge, N x K x E.

    Examples:
        >>> import torch
        >>> from drseg_core.nn import PDGR
        >>> from drseg_core.ops import decompositions
        >>> maps = torch.randn(1, 4, 3, 3), torch.randn(1, 5, 3, 3)
        >>> program = torch.export.export(PDGR(4, 5, k=3).eval(), maps)
        >>> plain = program.run_decompositions(torch.export.default_decompositions() | decompositions())
        >>> any("drseg" in str(node.target) for node in plain.graph.nodes)
        False
    """
    return {getattr(torch.ops.drseg, op).default: plain for op, plain in PLAIN.items()}
