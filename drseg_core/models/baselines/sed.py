# SPDX-License-Identifier: Apache-2.0
"""SED (arXiv 2311.15537; xb534/SED): a cost map of CLIP's ConvNeXt, and a decoder whose stages aggregate it anew."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drseg_core.config.schema import ModelConfig
from drseg_core.models.baselines.swin import LinearClassBlock
from drseg_core.models.clip import StageTower
from drseg_core.models.correlation import correlation
from drseg_core.models.decoder import GuidedConv
from drseg_core.models.segmenter import Segmenter, SegmenterOutput, SupervisedOutput
from drseg_core.nn.ugaf import build_fusion, group_norm

KERNEL, STAGES = 9, 3


class ConvNextBlock(nn.Module):
    """A 9x9 depth-wise convolution and an MLP inside each class map, with a scaled residual (arXiv 2201.03545)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, KERNEL, padding=KERNEL // 2, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(X, width, h, w) to the same."""
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.mlp(y)).permute(0, 3, 1, 2)


class GradualStage(nn.Module):
    """Aggregates over space and classes, doubles the resolution, and joins image features and the correlation.

    Args:
        width: input channels.
        guidance_width: channels of the features, and of the correlation, that are joined.
        out_width: output channels.
        heads: attention heads of the class attention.
        pooling: sides of its average pooling in training and in evaluation.
    """

    def __init__(
        self, width: int, guidance_width: int, out_width: int, *, heads: int, pooling: tuple[int, int]
    ) -> None:
        super().__init__()
        self.space = ConvNextBlock(width)
        self.classes = LinearClassBlock(width, heads, 4 * width, pooling=pooling, slots=0, guided=False)
        self.up = nn.ConvTranspose2d(width, width - guidance_width, 2, stride=2)
        # the former maps and the correlation are both one per class
        self.join = GuidedConv(width, guidance_width, out_width)
        self.norm_join = group_norm(out_width)
        self.conv = nn.Conv2d(out_width, out_width, 3, padding=1, bias=False)
        self.norm = group_norm(out_width)

    def forward(self, x: Tensor, guidance: Tensor, correlation: Tensor) -> Tensor:
        """``x`` (B*T, width, h, w), guidance (B, _, 2h, 2w) and correlation (B*T, _, 2h, 2w) to (B*T, _, 2h, 2w)."""
        batch, grid = guidance.shape[0], (x.shape[2], x.shape[3])
        tokens = self.space(x).flatten(2).transpose(1, 2).unflatten(0, (batch, -1))
        x = self.classes(tokens, None, grid).flatten(0, 1).transpose(1, 2).unflatten(2, grid)
        x = self.norm_join(self.join(torch.cat((self.up(x), correlation), dim=1), guidance)).relu_()
        return self.norm(self.conv(x)).relu_()


