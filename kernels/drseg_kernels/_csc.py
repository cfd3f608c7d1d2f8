# SPDX-License-Identifier: Apache-2.0
"""A graph by its columns (CSC): the edges that end in each node, so that a sum over them has one order and no atomics.

Made once per graph, for as long as its index lives unchanged.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# of an index in use: its version, the stream on which its columns were listed, and the columns
kept: Any = WeakIdKeyDictionary()


class Csc(NamedTuple):
    """Incoming edges of every node, nodes and edges counted through the whole batch.

    Args:
        indptr: (B * N + 1,) int64; node ``j`` has the places ``indptr[j]`` to ``indptr[j + 1]`` of ``perm``.
        perm: (B * N * K,) int32 (int64 from 2**31 edges on) positions in ``index``, ascending for each node.
    """

    indptr: Tensor
    perm: Tensor


def _build(index: Tensor) -> Csc:
    batch, nodes, _ = index.shape
    narrow = torch.int32 if batch * nodes < 2**31 else torch.int64
    first = torch.arange(batch, device=index.device, dtype=narrow) * nodes
    end = index.clamp(0, max(nodes - 1, 0)).to(narrow) + first[:, None, None]
    # stable, so that the edges of a node stay in ascending order
    end, perm = torch.sort(end.flatten(), stable=True)
    indptr = torch.searchsorted(end, torch.arange(batch * nodes + 1, device=index.device, dtype=narrow))
    return Csc(indptr, perm.int() if perm.numel() < 2**31 else perm)


def csc_of(index: Tensor) -> Csc:
    """The columns of a graph, or what was made of this index before; no host synchronisation.

    A graph that is recorded into a CUDA graph is sorted anew in every call: a replay must see what the index holds
    then. An index whose content changes without torch's notice (``.data``, another library, a replay that writes it)
    must be another tensor, or the columns are those of before.

    Args:
        index: (B, N, K) int32 or int64; values outside [0, N) are clamped into it.
    """
    if index.is_inference() or (index.is_cuda and torch.cuda.is_current_stream_capturing()):
        return _build(index)
    # another stream may run before what was made on this one has ended
    stream = torch.cuda.current_stream(index.device) if index.is_cuda else None
    found = kept.get(index)
    if found is None or found[:2] != (index._version, stream):
        found = kept[index] = (index._version, stream, _build(index))
    csc: Csc = found[2]
    return csc
