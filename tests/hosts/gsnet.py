# SPDX-License-Identifier: Apache-2.0
"""A host like GSNet: two streams of channels-last maps, where one graph of the specialist's prior serves two stages.

python -m tests.hosts.gsnet
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drseg_core.nn import PDGR
from drseg_core.testing import LiteralPDGR

WIDTH, PRIOR, CLASSES = 16, 24, 3


class Host(nn.Module):
    """An image (B, 3, H, W) to logits (B, T, H / 4, W / 4): a general and a specialist stream, fused and decoded.

    The specialist's grid is finer than the general one's and is averaged to it.
    """

    def __init__(self, *, literal: bool = False) -> None:
        super().__init__()
        self.literal = literal
        self.general = nn.Conv2d(3, WIDTH, 8, stride=8)
        self.specialist = nn.Conv2d(3, PRIOR, 4, stride=4).requires_grad_(False)
        self.pdgr = PDGR(WIDTH, PRIOR, k=5, edge_hidden=8)
        self.between = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.head = nn.Conv2d(WIDTH, CLASSES, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.general(image)
        prior = F.adaptive_avg_pool2d(self.specialist(image), x.shape[2:])
        if self.literal:
            stage = LiteralPDGR(self.pdgr)
            x = x + stage(x, prior)
            x = x + stage(F.relu(self.between(x)), prior)
        else:
            graph = self.pdgr.graph(prior)
            x = x + self.pdgr(x, graph=graph)
            x = x + self.pdgr(F.relu(self.between(x)), graph=graph)
        return F.interpolate(self.head(x), scale_factor=2, mode="bilinear", align_corners=False)


def main() -> dict[str, tuple[Tensor, Tensor]]:
    """Logits and gradients, with the engine and with the literal module, of channels-last images."""
    found: dict[str, list[Tensor]] = {}
    for literal in (False, True):
        torch.manual_seed(0)
        host = Host(literal=literal).to(memory_format=torch.channels_last)
        image = torch.rand(2, 3, 48, 40).to(memory_format=torch.channels_last)
        logits = host(image)
        logits.square().mean().backward()
        found.setdefault("logits", []).append(logits.detach())
        for name, parameter in host.named_parameters():
            if parameter.grad is not None:
                found.setdefault(name, []).append(parameter.grad)
    return {name: (one, other) for name, (one, other) in found.items()}


if __name__ == "__main__":
    for name, (one, other) in main().items():
        print(f"{name:28} {float((one - other).abs().max() / other.abs().max().clamp(min=1e-12)):.1e}")
