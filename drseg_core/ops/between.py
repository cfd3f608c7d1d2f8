# SPDX-License-Identifier: Apache-2.0
"""Neighbours of one set of features in another, by the kernels of ``knn_graph``."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from drseg_core.ops import _checks, _dispatch
from drseg_core.ops._dispatch import requested_backend
from drseg_core.ops.knn_graph import reference
from drseg_core.ops.prepare_prior.api import PreparedPrior, prepare_prior

_LAST = torch.iinfo(torch.int32).max


@overload
def knn_between(
    query: Tensor,
    prior: Tensor,
    k: int,
    *,
    return_score: Literal[False] = ...,
    pad: bool = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def knn_between(
    query: Tensor, prior: Tensor, k: int, *, return_score: Literal[True], pad: bool = ..., backend: str | None = ...
) -> tuple[Tensor, Tensor]: ...


def knn_between(
    query: Tensor, prior: Tensor, k: int, *, return_score: bool = False, pad: bool = False, backend: str | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """The k rows of ``prior`` with the highest cosine for every row of ``query``, equal ones by ascending index.

    Both sets are laid out as the two rows of one grid, N rows of the query at a time. ``knn_graph`` then chooses from
    the other row of the grid. So it runs on every backend that has ``knn_graph``. It computes four times the scores
    that are needed: 4 N M, or 4 N^2 for a smaller query. It never stores all M x N of them.

    Args:
        query: (B, M, D) or (M, D) features, float32, float64, float16 or bfloat16; need not be normalised.
        prior: (B, N, D) or (N, D) in the same dtype, on the same device.
        k: neighbours per row of the query, at most N unless ``pad``.
        return_score: return the cosines too.
        pad: fill up with -1 if there are fewer than k candidates.
        backend: one of ``backend_names()``; None takes the best that can run.

    Returns:
        ``index`` (B, M, k) int32 into the rows of ``prior``, each row ascending with its padding last. With
        ``return_score`` also ``score`` (B, M, k), float32 (float64 for float64 features), ``-inf`` in padded slots.
        Neither carries a gradient.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range.
        BackendUnavailableError: the named backend cannot run here.

    Note:
        A row of the prior that is not finite is never chosen. A row of the query that is not finite has -1 in all
        slots, with score NaN. Slots without a candidate are padded.

    Examples:
        >>> import torch
        >>> from drseg_core.ops import knn_between
        >>> prior = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> knn_between(torch.tensor([[2.0, 0.1], [0.1, 2.0]]), prior, 2).tolist()
        [[0, 2], [1, 2]]
    """
    op = "knn_between"
    _checks.check_tensor(op, "query", query, ("B", "M", "D"))
    _checks.check_tensor(op, "prior", prior, ("B", "N", "D"))
    _checks.check_same_device(op, query=query, prior=prior)
    if query.dtype != prior.dtype:
        raise TypeError(f"{op}: prior has another dtype than query; expected {query.dtype}, got {prior.dtype}")
    expected = (*query.shape[:-2], prior.shape[-2], query.shape[-1])
    _checks.check_shape(op, "prior", prior, expected, "B and D of query")
    if query.shape[-1] == 0:
        raise ValueError(f"{op}: query has no channels; expected D >= 1, got shape {tuple(query.shape)}")
    k = _checks.check_count(op, "k", k)
    _checks.check_flag(op, "return_score", return_score)
    _checks.check_flag(op, "pad", pad)
    if not pad and k > prior.shape[-2]:
        raise ValueError(
            f"{op}: k exceeds the candidates; expected k <= N = {prior.shape[-2]}, got {k}: pass pad=True or lower k"
        )
    requested = requested_backend("knn_graph", backend)
    if not torch.compiler.is_compiling():
        # if the named backend cannot run, the error is about the choice, not about the preparation
        _dispatch.resolve("knn_graph", query, requested, {"nodes": 2 * prior.shape[-2]})
    many = query.dim() == 3
    given = [prepare_prior(value if many else value[None], backend=backend) for value in (query, prior)]
    batch, rows, candidates = given[0].scaled.shape[0], query.shape[-2], prior.shape[-2]
    if batch * rows * candidates * k == 0:
        index = torch.full((batch, rows, k), -1, dtype=torch.int32, device=query.device)
        score = given[0].inverse_norm.new_full((batch, rows, k), -torch.inf)
        score = score.masked_fill(given[0].inverse_norm.isnan()[:, :, None], torch.nan)
    else:
        both = _side_by_side(*given)
        if return_score:
            both = both._replace(rounded=None, residual=None)
        # of each grid the query's row alone
        options = (2, candidates, k, 0.0, reference.ACROSS, False, requested, None, [0, candidates])
        found, values = torch.ops.drseg.knn_graph(*both, *options)
        # back in its samples
        index, score = (value.reshape(batch, -1, k)[:, :rows] for value in (found, values))
        # what is in its own row a node takes where the other has nothing left
        own = index < candidates
        index, place = torch.where(own, _LAST, index - candidates).sort(dim=-1, stable=True)
        score = torch.where(own & ~score.isnan(), -torch.inf, score).gather(-1, place)
        index = index.masked_fill(index == _LAST, -1)
    index, score = (index, score) if many else (index[0], score[0])
    return (index, score) if return_score else index


def _side_by_side(query: PreparedPrior, prior: PreparedPrior) -> PreparedPrior:
    """Grids (2, N) of N rows of the query, above, and the prior, below; (B * ceil(M / N), 2 N, ...) of each field."""
    rows, candidates = query.scaled.shape[1], prior.scaled.shape[1]
    grids = -(-rows // candidates)
    fields: list[Tensor | None] = []
    for name, above, below in zip(query._fields, query, prior, strict=True):
        if above is None or below is None:
            fields.append(None)
            continue
        # padding of the last grid lies in the query's row, which is never chosen from, and chooses nothing
        shape: Any = (above.shape[0], grids * candidates - rows, *above.shape[2:])
        padding = above.new_full(shape, torch.nan if name == "inverse_norm" else 0.0)
        above = torch.cat([above, padding], dim=1).unflatten(1, (grids, candidates)).flatten(0, 1)
        fields.append(torch.cat([above, below.repeat_interleave(grids, dim=0)], dim=1))
    return PreparedPrior(*fields)  # type: ignore[arg-type]
