# SPDX-License-Identifier: Apache-2.0
"""The selection contract for large images, whose tiles are made where they can matter; ``test_interpreter.py`` runs it,
or ``--gpu``. Small images stand for large ones: what counts as large is a size of the launch."""

from __future__ import annotations

import os

import contract_knn_graph
import oracle
import pytest
import torch
from contract_knn_rounded import against_each_other, copies
from drseg_kernels import knn_graph as kernels
from drseg_kernels import knn_live
from drseg_kernels._launch import Live, Selection
from drseg_kernels.prepare_prior import prepare_prior
from torch import Tensor

from drseg_core.ops.knn_graph import reference
from drseg_core.testing import dino_like_prior, numerics

# all images of more nodes than this are large
SMALL = Selection(tile_bytes=64, block_m=1, block_n=4, num_warps=1)
# blocks of rows and of columns alike, the one larger, the other larger
BLOCKS = [Live(16, 32, 16, 4, 3), Live(32, 16, 32, 4, 1), Live(16, 16, 16, 1, 2), Live(64, 128, 32, 4, 2)]


@pytest.fixture(autouse=True)
def device(request):
    on_gpu = request.config.getoption("--gpu")
    assert on_gpu or os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1, or pass --gpu"
    return "cuda" if on_gpu else "cpu"


def choose(
    prior: Tensor,
    grid: tuple[int, int],
    k: int,
    decay: float,
    device: str,
    *,
    form: str = "additive",
    radius: float | None = None,
    include_self: bool = True,
    rows: tuple[int, int] | None = None,
    live: Live | None = BLOCKS[0],
) -> tuple[Tensor, Tensor, Tensor]:
    """The choice, that of the reference, and how many scores of a row were computed again."""
    rounds = prior.dtype == torch.float32
    scaled, inverse, short, residual = prepare_prior(prior.to(device), rounds)
    table = reference.decay_table(grid, decay, form, torch.float32, scaled.device, radius)
    begin, end = rows or (0, prior.shape[1])
    counts = torch.full((len(prior), end - begin), -1, dtype=torch.int32, device=device)
    given = (scaled, inverse, table, k, form, include_self)
    rounded = (short, residual) if rounds else ()
    found, _ = kernels.knn_graph(*given, *rounded, rows=rows, sizes=SMALL, live=live, counts=counts)
    return found.cpu(), reference.knn_graph(*given, rows=rows)[0].cpu(), counts.cpu()


def prepared(batch: int, grid: tuple[int, int], channels: int, device: str, seed: int = 0) -> tuple[Tensor, ...]:
    """Integer features shorter than three, over four: scores are exact in any order, and full of ties. Any decay
    from cell to cell, and one node is not finite."""
    prior, inverse, table = contract_knn_graph.prepared(batch, grid, channels, device, seed)
    return prior, inverse / 4, table


def check_bits(given: tuple[Tensor, ...], k: int, include_self: bool, live: Live, rows: tuple[int, int] | None = None):
    """Of integers, whose products are exact in any order and which lose nothing: indices and scores."""
    prior, inverse, _ = given
    expected = reference.knn_graph(*given, k, "additive", include_self, rows=rows)
    rounded = (prior.half(), torch.zeros_like(inverse))
    got = kernels.knn_graph(*given, k, "additive", include_self, *rounded, rows=rows, sizes=SMALL, live=live)
    for value, right in zip(got, expected, strict=True):
        torch.testing.assert_close(value, right, rtol=0, atol=0, equal_nan=True)


# full of ties, with any decay from cell to cell and a node that is not finite
@pytest.mark.promise("C2", "C10")
@pytest.mark.parametrize("k", [5, 1, 14, 35, 36])
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("live", BLOCKS, ids=str)
@pytest.mark.parametrize("grid", [(3, 12), (12, 3), (1, 120), (120, 1), (10, 13), (2, 3)], ids=str)
def test_ties_in_every_configuration(grid, live, include_self, k, device):
    k = min(k, grid[0] * grid[1])
    check_bits(prepared(2, grid, 8, device), k, include_self, live)


@pytest.mark.promise("C2")
@pytest.mark.parametrize("rows", [(7, 133), (0, 5), (139, 140), (4, 4)], ids=str)
@pytest.mark.parametrize("live", BLOCKS[:3], ids=str)
@pytest.mark.parametrize("k", [5, 17])
def test_some_rows(k, live, rows, device):
    check_bits(prepared(3, (7, 20), 8, device), k, False, live, rows)


