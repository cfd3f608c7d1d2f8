# SPDX-License-Identifier: Apache-2.0
"""Public function of the op; validates and hands over to a backend."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from drseg_core.ops import _checks
from drseg_core.ops._dispatch import requested_backend
from drseg_core.ops.csc.api import Csc, csc_of
from drseg_core.ops.degree_normalize import registration

# a row without weights has gradients of order eps**-1.5, which must stay finite in float32
SMALLEST_EPS = 1e-20

NORMS = ("sym_row", "sym_count", "sym_inout", "row", "sym_undirected")

Norm = Literal["sym_row", "sym_count", "sym_inout", "row", "sym_undirected"]


def degree_normalize(
    weight: Tensor,
    index: Tensor,
    *,
    norm: Norm = "sym_row",
    eps: float = 1e-6,
    csc: Csc | None = None,
    validate: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Propagation coefficients from edge weights and degrees (arXiv 2604.02010, Eq. 9).

    Here ``j = index_ik``. ``row_i`` is the sum of the weights that leave node i, ``column_j`` the sum of the weights
    that end in node j.

    * ``sym_row``: ``w_ik / sqrt((row_i + eps) (row_j + eps))``,
    * ``sym_count``: ``w_ik / K``, the degree being the number of slots,
    * ``sym_inout``: ``w_ik / sqrt((row_i + eps) (column_j + eps))``,
    * ``row``: ``w_ik / (row_i + eps)``, so that each row sums to one,
    * ``sym_undirected``: ``w_ik / (2 sqrt((d_i + eps) (d_j + eps)))`` with ``d = (row + column) / 2``: half of the
      normalised (W + W^T) / 2. The other half is its transpose, so the whole operator is
      ``graph_propagate(x, ...) + graph_propagate(x, ..., transpose=True)``.

    Args:
        weight: (B, N, K) or (N, K) edge weights >= 0; float32, float64, float16 or bfloat16.
        index: same shape, neighbour indices, int32 or int64.
        norm: see above.
        eps: added to every degree, at least 1e-20: gradients of a row of zeros grow as ``eps**-1.5``.
        csc: ``csc(index)``, for degrees of incoming edges and for gradients; None makes it in every call.
        validate: refuse negative or non-finite weights and indices outside [0, N) (synchronises a GPU).
        backend: one of ``backend_names()``; None takes the best that can run.

    Returns:
        (B, N, K) coefficients, float32 (float64 for float64 weights). Differentiable once to ``weight``. Where
        the degree of a node leaves the range of that dtype, the coefficients of its edges are 0.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range.
        NumericalError: ``validate`` found a negative or non-finite weight.
        BackendUnavailableError: the named backend cannot run here.

    Examples:
        >>> import torch
        >>> from drseg_core.ops import degree_normalize
        >>> weight, index = torch.tensor([[1.0, 3.0], [2.0, 2.0]]), torch.tensor([[0, 1], [0, 1]])
        >>> degree_normalize(weight, index)[0].round(decimals=4).tolist()
        [0.25, 0.75]
    """
    op = "degree_normalize"
    _checks.check_tensor(op, "weight", weight, ("B", "N", "K"))
    _checks.check_tensor(op, "index", index, ("B", "N", "K"), _checks.INDEX_DTYPES)
    _checks.check_same_device(op, weight=weight, index=index)
    _checks.check_no_tangent(op, weight=weight)
    _checks.check_shape(op, "index", index, tuple(weight.shape), "the shape of weight")
    _checks.check_choice(op, "norm", norm, NORMS)
    eps = _checks.check_number(op, "eps", eps, positive=True)
    if eps < SMALLEST_EPS:
        raise ValueError(f"{op}: eps is too small; expected eps >= {SMALLEST_EPS}, got {eps}")
    _checks.check_flag(op, "validate", validate)
    requested = requested_backend(op, backend)
    if validate:
        _checks.check_index_values(op, index, index.shape[-2])
        _checks.check_weight_values(op, weight)
    options = (norm, eps, *csc_of(op, csc, index, validate), requested)
    if weight.dim() == 3:
        return registration.degree_normalize(weight, index, *options)
    return registration.degree_normalize(weight[None], index[None], *options)[0]