class GradualDecoder(nn.Module):
    """SED's gradual fusion: three stages, each with a head for a loss of its own.

    Args:
        width: channels of the embedded cost map; stages have a half, a quarter and an eighth of them.
        guidance_widths: channels of the image features that stages join, the coarsest first.
        heads: attention heads; must divide the widths of all stages.
        pooling: see :class:`GradualStage`.
        initial_logit: initial bias of the logits.
    """

    def __init__(
        self,
        width: int,
        guidance_widths: Sequence[int],
        *,
        heads: int,
        pooling: tuple[int, int],
        initial_logit: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [max(width >> stage, 1) for stage in range(STAGES + 1)]
        if any(one % heads for one in widths[:-1]):
            raise ValueError(
                f"GradualDecoder: heads does not divide the widths {widths[:-1]}; expected a divisor, got {heads}"
            )
        joined = [max(one // 4, 1) for one in widths[:-1]]
        self.guidance = nn.ModuleList(
            nn.Sequential(nn.Conv2d(into, out, 3, padding=1), nn.ReLU())
            for into, out in zip(guidance_widths, joined, strict=True)
        )
        self.correlation = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(into, out, 2, stride=2), nn.ReLU())
            for into, out in zip((1, *joined), joined, strict=False)
        )
        self.stages = nn.ModuleList(
            GradualStage(into, guided, out, heads=heads, pooling=pooling)
            for into, guided, out in zip(widths, joined, widths[1:], strict=False)
        )
        *early, last = (nn.Conv2d(one, 1, 3, padding=1) for one in widths)
        last.bias = nn.Parameter(torch.full((1,), initial_logit))
        self.heads = nn.ModuleList((*early, last))

    def forward(
        self, embedding: Tensor, guidance: Sequence[Tensor], correlation: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Decode.

        Args:
            embedding: (B, width, T, h, w).
            guidance: image features (B, _, _, _) of the stages, through which no gradient is sent.
            correlation: (B, T, h, w).

        Returns:
            Logits (B, T, 8h, 8w). In training also logits before each stage, which send no gradient beyond their heads.
        """
        batch, _, classes = embedding.shape[:3]
        x, maps = embedding.transpose(1, 2).flatten(0, 1), correlation.flatten(0, 1)[:, None]
        early = []
        for place, stage in enumerate(self.stages):
            if self.training:
                early.append(self.heads[place](x.detach())[:, 0].unflatten(0, (batch, classes)))
            maps = self.correlation[place](maps)
            seen = self.guidance[place](guidance[place].detach())
            if seen.shape[2:] != maps.shape[2:]:
                seen = F.interpolate(seen, size=maps.shape[2:], mode="bilinear", align_corners=False)
            x = stage(x, seen, maps)
        return self.heads[-1](x)[:, 0].unflatten(0, (batch, classes)), tuple(early)


class GradualSegmenter(Segmenter):
    """SED: the correlation of CLIP's dense features and words, embedded and decoded by :class:`GradualDecoder`.

    On a ConvNeXt the stages join its own stages' features. On a vision transformer, for comparisons with one encoder,
    they join the outputs of ``clip.guidance_blocks``, the later one first, enlarged.

    Args:
        config: ``decoder.kind`` must be ``gradual``.
        read_clip: False leaves CLIP's weights as memory is, for a checkpoint that holds all of them.

    Raises:
        ValueError: options that do not fit together.
        CheckpointError: CLIP's weights are not available.
    """

    hierarchical = True

    def __init__(self, config: ModelConfig, *, read_clip: bool = True) -> None:
        super().__init__(config, read_clip=read_clip)
        if config.decoder.kind != "gradual":
            raise ValueError(f"GradualSegmenter: decoder.kind is {config.decoder.kind}; expected gradual")
        aggregator, visual = config.aggregator, self.clip.visual
        widths = visual.guidance_widths if isinstance(visual, StageTower) else STAGES * (visual.width,)
        self.fusion = build_fusion("none", config.rotations, aggregator.width, tau=config.fusion.tau)
        self.decoder = GradualDecoder(
            aggregator.width,
            widths,
            heads=aggregator.heads,
            pooling=aggregator.class_pooling,
            initial_logit=config.decoder.initial_logit,
        )

    def forward(self, image: Tensor, text: Tensor) -> SegmenterOutput | SupervisedOutput:
        """Segment, see :meth:`Segmenter.forward`."""
        resized, text = self._resized(image, "GradualSegmenter"), self._class_embedding(text)
        dense = self.clip(resized, guided=len(image), rotations=self.config.rotations)
        original = correlation(dense.features, text, self.config.rotations)
        joined, mean = self.fusion(original), original.mean(dim=1)
        guidance = dense.guidance
        if not isinstance(self.clip.visual, StageTower):
            guidance = (guidance[1], guidance[0], guidance[0])
        logits, early = self.decoder(joined.embedding, guidance, mean)
        if self.training:
            return SupervisedOutput(logits, joined.uncertainty, mean, None, auxiliary=early)
        return SegmenterOutput(logits, joined.uncertainty, mean, None)
