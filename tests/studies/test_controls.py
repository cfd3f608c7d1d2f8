# SPDX-License-Identifier: Apache-2.0
"""Each control isolates what it says: no graph, distance alone, pixels, the true classes, and weights by hand."""

from __future__ import annotations

import inspect
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import drseg_core
from drseg_core.nn.pdgr import PDGR
from drseg_core.studies import controls
from drseg_core.studies.controls import (
    CONTROLS,
    WEIGHTS,
    Neighbours,
    colour_and_position,
    constant_prior,
    edge_weights,
    neighbours,
    no_graph,
    oracle_prior,
    spread,
)

GRID = (5, 6)
COUNT = 30


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def distances(grid: tuple[int, int]) -> Tensor:
    place = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).double()
    return torch.cdist(place, place)


def test_one_neighbour_is_the_module_without_index() -> None:
    """PDGR with K = 1 is two linear layers, ReLU and LayerNorm on each cell by itself, whatever the prior says."""
    pdgr = PDGR(8, 16, k=1, edge_hidden=4)
    features, prior = torch.randn(2, 8, *GRID), torch.randn(2, 16, *GRID)
    x = features.flatten(2).transpose(1, 2)
    first, last = pdgr.weights
    assert pdgr.biases is not None
    expected = F.linear(F.linear(x, first, pdgr.biases[0]).relu(), last, pdgr.biases[1])
    expected = pdgr.output_norm(expected).transpose(1, 2).unflatten(2, GRID)
    found = pdgr(features, prior)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(pdgr(features, prior.flip(0)), expected, atol=1e-5)
    assert not torch.allclose(PDGR(8, 16, k=2, edge_hidden=4)(features, prior), expected, atol=1e-2)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_no_graph_changes_nothing(kind) -> None:
    prior, x = torch.randn(7, *GRID), torch.randn(COUNT, 3)
    graph = no_graph(GRID)
    assert graph.node[:, 0].tolist() == list(range(COUNT)) and torch.equal(neighbours(prior, 1).node, graph.node)
    for value in spread(x, graph, edge_weights(kind, prior, graph), (1, 4)):
        assert torch.allclose(value, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [1, 9])
def test_a_constant_prior_is_distance_alone(width: int) -> None:
    """Its graph joins the nearest cells, equally far ones by their number, as sorting by distance does."""
    apart = distances(GRID)
    apart.fill_diagonal_(-1)
    expected = apart.argsort(dim=1, stable=True)[:, :8]
    found = neighbours(constant_prior(GRID, width) * 3.7, 8)
    kept = apart.gather(1, expected)
    assert torch.allclose(apart.gather(1, found.node.long()), kept)
    # where no other cell is as far as the last one, the neighbours are the same cells
    clear = (apart <= kept[:, -1:]).sum(1) == 8
    assert clear.any()
    assert torch.equal(found.node[clear].long().sort(dim=1).values, expected[clear].sort(dim=1).values)
    # no weight that is read from cosines tells its edges apart
    assert torch.allclose(edge_weights("exp(cos / 0.1)", constant_prior(GRID), found), torch.ones(COUNT, 8), atol=1e-4)


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_neighbours_are_those_of_the_module(decay: float) -> None:
    prior = torch.randn(16, *GRID)
    found = neighbours(prior, 9, decay)
    theirs, weight, _ = PDGR(1, 16, k=9, decay=decay).edges(prior[None])
    assert torch.equal(found.node.sort(dim=1).values, theirs[0].int())
    unit = F.normalize(prior.flatten(1).T, dim=1)
    cosine = unit @ unit.T
    assert torch.allclose(found.cosine, cosine.gather(1, found.node.long()), atol=1e-5)
    score = cosine - decay * distances(GRID).float() / math.hypot(4, 5)
    own = score.gather(1, found.node.long())
    assert found.node[:, 0].tolist() == list(range(COUNT)) and (own[:, 1:].diff(dim=1) <= 1e-5).all()
    assert torch.equal(found.first(3).node, neighbours(prior, 3, decay).node)
    assert neighbours(prior, 99, decay).node.shape == (COUNT, COUNT)


