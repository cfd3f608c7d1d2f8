# SPDX-License-Identifier: Apache-2.0
"""Named sizes with seeded inputs, shared by the tests, the benchmark and the tuner of every op."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One size at which an op is tested and measured.

    Args:
        name: origin first, e.g. ``paper_vitl_24x24``.
        batch, height, width: B, h, w; N = h * w nodes.
        prior: D, prior channels.
        hidden: E, width of the edge MLP.
        channels: C, feature channels.
        neighbours: K.
        saturated: values at the edge of the number range instead of ordinary ones.
        large: of a model, and too large for every commit on a CPU; whole PDGR is measured at these.

    Examples:
        >>> from drseg_core.testing import Case
        >>> Case("mine_8x8", 1, 8, 8, prior=16, hidden=8, channels=12, neighbours=5).nodes
        64
    """

    name: str
    batch: int
    height: int
    width: int
    prior: int
    hidden: int
    channels: int
    neighbours: int
    saturated: bool = False
    large: bool = False

    @property
    def nodes(self) -> int:
        return self.height * self.width


CASES = (
    Case("tiny_3x4", 2, 3, 4, prior=8, hidden=4, channels=5, neighbours=3),
    Case("tiny_one_node", 2, 1, 1, prior=3, hidden=2, channels=2, neighbours=1),
    Case("odd_37_nodes", 2, 1, 37, prior=17, hidden=9, channels=23, neighbours=7),
    Case("odd_all_neighbours", 1, 5, 7, prior=33, hidden=33, channels=65, neighbours=35),
    Case("odd_231_channels", 1, 9, 11, prior=7, hidden=16, channels=231, neighbours=16),
    Case("saturated_6x7", 2, 6, 7, prior=64, hidden=16, channels=33, neighbours=9, saturated=True),
    # E is the default of PDGR, and 256 where the name ends so: the wide edge MLP, of which the targets speak
    Case("paper_vitb_24x24", 8, 24, 24, prior=1024, hidden=128, channels=256, neighbours=75, large=True),
    Case("paper_vitl_24x24", 8, 24, 24, prior=1024, hidden=128, channels=384, neighbours=75, large=True),
    Case("paper_vitl_24x24_e256", 8, 24, 24, prior=1024, hidden=256, channels=384, neighbours=75, large=True),
    Case("paper_rsib_24x24", 8, 24, 24, prior=768, hidden=128, channels=384, neighbours=75, large=True),
    Case("image_24x24", 1, 24, 24, prior=1024, hidden=128, channels=384, neighbours=75, large=True),
    Case("grid_48x48", 1, 48, 48, prior=768, hidden=128, channels=384, neighbours=75, large=True),
    Case("grid_64x64", 1, 64, 64, prior=1024, hidden=128, channels=384, neighbours=75, large=True),
    Case("grid_64x64_e256", 1, 64, 64, prior=1024, hidden=256, channels=384, neighbours=75, large=True),
    Case("grid_128x128", 1, 128, 128, prior=768, hidden=128, channels=384, neighbours=75, large=True),
    Case("grid_256x256", 1, 256, 256, prior=768, hidden=128, channels=384, neighbours=75, large=True),
    Case("vitl_128x128", 1, 128, 128, prior=1024, hidden=128, channels=384, neighbours=75, large=True),
    Case("vitl_128x128_e256", 1, 128, 128, prior=1024, hidden=256, channels=384, neighbours=75, large=True),
    Case("vitl_256x256", 1, 256, 256, prior=1024, hidden=128, channels=384, neighbours=75, large=True),
    Case("vitl_256x256_e256", 1, 256, 256, prior=1024, hidden=256, channels=384, neighbours=75, large=True),
)


def generator(case: Case, seed: int = 0) -> torch.Generator:
    """Random numbers that depend on nothing but the case and the seed; always on the CPU.

    Examples:
        >>> import torch
        >>> from drseg_core.testing import CASES, generator
        >>> torch.equal(*(torch.rand(3, generator=generator(CASES[0])) for _ in range(2)))
        True
    """
    return torch.Generator().manual_seed(sum(case.name.encode()) * 1000 + seed)


