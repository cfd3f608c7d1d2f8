# SPDX-License-Identifier: Apache-2.0
"""A graph of your own from your own features: neighbours, learned weights, and sums over neighbours.

    python examples/own_graph.py

The pieces of PDGR one by one. Each is an op with a gradient, and takes any neighbours that you give it.
"""

from __future__ import annotations

import torch
from torch import nn

from drseg_core import ops


def main() -> torch.Tensor:
    torch.manual_seed(0)
    height, width, channels, hidden, k = 12, 16, 32, 8, 6
    features = torch.randn(1, height * width, channels)  # (B, N, D): any features of your cells

    # who is a neighbour: the k most similar cells, near ones first
    index, score = ops.knn_graph(features, (height, width), k, decay=0.5, return_score=True)
    print(f"cell 0 has the neighbours {index[0, 0].tolist()}, scores {score[0, 0].numpy().round(2).tolist()}")

    # or neighbours from anywhere else: here the cells to the right and below
    cell = torch.arange(height * width)
    grid = torch.stack([cell, (cell + 1) % len(cell), (cell + width) % len(cell)], dim=1)[None].int()

    # how much each edge counts, by a small network on both of its ends (Eq. 8)
    source, target, vector = nn.Linear(channels, hidden), nn.Linear(channels, hidden), nn.Parameter(torch.randn(hidden))
    for neighbours in (index, grid):
        weight = ops.edge_weight(source(features), target(features), neighbours, vector, torch.zeros(1))
        coefficient = ops.degree_normalize(weight, neighbours)  # divided by the degrees of both ends (Eq. 9)
        out = ops.graph_propagate(features, neighbours, coefficient)  # (B, N, D)
        out.square().mean().backward()
        print(f"{neighbours.shape[2]} neighbours each: gradient of the network {source.weight.grad.norm():.3g}")
    return out


if __name__ == "__main__":
    main()
