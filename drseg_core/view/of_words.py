# SPDX-License-Identifier: Apache-2.0
"""What lies beneath a map from words: the graph of the whole scene, and its logits before and after it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drseg_core.ops import Graph, padding_mask
from drseg_core.scenes.reader import SceneReader
from drseg_core.scenes.scene_graph import GraphPredictor
from drseg_core.view.graph import GRAPH_BYTES, Beneath, Part, make_part, stride_for


@torch.no_grad()
def beneath_words(predictor: GraphPredictor, scene: SceneReader, *, room: int = GRAPH_BYTES) -> Beneath:
    """Compute cells and graph of a scene once more, and keep them.

    Args:
        predictor: of the map.
        scene: open, on the grid of the map.
        room: bytes that the graph may take on a page.
    """
    cells = predictor.collect(scene.window, scene.height, scene.width)
    grid = int(cells.valid.shape[0]), int(cells.valid.shape[1])
    cell = predictor.windows.cell
    if cells.prior is None:
        why_not = "there is no prior, or no step over a graph was asked for"
        return Beneath([], why_not, cell, _maps(cells.logits, cells.valid), None)
    parts: list[Part] = []
    tiles = predictor.tiles(grid)

    def keep(weights: Graph, graph: Graph) -> None:
        tile = tiles[len(parts)]
        stride = stride_for(sum(h * w for h, w in (each.grid for each in tiles)), graph.index.shape[-1], room)
        real = padding_mask(graph.index, include_self=False)
        place = tile.outer_top * cell, tile.outer_left * cell
        values = graph.index, weights.coefficient, graph.coefficient, real
        parts.append(make_part(*values, tile.grid, place=place, cell=(cell, cell), stride=stride))

    predictor.watch = keep
    try:
        spread = predictor.spread(cells)
    finally:
        predictor.watch = None
    words = "features move along an edge and against it, so both coefficients add up"
    return Beneath(parts, "", cell, _maps(cells.logits, cells.valid), _maps(spread, cells.valid), words)


def _maps(logits: Tensor, valid: Tensor) -> NDArray[np.float32]:
    """(T, h, w) of (N, T), NaN where no pixel is valid."""
    found = logits.T.reshape(-1, *valid.shape)
    return torch.where(valid, found, torch.nan).float().numpy()
