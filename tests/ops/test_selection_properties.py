# SPDX-License-Identifier: Apache-2.0
"""Properties of the choice of neighbours: ``prepare_prior``, ``knn_graph``, and the columns of a graph (``csc``).

Priors of ones and minus ones in a power of four channels have exact cosines, so all backends must give the same bits.
"""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from contract import LAYOUTS
from hypothesis import given
from hypothesis import strategies as st
from properties import INTERPRETED, SEEDS, SIZES, any_index, few
from torch import Tensor

from drseg_core import ops
from drseg_core.testing import numerics

FORMS = ("additive", "gauss", "multiplicative", "product")
BACKENDS = [
    row["backend"]
    for row in ops.backend_report()
    if row["op"] == "knn_graph" and row["device"] == "cpu" and row["available"]
]
SIDES = st.integers(2, 4) if INTERPRETED else st.integers(1, 8)
GRIDS = st.tuples(SIDES, SIDES)


@pytest.fixture(params=BACKENDS, scope="module")
def backend(request):
    with ops.use_backend(request.param):
        yield request.param


def random_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lattice(seed: int, nodes: int, batch: int = 1, channels: int = 4) -> Tensor:
    """Rows of ones and minus ones, whose norm is a power of two; some of zeros."""
    random = random_of(seed)
    rows = 2.0 * torch.randint(0, 2, (batch, nodes, channels), generator=random) - 1
    return rows * (torch.rand(batch, nodes, 1, generator=random) < 0.9)


def smooth(seed: int, nodes: int, batch: int = 1, channels: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, nodes, channels, generator=random_of(seed), dtype=torch.float64).to(dtype)


OPTIONS = st.fixed_dictionaries(
    {
        "form": st.sampled_from(FORMS),
        "decay": st.sampled_from([0.0, 0.5, 2.0]),
        "include_self": st.booleans(),
    }
)


# finds: a tie went to the highest index, the last column of a tile was left out
@pytest.mark.promise("C2", "C8", "C10")
@few(20)
@given(grid=GRIDS, seed=SEEDS, k=st.integers(1, 12), channels=st.sampled_from([1, 4, 16, 64]), options=OPTIONS)
def test_exact_cosines_are_exact_everywhere(backend, grid, seed, k, channels, options):
    nodes = math.prod(grid)
    prior = lattice(seed, nodes, 2, channels)
    index, score = ops.knn_graph(prior, grid, k, **options, return_score=True, pad=True)
    right = ops.knn_graph(prior, grid, k, **options, return_score=True, pad=True, backend="reference")
    assert torch.equal(index, right[0]) and torch.equal(score, right[1])
    # without a decay the scores are exact in float64 too, and every tie is one
    decay = 0.0 if options["form"] != "gauss" else options["decay"]
    slack = 0.0 if decay == 0 else numerics.AFFINITY_TOLERANCE
    index, score = ops.knn_graph(prior, grid, k, **{**options, "decay": decay}, return_score=True, pad=True)
    truth = oracle.scores(prior, grid, decay, options["form"])
    for one, its, scores in zip(index, score, truth, strict=True):
        problem = numerics.compare_selection(
            one, its, scores, slack, include_self=options["include_self"], near_tie_share=1.0
        )
        assert problem is None, problem


def neighbours(index: Tensor) -> list[list[set[int]]]:
    return [[set(row) for row in sample] for sample in index.tolist()]


# finds: rows of a second tile took the numbers of the first
@pytest.mark.promise("C6")
@few()
@given(grid=GRIDS, seed=SEEDS, k=st.integers(1, 9), options=OPTIONS)
def test_mirrored_grids_have_mirrored_neighbours(backend, grid, seed, k, options):
    # only a decay knows where a node is; without one any order does
    nodes = math.prod(grid)
    prior = smooth(seed, nodes)
    place = torch.arange(nodes).view(grid)
    order = place.flip(0).flatten() if options["decay"] else torch.randperm(nodes, generator=random_of(seed))
    right = neighbours(ops.knn_graph(prior, grid, k, **options, pad=True))[0]
    found = neighbours(order[ops.knn_graph(prior[:, order], grid, k, **options, pad=True).long()])[0]
    scores = oracle.scores(prior, grid, options["decay"], options["form"])[0].fill_diagonal_(-torch.inf)
    ordered = scores.sort(-1, descending=True).values
    last = k - 1 if not options["include_self"] else k - 2
    for node, own in enumerate(order.tolist()):
        # products are summed in another order, so near ties may change
        near = 0 <= last < nodes - 1 and bool(ordered[own, last] - ordered[own, last + 1] <= 1e-5)
        assert near or found[node] == right[own], f"node {own} has other neighbours in another order"


