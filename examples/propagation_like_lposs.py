# SPDX-License-Identifier: Apache-2.0
"""Label propagation as in LPOSS (arXiv 2503.19777), before and after its two slow lines use the engine.

    python examples/propagation_like_lposs.py

``before`` is what such code usually does: all similarities, ``topk``, a sparse matrix. ``after`` calls the engine
instead, which never stores N x N values. Features are drawn here; in LPOSS they are a DINO's.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor
from torch.nn import functional as F

from drseg_core import ops

K, GAMMA, ALPHA, STEPS = 30, 3.0, 0.95, 10


def before(feature: Tensor, logits: Tensor) -> Tensor:
    """Features (N, D) and logits (N, T) to logits that were spread over the graph."""
    row = F.normalize(feature, dim=1)
    cosine, index = (row @ row.T).topk(K)
    node = torch.arange(len(row))[:, None].expand_as(index)
    places = torch.stack([node.flatten(), index.flatten()])
    weight = torch.sparse_coo_tensor(places, cosine.clamp(min=0).flatten() ** GAMMA, (len(row), len(row)))
    weight = (weight + weight.T).coalesce()
    scale = torch.sparse.sum(weight, dim=1).to_dense().rsqrt()[:, None]
    spread = logits
    for _ in range(STEPS):
        spread = ALPHA * scale * torch.sparse.mm(weight, scale * spread) + (1 - ALPHA) * logits
    return spread


def after(feature: Tensor, logits: Tensor, grid: tuple[int, int]) -> Tensor:
    """The same."""
    index, cosine = ops.knn_graph(feature, grid, K, decay=0.0, return_score=True)
    graph = ops.Graph.of(index, cosine.clamp(min=0) ** GAMMA)
    operator = graph.undirected()
    scale = operator.propagate(torch.ones(len(feature), 1)).rsqrt()
    spread = logits
    for _ in range(STEPS):
        spread = ALPHA * scale * operator.propagate(scale * spread) + (1 - ALPHA) * logits
    return spread


def main(side: int = 64) -> float:
    """Prints the seconds of both, and returns the largest difference of their results."""
    random = torch.Generator().manual_seed(0)
    feature, logits = torch.randn(side * side, 256, generator=random), torch.rand(side * side, 21, generator=random)
    found = []
    for name, run in (
        ("before", lambda: before(feature, logits)),
        ("after", lambda: after(feature, logits, (side, side))),
    ):
        begin = time.perf_counter()
        found.append(run())
        print(f"{name}: {time.perf_counter() - begin:.2f} s")
    return float((found[0] - found[1]).abs().max())


if __name__ == "__main__":
    print(f"largest difference: {main():.1e}")
