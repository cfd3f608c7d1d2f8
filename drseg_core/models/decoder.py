# SPDX-License-Identifier: Apache-2.0
"""Decoder: two up-sampling stages from the aggregated cost volume to logits at four times the token grid.

Each stage joins guidance from one inner CLIP block, and if asked from one block of the prior and of a second CLIP. A
convolution of ``cat(x, g)`` is ``conv_x(x) + conv_g(g)``. The guidance half is computed once per image and broadcast
over the classes. So guidance is never expanded by B x T.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drseg_core.nn.ugaf import group_norm


class GuidedConv(nn.Module):
    """3x3 convolution of class maps joined with per-image guidance, as two convolutions that are added.

    Equal to ``Conv2d(width + guidance_width, out_width, 3)`` on their concatenation; no bias, as a norm follows.

    Args:
        width: channels of the class maps.
        guidance_width: channels of the guidance.
        out_width: channels of the result.
    """

    def __init__(self, width: int, guidance_width: int, out_width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out_width, 3, padding=1, bias=False)
        self.conv_guidance = nn.Conv2d(guidance_width, out_width, 3, padding=1, bias=False)

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        """``x`` (B*T, width, h, w) and ``guidance`` (B, guidance_width, h, w) to (B*T, out_width, h, w)."""
        maps = self.conv(x)
        # in place to save memory, which is scarce at this resolution; no backward needs the parts of the sum
        maps.unflatten(0, (guidance.shape[0], -1)).add_(self.conv_guidance(guidance)[:, None])
        return maps


class GuidanceAttention(nn.Module):
    """Guidance weighted by the maps it will join, ``g + a_channel g + a_place g`` (caoql98/OVRS, model_ours.py).

    The weights come from the decoded maps' mean over the classes. A linear map of its mean over places gives one weight
    per channel of the guidance. A linear map of its mean over channels gives one per place.

    Args:
        width: channels of the decoded maps.
        guidance_width: channels of the guidance.
    """

    def __init__(self, width: int, guidance_width: int) -> None:
        super().__init__()
        self.channel = nn.Linear(width, guidance_width)
        self.place = nn.Linear(1, 1)

    def forward(self, guidance: Tensor, decoded: Tensor) -> Tensor:
        """``guidance`` (B, guidance_width, h, w) weighted by ``decoded`` (B*T, width, h, w)."""
        maps = decoded.unflatten(0, (guidance.shape[0], -1)).mean(dim=1)
        channel = self.channel(maps.mean(dim=(2, 3)))[:, :, None, None]
        place = self.place(maps.mean(dim=1)[..., None])[..., 0][:, None]
        return guidance * (1 + channel + place)


class Stage(nn.Module):
    """Doubles the resolution, joins guidance, and refines by two convolutions.

    Args:
        width: input channels.
        guidance_width: guidance channels of one source; the up-sampled maps have ``width - guidance_width``.
        out_width: output channels.
        sources: how many sources of guidance are joined.
        attention: weigh the guidance by :class:`GuidanceAttention`.
        skip: join the correlation map of each class too.
    """

    def __init__(
        self,
        width: int,
        guidance_width: int,
        out_width: int,
        sources: int = 1,
        *,
        attention: bool = False,
        skip: bool = False,
    ) -> None:
        super().__init__()
        if not 0 < guidance_width < width:
            raise ValueError(
                f"Decoder: guidance_widths is out of range; expected 1..{width - 1} for a stage of {width} channels, "
                f"got {guidance_width}"
            )
        self.up = nn.ConvTranspose2d(width, width - guidance_width, 2, stride=2)
        self.join = GuidedConv(width - guidance_width, sources * guidance_width, out_width)
        inner = width - guidance_width
        self.attention = GuidanceAttention(inner, sources * guidance_width) if attention else None
        self.skip = nn.Conv2d(1, inner, 3, padding=1) if skip else None
        self.norm_join = group_norm(out_width)
        self.conv = nn.Conv2d(out_width, out_width, 3, padding=1, bias=False)
        self.norm = group_norm(out_width)

    def forward(self, x: Tensor, guidance: Tensor, correlation: Tensor | None = None) -> Tensor:
        """``x`` (B*T, width, h, w), guidance (B, _, 2h, 2w) and correlation (B*T, 1, _, _) to (B*T, _, 2h, 2w)."""
        x = self.up(x)
        if self.skip is not None and correlation is not None:
            x = x + self.skip(F.interpolate(correlation, size=x.shape[2:], mode="bilinear", align_corners=False))
        if self.attention is not None:
            guidance = self.attention(guidance, x)
        x = self.norm_join(self.join(x, guidance)).relu_()
        return self.norm(self.conv(x)).relu_()


class Decoder(nn.Module):
    """Cost volume and two guidance maps to logits.

    Args:
        width: channels of the cost volume.
        guidance_dim: channels of the CLIP blocks' outputs.
        widths: output channels of the two stages.
        guidance_widths: guidance channels of the two stages.
        guidance_hidden: channels after the guidance is up-sampled.
        initial_logit: initial bias of the logits.
        prior_dim: channels of the prior's guidance; None has none.
        prior_scale: how many times finer than the cost volume the prior's grid is, 1 or 2.
        remote_dim: channels of a second CLIP's guidance; None has none.
        guidance_attention: weigh the guidance by what is decoded (OVRS).
        skip_correlation: join the original correlation map in each stage, and send no gradient through the guidance
            (SED).
    """

    def __init__(
        self,
        width: int,
        guidance_dim: int,
        *,
        widths: tuple[int, int] = (64, 32),
        guidance_widths: tuple[int, int] = (32, 16),
        guidance_hidden: tuple[int, int] = (256, 128),
        initial_logit: float = 0.0,
        prior_dim: int | None = None,
        prior_scale: Literal[1, 2] = 1,
        remote_dim: int | None = None,
        guidance_attention: bool = False,
        skip_correlation: bool = False,
    ) -> None:
        super().__init__()
        self.skip_correlation = skip_correlation
        self.guidance = _projections(guidance_dim, (2, 4), guidance_hidden, guidance_widths)
        self.prior_guidance: nn.ModuleList | None = None
        if prior_dim is not None:
            # on a grid twice as fine the first is RSKT-Seg's 1x1 convolution, the second a transposed one of stride two
            factors = (2 // prior_scale, 4 // prior_scale)
            self.prior_guidance = _projections(prior_dim, factors, guidance_hidden, guidance_widths)
        self.remote_guidance: nn.ModuleList | None = None
        if remote_dim is not None:
            self.remote_guidance = _projections(remote_dim, (2, 4), guidance_hidden, guidance_widths)
        sources = 1 + (prior_dim is not None) + (remote_dim is not None)
        self.stages = nn.ModuleList(
            Stage(into, guided, out, sources, attention=guidance_attention, skip=skip_correlation)
            for into, guided, out in zip((width, widths[0]), guidance_widths, widths, strict=True)
        )
        self.head = nn.Conv2d(widths[1], 1, 3, padding=1)
        self.head.bias = nn.Parameter(torch.full((1,), initial_logit))

    def forward(
        self,
        embedding: Tensor,
        guidance: tuple[Tensor, ...],
        prior_guidance: tuple[Tensor, ...] = (),
        correlation: Tensor | None = None,
        remote_guidance: tuple[Tensor, ...] = (),
    ) -> Tensor:
        """Decode.

        Args:
            embedding: (B, width, T, h, w).
            guidance: two maps (B, guidance_dim, h, w).
            prior_guidance: two maps (B, prior_dim, s h, s w) with s = ``prior_scale``; none without ``prior_dim``.
            correlation: (B, T, h, w), which ``skip_correlation`` joins.
            remote_guidance: two maps (B, remote_dim, h, w); none without ``remote_dim``.

        Returns:
            Logits (B, T, 4h, 4w).
        """
        batch, _, classes = embedding.shape[:3]
        x = embedding.transpose(1, 2).flatten(0, 1)
        if self.skip_correlation:
            guidance = tuple(maps.detach() for maps in guidance)
            correlation = None if correlation is None else correlation.flatten(0, 1)[:, None]
        projected = [project(maps) for project, maps in zip(self.guidance, guidance, strict=True)]
        for projections, source in ((self.prior_guidance, prior_guidance), (self.remote_guidance, remote_guidance)):
            if projections is not None:
                more = [project(maps) for project, maps in zip(projections, source, strict=True)]
                projected = [torch.cat(pair, dim=1) for pair in zip(projected, more, strict=True)]
        for stage, maps in zip(self.stages, projected, strict=True):
            x = stage(x, maps, correlation)
        return self.head(x)[:, 0].unflatten(0, (batch, classes))


def _projections(width: int, factors: tuple[int, int], hidden: tuple[int, int], out: tuple[int, int]) -> nn.ModuleList:
    """One enlargement by transposed convolution and one reduction of channels per stage."""
    return nn.ModuleList(
        nn.Sequential(
            nn.ConvTranspose2d(width, inner, factor, stride=factor), nn.Conv2d(inner, end, 3, padding=1), nn.ReLU()
        )
        for factor, inner, end in zip(factors, hidden, out, strict=True)
    )
