# SPDX-License-Identifier: Apache-2.0
"""Methods that propose masks first and recognise them by CLIP afterwards: SAN and SCAN.

Both train by matching proposals with true segments in their own papers. Here all methods share one loss on dense
logits, so every place shares itself out among the proposals (a softmax of the mask logits) and takes the class logits
of its shares: no matching, no "no object" class.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drseg_core.config.schema import ModelConfig, ProposalConfig
from drseg_core.models.clip import VisionTower
from drseg_core.models.correlation import cosine
from drseg_core.models.segmenter import Segmenter, SegmenterOutput
from drseg_core.nn.ugaf import uncertainty

# states of CLIP that SAN adds to its side network: the stem's, and some of the blocks before recognition begins
TAPS = 4
# SCAN's balance of what the side network says and what CLIP says, which it searches per vocabulary
CLIP_SHARE = 0.4


class SideLayer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.query_key_value(self.norm_attention(x)).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(*parts.chunk(3, dim=1))
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


class SideNetwork(nn.Module):
    """Learned queries and image patches in a small transformer that CLIP's states are added to (SAN's adapter).

    Args:
        config: queries, width, layers and heads.
        patch: side of a patch in pixels.
        grid: patches (h, w) at the model's image size, for the position embedding.
        clip_width: channels of CLIP's states.
        clip_heads: heads of the attention bias; one bias is shared by all if 1.
        taps: how many of CLIP's states are added, each before one of the first layers.
    """

    def __init__(
        self, config: ProposalConfig, *, patch: int, grid: tuple[int, int], clip_width: int, clip_heads: int, taps: int
    ) -> None:
        super().__init__()
        width = config.width
        if width % config.heads:
            raise ValueError(
                f"SideNetwork: heads does not divide width; expected a divisor of {width}, got {config.heads}"
            )
        self.clip_heads = clip_heads
        self.embed = nn.Conv2d(3, width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, width, *grid))
        self.query = nn.Parameter(0.02 * torch.randn(config.queries, width))
        self.layers = nn.ModuleList(SideLayer(width, config.heads) for _ in range(config.layers))
        self.taps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(clip_width), nn.Linear(clip_width, width)) for _ in range(taps)
        )
        self.norm = nn.LayerNorm(width)
        self.mask_query = _mlp(width, width)
        self.mask_pixel = nn.Sequential(
            nn.ConvTranspose2d(width, width, 2, stride=2), nn.GELU(), nn.Conv2d(width, width, 1)
        )
        self.bias_query = _mlp(width, clip_heads * width)
        self.bias_pixel = nn.Linear(width, clip_heads * width)

    def forward(self, pixels: Tensor, states: list[Tensor], grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Propose.

        Args:
            pixels: (B, 3, H, W) normalised.
            states: of CLIP, (B, 1 + hw, clip_width) each, class token first.
            grid: CLIP's (h, w).

        Returns:
            query states (B, Q, width), mask logits (B, Q, 2h', 2w') on twice the side grid, and attention bias
            (B, clip_heads, Q, hw) on CLIP's grid.
        """
        maps = self.embed(pixels) + self.position
        side = maps.shape[2:]
        x = torch.cat((self.query.expand(len(pixels), -1, -1), maps.flatten(2).transpose(1, 2)), dim=1)
        queries = len(self.query)
        for place, layer in enumerate(self.layers):
            if place < len(self.taps):
                seen = self.taps[place](states[place][:, 1:]).transpose(1, 2).unflatten(2, grid)
                seen = F.interpolate(seen, size=side, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
                x = torch.cat((x[:, :queries], x[:, queries:] + seen), dim=1)
            x = layer(x)
        x = self.norm(x)
        query, pixel = x[:, :queries], x[:, queries:]
        maps = self.mask_pixel(pixel.transpose(1, 2).unflatten(2, side))
        mask = torch.einsum("bqd,bdhw->bqhw", self.mask_query(query), maps) / maps.shape[1] ** 0.5
        bias_query = self.bias_query(query).unflatten(-1, (self.clip_heads, -1)).transpose(1, 2)
        small = F.adaptive_avg_pool2d(pixel.transpose(1, 2).unflatten(2, side), grid).flatten(2).transpose(1, 2)
        bias_pixel = self.bias_pixel(small).unflatten(-1, (self.clip_heads, -1)).transpose(1, 2)
        return query, mask, bias_query @ bias_pixel.transpose(-1, -2) / bias_query.shape[-1] ** 0.5


class ProposalSegmenter(Segmenter):
    """SAN (``side_adapter``) or SCAN (``calibrated``) on the dense dual encoder of all methods here.

    A side network proposes masks. SAN: copies of CLIP's class token, one per proposal, run beside CLIP's last blocks
    with an attention bias from the side network, and are compared with the class embeddings. SCAN: the proposals gather
    CLIP's own dense features (semantic integration), and copies of the class token look at the proposal's places only,
    all others being replaced by the class token (contextual shift); both embeddings are compared with the class
    embeddings and averaged.

    Simplified: trained by the dense loss of all methods (see the module); the image in one size for both networks;
    SCAN's proposals come from SAN's side network instead of Mask2Former, its semantic integration has no frequency
    filter and no class token, and CLIP looks at the whole image with a bias instead of at crops. What is trained of
    CLIP is what is trained in all methods, which leaves out the last block's queries and keys.

    Args:
        config: ``proposals.kind`` must not be ``none``.
        read_clip: False leaves CLIP's weights random, for a checkpoint that holds all of them.

    Raises:
        ValueError: options that do not fit together.
        CheckpointError: CLIP weights that cannot be had.
    """

    def __init__(self, config: ModelConfig, *, read_clip: bool = True) -> None:
        super().__init__(config, read_clip=read_clip)
        options, visual = config.proposals, self.clip.visual
        if options.kind not in ("side_adapter", "calibrated"):
            raise ValueError(
                f"ProposalSegmenter: kind is unknown; expected side_adapter or calibrated, got {options.kind!r}"
            )
        if not 1 <= options.recognition_blocks <= len(visual.blocks):
            raise ValueError(
                f"ProposalSegmenter: recognition_blocks is out of range for {config.clip.name}; "
                f"expected 1..{len(visual.blocks)}, got {options.recognition_blocks}"
            )
        # evenly from the stem to where recognition begins
        first, count = len(visual.blocks) - options.recognition_blocks, min(TAPS, options.layers)
        self.taps = sorted({round(place * first / max(count - 1, 1)) for place in range(count)})
        # twice as fine as CLIP, so that masks come out at four times its grid like all logits here
        patch = visual.patch_size[0] // 2
        self.side = SideNetwork(
            options,
            patch=patch,
            grid=(2 * self.clip.grid[0], 2 * self.clip.grid[1]),
            clip_width=visual.width,
            clip_heads=_heads(visual) if options.kind == "side_adapter" else 1,
            taps=len(self.taps),
        )
        channels = self.clip.embed_dim
        self.integrate: nn.Module | None = None
        if options.kind == "calibrated":
            self.integrate = Integration(options.width, channels, options.heads)
            # its proposals are told by their masks, not by a bias
            self.side.bias_query.requires_grad_(False)
            self.side.bias_pixel.requires_grad_(False)
        self.logit_scale = nn.Parameter(torch.tensor(10.0).log())
        self.logit_bias = nn.Parameter(torch.tensor(config.decoder.initial_logit))

    def forward(self, image: Tensor, text: Tensor) -> SegmenterOutput:
        """Segment, see :meth:`Segmenter.forward`. ``refined`` is the part of CLIP's recognition in the logits."""
        resized = self._resized(image, "ProposalSegmenter")
        text = self._class_embedding(text)
        visual = self.clip.visual
        pixels = (resized - self.clip.pixel_mean) / self.clip.pixel_deviation
        states, grid = visual.states(pixels)
        dense = visual.dense(states[-1], grid)
        original = cosine(dense, text)
        query, mask, bias = self.side(pixels, [states[place] for place in self.taps], grid)
        share = mask.softmax(dim=1)
        recognised = self._recognised(states, self._bias(share, bias, grid))
        score = recognised @ F.normalize(text, dim=-1).T
        total = score
        if self.integrate is not None:
            own = F.normalize(self.integrate(query, dense), dim=-1) @ F.normalize(text, dim=-1).T
            total = CLIP_SHARE * score + (1 - CLIP_SHARE) * own
        logits = torch.einsum("bqhw,bqt->bthw", share, total) * self.logit_scale.exp() + self.logit_bias
        small = F.adaptive_avg_pool2d(share, grid)
        with torch.no_grad():
            u = uncertainty(original, self.config.fusion.tau or 0.01)
        return SegmenterOutput(logits, u, original, torch.einsum("bqhw,bqt->bthw", small, score))

    def _bias(self, share: Tensor, bias: Tensor, grid: tuple[int, int]) -> Tensor:
        """Attention bias (B, heads or 1, Q, 1 + hw) of the proposals' tokens on CLIP's, the class token first."""
        if self.integrate is None:
            return F.pad(bias, (1, 0))
        # the proposal's places as they are; the class token as often as there are other places
        inside = F.adaptive_avg_pool2d(share, grid).flatten(2)
        inside = inside / inside.amax(dim=-1, keepdim=True).clamp_min(1e-6)
        others = (1 - inside).sum(dim=-1, keepdim=True)
        return torch.cat((others.clamp_min(1e-3).log(), inside.clamp_min(1e-3).log()), dim=-1)[:, None]

    def _recognised(self, states: list[Tensor], bias: Tensor) -> Tensor:
        """Embeddings (B, Q, C) of unit length of the proposals, by CLIP's last blocks."""
        visual, count = self.clip.visual, self.config.proposals.recognition_blocks
        first = len(states) - count
        x = states[first][:, :1].expand(-1, bias.shape[2], -1)
        blocks: list[Any] = list(visual.blocks)
        for state, block in zip(states[first:], blocks[first:], strict=True):
            x = block.forward_beside(x, state, bias)
        return F.normalize(visual.ln_post(x) @ visual.proj, dim=-1)


class Integration(nn.Module):
    """Proposals look at CLIP's dense features, and are brought into its joint space (SCAN's semantic integration)."""

    def __init__(self, width: int, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(channels, 2 * width)
        self.out = nn.Linear(width, width)
        self.project = _mlp(width, channels)

    def forward(self, query: Tensor, dense: Tensor) -> Tensor:
        """``query`` (B, Q, width) and ``dense`` (B, C, h, w) to (B, Q, C)."""
        key, value = self.key_value(dense.flatten(2).transpose(1, 2)).chunk(2, dim=-1)
        parts = [
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query(self.norm(query)), key, value)
        ]
        mixed = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        return self.project(query + self.out(mixed))


def _mlp(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, out))


def _heads(visual: VisionTower) -> int:
    first: Any = visual.blocks[0]
    return int(first.attn.heads)
