# SPDX-License-Identifier: Apache-2.0
"""Edges by the node in which they end: what a sum over incoming edges needs to have one order and no atomics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True)
class Reverse:
    """Incoming edges of every node, nodes and edges counted through the whole batch.

    Args:
        begin: (B * N + 1,) int64; node ``j`` has the places ``begin[j]`` to ``begin[j + 1]`` of ``edge``.
        edge: (B * N * K,) int32 (int64 from 2**31 edges on) positions in ``index``, ascending for each node.
    """

    begin: Tensor
    edge: Tensor


# of a graph in use: the version of its index, the stream on which its lists were made, and the lists
_kept: Any = WeakIdKeyDictionary()


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

    A graph that is recorded into a CUDA graph is sorted in every call: a replay must see what the index holds then.

    Args:
        index: (B, N, K) int32 or int64; values outside [0, N) are clamped into it.
    """
    if index.is_inference() or (index.is_cuda and torch.cuda.is_current_stream_capturing()):
        return _build(index)
    # another stream may run before the sort has ended on this one
    stream = torch.cuda.current_stream(index.device) if index.is_cuda else None
    found = _kept.get(index)
    if found is None or found[:2] != (index._version, stream):
        found = (index._version, stream, _build(index))
        _kept[index] = found
    return found[2]
