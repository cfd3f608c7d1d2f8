# SPDX-License-Identifier: Apache-2.0
"""One place where a configuration becomes a model."""

from __future__ import annotations

from drseg_core.config.schema import ModelConfig
from drseg_core.models.baselines.proposals import ProposalSegmenter
from drseg_core.models.baselines.sed import GradualSegmenter
from drseg_core.models.drseg import DRSeg
from drseg_core.models.segmenter import Segmenter

__all__ = ["build_model"]


def build_model(
    config: ModelConfig, *, read_clip: bool = True, read_prior: bool = True, read_remote: bool = True
) -> Segmenter:
    """The model of ``config``, on the CPU (or the default device), in training mode.

    Random initial weights are drawn from torch's global generator, those of the prior from ``config.dino.seed``.

    Args:
        config: all options of the model.
        read_clip: False leaves CLIP's weights as memory is, for a checkpoint that holds all of them.
        read_prior: the same for the prior's weights.
        read_remote: the same for those of the second CLIP that guides the decoder.

    Raises:
        ValueError: options that do not fit together.
        CheckpointError: CLIP or prior weights that cannot be had.

    Examples:
        >>> from drseg_core.config.load import load_config
        >>> from drseg_core.models.build import build_model
        >>> model = build_model(load_config("tiny").model)
        >>> type(model).__name__, len(model.spsd.semantic_index), model.pdgr is not None
        ('DRSeg', 32, True)
    """
    if config.proposals.kind != "none":
        return ProposalSegmenter(config, read_clip=read_clip)
    # CLIP alone has no decoder of any kind
    if config.decoder.kind == "gradual" and config.fusion.kind != "cosine":
        return GradualSegmenter(config, read_clip=read_clip)
    return DRSeg(config, read_clip=read_clip, read_prior=read_prior, read_remote=read_remote)
