# SPDX-License-Identifier: Apache-2.0
"""PDGR in a segmentation network of your own: a frozen prior lays a graph over its features.

    python examples/pdgr_in_a_model.py

Images are drawn here and the prior is a random convolution, so that nothing is downloaded. In a real model the prior is
a frozen DINO, such as ``timm.create_model("vit_base_patch14_dinov2", pretrained=True, num_classes=0, img_size=336)``,
whose ``forward_features`` gives tokens (B, N, D); PDGR takes them as they are, with ``grid=(h, w)``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drseg_core.nn import PDGR

CLASSES = 3


class Network(nn.Module):
    """An image (B, 3, H, W) to logits (B, 3, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 32, 4, stride=4), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1))
        self.prior = nn.Conv2d(3, 48, 4, stride=4).requires_grad_(False)
        # 20 neighbours of 16 x 16 cells; in the paper it is 75 of 24 x 24
        self.pdgr = PDGR(channels=32, prior_dim=48, k=20)
        self.head = nn.Conv2d(32, CLASSES, 1)

    def forward(self, image: Tensor) -> Tensor:
        features, prior = self.features(image), self.prior(image)
        features = features + self.pdgr(features, prior)
        return F.interpolate(self.head(features), size=image.shape[2:], mode="bilinear")


def draw(batch: int, size: int = 64) -> tuple[Tensor, Tensor]:
    """Images with a disc and a bar of their own colours on noise, and their masks (B, H, W)."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    images, masks = torch.rand(batch, 3, size, size) * 0.6, torch.zeros(batch, size, size, dtype=torch.long)
    for image, mask in zip(images, masks, strict=True):
        row, column, bar = (int(torch.randint(12, size - 12, ())) for _ in range(3))
        mask[:, max(0, bar - 4) : bar + 4] = 1
        mask[(y - row) ** 2 + (x - column) ** 2 < 100] = 2
        image[0, mask == 1] += 0.4
        image[1, mask == 2] += 0.4
    return images, masks


def main(steps: int = 40) -> list[float]:
    torch.manual_seed(0)
    model = Network()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    losses = []
    for step in range(steps):
        images, masks = draw(4)
        loss = F.cross_entropy(model(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:3}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