# finds: float32 norms of unscaled rows, which leave its range
@pytest.mark.promise("C6", "C5")
@few()
@given(grid=GRIDS, seed=SEEDS, k=st.integers(1, 9), options=OPTIONS, power=st.integers(-60, 60))
def test_powers_of_two_change_nothing(backend, grid, seed, k, options, power):
    prior = smooth(seed, math.prod(grid))
    scale = 2.0 ** torch.randint(min(power, 0), max(power, 0) + 1, (1, prior.shape[1], 1), generator=random_of(seed))
    right = ops.knn_graph(prior, grid, k, **options, pad=True, return_score=True)
    got = ops.knn_graph(prior * scale, grid, k, **options, pad=True, return_score=True)
    assert torch.equal(got[0], right[0]) and torch.equal(got[1], right[1])
    one, other = ops.prepare_prior(prior), ops.prepare_prior(prior * scale)
    assert torch.equal(one.scaled, other.scaled) and torch.equal(one.inverse_norm, other.inverse_norm)


# finds: the second sample was read with the first one's norms
@pytest.mark.promise("C7", "C13")
@few()
@given(grid=GRIDS, seed=SEEDS, k=st.integers(1, 9), options=OPTIONS, layout=st.sampled_from(list(LAYOUTS)))
def test_samples_and_layouts(backend, grid, seed, k, options, layout):
    prior = LAYOUTS[layout](smooth(seed, math.prod(grid), 3))
    options = {**options, "pad": True, "return_score": True}
    index, score = ops.knn_graph(prior.clone(memory_format=torch.contiguous_format), grid, k, **options)
    assert torch.equal(ops.knn_graph(prior, grid, k, **options)[0], index)
    for sample in range(3):
        for pick in (slice(sample, sample + 1), sample):
            got = ops.knn_graph(prior[pick], grid, k, **options)
            # torch, in which the reference is written, may multiply a batch in another order
            exact = backend != "reference"
            if exact:
                assert torch.equal(got[0], index[pick]) and torch.equal(got[1], score[pick])
            else:
                torch.testing.assert_close(got[1].sort().values, score[pick].sort().values, rtol=1e-5, atol=1e-5)


# finds: padding was filled with -1, and a real neighbour got lost where k is the number of nodes
@pytest.mark.promise("C9")
@few()
@given(grid=GRIDS, seed=SEEDS, more=st.integers(0, 5), options=OPTIONS)
def test_padding_stands_behind_all_candidates(backend, grid, seed, more, options):
    nodes = math.prod(grid)
    candidates = nodes - (not options["include_self"])
    index, score = ops.knn_graph(lattice(seed, nodes), grid, candidates + more, **options, return_score=True, pad=True)
    own = torch.arange(nodes)
    for node in range(nodes):
        right = [other for other in range(nodes) if options["include_self"] or other != node]
        assert index[0, node, :candidates].tolist() == right
    assert (index[0, :, candidates:] == own[:, None]).all() and (score[0, :, candidates:] == -torch.inf).all()
    mask = ops.padding_mask(index, include_self=options["include_self"])
    assert mask[..., :candidates].all() and not mask[..., candidates:].any()


BAD = st.lists(st.tuples(st.integers(0, 200), st.sampled_from([math.nan, math.inf, -math.inf])), min_size=1, max_size=3)