@pytest.mark.parametrize("rows", [None, (7, 47)], ids=str)
def test_images_that_share_no_launch(rows, device, monkeypatch):
    """Lists of so many bytes live at a time; one image's rows are alike, and have none."""
    given = prepared(5, (5, 12), 8, device)
    given[0][2] = 1
    monkeypatch.setattr(knn_live, "LARGEST_GRID_Y", 2)
    check_bits(given, 5, True, BLOCKS[2], rows)
    monkeypatch.setattr(knn_live, "_LIST_BYTES", 1)
    check_bits(given, 5, False, BLOCKS[0], rows)


def test_the_longest_lists(device):
    check_bits(prepared(1, (3, 84), 8, device), 240, True, BLOCKS[0], (30, 40))


@pytest.mark.parametrize("grid", [(9, 7), (1, 60), (60, 1)], ids=str)
@pytest.mark.parametrize("k", [6, 1, 63])
@pytest.mark.parametrize("decay", [4.0, 0.0, 1.0])
@pytest.mark.parametrize("form", ["additive", "gauss"])
@pytest.mark.parametrize("include_self", [True, False])
def test_the_choice_is_that_of_float32(include_self, form, decay, k, grid, device):
    nodes = grid[0] * grid[1]
    prior = dino_like_prior(2, *grid, 48, torch.Generator().manual_seed(0))
    options = {"form": form, "include_self": include_self}
    found, expected, _ = choose(prior, grid, min(k, nodes), decay, device, **options)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("live", BLOCKS[:3], ids=str)
@pytest.mark.parametrize("grid", [(9, 10), (1, 70), (70, 1)], ids=str)
def test_the_nearest_of_equal_rows_lie_in_other_blocks(grid, live, device):
    # products are exact, and what is left of a cosine's rounding is less than a step of the decay
    prior = torch.full((1, grid[0] * grid[1], 16), 0.5)
    for k in (2, 5, 9):
        found, expected, _ = choose(prior, grid, k, 30.0, device, live=live)
        assert torch.equal(found, expected)


def test_a_far_copy_beats_what_is_near(device):
    nodes = 200
    prior = torch.eye(nodes)
    prior[:, 0] = 0.555
    prior[0] = prior[-1] = torch.eye(nodes)[0]
    # a copy is worth 1 less 0.5, what lies beside 0.485 less next to nothing
    for live in BLOCKS[:3]:
        found, expected, _ = choose(prior[None], (1, nodes), 1, 0.5, device, include_self=False, live=live)
        assert torch.equal(found, expected) and found[0, 0] == nodes - 1


def test_a_node_is_its_own_neighbour_whatever_the_table_says(device):
    prior, inverse, table = prepared(1, (4, 30), 8, device)
    table[0, 0] = 50
    check_bits((prior, inverse, table), 6, True, BLOCKS[2])
    # nor does that of its neighbourhood
    for near in (50.0, torch.nan, torch.inf):
        table[:, :20] = near
        table[0, 0] = 50
        check_bits((prior, inverse, table), 6, True, BLOCKS[2])


def test_decays_as_large_as_numbers_are(device):
    """What is certainly not chosen is lower than any number: no program goes on for ever."""
    prior, inverse, _ = prepared(1, (1, 200), 8, device)
    table = torch.full((1, 200), torch.nan, device=device)
    table[0, :29] = torch.finfo(torch.float32).max
    check_bits((prior, inverse, table), 5, False, BLOCKS[2])


@pytest.mark.promise("C5")
@pytest.mark.parametrize("radius", [2.0, 0.0, 5.5])
def test_cells_that_are_too_far_apart(radius, device):
    prior = torch.randn(1, 63, 16, generator=torch.Generator().manual_seed(1))
    found, expected, _ = choose(prior, (9, 7), 14, 0.5, device, radius=radius, include_self=False)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [None, (11, 60)], ids=str)
def test_half_precision_needs_no_rounded_rows(rows, dtype, device):
    prior = dino_like_prior(2, 8, 9, 48, torch.Generator().manual_seed(2)).to(dtype)
    for include_self in (True, False):
        found, expected, counts = choose(prior, (8, 9), 7, 1.0, device, rows=rows, include_self=include_self)
        # nothing but the sums may be off
        assert torch.equal(found, expected) and 0 <= counts.min() and counts.float().mean() < 1