def test_weights_by_hand() -> None:
    prior = torch.randn(16, *GRID)
    graph = neighbours(prior, 9)
    assert (edge_weights("flat", prior, graph) == 1).all()
    for kind, temperature in (("exp(cos / 0.1)", 0.1), ("exp(cos / 0.03)", 0.03)):
        found = edge_weights(kind, prior, graph)
        expected = torch.softmax(graph.cosine / temperature, dim=1)
        assert torch.allclose(found / found.sum(1, keepdim=True), expected, atol=1e-5)
    before = torch.get_rng_state()
    found = edge_weights("learned start", prior, graph, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    index, weight, _ = PDGR(1, 16, k=9).edges(prior[None])
    order = graph.node.long().argsort(dim=1)
    assert torch.equal(graph.node.long().gather(1, order), index[0].long())
    assert torch.allclose(found.gather(1, order), weight[0], atol=1e-5)
    assert not torch.equal(edge_weights("learned start", prior, graph, seed=4), found)


def test_spreading_is_the_module_without_what_it_learns() -> None:
    prior, x = torch.randn(16, *GRID), torch.randn(COUNT, 3)
    graph = neighbours(prior, 9)
    weight = torch.rand(COUNT, 9) + 0.1
    dense = torch.zeros(COUNT, COUNT).scatter(1, graph.node.long(), weight)
    degree = dense.sum(1)
    operator = dense / (degree[:, None] * degree).sqrt()
    once, thrice = spread(x, graph, weight, (1, 3))
    assert torch.allclose(once, operator @ x, atol=1e-4)
    assert torch.allclose(thrice, operator @ operator @ operator @ x, atol=1e-4)


def test_colour_and_position_see_pixels_and_places_alone() -> None:
    image = torch.rand(3, 20, 24)
    found = colour_and_position(image, GRID)
    assert found.shape == (8, *GRID)
    assert torch.allclose(found.mean((1, 2)), torch.zeros(8), atol=1e-5)
    assert torch.allclose(found.square().mean((1, 2)), torch.ones(8), atol=1e-4)
    assert (found[6].diff(dim=1) == 0).all() and (found[6].diff(dim=0) > 0).all() and (found[7].diff(dim=1) > 0).all()
    # pixels that change places inside their cell change nothing
    cells = image.unfold(1, 4, 4).unfold(2, 4, 4).flatten(3)[..., torch.randperm(16)]
    moved = cells.unflatten(3, (4, 4)).permute(0, 1, 3, 2, 4).reshape(3, 20, 24)
    assert torch.allclose(colour_and_position(moved, GRID), found, atol=1e-4)


def test_the_oracle_joins_cells_of_one_class_the_nearest_first() -> None:
    label = torch.randint(3, GRID)
    pixels = F.one_hot(label.flatten(), 3).double() * 64
    # a cell without a label is like no other
    pixels[7] = 0
    prior = oracle_prior(pixels, GRID)
    assert prior.shape == (3, *GRID) and (prior[:, 1, 1] == 0).all()
    found = neighbours(prior, 4)
    for node in set(range(COUNT)) - {7}:
        same = ((label.flatten() == label.flatten()[node]) & (torch.arange(COUNT) != 7)).nonzero().flatten().tolist()
        assert len(same) >= 4
        assert set(found.node[node].tolist()) <= set(same)
    assert found.cosine.isfinite().all()


def test_the_oracle_is_only_in_studies() -> None:
    """Nothing outside of studies names it, and of the controls only the oracle has labels among its arguments."""
    root = Path(drseg_core.__file__).parent
    for path in root.rglob("*.py"):
        if path.parent.name != "studies":
            assert "oracle_prior" not in path.read_text("utf-8"), path
    for function in (neighbours, no_graph, constant_prior, colour_and_position, edge_weights, spread):
        assert not {"pixels", "label", "mask"} & set(inspect.signature(function).parameters)


def test_every_control_says_what_it_isolates() -> None:
    assert list(CONTROLS) == [
        controls.NONE,
        controls.DISTANCE,
        controls.COLOUR,
        controls.RANDOM,
        controls.OWN,
        controls.REAL,
        controls.ORACLE,
    ]
    assert all(CONTROLS.values()) and Neighbours._fields == ("node", "cosine")