# finds: an infinite feature whose cosine was NaN was taken for the largest
@pytest.mark.promise("C11")
@few()
@given(grid=GRIDS, seed=SEEDS, k=st.integers(1, 9), bad=BAD, include_self=st.booleans())
def test_nodes_that_are_not_finite_are_as_if_not_there(backend, grid, seed, k, bad, include_self):
    nodes = math.prod(grid)
    prior = lattice(seed, nodes)
    for place, value in bad:
        prior[0, place % nodes, place % prior.shape[2]] = value
    healthy = prior.isfinite().all(-1)[0]
    options = {"decay": 0.0, "include_self": include_self, "pad": True, "return_score": True}
    index, score = ops.knn_graph(prior, grid, k, **options)
    assert (index[0, ~healthy] == torch.arange(nodes)[~healthy, None]).all() and score[0, ~healthy].isnan().all()
    if healthy.any():
        alone, its = ops.knn_graph(prior[:, healthy], (1, int(healthy.sum())), k, **options)
        assert torch.equal(index[0, healthy].long(), healthy.nonzero()[:, 0][alone[0].long()])
        assert torch.equal(score[0, healthy], its[0])
    prepared = ops.prepare_prior(prior)
    assert torch.equal(prepared.inverse_norm[0].isnan(), ~healthy)
    assert torch.equal(prepared.inverse_norm[:, healthy], ops.prepare_prior(prior[:, healthy]).inverse_norm)


# finds: equal scores were taken from both ends of a block
@pytest.mark.promise("C6", "C10")
@few()
@given(grid=GRIDS, value=st.sampled_from([0.0, 1.0, -3.0, 1e30]), k=st.integers(1, 70), channels=st.integers(1, 40))
def test_a_constant_prior_takes_the_lowest(backend, grid, value, k, channels):
    nodes = math.prod(grid)
    k = min(k, nodes)
    index, score = ops.knn_graph(torch.full((nodes, channels), value), grid, k, decay=0.0, return_score=True)
    for node, row in enumerate(index.tolist()):
        assert row == sorted([node, *[other for other in range(nodes) if other != node][: k - 1]])
    assert torch.allclose(score, torch.full_like(score, float(value != 0)), atol=1e-6)


# finds: a heap that lost its smallest entry once it was full
@pytest.mark.promise("C8", "C3", "C24")
@few()
@given(grid=GRIDS, seed=SEEDS, k=st.integers(1, 9), options=OPTIONS, radius=st.floats(0, 6))
def test_more_neighbours_are_the_same_and_one_more(backend, grid, seed, k, options, radius):
    nodes = math.prod(grid)
    prior = lattice(seed, nodes).requires_grad_()
    kept = prior.detach().clone()
    fewer, more = (ops.knn_graph(prior, grid, count, **options, pad=True) for count in (k, k + 1))
    for one, other in zip(neighbours(fewer)[0], neighbours(more)[0], strict=True):
        assert one <= other and len(other) <= len(one) + 1
    assert not fewer.requires_grad and torch.equal(prior, kept)
    assert torch.equal(ops.knn_graph(prior, grid, k, **options, pad=True), fewer)
    near, score = ops.knn_graph(prior, grid, k, **options, radius=radius, pad=True, return_score=True)
    row, column = torch.arange(nodes) // grid[1], torch.arange(nodes) % grid[1]
    far = (row[:, None] - row[near[0].long()]) ** 2 + (column[:, None] - column[near[0].long()]) ** 2
    assert (far[score[0] > -torch.inf].double().sqrt() <= radius).all()
    assert torch.equal(ops.knn_graph(prior, grid, k, **options, radius=100.0, pad=True), fewer)


