# SPDX-License-Identifier: Apache-2.0
"""Public function of the op; validates and hands over to a backend."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from drseg_core.ops import _checks, _edges
from drseg_core.ops._dispatch import requested_backend
from drseg_core.ops.csc.api import Csc, csc_of
from drseg_core.ops.edge_coefficient import registration

# a row without weights has gradients of order eps**-1.5, which must stay finite in float32
SMALLEST_EPS = 1e-20

NORMS = ("sym_row", "sym_count", "sym_inout", "row", "sym_undirected")

Norm = Literal["sym_row", "sym_count", "sym_inout", "row", "sym_undirected"]


@overload
def edge_coefficient(
    source: Tensor,
    target: Tensor | None,
    index: Tensor,
    vector: Tensor,
    bias: Tensor,
    *,
    inverse_norm: Tensor | None = ...,
    source_bias: Tensor | None = ...,
    mask: Tensor | None = ...,
    score: Tensor | None = ...,
    exponent: Tensor | None = ...,
    norm: Norm = ...,
    eps: float = ...,
    apart: Literal[False] = ...,
    csc: Csc | None = ...,
    validate: bool = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def edge_coefficient(
    source: Tensor,
    target: Tensor | None,
    index: Tensor,
    vector: Tensor,
    bias: Tensor,
    *,
    inverse_norm: Tensor | None = ...,
    source_bias: Tensor | None = ...,
    mask: Tensor | None = ...,
    score: Tensor | None = ...,
    exponent: Tensor | None = ...,
    norm: Norm = ...,
    eps: float = ...,
    apart: Literal[True],
    csc: Csc | None = ...,
    validate: bool = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor | None]: ...


def edge_coefficient(
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
    norm: Norm = "sym_row",
    eps: float = 1e-6,
    apart: bool = False,
    csc: Csc | None = None,
    validate: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor | None]:
    """``edge_weight``, then ``degree_normalize``, in one op (arXiv 2604.02010, Eq. 8 and 9).

    A backend without a kernel for both runs its two ops.

    Args:
        source: (B, N, E) or (N, E), half of the edge MLP's first layer for the node itself; float32, float64, float16
            or bfloat16.
        target: same shape, half for the neighbour. None means that ``source`` (..., 2E) holds both.
        index: (B, N, K) or (N, K) neighbour indices, int32 or int64; any indices, repeated ones too.
        vector: (E,) second layer, or (1, E), the weight of ``nn.Linear(E, 1)``.
        bias: () or (1,), the bias of the second layer.
        inverse_norm, source_bias: as in ``edge_weight``.
        mask: bool, shape of ``index``; where False the weight is 0 without gradient. It is NaN where the features of
            either end are not finite: a mask does not hide those.
        score: the scores of ``knn_graph`` in place of a mask, shape of ``index``; a slot with ``-inf`` is padding.
        exponent: as in ``edge_weight``. A weight that is infinite makes coefficients NaN.
        norm: see ``degree_normalize``.
        eps: added to every degree, at least 1e-20: gradients of a row of zeros grow as ``eps**-1.5``.
        apart: return a pair for ``graph_layer``. If a kernel can leave the scales to that op, which saves a pass over
            the edges, the pair is weights and scales (B, N). Otherwise it is coefficients and None. The second one is
            the ``scale`` of ``graph_layer``. Use the pair for nothing else, because a gradient to the weights goes
            through the scales too.
        csc: ``csc(index)``, for degrees of incoming edges and for gradients; None makes it in every call.
        validate: refuse indices outside [0, N) (synchronises a GPU); otherwise they are clamped into it.
        backend: one of ``backend_names()``; None takes the best that can run.

    Returns:
        (B, N, K) coefficients, float32 (float64 if an input is). Differentiable once to ``source``, ``target``,
        ``vector``, ``bias``, ``source_bias`` and ``exponent``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range.
        BackendUnavailableError: the named backend cannot run here.

    Examples:
        >>> import torch
        >>> from drseg_core.ops import edge_coefficient
        >>> half, index = torch.zeros(2, 4), torch.tensor([[0, 1], [1, 0]])
        >>> edge_coefficient(half, half, index, torch.ones(4), torch.zeros(1), norm="row")[0].round(decimals=4).tolist()
        [0.5, 0.5]
    """
    op = "edge_coefficient"
    vector = _checks.check_edges(
        op, source, target, index, vector, bias, inverse_norm, source_bias, mask, score, exponent
    )
    _checks.check_choice(op, "norm", norm, NORMS)
    eps = _checks.check_number(op, "eps", eps, positive=True)
    if eps < SMALLEST_EPS:
        raise ValueError(f"{op}: eps is too small; expected eps >= {SMALLEST_EPS}, got {eps}")
    _checks.check_flag(op, "apart", apart)
    _checks.check_flag(op, "validate", validate)
    requested = requested_backend(op, backend)
    if validate:
        _checks.check_index_values(op, index, source.shape[-2])
    halves = (source, target, inverse_norm, source_bias)
    leaves = apart and norm == "sym_row" and _edges.takes_raw(op, halves, vector, bias, exponent, requested)
    options = (norm, eps, leaves, *csc_of(op, csc, index, validate), requested)
    mask = mask if score is None else score
    if source.dim() == 3:
        given = (source, target, index, vector, bias, inverse_norm, source_bias, mask)
        found, _, scales = registration.edge_coefficient(*given, *options, exponent)
        scale = scales[0] if leaves else None
    else:
        per_node = (target, inverse_norm, mask, exponent)
        target, inverse_norm, mask, exponent = (None if value is None else value[None] for value in per_node)
        given = (source[None], target, index[None], vector, bias, inverse_norm, source_bias, mask)
        found, _, scales = registration.edge_coefficient(*given, *options, exponent)
        found, scale = found[0], scales[0, 0] if leaves else None
    return (found, scale) if apart else found
