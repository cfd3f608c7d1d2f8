# SPDX-License-Identifier: Apache-2.0
"""Public function of the op; validates and hands over to a backend."""

from __future__ import annotations

from torch import Tensor

from drseg_core.ops import _checks
from drseg_core.ops._dispatch import requested_backend
from drseg_core.ops.csc.api import Csc, csc_of
from drseg_core.ops.edge_weight import registration


def edge_weight(
    source: Tensor,
    target: Tensor | None,
    index: Tensor,
    vector: Tensor,
    bias: Tensor,
    *,
    inverse_norm: Tensor | None = None,
    source_bias: Tensor | None = None,
    mask: Tensor | None = None,
    score: Tensor | None = None,
    exponent: Tensor | None = None,
    csc: Csc | None = None,
    validate: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Weight of every edge by a two-layer MLP with softplus output (arXiv 2604.02010, Eq. 8).

    ``w_ik = softplus(vector . relu(source_i + target_j) + bias)`` with ``j = index_ik``. The first layer of
    ``MLP([d_i || d_j])`` is linear. So its two halves are computed once per node (``source = d W_a^T + b``,
    ``target = d W_b^T``), and the concatenation of every edge never exists.

    Args:
        source: (B, N, E) or (N, E), half of the first layer for the node itself; float32, float64, float16, bfloat16.
        target: same shape, half for the neighbour. None means that ``source`` (..., 2E) holds both, one after the
            other.
        index: (B, N, K) or (N, K) neighbour indices, int32 or int64; any indices, repeated ones too.
        vector: (E,) second layer, or (1, E), the weight of ``nn.Linear(E, 1)``.
        bias: () or (1,), the bias of the second layer.
        inverse_norm: (B, N) or (N,), float32 or float64. Both halves of a node are multiplied by it. So halves of
            unnormalised features become those of normalised ones. It gets no gradient.
        source_bias: (E,), bias of the first layer, added to ``source`` after ``inverse_norm`` is applied.
        mask: bool, shape of ``index``; where False the weight is 0 without gradient. It is NaN where the features of
            either end are not finite: a mask does not hide those.
        score: the scores of ``knn_graph`` in place of a mask, shape of ``index``; a slot with ``-inf`` is padding.
        exponent: shape of ``index``, float32 or float64; multiplies the weight by its exponential. What padding has
            does not matter. Elsewhere NaN makes the weight NaN and ``-inf`` makes it 0. Above 88 (of float32) it is
            infinite, or NaN where the weight without it is 0 in float32. A weight of 0 has no gradient.
        csc: ``csc(index)``, for the gradient to ``target``; None makes it in every backward.
        validate: refuse indices outside [0, N) (synchronises a GPU); otherwise they are clamped into it.
        backend: one of ``backend_names()``; None takes the best that can run.

    Returns:
        (B, N, K) weights >= 0, float32 (float64 if an input is), because half precision would underflow to 0.
        Differentiable once to ``source``, ``target``, ``vector``, ``bias``, ``source_bias`` and ``exponent``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range.
        BackendUnavailableError: the named backend cannot run here.

    Examples:
        >>> import torch
        >>> from drseg_core.ops import edge_weight
        >>> half, index = torch.zeros(2, 4), torch.tensor([[0, 1], [1, 0]])
        >>> edge_weight(half, half, index, torch.ones(4), torch.zeros(1))[0].tolist()  # softplus(0) = log 2
        [0.6931471824645996, 0.6931471824645996]
        >>> distance = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> near = edge_weight(half, half, index, torch.ones(4), torch.zeros(1), exponent=-distance)
        >>> near[0].double().round(decimals=4).tolist()  # log 2, and log 2 / e
        [0.6931, 0.255]
    """
    op = "edge_weight"
    vector = _checks.check_edges(
        op, source, target, index, vector, bias, inverse_norm, source_bias, mask, score, exponent
    )
    _checks.check_flag(op, "validate", validate)
    requested = requested_backend(op, backend)
    if validate:
        _checks.check_index_values(op, index, source.shape[-2])
    options = (*csc_of(op, csc, index, validate), requested)
    mask = mask if score is None else score
    if source.dim() == 3:
        given = (source, target, index, vector, bias, inverse_norm, source_bias, mask)
        return registration.edge_weight(*given, *options, exponent)
    per_node = (target, inverse_norm, mask, exponent)
    target, inverse_norm, mask, exponent = (None if value is None else value[None] for value in per_node)
    given = (source[None], target, index[None], vector, bias, inverse_norm, source_bias, mask)
    return registration.edge_weight(*given, *options, exponent)[0]
