# SPDX-License-Identifier: Apache-2.0
"""Aggregation of the cost embedding over space (within each class map) and over classes (at each place).

The benchmark's efficient form is here, tensor for tensor RSKT-Seg's (arXiv 2509.12040; LiBingyu01/RSKT-Seg,
EfficientAggregator): spatial attention with keys and values reduced by two, class attention on maps reduced by two.
CAT-Seg's is in :mod:`drseg_core.models.baselines.swin`. Guidance enters queries and keys. A linear map of a
concatenation is a sum of two linear maps. So the guidance part is computed once per image (or class) and broadcast,
never expanded to B x T.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from drseg_core.models.baselines.swin import LinearClassBlock, WindowPair


class GatedMLP(nn.Module):
    """``fc3(relu6(fc1 x) * fc2 x)`` on the last dimension."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(width, hidden)
        self.fc3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.relu6(self.fc1(x)) * self.fc2(x))


class SpatialBlock(nn.Module):
    """Attention among the places of each class map, then a gated MLP with a 7x7 depth-wise convolution.

    Places are reduced by two for keys and values, each with its own convolution and LayerNorm. Values come from the
    maps, keys from the maps and the guidance together, at twice the width.

    Args:
        width: channels.
        heads: attention heads.
        hidden: width inside the MLP.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.query_guidance = nn.Linear(width, width, bias=False)
        self.reduce_key = nn.Conv2d(width, 2 * width, 2, stride=2)
        self.reduce_key_guidance = nn.Conv2d(width, 2 * width, 2, stride=2, bias=False)
        self.norm_key = nn.LayerNorm(2 * width)
        self.key = nn.Linear(2 * width, width)
        self.reduce_value = nn.Conv2d(width, width, 2, stride=2)
        self.norm_value = nn.LayerNorm(width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = GatedMLP(width, hidden)
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.apply(_initialise)

    def forward(self, x: Tensor, guidance: Tensor, grid: tuple[int, int]) -> Tensor:
        """``x`` (B, T, hw, width) and ``guidance`` (B, width, h, w) to (B, T, hw, width)."""
        batch, classes = x.shape[:2]
        y = self.norm_attention(x)
        query = self.query(y) + self.query_guidance(guidance.flatten(2).transpose(1, 2))[:, None]
        maps = _even(_map(y.flatten(0, 1), grid))
        small = _tokens(self.reduce_key(maps)).unflatten(0, (batch, classes))
        key = self.key(self.norm_key(small + _tokens(self.reduce_key_guidance(_even(guidance)))[:, None]))
        value = self.value(self.norm_value(_tokens(self.reduce_value(maps))))
        mixed = _attention(query.flatten(0, 1), key.flatten(0, 1), value, self.heads)
        x = x + self.out(mixed).unflatten(0, (batch, classes))
        y = self.mlp(self.norm_mlp(x))
        return x + _tokens(self.depthwise(_map(y.flatten(0, 1), grid))).unflatten(0, (batch, classes))


class ConvBlock(nn.Module):
    """A 9x9 depth-wise convolution and an MLP inside each class map, with a residual (SED, arXiv 2311.15537).

    Args:
        width: channels.
        hidden: width inside the MLP.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 9, padding=4, groups=width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.guide = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, guidance: Tensor, grid: tuple[int, int]) -> Tensor:
        """``x`` (B, T, hw, width) and ``guidance`` (B, width, h, w) to (B, T, hw, width)."""
        guided = x + self.guide(guidance.flatten(2).transpose(1, 2))[:, None]
        y = _tokens(self.depthwise(_map(guided.flatten(0, 1), grid)))
        return x + self.mlp(self.norm(y)).view_as(x)


