# SPDX-License-Identifier: Apache-2.0
"""The parts of a score, and neighbours in the order of their scores."""

from __future__ import annotations

import oracle
import pytest
import torch
from contract import SMALL
from test_knn_graph import DTYPES, FORMS, backend

from drseg_core import ops
from drseg_core.ops.knn_graph import reference
from drseg_core.ops.knn_graph.cases import make_inputs
from drseg_core.testing import numerics

__all__ = ["backend"]


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_neighbours_in_the_order_of_their_scores(form, include_self):
    # entries of -1..1 in few dimensions: many equal scores
    prior = torch.randint(-1, 2, (2, 12, 4), generator=torch.Generator().manual_seed(0)).float()
    prior[1, 3] = torch.nan
    for k in (5, 14):
        given = {"decay": 0.0, "form": form, "include_self": include_self, "return_score": True, "pad": True}
        index, score = ops.knn_graph(prior, (3, 4), k, **given)
        found, ordered = ops.sort_by_score(index, score)
        for row, value, got, best in zip(
            *(t.flatten(0, 1).tolist() for t in (index, score, found, ordered)), strict=True
        ):
            # a node that is not finite has its own index in every slot
            if value[0] == value[0]:
                right = sorted(zip(value, row, strict=True), key=lambda pair: -pair[0])
                assert (best, got) == tuple(map(list, zip(*right, strict=True)))
                assert all(
                    a < b
                    for a, b, s, t in zip(got[:-1], got[1:], best[:-1], best[1:], strict=True)
                    if s == t > -torch.inf
                )
            else:
                assert got == row
        alone = ops.sort_by_score(index[0], score[0])
        assert torch.equal(alone[0], found[0]) and torch.equal(alone[1], ordered[0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_parts_of_a_score(dtype, form, backend):
    for case in SMALL:
        prior = make_inputs(case, dtype)["prior"]
        grid = make_inputs(case, dtype)["grid"]
        index, score = ops.knn_graph(prior, grid, 5, decay=0.7, form=form, return_score=True, pad=True)
        for given in (prior, ops.prepare_prior(prior)):
            cosine, spatial = ops.score_parts(given, grid, index, decay=0.7, form=form)
            real = score > -torch.inf
            assert cosine.dtype == spatial.dtype == score.dtype and not cosine.requires_grad
            joined = reference.combine(cosine, spatial, form)
            limit = numerics.affinity_tolerance(dtype)
            torch.testing.assert_close(joined[real], score[real], rtol=0, atol=limit)
        exact = oracle.scores(prior, grid, 0.0, "additive").gather(2, index.long())
        torch.testing.assert_close(cosine.double()[real], exact[real], rtol=0, atol=limit)
    cosine, spatial = ops.score_parts(prior[0], grid, index[0], decay=0.7, form=form)
    assert torch.equal(spatial, ops.score_parts(prior, grid, index, decay=0.7, form=form).spatial[0])
    assert ops.last_backend("graph_propagate") == backend


def test_the_spatial_part_is_the_distance_on_the_grid():
    index = torch.arange(12).expand(12, 12)
    spatial = ops.score_parts(torch.ones(12, 1), (3, 4), index, decay=2.0).spatial
    # from the cell (0, 0) to (2, 3), the longest way, and to (1, 0)
    assert spatial[0, 11] == 2.0 and spatial[0, 4] == torch.tensor(2 / 13**0.5) and (spatial == spatial.T).all()
    with pytest.raises(
        ValueError, match="^score_parts: grid does not match prior; expected h . w = N = 12, got 3 x 5$"
    ):
        ops.score_parts(torch.ones(12, 1), (3, 5), index)
    with pytest.raises(ValueError, match="^score_parts: index has the wrong shape; .* = .12, 3., got .11, 3.$"):
        ops.score_parts(torch.ones(12, 1), (3, 4), index[:11, :3])
    assert ops.score_parts(torch.ones(0, 1), (0, 4), index[:0]).spatial.shape == (0, 12)
