# SPDX-License-Identifier: Apache-2.0
"""The order and the parts of the scores of ``knn_graph``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from drseg_core.ops import _checks
from drseg_core.ops._dispatch import requested_backend
from drseg_core.ops._registration import widest
from drseg_core.ops.knn_graph import reference
from drseg_core.ops.knn_graph.api import FORMS, Form
from drseg_core.ops.prepare_prior.api import PreparedPrior, prepare_prior, rows_of


class ScoreParts(NamedTuple):
    """What the scores of ``knn_graph`` are made of; see ``score_parts``.

    Args:
        cosine: (B, N, K) or (N, K) cosines of the features of both ends of an edge.
        spatial: same shape, the term of the distance. It is subtracted from the cosine (``additive``, ``gauss``), or
            multiplied with it (``multiplicative``, ``product``).

    Examples:
        >>> import torch
        >>> from drseg_core.ops import knn_graph, score_parts
        >>> parts = score_parts(torch.eye(2), (1, 2), torch.tensor([[0, 1], [0, 1]]), decay=0.5)
        >>> parts.cosine.tolist(), parts.spatial.tolist()
        ([[1.0, 0.0], [0.0, 1.0]], [[0.0, 0.5], [0.5, 0.0]])
    """

    cosine: Tensor
    spatial: Tensor


def sort_by_score(index: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbours from the best to the worst; ``knn_graph`` lists them by index.

    Args:
        index: (B, N, K) or (N, K) neighbour indices of ``knn_graph``.
        score: their scores, of the same shape.

    Returns:
        Both in descending score. Equal scores keep their order, which is by ascending index. Padding comes last.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.

    Examples:
        >>> import torch
        >>> from drseg_core.ops import sort_by_score
        >>> index, score = sort_by_score(torch.tensor([[0, 2, 5]]), torch.tensor([[0.1, 0.9, 0.1]]))
        >>> index.tolist()
        [[2, 0, 5]]
    """
    op = "sort_by_score"
    _checks.check_tensor(op, "index", index, ("B", "N", "K"), _checks.INDEX_DTYPES)
    _checks.check_tensor(op, "score", score, ("B", "N", "K"))
    _checks.check_same_device(op, index=index, score=score)
    _checks.check_shape(op, "score", score, tuple(index.shape), "the shape of index")
    ordered, place = score.sort(dim=-1, descending=True, stable=True)
    return index.gather(-1, place), ordered


def score_parts(
    prior: Tensor | PreparedPrior,
    grid: tuple[int, int],
    index: Tensor,
    *,
    decay: float = 1.0,
    form: Form = "additive",
    backend: str | None = None,
) -> ScoreParts:
    """Cosine and spatial term of every edge of a graph on a grid (arXiv 2604.02010, Eq. 7).

    ``knn_graph`` joins them: its score is ``cosine - spatial`` (``additive``, ``gauss``), ``max(cosine, 0) * spatial``
    (``multiplicative``) or ``cosine * spatial`` (``product``), up to the rounding of a sum.

    Args:
        prior: (B, N, D) or (N, D) features, or what ``prepare_prior`` made of them.
        grid: (h, w) with ``h * w = N``.
        index: (B, N, K) or (N, K) neighbour indices, int32 or int64; any indices.
        decay, form: as in ``knn_graph``.
        backend: one of ``backend_names()``; None takes the best that can run.

    Returns:
        Both of the shape of ``index``, float32 (float64 for float64 features), without gradients. A padded slot has
        the terms of the node with itself. Nothing of size N x N or N x K x D is made.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range.
        BackendUnavailableError: the named backend cannot run here.

    Examples:
        >>> import torch
        >>> from drseg_core.ops import knn_graph, score_parts
        >>> prior = torch.randn(6, 4)
        >>> index, score = knn_graph(prior, (2, 3), 3, return_score=True)
        >>> cosine, spatial = score_parts(prior, (2, 3), index)
        >>> torch.allclose(cosine - spatial, score, atol=1e-5)
        True
    """
    op = "score_parts"
    rows = rows_of(op, prior)
    _checks.check_tensor(op, "index", index, ("B", "N", "K"), _checks.INDEX_DTYPES)
    _checks.check_same_device(op, prior=rows, index=index)
    _checks.check_shape(op, "index", index, (*rows.shape[:-1], index.shape[-1]), "the shape of prior before K")
    height, width = _checks.check_grid(op, grid, rows.shape[-2])
    decay = _checks.check_number(op, "decay", decay)
    _checks.check_choice(op, "form", form, FORMS)
    requested = requested_backend("graph_propagate", backend)
    prepared = prior if isinstance(prior, PreparedPrior) else prepare_prior(prior, backend=backend)
    unit = prepared.scaled.to(prepared.inverse_norm.dtype) * prepared.inverse_norm.unsqueeze(-1)
    batched = (unit, index) if index.dim() == 3 else (unit[None], index[None])
    # the gradient of a sum along edges to its coefficients consists of these products
    none = unit.new_zeros(batched[1].shape)
    given = (batched[0], *batched, none, False, [False, True], None, None, requested)
    cosine = torch.ops.drseg.graph_propagate_backward(*given)[1].view(index.shape)
    table = reference.decay_table((height, width), float(decay), form, widest(rows), rows.device)
    own = torch.arange(height * width, device=index.device)[:, None]
    other = index.long().clamp(0, max(height * width - 1, 0))
    step = max(width, 1)
    return ScoreParts(cosine, table[(own // step - other // step).abs(), (own % step - other % step).abs()])
