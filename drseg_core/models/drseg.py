# SPDX-License-Identifier: Apache-2.0
"""DR-Seg: open-vocabulary segmentation by decoupled and rectified CLIP features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drseg_core.config.schema import ModelConfig, TrainConfig
from drseg_core.models.aggregator import Aggregator
from drseg_core.models.clip import ClipEncoder
from drseg_core.models.correlation import correlation, cosine, rotate
from drseg_core.models.decoder import Decoder
from drseg_core.models.dino import DinoPrior, PriorMaps, resample
from drseg_core.nn.pdgr import PDGR
from drseg_core.nn.spsd import SPSD
from drseg_core.nn.ugaf import build_fusion, uncertainty

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)
EMBEDDINGS = ("class_embedding", "positional_embedding", "logit_scale", "logit_bias")


class DRSegOutput(NamedTuple):
    """One forward pass.

    ``logits`` (B, T, 4h, 4w), of the dual encoder alone (B, T, h, w); ``uncertainty`` (B, 1, h, w) in [0, 1];
    ``original`` (B, T, h, w) cosines, mean over the orientations; ``refined`` (B, T, h, w) cosines of the rectified
    features, None in the baselines.
    """

    logits: Tensor
    uncertainty: Tensor
    original: Tensor
    refined: Tensor | None


class DRSeg(nn.Module):
    """The whole model (model of arXiv 2604.02010).

    Dense CLIP features in four orientations and class embeddings give the original correlation (Eq. 10). The canonical
    features are split into semantic and structural channels (SPSD), the structural ones are propagated over a graph
    that a frozen prior decides (PDGR), and give the rectified correlation (Eq. 11). UGAF joins both; aggregation and
    decoder turn the result into logits. ``fusion.kind = "none"`` is the baseline without prior, split and graph;
    ``"cosine"`` is the dual encoder alone, whose logits are the original correlation times a learned scale plus a
    learned bias.

    Args:
        config: see :class:`drseg_core.config.schema.ModelConfig`.
        read_clip: False leaves CLIP's weights random, for a checkpoint that holds all of them.
        read_prior: the same for the prior's weights.

    Raises:
        ValueError: options that do not fit together.
        CheckpointError: CLIP or prior weights that cannot be had.
    """

    def __init__(self, config: ModelConfig, *, read_clip: bool = True, read_prior: bool = True) -> None:
        super().__init__()
        self.config = config
        self.clip = ClipEncoder(config.clip, read_weights=read_clip)
        channels = self.clip.embed_dim
        self.dino: DinoPrior | None = None
        self.spsd: SPSD | None = None
        self.pdgr: PDGR | None = None
        self.decoder: Decoder | None = None
        kind = config.fusion.kind
        if kind == "cosine":
            # the usual start of a dual encoder that learns by one sigmoid per pair
            self.logit_scale = nn.Parameter(torch.tensor(10.0).log())
            self.logit_bias = nn.Parameter(torch.tensor(-10.0))
            return
        if kind != "none":
            self.dino = DinoPrior(config.dino, read_weights=read_prior)
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
                norm_scale=graph.norm_scale,
                backend=graph.backend,
            )
        fusion, aggregator, decoder = config.fusion, config.aggregator, config.decoder
        self.fusion = build_fusion(
            kind,
            config.rotations,
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
        )

    def tokenize(self, class_names: Sequence[str]) -> Tensor:
        """Class names to prompt tokens (T, L) int64 on the model's device."""
        return self.clip.tokenize(class_names).to(self.clip.visual.conv1.weight.device)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Prompt tokens (T, L) to L2-normalised class embeddings (T, C)."""
        return self.clip.encode_text(tokens)

    def dense_features(self, image: Tensor) -> Tensor:
        """Canonical dense CLIP features (B, C, h, w), not normalised; what SPSD ranks and splits."""
        return self.clip(self._resized(image, "DRSeg.dense_features"), guided=0).features

    def forward(self, image: Tensor, text: Tensor) -> DRSegOutput:
        """Segment.

        Args:
            image: (B, 3, H, W) RGB in [0, 1], any size.
            text: (T, L) integer tokens of :meth:`tokenize`, or (T, C) embeddings of :meth:`encode_text`.

        Returns:
            Logits and the maps behind them, see :class:`DRSegOutput`.

        Raises:
            TypeError: integer image.
            ValueError: wrong shapes.
        """
        resized = self._resized(image, "DRSeg")
        batch = image.shape[0]
        text = self._class_embedding(text)
        guided = 0 if self.decoder is None else batch
        dense = self.clip(rotate(resized, self.config.rotations), guided=guided)
        original = correlation(dense.features, text, self.config.rotations)
        if self.decoder is None:
            mean = original.mean(dim=1)
            with torch.no_grad():
                ambiguity = uncertainty(mean, self.config.fusion.tau or 0.01)
            return DRSegOutput(mean * self.logit_scale.exp() + self.logit_bias, ambiguity, mean, None)
        canonical = dense.features[:batch]
        refined, prior = None, None
        if self.dino is not None:
            prior = self.dino.maps(image, self._prior_blocks)
            refined = cosine(self._rectified(canonical, prior.features), text)[:, None]
        fused = self.fusion(original, refined)
        embedding = self.aggregator(fused.embedding, canonical, text)
        return DRSegOutput(
            self.decoder(embedding, dense.guidance, self._prior_guidance(prior)),
            fused.uncertainty,
            original.mean(dim=1),
            None if refined is None else refined[:, 0],
        )

    def rectify(self, features: Tensor, image: Tensor) -> Tensor:
        """Canonical features (B, C, h, w) with their structural channels propagated over the prior's graph."""
        if self.dino is None:
            raise ValueError("DRSeg.rectify: the baseline has no prior; expected a fusion.kind other than none")
        return self._rectified(features, self.dino.maps(image).features)

    def _rectified(self, features: Tensor, prior: Tensor) -> Tensor:
        assert self.spsd is not None and self.pdgr is not None
        grid = (features.shape[2], features.shape[3])
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

    def parameter_groups(self, train: TrainConfig) -> list[dict[str, Any]]:
        """AdamW groups of everything that is trained.

        CLIP has its own rate; normalisation layers and embeddings have no weight decay.
        """
        exempt = {
            id(parameter)
            for module in self.modules()
            if isinstance(module, (*NORMS, nn.Embedding))
            for parameter in module.parameters(recurse=False)
        }
        groups: dict[str, dict[str, Any]] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            part = "clip" if name.startswith("clip.") else "head"
            plain = id(parameter) in exempt or name.endswith(EMBEDDINGS)
            key = f"{part}_{'no_decay' if plain else 'decay'}"
            rate = train.learning_rate * (train.clip_learning_rate_scale if part == "clip" else 1.0)
            group = groups.setdefault(
                key, {"name": key, "params": [], "lr": rate, "weight_decay": 0.0 if plain else train.weight_decay}
            )
            group["params"].append(parameter)
        return list(groups.values())

    def _class_embedding(self, text: Tensor) -> Tensor:
        if text.dim() != 2 or text.shape[0] == 0:
            raise ValueError(f"DRSeg: text has a wrong shape; expected (T, L) or (T, C), got {tuple(text.shape)}")
        if not text.is_floating_point():
            return self.encode_text(text)
        if text.shape[1] != self.clip.embed_dim:
            raise ValueError(
                f"DRSeg: text has a wrong width; expected embeddings (T, {self.clip.embed_dim}), "
                f"got {tuple(text.shape)}"
            )
        return text

    def _resized(self, image: Tensor, name: str) -> Tensor:
        if not image.is_floating_point():
            raise TypeError(f"{name}: image has a wrong dtype; expected floating point in [0, 1], got {image.dtype}")
        if image.dim() != 4 or image.shape[1] != 3 or 0 in image.shape:
            raise ValueError(f"{name}: image has a wrong shape; expected (B, 3, H, W), got {tuple(image.shape)}")
        side = (self.config.clip.image_size, self.config.clip.image_size)
        if image.shape[2:] == torch.Size(side):
            return image
        return F.interpolate(image, size=side, mode="bilinear", align_corners=False)
