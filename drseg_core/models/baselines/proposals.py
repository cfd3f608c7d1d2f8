# SPDX-License-Identifier: Apache-2.0
"""Methods that propose masks first and recognise them by CLIP afterwards: SAN and SCAN.

Both learn by matching proposals with true segments, see :mod:`drseg_core.training.matching`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drseg_core.config.schema import ModelConfig, ProposalConfig
from drseg_core.models.clip import VisionTower
from drseg_core.models.correlation import cosine
from drseg_core.models.segmenter import Proposals, Segmenter, SegmenterOutput, SupervisedOutput
from drseg_core.nn.ugaf import uncertainty

# states of CLIP that SAN adds to its side network: the stem's, and some of the blocks before recognition begins
TAPS = 4
# side of the side network's patches in an image of its own size
PATCH = 16
# supervised layers of the side network, its last ones
SUPERVISED = 2
# SCAN's balance of side network and CLIP, as in its files; its authors search it per vocabulary
CLIP_SHARE = 0.7
# keeps a proposal's token from seeing the class token and the other proposals
HIDDEN = -100.0


class SideLayer(nn.Module):
    """A pre-norm transformer layer, with timm's initial weights."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width, eps=1e-6)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.query_key_value(self.norm_attention(x)).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(*parts.chunk(3, dim=1))
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


class SideOutput(NamedTuple):
    """Output of one supervised layer.

    Query states (B, Q, width), mask logits (B, Q, h', w') on the side grid, and attention bias (B, clip_heads, Q, hw)
    on CLIP's grid (None if none is made).
    """

    query: Tensor
    mask: Tensor
    bias: Tensor | None


