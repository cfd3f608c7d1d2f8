# SPDX-License-Identifier: Apache-2.0
"""A host like LPOSS (arXiv 2503.19777): logits of a vision-language model, spread over the graph of a vision model.

python -m tests.hosts.lposs
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from drseg_core.nn.label_propagation import propagation_graph, solve_labels

K, GAMMA, DECAY, ALPHA, STEPS = 12, 3.0, 0.16, 0.95, 10


class Host:
    """Patch features (B, N, D) and logits (B, N, T) to refined logits; ``engine`` swaps its graph and solver."""

    def __init__(self, *, engine: bool) -> None:
        self.engine = engine

    def __call__(self, feature: Tensor, logits: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.engine:
            # its k counts the node itself, whose edge it drops
            graph = propagation_graph(feature, grid, K - 1, gamma=GAMMA, decay=DECAY, select="cosine")
            options = {"alpha": ALPHA, "scaled": False, "max_iterations": STEPS, "must_converge": False}
            return solve_labels(logits, graph, **options)
        return torch.stack([self.refine(*each, grid[1]) for each in zip(feature, logits, strict=True)])

    def refine(self, feature: Tensor, logits: Tensor, width: int) -> Tensor:
        """One image by dense matrices, class by class."""
        row = F.normalize(feature, dim=1)
        cosine = row @ row.T
        cosine.fill_diagonal_(2.0)
        node = torch.arange(len(row))
        place = torch.stack([node // width, node % width], dim=1).to(row.dtype)
        weight = cosine.clamp(min=0) ** GAMMA * torch.exp(-DECAY * torch.cdist(place, place))
        kept = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, cosine.topk(K, dim=1).indices, True)
        weight = torch.where(kept, weight, 0).fill_diagonal_(0)
        weight = weight + weight.T
        scale = weight.sum(1).rsqrt()
        matrix = torch.eye(len(row), dtype=row.dtype) - ALPHA * scale[:, None] * weight * scale
        return torch.stack([conjugate_gradients(matrix, column) for column in logits.T], dim=1)


def conjugate_gradients(matrix: Tensor, right: Tensor) -> Tensor:
    x, residual = torch.zeros_like(right), right
    direction, length = residual, residual @ residual
    for _ in range(STEPS):
        image = matrix @ direction
        step = length / (direction @ image)
        x, residual = x + step * direction, residual - step * image
        reached = residual @ residual
        direction, length = residual + reached / length * direction, reached
    return x


def main() -> float:
    """The largest difference of both, over the largest value."""
    random = torch.Generator().manual_seed(0)
    grid = (9, 11)
    feature = torch.randn(2, 99, 16, generator=random, dtype=torch.float64)
    logits = torch.rand(2, 99, 5, generator=random, dtype=torch.float64)
    own, ours = (Host(engine=engine)(feature, logits, grid) for engine in (False, True))
    return float((own - ours).abs().max() / own.abs().max())


if __name__ == "__main__":
    print(main())
