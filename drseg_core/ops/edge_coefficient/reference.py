# SPDX-License-Identifier: Apache-2.0
"""What ``edge_coefficient`` means: ``edge_weight``, then ``degree_normalize``; so of any backend that has the two."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from drseg_core.ops.degree_normalize import reference as degree_normalize
from drseg_core.ops.edge_weight import reference as edge_weight

# scales that a kernel's backward needs: inverse roots of the degrees, one per node or one for each end of an edge
ENDS = {"sym_row": 1, "sym_undirected": 1, "sym_inout": 2, "row": 0, "sym_count": 0}


Run = Callable[..., tuple[Tensor, ...]]


def compose(
    edge: tuple[Callable[..., Tensor], Run], degree: tuple[Callable[..., Tensor], Callable[..., Tensor]]
) -> tuple[Run, Run]:
    """Forward and backward from those of ``edge_weight`` and of ``degree_normalize``."""

    def forward(
        source: Tensor,
        target: Tensor,
        index: Tensor,
        vector: Tensor,
        bias: Tensor,
        mask: Tensor | None,
        norm: str,
        eps: float,
        csc: tuple[Tensor, Tensor] | None = None,
        exponent: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Coefficients and weights (B, N, K), and scales (S, B, N) with S from ``ENDS``, which are not used here.

        ``csc`` are ``indptr`` and ``perm`` of the graph's columns, if they are known.
        """
        weight = edge[0](source, target, index, vector, bias, mask, *() if exponent is None else (exponent,))
        coefficient = degree[0](weight, index, norm, eps, csc)
        return coefficient, weight, weight.new_zeros(ENDS[norm], *index.shape[:2])

    def backward(
        grad: Tensor,
        weight: Tensor,
        scale: Tensor,
        source: Tensor,
        target: Tensor,
        index: Tensor,
        vector: Tensor,
        bias: Tensor,
        norm: str,
        eps: float,
        output_mask: Sequence[bool],
        csc: tuple[Tensor, Tensor] | None = None,
        exponent: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        grad_weight = degree[1](grad, weight, index, norm, eps, csc)
        given = (grad_weight, weight, source, target, index, vector, bias, output_mask, csc)
        return edge[1](*given) if exponent is None else edge[1](*given, exponent)

    return forward, backward


edge_coefficient, edge_coefficient_backward = compose(
    (edge_weight.edge_weight, edge_weight.edge_weight_backward),
    (degree_normalize.degree_normalize, degree_normalize.degree_normalize_backward),
)
