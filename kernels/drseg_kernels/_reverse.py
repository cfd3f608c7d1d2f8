# SPDX-License-Identifier: Apache-2.0
"""Edges by the node in which they end: what a sum over incoming edges needs to have one order and no atomics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from drseg_kernels._kept import once_per_graph


@dataclass(frozen=True)
class Reverse:
    """Incoming edges of every node, nodes and edges counted through the whole batch.

    Args:
        begin: (B * N + 1,) int64; node ``j`` has the places ``begin[j]`` to ``begin[j + 1]`` of ``edge``.
        edge: (B * N * K,) int32 (int64 from 2**31 edges on) positions in ``index``, ascending for each node.
    """

    begin: Tensor
    edge: Tensor


def _build(index: Tensor) -> Reverse:
    batch, nodes, _ = index.shape
    narrow = torch.int32 if batch * nodes < 2**31 else torch.int64
    first = torch.arange(batch, device=index.device, dtype=narrow) * nodes
    end = index.clamp(0, max(nodes - 1, 0)).to(narrow) + first[:, None, None]
    # stable, so that the edges of a node stay in ascending order
    end, edge = torch.sort(end.flatten(), stable=True)
    begin = torch.searchsorted(end, torch.arange(batch * nodes + 1, device=index.device, dtype=narrow))
    return Reverse(begin, edge.int() if edge.numel() < 2**31 else edge)


def reverse_lists(index: Tensor) -> Reverse:
    """Incoming edges of a graph, sorted once for as long as its index lives unchanged; no host synchronisation.

    Args:
        index: (B, N, K) int32 or int64; values outside [0, N) are clamped into it.
    """
    return once_per_graph(index, "reverse", lambda: _build(index))