def random_index(case: Case, random: torch.Generator) -> Tensor:
    """(B, N, K) int32 neighbours, ascending and distinct in each row, with a few nodes that many rows choose.

    Examples:
        >>> from drseg_core.testing import CASES, generator, random_index
        >>> random_index(CASES[0], generator(CASES[0])).shape
        torch.Size([2, 12, 3])
    """
    score = torch.rand(case.batch, case.nodes, case.nodes, generator=random)
    score[:, :, : max(1, case.nodes // 16)] += 0.6
    return score.topk(case.neighbours, dim=-1).indices.sort(-1).values.int()


def random_features(case: Case, dtype: torch.dtype, random: torch.Generator) -> Tensor:
    """(B, N, C) float32 features; saturated ones are 100 (for float16) or 1e15 beside ordinary ones."""
    x = torch.randn(case.batch, case.nodes, case.channels, generator=random)
    if case.saturated:
        x[:, ::3] *= 1e2 if dtype == torch.float16 else 1e15
    return x


def vit_like_prior(case: Case, random: torch.Generator) -> Tensor:
    """(B, N, D) float32 features as a vision transformer makes them: clusters, a shared mean, 2 % exact duplicates.

    Examples:
        >>> from drseg_core.testing import CASES, generator, vit_like_prior
        >>> vit_like_prior(CASES[0], generator(CASES[0])).shape
        torch.Size([2, 12, 8])
    """
    shape = (case.batch, case.nodes, case.prior)
    centre = torch.randn(case.batch, 6, case.prior, generator=random)
    member = torch.randint(0, 6, shape[:2], generator=random)
    prior = centre.gather(1, member[..., None].expand(shape)) + 0.5 * torch.randn(shape, generator=random)
    prior = prior + 0.7 * torch.randn(case.prior, generator=random)
    copies = math.ceil(case.nodes * 0.02) if case.nodes > 10 else 0
    if copies:
        order = torch.randperm(case.nodes, generator=random)
        prior[:, order[:copies]] = prior[:, order[copies : 2 * copies]]
    return prior


def _waves(batch: int, height: int, width: int, count: int, random: torch.Generator) -> Tensor:
    """(B, N, count) smooth fields on the grid, each a wave of at most one and a half periods, values in [-1, 1]."""
    y = torch.linspace(0, 1, height)[:, None, None]
    x = torch.linspace(0, 1, width)[None, :, None]
    turns = torch.empty(2, batch, 1, 1, count).uniform_(-1.5, 1.5, generator=random)
    phase = torch.rand(batch, 1, 1, count, generator=random)
    return torch.sin(2 * math.pi * (turns[0] * y + turns[1] * x + phase)).flatten(1, 2)


def dino_like_prior(batch: int, height: int, width: int, channels: int, random: torch.Generator) -> Tensor:
    """Features with the structure of a self-supervised vision transformer's on an aerial image.

    It has a few regions with curved, soft borders and one direction each, a smooth field inside them, and noise per
    patch. All patches share a mean. Outlier channels have 10 to 20 times the usual size. 2 % of the patches are exact
    copies of others, and a rectangle of zeros (nodata) covers about 3 % of the area.

    Args:
        batch, height, width, channels: B, h, w, D; N = h * w nodes.
        random: source of every number.

    Returns:
        (B, N, D) float32. Nothing else of that size is allocated on the way.

    Examples:
        >>> import torch
        >>> from drseg_core.testing import dino_like_prior
        >>> dino_like_prior(2, 6, 7, 32, torch.Generator().manual_seed(0)).shape
        torch.Size([2, 42, 32])
    """
    nodes, regions, fields = height * width, 6, 8
    logit = 4 * _waves(batch, height, width, 3 * regions, random).unflatten(2, (3, regions)).sum(2)
    basis = torch.cat(
        [logit.softmax(-1), _waves(batch, height, width, fields, random), torch.ones(batch, nodes, 1)], dim=2
    )
    direction = torch.randn(batch, basis.shape[2], channels, generator=random)
    direction[:, regions:-1] *= 0.5 / math.sqrt(fields)
    # the mean is that of the backbone, the same for every image
    direction[:, -1] = 0.7 * torch.randn(channels, generator=random)
    prior = torch.randn(batch, nodes, channels, generator=random)
    prior.mul_(0.5).baddbmm_(basis, direction)
    outliers = torch.randperm(channels, generator=random)[: math.ceil(channels / 256)]
    prior[:, :, outliers] *= torch.empty(len(outliers)).uniform_(10, 20, generator=random)
    if nodes > 10:
        copies = math.ceil(nodes * 0.02)
        order = torch.randperm(nodes, generator=random)
        prior[:, order[:copies]] = prior[:, order[copies : 2 * copies]]
        hole = [max(1, round(side * math.sqrt(0.03))) for side in (height, width)]
        top, left = (
            int(torch.randint(side - cut + 1, (), generator=random))
            for side, cut in zip((height, width), hole, strict=True)
        )
        prior.unflatten(1, (height, width))[:, top : top + hole[0], left : left + hole[1]] = 0
    return prior