class SideNetwork(nn.Module):
    """Learned queries and image patches in a small transformer that CLIP's states are added to (SAN's adapter).

    Args:
        config: queries, width, layers, heads and width of the MLPs.
        patch: side of a patch in pixels.
        grid: patches (h, w) at the side network's image size, for the position embedding.
        clip_width: channels of CLIP's states.
        clip_heads: heads of the attention bias; 0 makes none.
        taps: how many of CLIP's states are added: the first before the layers, the others after one layer each.
    """

    def __init__(
        self, config: ProposalConfig, *, patch: int, grid: tuple[int, int], clip_width: int, clip_heads: int, taps: int
    ) -> None:
        super().__init__()
        width, hidden = config.width, config.hidden
        if width % config.heads:
            raise ValueError(
                f"SideNetwork: heads does not divide width; expected a divisor of {width}, got {config.heads}"
            )
        self.clip_heads = clip_heads
        self.embed = nn.Conv2d(3, width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, width, *grid))
        self.query = nn.Parameter(0.02 * torch.randn(config.queries, width))
        self.query_position = nn.Parameter(0.02 * torch.randn(config.queries, width))
        self.layers = nn.ModuleList(SideLayer(width, config.heads) for _ in range(config.layers))
        self.taps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(clip_width, eps=1e-6), nn.Linear(clip_width, width)) for _ in range(taps)
        )
        self.mask_query = _mlp(width, hidden, hidden)
        self.mask_pixel = _mlp(width, hidden, hidden)
        self.bias_pixel = _mlp(width, hidden, clip_heads * hidden) if clip_heads else None
        self.bias_scale = nn.Linear(1, 1) if clip_heads else None

    def forward(self, pixels: Tensor, states: list[Tensor], grid: tuple[int, int]) -> list[SideOutput]:
        """Propose.

        Args:
            pixels: (B, 3, H, W) normalised.
            states: of CLIP, (B, 1 + hw, clip_width) each, class token first.
            grid: CLIP's (h, w).

        Returns:
            In training the output of each supervised layer, otherwise that of the last layer.
        """
        patches = self.embed(pixels)
        side, batch, queries = patches.shape[2:], len(pixels), len(self.query)
        position = torch.cat((self.query_position, self.position[0].flatten(1).T))
        x = torch.cat((self.query.expand(batch, -1, -1), patches.flatten(2).transpose(1, 2)), dim=1)
        found, depth = [], len(self.layers)
        for place in range(depth + 1):
            if place:
                x = self.layers[place - 1](x)
            else:
                x = x + position
            if place < len(self.taps):
                seen = self.taps[place](states[place][:, 1:]).transpose(1, 2).unflatten(2, grid)
                seen = F.interpolate(seen, size=side, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
                x = torch.cat((x[:, :queries], x[:, queries:] + seen), dim=1)
            if place == depth or (self.training and place and place > depth - SUPERVISED):
                found.append(self._decode(x[:, :queries], x[:, queries:], side, grid))
            if 0 < place < depth:
                # every layer sees the places anew
                x = x + position
        return found

    def _decode(self, query: Tensor, pixel: Tensor, side: torch.Size, grid: tuple[int, int]) -> SideOutput:
        key = self.mask_query(query)
        mask = (key @ self.mask_pixel(pixel).transpose(1, 2)).unflatten(2, side)
        if self.bias_pixel is None or self.bias_scale is None:
            return SideOutput(query, mask, None)
        place = self.bias_pixel(pixel).unflatten(-1, (self.clip_heads, -1)).transpose(1, 2)
        bias = self.bias_scale((key[:, None] @ place.transpose(2, 3))[..., None])[..., 0]
        small = F.adaptive_max_pool2d(bias.flatten(0, 1).unflatten(2, side), grid).flatten(2)
        return SideOutput(query, mask, small.unflatten(0, (len(query), -1)))


class ProposalSegmenter(Segmenter):
    """SAN (``side_adapter``) or SCAN (``calibrated``).

    A side network proposes masks. In both methods a learned embedding stands for no object. The score of a class at a
    place is the sum over all masks of their share there times their class probability. The logits are its logarithm.

    * SAN: copies of CLIP's class token, one per proposal, run beside CLIP's last blocks with an attention bias from the
      side network. Then they are compared with the class embeddings.
    * SCAN: the proposals gather CLIP's own dense features (semantic integration) and are compared with the class
      embeddings. Copies of the class token look only at the proposal's places, with all other places replaced by the
      class token (contextual shift). In evaluation their result is weighed against the proposals' own.

    SCAN is simplified. Its proposals come from SAN's side network instead of Mask2Former. Its semantic integration has
    no frequency filter and no class token. CLIP looks at the whole image with a bias, not at crops.

    A CLIP that begins with random weights has to learn to recognise masks. So its scale is learned, and SCAN's shift
    too.

    Args:
        config: ``proposals.kind`` must not be ``none``.
        read_clip: False leaves CLIP's weights as memory is, for a checkpoint that holds all of them.

    Raises:
        ValueError: options that do not fit together.
        CheckpointError: CLIP's weights are not available.
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
        if options.image_size is not None and (options.image_size < PATCH or options.image_size % PATCH):
            raise ValueError(
                f"ProposalSegmenter: proposals.image_size does not fit the patch; expected a multiple of {PATCH}, "
                f"got {options.image_size}"
            )
        # evenly from the stem to where recognition begins
        first, count = len(visual.blocks) - options.recognition_blocks, min(TAPS, options.layers)
        self.taps = sorted({round(place * first / max(count - 1, 1)) for place in range(count)})
        half = visual.patch_size[0] // 2
        self.side_size = options.image_size or config.clip.image_size
        patch = PATCH if options.image_size else half
        self.side = SideNetwork(
            options,
            patch=patch,
            grid=(self.side_size // patch, self.side_size // patch),
            clip_width=visual.width,
            clip_heads=_heads(visual) if options.kind == "side_adapter" else 0,
            taps=len(self.taps),
        )
        channels = self.clip.embed_dim
        self.integrate = Integration(options.width, channels, options.heads) if options.kind == "calibrated" else None
        self.no_object = nn.Parameter(channels**-0.5 * torch.randn(1, channels))
        # CLIP's own scale, or a learned one if there is none
        self.learns = config.clip.weights is None
        scale = torch.tensor(10.0 if self.learns else 100.0).log()
        self.logit_scale = nn.Parameter(scale, requires_grad=self.learns)
        if config.clip.trainable in ("attention", "all") and (self.learns or self.integrate is None):
            # recognition runs the last block as it is
            last: Any = visual.blocks[-1]
            last.attn.q_proj.weight.requires_grad_(True)
            if config.clip.trainable == "all":
                last.attn.q_proj.requires_grad_(True)
                last.attn.k_proj.requires_grad_(True)

    def forward(self, image: Tensor, text: Tensor) -> SegmenterOutput | SupervisedOutput:
        """Segment, see :meth:`Segmenter.forward`. ``refined`` is CLIP's recognition of the masks at each place."""
        resized = self._resized(image, "ProposalSegmenter")
        text = F.normalize(self._class_embedding(text), dim=-1)
        visual = self.clip.visual
        states, grid = visual.states((resized - self.clip.pixel_mean) / self.clip.pixel_deviation)
        dense = visual.dense(states[-1], grid)
        original = cosine(dense, text)
        side = self._side_pixels(image, resized)
        classes = torch.cat((text, F.normalize(self.no_object, dim=-1)))
        layers = self.side(side, [states[place] for place in self.taps], grid)
        recognised = [self._recognised(states, self._bias(layer, grid)) @ classes.T for layer in layers]
        proposals = tuple(
            Proposals(layer.mask, self._score(layer, cosines, dense, classes))
            for layer, cosines in zip(layers, recognised, strict=True)
        )
        mask, score = proposals[-1]
        share = score.softmax(dim=-1)[..., :-1]
        size = (4 * grid[0], 4 * grid[1])
        inside = F.interpolate(mask, size=size, mode="bilinear", align_corners=False).sigmoid()
        logits = torch.einsum("bqt,bqhw->bthw", share, inside).clamp_min(1e-6).log()
        with torch.no_grad():
            u = uncertainty(original, self.config.fusion.tau or 0.01)
            small = F.adaptive_avg_pool2d(inside, grid)
            refined = torch.einsum("bqhw,bqt->bthw", small / small.sum(dim=1, keepdim=True), recognised[-1][..., :-1])
        if self.training:
            return SupervisedOutput(logits, u, original, refined, proposals=proposals)
        return SegmenterOutput(logits, u, original, refined)

    def _score(self, layer: SideOutput, recognised: Tensor, dense: Tensor, classes: Tensor) -> Tensor:
        """Class logits (B, Q, T + 1) of the proposals, from CLIP's cosines and SCAN's own."""
        scale = self.logit_scale.exp()
        if self.integrate is None:
            return scale * recognised
        own = scale * (F.normalize(self.integrate(layer.query, dense), dim=-1) @ classes.T)
        # in a training from nothing both have to be learned
        if self.training and not self.learns:
            return own
        said = (scale * recognised).log_softmax(dim=-1)
        return CLIP_SHARE * said + (1 - CLIP_SHARE) * own.log_softmax(dim=-1)

    def _side_pixels(self, image: Tensor, resized: Tensor) -> Tensor:
        """The image as the side network sees it."""
        side = (self.side_size, self.side_size)
        if resized.shape[2:] != side:
            resized = F.interpolate(image, size=side, mode="bilinear", align_corners=False)
        return (resized - self.clip.pixel_mean) / self.clip.pixel_deviation

    def _bias(self, layer: SideOutput, grid: tuple[int, int]) -> Tensor:
        """Attention bias (B, heads or 1, Q, 1 + hw) of the proposals' tokens on CLIP's, the class token first."""
        if layer.bias is not None:
            return F.pad(layer.bias, (1, 0), value=HIDDEN)
        # the proposal's places as they are; the class token as often as there are other places
        inside = F.adaptive_avg_pool2d(layer.mask.sigmoid(), grid).flatten(2)
        others = (1 - inside).sum(dim=-1, keepdim=True)
        return torch.cat((others.clamp_min(1e-3).log(), inside.clamp_min(1e-3).log()), dim=-1)[:, None]

    def _recognised(self, states: list[Tensor], bias: Tensor) -> Tensor:
        """Embeddings (B, Q, C) of unit length of the proposals, by CLIP's last blocks."""
        visual, count, queries = self.clip.visual, self.config.proposals.recognition_blocks, bias.shape[2]
        first = len(states) - count
        x = states[first][:, :1].expand(-1, queries, -1)
        # a token sees itself, and none of the others
        own = x.new_full((queries, queries), HIDDEN).fill_diagonal_(0.0)
        bias = torch.cat((own.expand(*bias.shape[:2], -1, -1), bias), dim=-1)
        blocks: list[Any] = list(visual.blocks)
        for state, block in zip(states[first:], blocks[first:], strict=True):
            x = block.forward_beside(x, torch.cat((x, state), dim=1), bias)
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
        self.project = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, channels))

    def forward(self, query: Tensor, dense: Tensor) -> Tensor:
        """``query`` (B, Q, width) and ``dense`` (B, C, h, w) to (B, Q, C)."""
        key, value = self.key_value(dense.flatten(2).transpose(1, 2)).chunk(2, dim=-1)
        parts = [
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query(self.norm(query)), key, value)
        ]
        mixed = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        return self.project(query + self.out(mixed))


def _mlp(width: int, hidden: int, out: int) -> nn.Sequential:
    """Three linear maps."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, out)
    )


def _heads(visual: VisionTower) -> int:
    first: Any = visual.blocks[0]
    return int(first.attn.heads)
