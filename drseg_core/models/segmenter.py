# SPDX-License-Identifier: Apache-2.0
"""The common part of every model here: CLIP, prompts, one call, and how its parameters are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drseg_core.config.schema import ModelConfig, TrainConfig
from drseg_core.models.clip import ClipEncoder
from drseg_core.models.dino import DinoPrior
from drseg_core.nn.pdgr import PDGR
from drseg_core.nn.spsd import SPSD

__all__ = ["Proposals", "Segmenter", "SegmenterOutput", "SupervisedOutput"]

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)
EMBEDDINGS = (
    "class_embedding",
    "positional_embedding",
    "logit_scale",
    "logit_bias",
    "side.position",
    "side.query",
    "side.query_position",
    # logarithms: decay would pull the numbers to 1
    "edge_log_temperature",
    "edge_log_decay",
)
EDGE = "pdgr.edge_"
"""How the names of the parameters of Eq. 8's MLP begin."""


class Proposals(NamedTuple):
    """Masks and their classes: ``mask`` logits (B, Q, h, w), and ``score`` (B, Q, T + 1) logits, no object last.

    Examples:
        >>> import torch
        >>> from drseg_core.models.segmenter import Proposals
        >>> Proposals(torch.zeros(1, 100, 40, 40), torch.zeros(1, 100, 18)).score.shape[2] - 1
        17
    """

    mask: Tensor
    score: Tensor


class SegmenterOutput(NamedTuple):
    """One forward pass.

    * ``logits`` (B, T, 4h, 4w); of the dual encoder alone (B, T, h, w), of SED (B, T, 8h, 8w).
    * ``uncertainty`` (B, 1, h, w) in [0, 1].
    * ``original`` (B, T, h, w): cosines, mean over the orientations.
    * ``refined`` (B, T, h, w): cosines of the refined correlation; None if the model has none.

    Examples:
        >>> import torch, drseg_core as drseg
        >>> model = drseg.load("run").model
        >>> output = model(torch.rand(1, 3, 32, 32), model.tokenize(["roof", "pond"]))
        >>> output.logits.shape, output.uncertainty.shape
        (torch.Size([1, 2, 16, 16]), torch.Size([1, 1, 4, 4]))
    """

    logits: Tensor
    uncertainty: Tensor
    original: Tensor
    refined: Tensor | None


class SupervisedOutput(NamedTuple):
    """One forward pass in the training of a method with its own losses; the first four fields are as in evaluation.

    ``auxiliary`` are logits (B, T, _, _) with the same loss as ``logits`` (SED). For ``proposals``, of every supervised
    layer, another loss takes its place (SAN, SCAN).

    Examples:
        >>> import torch
        >>> from drseg_core.models.segmenter import SupervisedOutput
        >>> maps = torch.zeros(1, 2, 16, 16)
        >>> len(SupervisedOutput(maps, maps[:, :1], maps, None, auxiliary=(maps,)).auxiliary)
        1
    """

    logits: Tensor
    uncertainty: Tensor
    original: Tensor
    refined: Tensor | None
    auxiliary: tuple[Tensor, ...] = ()
    proposals: tuple[Proposals, ...] = ()


class Segmenter(nn.Module):
    """An image and class names to logits, on top of CLIP. Subclasses have the forward pass.

    Args:
        config: see :class:`drseg_core.config.schema.ModelConfig`.
        read_clip: False leaves CLIP's weights as memory is, for a checkpoint that holds all of them.

    Raises:
        ValueError: options that do not fit together.
        CheckpointError: CLIP's weights are not available.

    Examples:
        >>> import drseg_core as drseg
        >>> from drseg_core.models.segmenter import Segmenter
        >>> model = drseg.load("run").model
        >>> isinstance(model, Segmenter), model.encode_text(model.tokenize(["roof", "pond"])).shape[0]
        (True, 2)
    """

    hierarchical = False
    """Whether CLIP's image tower may be one of stages of falling resolution."""

    def __init__(self, config: ModelConfig, *, read_clip: bool = True) -> None:
        super().__init__()
        self.config = config
        self.clip = ClipEncoder(config.clip, read_weights=read_clip, hierarchical=self.hierarchical)
        self.dino: DinoPrior | None = None
        self.spsd: SPSD | None = None
        self.pdgr: PDGR | None = None

    def forward(self, image: Tensor, text: Tensor) -> SegmenterOutput | SupervisedOutput:
        """Segment.

        Args:
            image: (B, 3, H, W) RGB in [0, 1], any size.
            text: (T, L) integer tokens of :meth:`tokenize`, or (T, C) embeddings of :meth:`encode_text`.

        Raises:
            TypeError: integer image.
            ValueError: wrong shapes.
        """
        raise NotImplementedError

    def tokenize(self, class_names: Sequence[str]) -> Tensor:
        """Class names to prompt tokens (T, L) int64 on the model's device."""
        return self.clip.tokenize(class_names).to(self.clip.pixel_mean.device)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Prompt tokens (T, L) to L2-normalised class embeddings (T, C)."""
        return self.clip.encode_text(tokens)

    @property
    def trains_text(self) -> bool:
        """Whether class embeddings change in a training; if not, they are encoded only once."""
        return any(parameter.requires_grad for parameter in self.clip.text.parameters())

    def dense_features(self, image: Tensor) -> Tensor:
        """Canonical dense CLIP features (B, C, h, w), not normalised; what SPSD ranks and splits."""
        return self.clip(self._resized(image, f"{type(self).__name__}.dense_features"), guided=0).features

    def parameter_groups(self, train: TrainConfig) -> list[dict[str, Any]]:
        """AdamW groups of everything that is trained.

        CLIP has its own rate; normalisation layers, embeddings and the logarithms of Eq. 8 have no weight decay; the
        weights of Eq. 8 have their own epsilon.
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
            part = "clip" if name.startswith("clip.") else "edge" if name.startswith(EDGE) else "head"
            plain = id(parameter) in exempt or name.endswith(EMBEDDINGS)
            key = f"{part}_{'no_decay' if plain else 'decay'}"
            rate = train.learning_rate * (train.clip_learning_rate_scale if part == "clip" else 1.0)
            group = groups.setdefault(
                key, {"name": key, "params": [], "lr": rate, "weight_decay": 0.0 if plain else train.weight_decay}
            )
            if part == "edge":
                group["eps"] = train.edge_eps
            group["params"].append(parameter)
        return list(groups.values())

    def _class_embedding(self, text: Tensor) -> Tensor:
        name = type(self).__name__
        if text.dim() != 2 or text.shape[0] == 0:
            raise ValueError(f"{name}: text has a wrong shape; expected (T, L) or (T, C), got {tuple(text.shape)}")
        if not text.is_floating_point():
            return self.encode_text(text)
        if text.shape[1] != self.clip.embed_dim:
            raise ValueError(
                f"{name}: text has a wrong width; expected embeddings (T, {self.clip.embed_dim}), "
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