def test_float16_of_any_size(device):
    """It is not scaled: large rows beside small ones."""
    prior = torch.randn(1, 72, 48, generator=torch.Generator().manual_seed(2))
    prior = (prior * torch.logspace(-3, 4, 72)[:, None]).clamp(-6e4, 6e4).half()
    found, expected, _ = choose(prior, (8, 9), 7, 1.0, device)
    assert torch.equal(found, expected)


def test_few_scores_are_computed_again(device):
    """A bound that is too loose, or products that are wrong, would hide behind the second computation."""
    sizes = [((8, 10), 128, 20)] + ([((48, 48), 256, 75), ((70, 75), 768, 20)] if device == "cuda" else [])
    for grid, channels, k in sizes:
        prior = dino_like_prior(1, *grid, channels, torch.Generator().manual_seed(0))
        # a barrier that is missing shows now and then
        for _ in range(20 if device == "cuda" else 1):
            found, expected, counts = choose(prior, grid, k, 1.0, device, live=None)
            assert torch.equal(found, expected)
        assert 0 < counts.float().mean() < 4 and counts.max() <= 24


def visits(prior: Tensor, grid: tuple[int, int], k: int, decay: float, live: Live, device: str, **options) -> Tensor:
    """Blocks of columns that each block of rows multiplies, in the order of the image."""
    scaled, inverse, short, residual = prepare_prior(prior.to(device), True)
    table = reference.decay_table(grid, decay, "additive", torch.float32, scaled.device, **options)
    down, across = knn_live.patch_of(live.block_m, *grid)
    blocks = -(-grid[0] // down), -(-grid[1] // across)
    index = torch.empty(*prior.shape[:2], k, dtype=torch.int32, device=device)
    visited = torch.full((len(prior), blocks[0] * blocks[1]), -1, dtype=torch.int32, device=device)
    given = (scaled, inverse, table, "additive", True, short, residual)
    knn_live.knn_live(*given, live, 0, index, index.float(), None, visited)
    return visited.cpu().view(len(prior), *blocks)


def test_blocks_that_cannot_matter_are_left_out(device):
    """Of equal rows only those nearby are neighbours: with k 5 a patch of 16 nodes needs those that touch it alone."""
    grid, live = (16, 16), Live(16, 16, 16, 4, 1)
    found = visits(torch.ones(1, 256, 16), grid, 5, 40.0, live, device)[0]
    assert found.max() <= 9 and found.min() >= 3 and (found[1:-1, 1:-1] == 9).all()
    # beyond a radius there are no candidates, however few there are within
    assert visits(torch.ones(1, 256, 16), grid, 16, 0.0, live, device, radius=1.0).max() <= 9
    # without a decay any block may matter
    random = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(0))
    assert (visits(random, (8, 8), 5, 0.0, live, device) == 4).all()
    # a row that no list decides asks for no more blocks
    assert visits(torch.ones(1, 64, 16), (8, 8), 5, 0.0, live, device).max() == 3
    # rows of zeros have no cosine that might be one
    zeros = torch.zeros(1, 64, 16)
    zeros[0, 34] = 1
    assert visits(zeros, (8, 8), 5, 40.0, live, device).max() <= 4
    assert visits(zeros, (8, 8), 5, 1e-3, live, device).max() <= 4


@pytest.mark.promise("C8")
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("kind", ["all alike", "half alike", "not finite"])
def test_rows_that_no_list_decides(kind, include_self, device):
    """More scores around the border than a list has room for."""
    # whose products are exact in any order
    prior = torch.full((1, 60, 24), 0.5)
    if kind == "half alike":
        prior[0, 50:] = torch.randn(10, 24, generator=torch.Generator().manual_seed(0))
        prior[0, 40:50] += 1e-4 * torch.randn(10, 24, generator=torch.Generator().manual_seed(1))
    if kind == "not finite":
        prior[0, 3] = torch.inf
    scores = oracle.scores(prior, (6, 10), 0.0, "additive")
    for rows in (None, (11, 47)):
        found, expected, _ = choose(
            prior, (6, 10), 5 if include_self else 16, 0.0, device, include_self=include_self, rows=rows
        )
        if kind != "half alike":
            assert torch.equal(found, expected)
        elif rows is None:
            problem = numerics.compare_selection(
                found[0], scores[0].gather(1, found[0].long()), scores[0], 2e-6, include_self=include_self
            )
            assert problem is None, problem


