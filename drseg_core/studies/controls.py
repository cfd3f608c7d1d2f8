# SPDX-License-Identifier: Apache-2.0
"""Controls for every table about PDGR: graphs and priors that each leave out one thing that could explain a gain.

A graph helps only if it does better than what these have. They are plain functions of an image and of what models see
in it, so any study can ask for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from drseg_core.nn.pdgr import PDGR
from drseg_core.ops import (
    degree_normalize,
    edge_weight,
    graph_propagate,
    knn_graph,
    prepare_prior,
    score_parts,
    sort_by_score,
)
from drseg_core.studies.propagation import colour_features, nodes, standardised

NONE, DISTANCE, COLOUR = "no graph", "distance alone", "colour and position"
RANDOM, OWN, REAL, ORACLE = "random encoder", "own features", "DINOv2", "oracle"

CONTROLS: Mapping[str, str] = {
    NONE: "K = 1, only the node itself: what is left of a gain here is not the graph's",
    DISTANCE: "a constant prior, whose graph joins the nearest cells: smoothing, with nothing seen",
    COLOUR: "what pixels say without an encoder",
    RANDOM: "an encoder's architecture without what it learned",
    OWN: "the features that are rectified are their own prior: nothing comes from elsewhere",
    REAL: "a published prior, from `make real`",
    ORACLE: "the true classes as prior: as far as there are enough, no neighbour is of another class",
}
"""Each control, and what it isolates."""

Weights = Literal["flat", "learned start", "exp(cos / 0.1)", "exp(cos / 0.03)"]
WEIGHTS: tuple[Weights, ...] = ("flat", "learned start", "exp(cos / 0.1)", "exp(cos / 0.03)")


class Neighbours(NamedTuple):
    """``node`` (N, K) int32, the node itself first and then from the best to the worst; ``cosine`` (N, K) float32."""

    node: Tensor
    cosine: Tensor

    def first(self, k: int) -> Neighbours:
        """The graph of fewer neighbours: K counts the node itself."""
        return Neighbours(self.node[:, :k].contiguous(), self.cosine[:, :k].contiguous())


def no_graph(grid: tuple[int, int]) -> Neighbours:
    """K = 1: every node alone."""
    own = torch.arange(grid[0] * grid[1], dtype=torch.int32)[:, None]
    return Neighbours(own, torch.ones(own.shape))


def neighbours(prior: Tensor, k: int, decay: float = 1.0) -> Neighbours:
    """The graph of Eq. 7 (``exp``): the node itself and the k - 1 others of highest ``cos - decay dist``.

    Args:
        prior: (D, h, w).
        k: neighbours with the node itself, >= 1; a smaller grid has all of its cells.
        decay: over the longest distance on the grid.
    """
    grid = (prior.shape[1], prior.shape[2])
    alone = no_graph(grid)
    others = min(k, len(alone.node)) - 1
    if others == 0:
        return alone
    prepared = prepare_prior(nodes(prior))
    index, score = knn_graph(prepared, grid, others, decay=decay, include_self=False, return_score=True)
    index, _ = sort_by_score(index, score)
    cosine = score_parts(prepared, grid, index, decay=decay).cosine
    return Neighbours(torch.cat((alone.node, index), dim=1), torch.cat((alone.cosine, cosine), dim=1))


def constant_prior(grid: tuple[int, int], width: int = 1) -> Tensor:
    """(D, h, w) of one value everywhere: all cosines are 1, so distance alone orders the cells."""
    return torch.ones(width, *grid)


def colour_and_position(image: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean and deviation of every channel in each cell, and the cell's row and column, all standardised.

    Args:
        image: (3, H, W) in [0, 1], of square cells.
        grid: (h, w), which divide H and W.

    Returns:
        (8, h, w).
    """
    place = torch.meshgrid(torch.arange(grid[0]).float(), torch.arange(grid[1]).float(), indexing="ij")
    return torch.cat((colour_features(image, image.shape[1] // grid[0]), standardised(torch.stack(place))))


def oracle_prior(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """The true classes as a prior, (T, h, w): one for the class with the most pixels below a cell.

    Args:
        pixels: (hw, T) pixels of every class below each cell. A cell without any is like no other, so it has zeros.
    """
    truth = F.one_hot(pixels.argmax(dim=1), pixels.shape[1]).float() * (pixels.sum(dim=1, keepdim=True) > 0)
    return truth.T.reshape(-1, *grid)


def edge_weights(kind: Weights, prior: Tensor, graph: Neighbours, seed: int = 0) -> Tensor:
    """(N, K) weights > 0 of a graph's edges.

    Args:
        kind: ``flat``; ``learned start``, Eq. 8 as a training begins; or ``exp(cos / t)``.
        prior: (D, h, w), which ``learned start`` reads.
        graph: its edges.
        seed: of the initial weights of Eq. 8.
    """
    if kind == "flat":
        return torch.ones_like(graph.cosine)
    if kind == "learned start":
        return _learned_start(prior, graph.node, seed)
    temperature = float(kind.removeprefix("exp(cos / ").removesuffix(")"))
    # the node's own cosine is the largest: less it, nothing overflows, and each row only has another scale
    return torch.exp((graph.cosine - 1) / temperature)


@torch.no_grad()
def _learned_start(prior: Tensor, index: Tensor, seed: int) -> Tensor:
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    module = PDGR(1, prior.shape[0])
    torch.set_rng_state(state)
    unit = F.normalize(nodes(prior), dim=1)
    source, target = module.edge_source(unit), module.edge_target(unit)
    return edge_weight(source[None], target[None], index[None], module.edge_vector, module.edge_bias)[0]


def spread(x: Tensor, graph: Neighbours, weight: Tensor, steps: tuple[int, ...]) -> list[Tensor]:
    """Eq. 9 without its linear maps, ReLU and LayerNorm: ``x`` after each of some numbers of steps.

    Args:
        x: (N, C) features or logits.
        graph: (N, K) edges.
        weight: (N, K) of them.
        steps: rising, each >= 1.
    """
    index = graph.node[None]
    coefficient = degree_normalize(weight[None], index)
    value, found = x[None], []
    for step in range(1, steps[-1] + 1):
        value = graph_propagate(value, index, coefficient)
        if step in steps:
            found.append(value[0])
    return found
