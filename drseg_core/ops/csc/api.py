# SPDX-License-Identifier: Apache-2.0
"""Public function of the op; validates and hands over to a backend."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from drseg_core.ops import _checks
from drseg_core.ops._dispatch import has_backend, requested_backend
from drseg_core.ops.csc import registration


class Csc(NamedTuple):
    """A graph by its columns: for each node the edges that end in it.

    Nodes and edges are counted through the whole batch. Node ``j`` of sample ``b`` is ``b * N + j``. The number of an
    edge is its place in ``index.flatten()``.

    Args:
        indptr: (B * N + 1,) int32; node ``j`` has ``perm[indptr[j] : indptr[j + 1]]``.
        perm: (B * N * K,) int32, ascending for each node. Both are int64 from 2**31 edges on.

    Examples:
        >>> import torch
        >>> from drseg_core.ops import csc
        >>> columns = csc(torch.tensor([[0, 1], [1, 1]]))
        >>> columns.perm[columns.indptr[1] : columns.indptr[2]].tolist()  # edges that end in node 1
        [1, 2, 3]
    """

    indptr: Tensor
    perm: Tensor


def csc_of(op: str, given: Csc | None, index: Tensor, validate: bool) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """An op's ``csc`` argument as it is registered, checked against ``index``."""
    _checks.check_csc(op, given, index)
    if given is None:
        return None, None
    if validate:
        _checks.check_csc_values(op, given, columns_of(index))
    return given


def columns_of(index: Tensor, backend: str | None = None) -> Csc:
    """``csc`` by the named backend, or by the default one if that has no ``csc``: the lists are equal."""
    requested = requested_backend("csc", backend)
    known = has_backend("csc", requested)
    return Csc(*registration.csc(index if index.dim() == 3 else index[None], requested if known else "auto"))


def csc(index: Tensor, *, backend: str | None = None) -> Csc:
    """The columns of a graph, for sums against the direction of its edges.

    Made once, they serve every op on the same ``index``: a backward, ``graph_propagate(..., transpose=True)``, and
    degrees of incoming edges. ``Graph`` keeps them.

    Args:
        index: (B, N, K) or (N, K) neighbour indices, int32 or int64; any indices, repeated ones too. Values outside
            [0, N) are clamped into it.
        backend: one of ``backend_names()``; None takes the best that can run.

    Raises:
        TypeError, ValueError: ``index`` has the wrong type, dtype or rank.
        BackendUnavailableError: the named backend cannot run here.

    Examples:
        >>> import torch
        >>> from drseg_core.ops import csc
        >>> csc(torch.tensor([[0, 1], [1, 1]])).indptr.tolist()
        [0, 1, 4]
    """
    _checks.check_tensor("csc", "index", index, ("B", "N", "K"), _checks.INDEX_DTYPES)
    requested = requested_backend("csc", backend)
    return Csc(*registration.csc(index if index.dim() == 3 else index[None], requested))