# finds: the columns of a second sample counted from zero
@pytest.mark.promise("C7")
@few(60)
@given(sizes=SIZES, seed=SEEDS, wild=st.booleans())
def test_columns_hold_every_edge_once(backend, sizes, seed, wild):
    index = any_index(sizes).long()
    if wild:
        index = torch.where(torch.rand(index.shape, generator=random_of(seed)) < 0.1, 2**40, index)
    batch, nodes, slots = index.shape
    indptr, perm = ops.csc(index)
    end = (index.clamp_max(nodes - 1) + nodes * torch.arange(batch)[:, None, None]).flatten()
    assert sorted(perm.tolist()) == list(range(index.numel()))
    # by their ends, and among those of one end in their order
    assert torch.equal(end[perm.long()], end.sort(stable=True).values)
    assert torch.equal(perm.long(), end.sort(stable=True).indices)
    assert torch.equal(indptr.diff().long(), end.bincount(minlength=batch * nodes))
    for sample in range(batch):
        alone, its = ops.csc(index[sample])
        first, last = indptr[sample * nodes], indptr[(sample + 1) * nodes]
        assert torch.equal(its, perm[first:last] - sample * nodes * slots)
        assert torch.equal(alone, indptr[sample * nodes : (sample + 1) * nodes + 1] - first)
    narrow = index.clamp_max(nodes - 1).int()
    for form in (narrow, index.mT.contiguous().mT, narrow.permute(2, 0, 1).contiguous().permute(1, 2, 0)):
        again = ops.csc(form)
        assert torch.equal(again.indptr, indptr) and torch.equal(again.perm, perm)
    # nodes in another order: each has its edges still
    order = torch.randperm(nodes, generator=random_of(seed))
    moved = ops.csc(order.argsort()[index.clamp_max(nodes - 1)])
    counts, right = moved.indptr.diff().view(batch, nodes), indptr.diff().view(batch, nodes)
    assert torch.equal(counts, right[:, order])


# finds: rows of float16 were scaled too
@pytest.mark.promise("C12", "C7", "C13")
@few(60)
@given(
    sizes=SIZES,
    layout=st.sampled_from(list(LAYOUTS)),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    zeros=st.booleans(),
)
def test_prepared_rows(backend, sizes, layout, dtype, zeros):
    prior = smooth(sizes.seed, sizes.nodes, sizes.batch, sizes.channels, dtype)
    prior = LAYOUTS[layout](
        prior * torch.rand(prior.shape[:2], generator=sizes.random()).round()[..., None] if zeros else prior
    )
    got, given = ops.prepare_prior(prior.requires_grad_()), prior.detach().double()
    assert got.scaled.is_contiguous() and not got.scaled.requires_grad and not got.inverse_norm.requires_grad
    # a power of two for each row, none for a row of zeros
    ratio = got.scaled.double().norm(dim=-1) / given.norm(dim=-1)
    power = ratio[given.norm(dim=-1) > 0].log2()
    assert torch.allclose(power, power.round(), atol=1e-9)
    right = torch.where(given.norm(dim=-1) > 0, 1 / got.scaled.double().norm(dim=-1), 0)
    assert torch.allclose(got.inverse_norm.double(), right, rtol=4e-7, atol=0)
    assert got.inverse_norm.isfinite().all()
    for sample in range(sizes.batch):
        alone = ops.prepare_prior(prior[sample].contiguous())
        assert torch.equal(alone.scaled, got.scaled[sample])
        assert torch.allclose(alone.inverse_norm, got.inverse_norm[sample], rtol=4e-7, atol=0)
    order = torch.randperm(sizes.nodes, generator=sizes.random())
    moved = ops.prepare_prior(prior[:, order].contiguous())
    assert torch.equal(moved.scaled, got.scaled[:, order])


@pytest.mark.promise("C2", "C24")
@few(40)
@given(seed=SEEDS, nodes=st.integers(1, 40), channels=st.sampled_from([1, 4, 16, 64]), power=st.integers(-20, 20))
def test_exact_norms_are_exact_everywhere(backend, seed, nodes, channels, power):
    prior = lattice(seed, nodes, 2, channels) * 2.0**power
    got, right = ops.prepare_prior(prior), ops.prepare_prior(prior, backend="reference")
    assert torch.equal(got.scaled, right.scaled) and torch.equal(got.inverse_norm, right.inverse_norm)
    length = prior.norm(dim=-1) / prior.abs().amax(-1).clamp_min(1e-30)
    assert torch.equal(got.inverse_norm * got.scaled.abs().amax(-1), torch.where(length > 0, 1 / length, 0))
    again = ops.prepare_prior(prior)
    assert torch.equal(again.scaled, got.scaled) and torch.equal(again.inverse_norm, got.inverse_norm)
