# SPDX-License-Identifier: Apache-2.0
"""The frozen structural prior: an adapter on timm's self-supervised encoders (DINOv3 by default)."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drseg_core.config.schema import DinoConfig
from drseg_core.errors import CheckpointError
from drseg_core.models.clip import PIXEL_DEVIATION, PIXEL_MEAN
from drseg_core.models.weights import difference, read_foreign_state

# pixel mean and deviation on [0, 1] RGB; sat is what the SAT-493M weights were trained with
NORMALIZATIONS = {
    "sat": ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": (PIXEL_MEAN, PIXEL_DEVIATION),
}

TINY: dict[str, Any] = {"depth": 2, "embed_dim": 96, "num_heads": 4, "patch_size": 8}


class DinoPrior(nn.Module):
    """Patch features of a frozen encoder on a given grid. Never trained, always in evaluation mode.

    Args:
        config: architecture, weights, input size and pixel normalisation.

    Raises:
        ValueError: unknown architecture, one without feature maps, or an image size that is no multiple of its patch.
        CheckpointError: weights that cannot be had or do not fit.
    """

    pixel_mean: Tensor
    pixel_deviation: Tensor

    def __init__(self, config: DinoConfig) -> None:
        super().__init__()
        self.config = config
        if config.normalization not in NORMALIZATIONS:
            raise ValueError(
                f"DinoPrior: normalization is unknown; expected {', '.join(NORMALIZATIONS)}, "
                f"got {config.normalization!r}"
            )
        mean, deviation = NORMALIZATIONS[config.normalization]
        self.encoder: Any = _build(config)
        self.width = int(self.encoder.num_features)
        self.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_deviation", torch.tensor(deviation).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> DinoPrior:
        """Stays in evaluation mode: the prior is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, 3, H, W) RGB in [0, 1] to (B, D, h, w) on ``grid``, without gradient.

        The last block's patch tokens after the final norm; a finer grid is averaged down where it is a multiple of
        ``grid``, otherwise resampled bilinearly.
        """
        side = (self.config.image_size, self.config.image_size)
        if image.shape[2:] != side:
            image = F.interpolate(image, size=side, mode="bilinear", align_corners=False)
        pixels = (image - self.pixel_mean) / self.pixel_deviation
        features = self.encoder.forward_intermediates(pixels, indices=1, norm=True, intermediates_only=True)[-1]
        return resample(features, grid)


def resample(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, D, h', w') to (B, D, h, w): average pooling where the sizes divide, otherwise bilinear."""
    height, width = features.shape[2:]
    if (height, width) == grid:
        return features
    if height % grid[0] == 0 and width % grid[1] == 0:
        return F.avg_pool2d(features, (height // grid[0], width // grid[1]))
    return F.interpolate(features, size=grid, mode="bilinear", align_corners=False)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    # only the CPU generator: initial weights are drawn there, and no device is woken up
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


def _build(config: DinoConfig) -> Any:
    import timm

    options: dict[str, Any] = {"num_classes": 0}
    name = config.name
    if name == "drseg-tiny":
        name = "vit_small_patch16_dinov3"
        options.update(TINY)
    elif not timm.is_model(name.split(".", 1)[0]):
        raise ValueError(f"DinoPrior: name is unknown; expected drseg-tiny or an architecture of timm, got {name!r}")
    pretrained = config.weights == "pretrained"
    if pretrained and config.name == "drseg-tiny":
        raise CheckpointError("DinoPrior: drseg-tiny has no published weights; expected null or a file, got pretrained")
    with _seeded(config.seed):
        try:
            encoder = _create(timm, name, pretrained, options, config.image_size)
        except (ValueError, TypeError):
            raise
        except AssertionError as error:
            raise ValueError(
                f"DinoPrior: image_size does not fit {config.name}; got {config.image_size} ({error})"
            ) from error
        except Exception as error:
            raise CheckpointError(
                f"DinoPrior: weights of {config.name} cannot be fetched; expected a network or a local file in "
                f"model.dino.weights, got {type(error).__name__}: {str(error).splitlines()[0]}"
            ) from error
    if not hasattr(encoder, "forward_intermediates"):
        raise ValueError(f"DinoPrior: {config.name} has no feature maps; expected a model with forward_intermediates")
    patch = getattr(getattr(encoder, "patch_embed", None), "patch_size", None)
    side = patch[0] if isinstance(patch, (tuple, list)) else patch
    if isinstance(side, int) and config.image_size % side:
        raise ValueError(
            f"DinoPrior: image_size does not fit {config.name}; expected a multiple of {side}, got {config.image_size}"
        )
    if config.weights is not None and not pretrained:
        _load(encoder, config)
    return encoder


def _create(timm: Any, name: str, pretrained: bool, options: dict[str, Any], image_size: int) -> Any:
    try:
        return timm.create_model(name, pretrained=pretrained, img_size=image_size, **options)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        # convolutional models take any size and no such option
        return timm.create_model(name, pretrained=pretrained, **options)


def _load(encoder: Any, config: DinoConfig) -> None:
    if not Path(str(config.weights)).exists():
        raise CheckpointError(
            f"DinoPrior: weights {config.weights!r} not found; expected pretrained, null or the path of a file"
        )
    state = read_foreign_state(str(config.weights))
    state = {key: value for key, value in state.items() if not key.startswith("head.")}
    # timm's own translation of published checkpoints into its names
    translate = getattr(sys.modules[type(encoder).__module__], "checkpoint_filter_fn", None)
    if translate is not None:
        state = translate(state, encoder)
    own = encoder.state_dict()
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    problem = difference(own, state)
    if problem:
        raise CheckpointError(f"DinoPrior: {config.weights} does not fit {config.name}; {problem}")
    encoder.load_state_dict(state, assign=any(value.is_meta for value in own.values()))
