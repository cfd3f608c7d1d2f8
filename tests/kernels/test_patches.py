# SPDX-License-Identifier: Apache-2.0
"""The grid in patches: every node once, windows within the grid, and bounds that no score exceeds."""

from __future__ import annotations

import pytest
import torch
from drseg_kernels import _patches
from drseg_kernels._patches import cut

from drseg_core.ops.knn_graph import reference

GRIDS = [(1, 1), (8, 8), (1, 97), (97, 1), (3, 40), (24, 24), (37, 41), (130, 9)]


@pytest.mark.parametrize("nodes", [16, 64, 128])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_node_is_in_one_patch_of_neighbours(grid, nodes):
    patches = cut(grid, nodes)
    order = patches.order(torch.device("cpu"))
    assert order.shape == (patches.count, nodes) and order.dtype == torch.int32
    assert order[order >= 0].sort().values.tolist() == list(range(grid[0] * grid[1]))
    for patch, row in enumerate(order.tolist()):
        for node in (node for node in row if node >= 0):
            y, x = node // grid[1] // patches.height, node % grid[1] // patches.width
            assert patch == y * patches.across + x


def test_patches_are_few_and_square_where_they_can_be():
    expected = {(64, 64): (8, 8), (1, 640): (1, 64), (640, 1): (64, 1), (4, 64): (4, 16), (128, 130): (8, 8)}
    assert {grid: (cut(grid, 64).height, cut(grid, 64).width) for grid in expected} == expected


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("wanted", [1, 300, 5000])
def test_windows_lie_in_the_grid_and_begin_with_the_patch_itself(wanted, grid):
    patches = cut(grid, 16)
    window = patches.window(wanted, 3)
    assert window[0] <= patches.down and window[1] <= patches.across
    assert window[0] * window[1] >= min(patches.count, -(-wanted // 16), 9) or min(window) < 3
    if wanted == 300 and patches.count >= 19:
        assert window[0] * window[1] >= 19
    for patch, (corner, own) in enumerate(patches.windows(window, torch.device("cpu")).tolist()):
        top, left = divmod(corner, patches.across)
        assert 0 <= top <= patches.down - window[0] and 0 <= left <= patches.across - window[1]
        assert patch == (top + own // window[1]) * patches.across + left + own % window[1]


@pytest.mark.parametrize("form", ["additive", "multiplicative", "product"])
@pytest.mark.parametrize("kind", ["falling", "any", "negative", "infinite"])
@pytest.mark.parametrize("grid", [(13, 17), (1, 70), (3, 40)], ids=str)
def test_no_score_exceeds_the_bound_of_its_patches(grid, kind, form):
    random = torch.Generator().manual_seed(0)
    nodes = grid[0] * grid[1]
    table = torch.rand(grid, generator=random) * 2 - (1 if kind == "negative" else 0)
    if kind == "falling":
        table = reference.decay_table(grid, 3.0, form, torch.float32, torch.device("cpu"))
    elif kind == "infinite":
        table[grid[0] // 2 :, grid[1] // 3 :] = torch.inf
    prior, inverse = reference.prepare_prior(torch.randn(1, nodes, 200, generator=random))
    # equal rows have the largest cosine, rounded up for some
    prior[0, : nodes // 2] = prior[0, 0]
    inverse[0, : nodes // 2] = inverse[0, 0]
    inverse[0, 7] = torch.nan
    patches = cut(grid, 16)
    length = _patches.lengths(prior, inverse)
    longest = patches.longest(length) * _patches.slack(200)
    reach = patches.reach(table, form == "additive")
    node = torch.arange(nodes)
    y, x = node // grid[1], node % grid[1]
    patch = y // patches.height * patches.across + x // patches.width
    down = (y // patches.height)[:, None] - (y // patches.height)
    right = (x // patches.width)[:, None] - (x // patches.width)
    near = reach[down.abs(), right.abs()]
    bound = length[0, :, None] * longest[0, patch]
    bound = bound - near if form == "additive" else bound * near
    cosine = prior[0] @ prior[0].T * inverse[0, :, None] * inverse[0]
    score = reference.combine(cosine, table[(y[:, None] - y).abs(), (x[:, None] - x).abs()], form)
    assert not (bound < score).any()
    if kind == "falling":
        # and it is near enough to rule something out
        assert (bound < score.nan_to_num(nan=-9).max(dim=1, keepdim=True).values - 0.2).any()


def test_the_longest_row_of_a_patch_counts_and_a_bad_one_does_not():
    length = torch.rand(2, 5 * 7)
    length[1, 11] = torch.inf
    patches = cut((5, 7), 16)
    order = patches.order(length.device).long()
    expected = torch.where(order >= 0, length[:, order.clamp_min(0)], 0).amax(-1)
    assert torch.equal(patches.longest(length), expected)
    prior = torch.full((1, 3, 4), 3e38)
    prior[0, 1] = torch.nan
    inverse = torch.tensor([[0.0, torch.nan, 1.0]])
    assert _patches.lengths(prior, inverse).tolist() == [[torch.inf, 0.0, torch.inf]]
    half = torch.full((1, 1, 4), 6e4, dtype=torch.float16)
    assert _patches.lengths(half, torch.full((1, 1), 1 / 1.2e5)).item() == pytest.approx(1, abs=1e-3)