class ClassBlock(nn.Module):
    """Attention among the classes at each place of maps pooled 2x2, resized back and added.

    Args:
        width: channels.
        heads: attention heads.
        hidden: width inside the MLP.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.query_key_guidance = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = GatedMLP(width, hidden)
        self.apply(_initialise)

    def forward(self, x: Tensor, guidance: Tensor, grid: tuple[int, int]) -> Tensor:
        """``x`` (B, T, hw, width) and ``guidance`` (T, width) to (B, T, hw, width)."""
        batch, classes = x.shape[:2]
        pooled = F.avg_pool2d(_map(x.flatten(0, 1), grid), 2, ceil_mode=True)
        small = (pooled.shape[2], pooled.shape[3])
        # classes become the sequence: (B*h'w', T, width)
        z = _tokens(pooled).unflatten(0, (batch, classes)).transpose(1, 2).flatten(0, 1)
        query, key, value = self.query_key_value(self.norm_attention(z)).chunk(3, dim=-1)
        query_guidance, key_guidance = self.query_key_guidance(guidance).chunk(2, dim=-1)
        z = z + self.out(_attention(query + query_guidance, key + key_guidance, value, self.heads))
        z = z + F.relu6(self.mlp(self.norm_mlp(z)))
        z = _map(z.unflatten(0, (batch, -1)).transpose(1, 2).flatten(0, 1), small)
        z = F.interpolate(z, size=grid, mode="bilinear", align_corners=True)
        return x + _tokens(z).unflatten(0, (batch, classes))


class Aggregator(nn.Module):
    """Layers of a spatial and a class block with visual and text guidance.

    Args:
        width: channels of the cost embedding.
        embed_dim: channels of the dense CLIP features and of the text embeddings (C).
        kind: ``efficient`` (:class:`SpatialBlock`, :class:`ClassBlock`), ``swin`` (:class:`WindowPair`,
            :class:`LinearClassBlock`) or ``conv`` (:class:`ConvBlock`, :class:`LinearClassBlock`).
        layers: number of layers.
        heads: attention heads; must divide ``width``.
        mlp_hidden: width inside the MLPs.
        window: side of the windows of ``swin``, in cells.
        class_pooling: pooling of the maps before the class attention of ``swin`` and ``conv``, in training and in
            evaluation.
        class_slots: length of the class axis of ``swin`` and ``conv``.
    """

    def __init__(
        self,
        width: int,
        embed_dim: int,
        *,
        kind: Literal["efficient", "swin", "conv"] = "efficient",
        layers: int = 2,
        heads: int = 8,
        mlp_hidden: int = 384,
        window: int = 12,
        class_pooling: tuple[int, int] = (2, 1),
        class_slots: int = 256,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"Aggregator: heads does not divide width; expected a divisor of {width}, got {heads}")
        self.project_visual = nn.Conv2d(embed_dim, width, 3, padding=1)
        self.project_text = nn.Linear(embed_dim, width)
        if kind == "efficient":
            self.spatial = nn.ModuleList(SpatialBlock(width, heads, mlp_hidden) for _ in range(layers))
            self.classes = nn.ModuleList(ClassBlock(width, heads, mlp_hidden) for _ in range(layers))
        elif kind in ("swin", "conv"):
            self.spatial = nn.ModuleList(
                WindowPair(width, heads, mlp_hidden, window=window) if kind == "swin" else ConvBlock(width, mlp_hidden)
                for _ in range(layers)
            )
            self.classes = nn.ModuleList(
                LinearClassBlock(width, heads, mlp_hidden, pooling=class_pooling, slots=class_slots)
                for _ in range(layers)
            )
        else:
            raise ValueError(f"Aggregator: kind is unknown; expected efficient, swin or conv, got {kind!r}")

    def forward(self, embedding: Tensor, features: Tensor, text: Tensor) -> Tensor:
        """Aggregate.

        Args:
            embedding: (B, width, T, h, w).
            features: (B, C, h, w) canonical dense features.
            text: (T, C).

        Returns:
            (B, width, T, h, w).
        """
        batch, _, classes, h, w = embedding.shape
        if not len(self.spatial):
            return embedding
        visual = self.project_visual(features).relu()
        words = self.project_text(text).relu()
        x = _tokens(embedding.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, classes))
        for spatial, across in zip(self.spatial, self.classes, strict=True):
            x = across(spatial(x, visual, (h, w)), words, (h, w))
        return x.permute(0, 3, 1, 2).unflatten(3, (h, w))


def _initialise(module: nn.Module) -> None:
    """RSKT-Seg's initial weights, of linear maps and convolutions; biases are 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        # per group, which is less than PyTorch's fan_out of a depth-wise convolution
        outputs = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2.0 / outputs) ** 0.5)
    if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _tokens(maps: Tensor) -> Tensor:
    # (X, width, h, w) to (X, hw, width); a view where memory is channels_last
    return maps.flatten(2).transpose(1, 2).contiguous()


def _map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    # (X, hw, width) to (X, width, h, w) in channels_last memory, a view
    return tokens.unflatten(1, grid).permute(0, 3, 1, 2)


def _even(maps: Tensor) -> Tensor:
    # the 2x2 reduction must see the last row and column of an odd grid too
    pad = (maps.shape[3] % 2, maps.shape[2] % 2)
    return F.pad(maps, (0, pad[0], 0, pad[1]), mode="replicate") if any(pad) else maps


def _attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    # (X, N, width), (X, M, width) twice
    parts = [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value)]
    return F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