@pytest.mark.promise("C12")
def test_a_row_of_zeros_has_exact_scores(device):
    prior = torch.randn(1, 40, 16, generator=torch.Generator().manual_seed(0))
    prior[0, 3] = prior[0, 30] = 0
    for live in BLOCKS[:2]:
        found, expected, counts = choose(prior, (5, 8), 6, 1.0, device, live=live)
        assert torch.equal(found, expected) and counts[0, 3] == counts[0, 30] == 0


@pytest.mark.promise("C10")
def test_copies_of_a_row_are_taken_from_the_lowest_index(device):
    prior, expected = copies()
    found, _, counts = choose(prior, (8, 9), 17, 0.0, device)
    assert torch.equal(found, expected) and counts.max() > 0


# a row is one of its own candidates, so its roundings are counted twice
@pytest.mark.promise("C4")
@pytest.mark.parametrize("whose,tenth", [("candidates", 0.89), ("row", 0.89 / 2)])
def test_the_bound_is_no_larger_than_it_must_be(whose, tenth, device):
    prior, grid = against_each_other(whose), (1, 5)
    found, expected, counts = choose(prior, grid, 1, 4e-5, device, include_self=False)
    assert expected[0, 0] == 1 and torch.equal(found, expected) and counts[0, 0] == 3
    # and without a tenth of it the choice is wrong
    scaled, inverse, short, residual = prepare_prior(prior.to(device), True)
    table = reference.decay_table(grid, 4e-5, "additive", torch.float32, scaled.device)
    given = (scaled, inverse, table, 1, "additive", False, short, residual * tenth)
    index, _ = kernels.knn_graph(*given, sizes=SMALL, live=BLOCKS[0])
    assert index[0, 0].item() == 2


def test_a_list_that_is_cut_back_keeps_what_is_undecided(device):
    """Many candidates, the best of which come last, so that every block has some that go and some that stay."""
    random = torch.Generator().manual_seed(4)
    base = torch.randn(24, generator=random)
    nodes = 136
    share = torch.linspace(0, 1, nodes)[:, None]
    prior = (share * base + (1 - share) * torch.randn(nodes, 24, generator=random))[None]
    for include_self in (True, False):
        found, expected, _ = choose(prior, (1, nodes), 9, 0.0, device, include_self=include_self, live=BLOCKS[2])
        assert torch.equal(found, expected)


def test_what_lists_do_not_serve_is_merged_from_float32_products(device, monkeypatch):
    monkeypatch.setattr(kernels, "knn_live", None)
    prior = torch.randn(1, 30, 8, generator=torch.Generator().manual_seed(0))
    found, expected, counts = choose(prior, (5, 6), 4, 20.0, device, form="product")
    assert torch.equal(found, expected) and (counts == -1).all()
    monkeypatch.setattr(knn_live, "LARGEST_K", 3)
    found, expected, counts = choose(prior, (5, 6), 4, 1.0, device)
    assert torch.equal(found, expected) and (counts == -1).all()


def test_places_that_int32_does_not_count_are_not_served():
    live = BLOCKS[3]
    assert knn_live.serves(16_384, 1024, 75, (128, 128), live) and knn_live.serves(16_384, 1024, 240, (128, 128), live)
    assert not knn_live.serves(16_384, 1024, 241, (128, 128), live)
    assert not knn_live.serves(1 << 20, 2048, 20, (1024, 1024), live)
    assert not knn_live.serves(128 * 1024, 16, 20, (1, 128 * 1024), Live(16, 16, 16, 1, 1))


def test_settings_of_products_do_not_matter(device):
    """The products are the kernel's own."""
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "allow_fp16_accumulation"):
        pytest.skip("this torch has no such setting")
    matmul.allow_fp16_accumulation = True
    try:
        found, expected, counts = choose(torch.randn(1, 30, 8), (5, 6), 4, 1.0, device)
    finally:
        matmul.allow_fp16_accumulation = False
    assert torch.equal(found, expected) and (counts >= 0).all()


@pytest.mark.parametrize(
    "grid,size", [((128, 128), 128), ((128, 128), 64), ((3, 500), 32), ((500, 3), 32), ((1, 9), 16)]
)
def test_patches_cover_the_image_once(grid, size):
    down, across = knn_live.patch_of(size, *grid)
    assert down * across == size and (down & (down - 1)) == (across & (across - 1)) == 0
    # no longer than twice the other side, unless the image is narrow
    assert down <= 2 * across or across >= grid[1]
    assert across <= 2 * down or down >= grid[0]
