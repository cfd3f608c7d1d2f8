# SPDX-License-Identifier: Apache-2.0
"""DR-Seg: open-vocabulary segmentation by decoupled and rectified CLIP features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drseg_core.config.schema import ModelConfig
from drseg_core.models.aggregator import Aggregator
from drseg_core.models.baselines.remote import RemoteGuidance
from drseg_core.models.correlation import correlation, cosine
from drseg_core.models.decoder import Decoder
from drseg_core.models.dino import DinoPrior, PriorMaps
from drseg_core.models.segmenter import Segmenter, SegmenterOutput
from drseg_core.nn.pdgr import PDGR
from drseg_core.nn.resample import resample
from drseg_core.nn.spsd import SPSD
from drseg_core.nn.ugaf import build_fusion, uncertainty

__all__ = ["DRSeg"]


class DRSeg(Segmenter):
    """The whole model (model of arXiv 2604.02010).

    Dense CLIP features in four orientations and class embeddings give the original correlation (Eq. 10). The canonical
    features are split into semantic and structural channels (SPSD), the structural ones are propagated over a graph
    that a frozen prior decides (PDGR), and give the refined correlation (Eq. 11). UGAF joins both; aggregation and
    decoder turn the result into logits. ``fusion.kind = "none"`` is the baseline without prior, split and graph;
    ``"cosine"`` is the dual encoder alone, whose logits are the original correlation times a learned scale plus a
    learned bias. ``fusion.branch = "prior"`` takes the prior's own features, brought into the joint space by a learned
    linear map, for the rectified ones: the refined correlation of RSKT-Seg and GSNet.

    Args:
        config: see :class:`drseg_core.config.schema.ModelConfig`.
        read_clip: False leaves CLIP's weights as memory is, for a checkpoint that holds all of them.
        read_prior: the same for the prior's weights.
        read_remote: the same for those of the second CLIP.

    Raises:
        ValueError: options that do not fit together.
        CheckpointError: weights of CLIP, the prior or the second CLIP that cannot be had.

    Examples:
        >>> import torch
        >>> from drseg_core.config.load import load_config
        >>> from drseg_core.models.drseg import DRSeg
        >>> model = DRSeg(load_config("tiny").model).eval()
        >>> model(torch.rand(1, 3, 128, 128), model.tokenize(["roof", "pond"])).logits.shape
        torch.Size([1, 2, 64, 64])
    """

    def __init__(
        self, config: ModelConfig, *, read_clip: bool = True, read_prior: bool = True, read_remote: bool = True
    ) -> None:
        super().__init__(config, read_clip=read_clip)
        channels = self.clip.embed_dim
        self.decoder: Decoder | None = None
        kind = config.fusion.kind
        if kind == "cosine":
            if config.decoder.remote_clip:
                raise ValueError("DRSeg: decoder.remote_clip needs a decoder; expected a fusion.kind other than cosine")
            # the usual start of a dual encoder that learns by one sigmoid per pair
            self.logit_scale = nn.Parameter(torch.tensor(10.0).log())
            self.logit_bias = nn.Parameter(torch.tensor(-10.0))
            return
        self.project_prior: nn.Conv2d | None = None
        if kind != "none":
            self.dino = DinoPrior(config.dino, read_weights=read_prior)
        if self.dino is not None and config.fusion.branch == "prior":
            # a grid that is twice as fine comes down by the same map
            scale = 2 if self.dino.grid[0] == 2 * self.clip.grid[0] else 1
            self.project_prior = nn.Conv2d(self.dino.width, channels, scale, stride=scale)
        elif self.dino is not None:
            self.spsd = SPSD(channels, config.spsd.semantic_ratio)
            structural = len(self.spsd.structural_index)
            if structural == 0:
                raise ValueError("DRSeg: semantic_ratio leaves no structural channel; expected below 1")
            graph = config.graph
            self.pdgr = PDGR(
                structural,
                self.dino.width,
                k=graph.k,
                affinity=graph.affinity,
                gamma=graph.gamma,
                decay=graph.decay,
                self_loop=graph.self_loop,
                norm=graph.norm,
                edge_hidden=graph.edge_hidden,
                normalize_prior=graph.normalize_prior,
                layers=graph.layers,
                hidden=graph.hidden,
                bias=graph.bias,
                dropout=graph.dropout,
                residual=graph.residual,
                use_affinity_as_weight=graph.use_affinity_as_weight,
                # a training sets what is measured
                norm_scale=1.0 if graph.norm_scale == "match" else graph.norm_scale,
                edge_temperature=graph.edge_temperature,
                edge_decay=graph.edge_decay,
                # what follows reads tokens
                keep_format=False,
                backend=graph.backend,
            )
        fusion, aggregator, decoder = config.fusion, config.aggregator, config.decoder
        self.remote = RemoteGuidance(config.remote, read_weights=read_remote) if decoder.remote_clip else None
        self.fusion = build_fusion(
            kind,
            config.rotations if fusion.original == "stack" else 1,
            aggregator.width,
            tau=fusion.tau,
            gate=fusion.gate,
            detach_gate=fusion.detach_gate,
            head=fusion.head,
            multi_scale=fusion.multi_scale,
        )
        self.aggregator = Aggregator(
            aggregator.width,
            channels,
            kind=aggregator.kind,
            layers=aggregator.layers,
            heads=aggregator.heads,
            mlp_hidden=aggregator.mlp_hidden,
            window=aggregator.window,
            class_pooling=aggregator.class_pooling,
            class_slots=aggregator.class_slots,
        )
        prior_dim, self._prior_blocks, self._prior_grid = self._guidance_of_the_prior()
        self.decoder = Decoder(
            aggregator.width,
            self.clip.visual.width,
            widths=decoder.widths,
            guidance_widths=decoder.guidance_widths,
            guidance_hidden=decoder.guidance_hidden,
            initial_logit=decoder.initial_logit,
            prior_dim=prior_dim,
            prior_scale=2 if self._prior_grid[0] == 2 * self.clip.grid[0] else 1,
            remote_dim=None if self.remote is None else self.remote.visual.width,
            guidance_attention=decoder.guidance_attention,
            skip_correlation=decoder.skip_correlation,
        )

    def forward(self, image: Tensor, text: Tensor) -> SegmenterOutput:
        """Segment, see :meth:`Segmenter.forward`."""
        resized = self._resized(image, "DRSeg")
        batch = image.shape[0]
        text = self._class_embedding(text)
        guided = 0 if self.decoder is None else batch
        dense = self.clip(resized, guided=guided, rotations=self.config.rotations)
        original = correlation(dense.features, text, self.config.rotations)
        if self.decoder is None:
            mean = original.mean(dim=1)
            with torch.no_grad():
                u = uncertainty(mean, self.config.fusion.tau or 0.01)
            return SegmenterOutput(mean * self.logit_scale.exp() + self.logit_bias, u, mean, None)
        canonical = dense.features[:batch]
        refined, prior = None, None
        if self.dino is not None:
            prior = self.dino.maps(image, self._prior_blocks)
            refined = cosine(self._rectified(canonical, prior.features), text)[:, None]
        mean = original.mean(dim=1)
        joined = self.fusion(original if self.config.fusion.original == "stack" else mean[:, None], refined)
        embedding = self.aggregator(joined.embedding, canonical, text)
        remote = () if self.remote is None else tuple(resample(maps, self.clip.grid) for maps in self.remote(image))
        return SegmenterOutput(
            self.decoder(embedding, dense.guidance, self._prior_guidance(prior), mean, remote),
            joined.uncertainty,
            mean,
            None if refined is None else refined[:, 0],
        )

    def rectify(self, features: Tensor, image: Tensor) -> Tensor:
        """Canonical features (B, C, h, w) with their structural channels propagated over the prior's graph.

        With ``fusion.branch = "prior"`` the prior's own features (B, C, h, w) in the joint space.
        """
        if self.dino is None:
            raise ValueError("DRSeg.rectify: the baseline has no prior; expected a fusion.kind other than none")
        return self._rectified(features, self.dino.maps(image).features)

    def _rectified(self, features: Tensor, prior: Tensor) -> Tensor:
        grid = (features.shape[2], features.shape[3])
        if self.project_prior is not None:
            return resample(self.project_prior(prior), grid)
        assert self.spsd is not None and self.pdgr is not None
        semantic, structural = self.spsd.split(features)
        if self.config.graph.grid == "clip":
            rectified = self.pdgr(structural, resample(prior, grid))
        else:
            fine = F.interpolate(structural, size=prior.shape[2:], mode="bilinear", align_corners=False)
            rectified = resample(self.pdgr(fine, prior), grid)
        return self.spsd.merge(semantic.to(rectified.dtype), rectified)

    def _guidance_of_the_prior(self) -> tuple[int | None, tuple[int, ...], tuple[int, int]]:
        """Channels, blocks and grid of what the prior gives the decoder; no blocks where it gives nothing."""
        if not self.config.decoder.dino_guidance:
            return None, (), self.clip.grid
        if self.dino is None:
            raise ValueError("DRSeg: decoder.dino_guidance needs a prior; expected a fusion.kind other than none")
        blocks, depth = self.config.dino.guidance_blocks, len(getattr(self.dino.encoder, "blocks", ()))
        if not all(0 <= block < depth for block in blocks):
            raise ValueError(
                f"DRSeg: dino.guidance_blocks is out of range for {self.config.dino.name}; "
                f"expected two of 0..{depth - 1}, got {blocks}"
            )
        # what is at least twice as fine as CLIP's grid guides at twice its resolution, all else at its own
        scale = 2 if self.dino.grid[0] >= 2 * self.clip.grid[0] else 1
        return self.dino.width, blocks, (scale * self.clip.grid[0], scale * self.clip.grid[1])

    def _prior_guidance(self, prior: PriorMaps | None) -> tuple[Tensor, ...]:
        return () if prior is None else tuple(resample(maps, self._prior_grid) for maps in prior.guidance)
