# SPDX-License-Identifier: Apache-2.0
"""Public function of the op; validates and hands over to a backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from drseg_core.ops import _checks
from drseg_core.ops._dispatch import requested_backend
from drseg_core.ops.csc.api import Csc, csc_of
from drseg_core.ops.graph_propagate import registration


class Incoming(NamedTuple):
    """The edges of a graph by the node in which they end, with the node that each leaves and its coefficient.

    Args:
        indptr: (B * N + 1,) int32, as that of ``csc``.
        start: (B * N * K,) int32, counted within its sample.
        coefficient: (B * N * K,), float32 or float64.
    """

    indptr: Tensor
    start: Tensor
    coefficient: Tensor


def incoming(index: Tensor, coefficient: Tensor, csc: Csc) -> Incoming | None:
    """The lists that every ``graph_propagate(..., transpose=True)`` on a CPU makes anew, made once; None if of no use.

    The coefficients are copied, so other coefficients need another list.
    """
    if index.device.type != "cpu" or index.numel() >= 2**31:
        return None
    # int32 throughout, which is half the time
    perm = csc.perm.int()
    start = torch.div(perm, max(index.shape[-1], 1), rounding_mode="floor").remainder_(max(index.shape[-2], 1))
    share = coefficient.detach().flatten().index_select(0, perm)
    return Incoming(csc.indptr.int(), start, share.to(torch.promote_types(share.dtype, torch.float32)))


def propagate_incoming(
    x: Tensor, index: Tensor, coefficient: Tensor, lists: Incoming | None, *, backend: str | None = None
) -> Tensor | None:
    """``graph_propagate(..., transpose=True)``, the same bits, along lists; None if its backend does not take them.

    Only the native backend takes them, only without gradients, and only where nothing but torch's eager mode sees the
    call. The graph's own coefficients say whether gradients are needed: those of the lists are copies.
    """
    requested = requested_backend("graph_propagate", backend)
    if lists is None or not registration.takes_incoming(x, index, coefficient, lists, requested):
        return None
    batched = x if x.dim() == 3 else x[None]
    return registration.propagate_incoming(batched, *lists).view_as(x)


def graph_propagate(
    x: Tensor,
    index: Tensor,
    coefficient: Tensor,
    *,
    transpose: bool = False,
    csc: Csc | None = None,
    validate: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Sum of the neighbours' features, weighted by the edges' coefficients (arXiv 2604.02010, Eq. 9).

    ``y_i = sum_k coefficient_ik x_j`` with ``j = index_ik``. With ``transpose`` the edges are followed backwards:
    ``y_j = sum over (i, k) with index_ik = j of coefficient_ik x_i``.

    Args:
        x: (B, N, C) or (N, C) node features; float32, float64, float16 or bfloat16.
        index: (B, N, K) or (N, K) neighbour indices, int32 or int64; any indices, repeated ones too.
        coefficient: shape of ``index``, a floating-point dtype, not necessarily that of ``x``.
        transpose: follow the edges from neighbour to node.
        csc: ``csc(index)``, for the transpose and for the gradient to ``x``; None makes it in every call.
        validate: refuse indices outside [0, N) (synchronises a GPU); otherwise they are clamped into it.
        backend: one of ``backend_names()``; None takes the best that can run.

    Returns:
        (B, N, C) in the dtype of ``x``; sums in float32 (float64 if an input is) and rounds once. Differentiable once
        to ``x`` and ``coefficient``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range.
        BackendUnavailableError: the named backend cannot run here.

    Examples:
        >>> import torch
        >>> from drseg_core.ops import graph_propagate
        >>> x, index = torch.tensor([[1.0], [3.0]]), torch.tensor([[0, 1], [1, 1]])
        >>> graph_propagate(x, index, torch.full((2, 2), 0.5)).tolist()
        [[2.0], [3.0]]
    """
    op = "graph_propagate"
    _checks.check_tensor(op, "x", x, ("B", "N", "C"))
    _checks.check_tensor(op, "index", index, ("B", "N", "K"), _checks.INDEX_DTYPES)
    _checks.check_tensor(op, "coefficient", coefficient, ("B", "N", "K"))
    _checks.check_same_device(op, x=x, index=index, coefficient=coefficient)
    _checks.check_no_tangent(op, x=x, coefficient=coefficient)
    _checks.check_flag(op, "transpose", transpose)
    _checks.check_flag(op, "validate", validate)
    _checks.check_shape(op, "coefficient", coefficient, tuple(index.shape), "the shape of index")
    if index.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"{op}: index does not match x; expected {tuple(x.shape[:-1])} before K, got {tuple(index.shape)}"
        )
    requested = requested_backend(op, backend)
    if validate:
        _checks.check_index_values(op, index, x.shape[-2])
    options = (transpose, *csc_of(op, csc, index, validate), requested)
    if x.dim() == 3:
        return registration.graph_propagate(x, index, coefficient, *options)
    return registration.graph_propagate(x[None], index[None], coefficient[None], *options)[0]
