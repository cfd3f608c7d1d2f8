# SPDX-License-Identifier: Apache-2.0
"""What the native kernel of ``knn_graph`` alone has: registers and what fills none, parts of a batch, threads."""

from __future__ import annotations

import pytest
import torch
from test_knn_graph import select

from drseg_core import ops
from drseg_core.testing import dino_like_prior


@pytest.mark.promise("C10")
def test_equal_scores_are_equal_wherever_they_are_computed():
    """In whole registers and in those that are left over: a product that is not rounded before a subtraction shows."""
    nodes, table = 37, torch.full((1, 37), 0.7)
    for value in (0.1, 0.3, 0.7, 1.1, 1.3, 1.7, 2.3, 2.9):
        prior, inverse = torch.full((1, nodes, 3), value), torch.full((1, nodes), 1 / (value * 3**0.5))
        index, score = select(prior, inverse, table, nodes - 2, "additive", False, "native")
        for i in range(nodes):
            assert index[0, i].tolist() == [j for j in range(nodes) if j != i][: nodes - 2]
        assert score.unique().numel() == 1


@pytest.mark.promise("C7")
def test_more_images_than_there_is_room_for_scores():
    """The native kernel holds the scores of eight images of this size at a time."""
    prior = torch.randn(9, 32 * 32, 3, generator=torch.Generator().manual_seed(0))
    together = ops.knn_graph(prior, (32, 32), 3, backend="native")
    for image in (0, 7, 8):
        assert torch.equal(together[image], ops.knn_graph(prior[image], (32, 32), 3, backend="native"))


@pytest.mark.promise("C2")
@pytest.mark.parametrize(("grid", "channels"), [((33, 40), 8), ((44, 47), 100)], ids=["in blocks", "coarsely first"])
@pytest.mark.parametrize("k", [90, 400])
def test_a_decay_of_little_weight_orders_equal_rows(grid, channels, k):
    """Blocks of columns then differ in a hundredth of what no score exceeds, and those in a corner look far."""
    prior = torch.ones(1, grid[0] * grid[1], channels)
    options = {"decay": 0.01, "return_score": True}
    index, score = ops.knn_graph(prior, grid, k, backend="native", **options)
    expected, best = ops.knn_graph(prior, grid, k, backend="reference", **options)
    assert torch.equal(index, expected)
    torch.testing.assert_close(score, best, rtol=0, atol=1e-6)


@pytest.mark.promise("C24")
def test_large_grids_give_the_same_bits_for_any_threads():
    prior = dino_like_prior(1, 43, 50, 100, torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            found.append(ops.knn_graph(prior, (43, 50), 30, decay=2.0, return_score=True, backend="native"))
    finally:
        torch.set_num_threads(threads)
    for index, score in found[1:]:
        assert torch.equal(index, found[0][0]) and torch.equal(score, found[0][1])


@pytest.mark.promise("C24")
@pytest.mark.parametrize(("grid", "channels"), [((43, 50), 100), ((33, 35), 20), ((20, 30), 20)], ids=str)
@pytest.mark.parametrize("form", ["additive", "multiplicative"])
def test_some_rows_have_the_bits_that_they_have_among_all(grid, channels, form):
    """Searched coarsely first, searched in blocks, and all scores at once; rows end within blocks."""
    nodes = grid[0] * grid[1]
    options = {"decay": 2.0, "form": form, "include_self": False, "return_score": True, "backend": "native"}
    prior = dino_like_prior(2, *grid, channels, torch.Generator().manual_seed(0))
    whole = ops.knn_graph(prior, grid, 30, **options)
    for first, end in ((0, 8 * grid[1]), (101, 160), (nodes - 1, nodes)):
        some = ops.knn_graph(prior, grid, 30, rows=(first, end), **options)
        assert all(torch.equal(value, right[:, first:end]) for value, right in zip(some, whole, strict=True))
