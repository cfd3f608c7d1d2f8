# SPDX-License-Identifier: Apache-2.0
"""A host like RSKT-Seg: a trained segmenter on tokens, in which PDGR rectifies the image features before the cosine.

python -m tests.hosts.rskt
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from drseg_core.nn import PDGR
from drseg_core.testing import LiteralPDGR

GRID, WIDTH, PRIOR, CLASSES = (6, 6), 16, 24, 4


class Host(nn.Module):
    """Tokens (B, N, C) of a tower, those of a frozen prior, and text embeddings (T, C) to logits (B, T, h, w).

    The tower is checkpointed, as it is in trainings on one card; ``rectify`` is whatever takes maps or tokens.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.TransformerEncoderLayer(WIDTH, 4, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.pdgr = PDGR(WIDTH, PRIOR, k=7, edge_hidden=8)
        self.aggregate = nn.Conv2d(1, 1, 3, padding=1)

    def rectify(self, token: Tensor, prior: Tensor) -> Tensor:
        return self.pdgr(token, prior, grid=GRID)

    def forward(self, token: Tensor, prior: Tensor, text: Tensor) -> Tensor:
        token = checkpoint(self.tower, token, use_reentrant=False)
        token = token + self.rectify(token, prior)
        cosine = F.normalize(token, dim=-1) @ F.normalize(text, dim=-1).T
        cost = cosine.transpose(1, 2).reshape(-1, 1, *GRID)
        return self.aggregate(cost).view(len(token), CLASSES, *GRID)


class LiteralHost(Host):
    """The same with the paper's equations written down in place of the engine."""

    def rectify(self, token: Tensor, prior: Tensor) -> Tensor:
        as_map = [value.transpose(1, 2).unflatten(2, GRID) for value in (token, prior)]
        return LiteralPDGR(self.pdgr)(*as_map).flatten(2).transpose(1, 2)


def losses(host: Host, steps: int) -> list[float]:
    """Of a training on one batch whose classes are those of its prior."""
    random = torch.Generator().manual_seed(1)
    target = torch.randint(0, CLASSES, (2, *GRID), generator=random)
    center = torch.randn(CLASSES, PRIOR, generator=random)
    prior = center[target.flatten(1)] + 0.5 * torch.randn(2, 36, PRIOR, generator=random)
    token, text = torch.randn(2, 36, WIDTH, generator=random), torch.randn(CLASSES, WIDTH, generator=random)
    optimizer = torch.optim.AdamW(host.parameters(), 3e-3)
    found = []
    for _ in range(steps):
        loss = F.cross_entropy(10 * host(token, prior, text), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(host.parameters(), 1.0)
        optimizer.step()
        found.append(loss.item())
    return found


def main(steps: int = 20) -> tuple[list[float], list[float]]:
    """Losses of the engine's training, and of the same host's with the literal module."""
    torch.manual_seed(0)
    host, literal = Host(), LiteralHost()
    literal.load_state_dict(copy.deepcopy(host.state_dict()))
    return losses(host, steps), losses(literal, steps)


if __name__ == "__main__":
    print(*main(), sep="\n")
