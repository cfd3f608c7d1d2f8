# SPDX-License-Identifier: Apache-2.0
"""Training augmentation of the benchmark protocol, drawn from an explicit generator."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from drseg_core.data.dataset import IGNORE, Sample
from drseg_core.extras import require

PAD_VALUE = 128
LONGEST_EDGE = 1333 / 384
"""Bound on the longest edge after resizing, in crop sizes."""


def _uniform(generator: Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))


def _chance(generator: Generator) -> bool:
    return _uniform(generator, 0, 1) < 0.5


def resized_size(height: int, width: int, crop_size: int) -> tuple[int, int]:
    """Size whose shortest edge is ``crop_size``, or less where the longest edge would pass its bound."""
    scale = crop_size / min(height, width)
    scale = min(scale, LONGEST_EDGE * crop_size / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def photometric_distortion(image: Tensor, generator: Generator) -> Tensor:
    """SSD's colour distortion: each step with chance one half.

    Brightness shift within 32/255, contrast factor in [0.5, 1.5] (before or after the next two), saturation factor in
    [0.5, 1.5], hue turn within 0.1.

    Args:
        image: (3, H, W) float32 in [0, 1].
        generator: source of randomness.

    Returns:
        the same shape and range.
    """
    require("photometric_distortion", "torchvision")
    from torchvision.transforms.v2 import functional as F

    if _chance(generator):
        image = (image + _uniform(generator, -32 / 255, 32 / 255)).clamp(0, 1)
    contrast_first = _chance(generator)
    contrast = _uniform(generator, 0.5, 1.5) if _chance(generator) else 1.0
    if contrast_first:
        image = (image * contrast).clamp(0, 1)
    if _chance(generator):
        image = F.adjust_saturation(image, _uniform(generator, 0.5, 1.5))
    if _chance(generator):
        image = F.adjust_hue(image, _uniform(generator, -0.1, 0.1))
    if not contrast_first:
        image = (image * contrast).clamp(0, 1)
    return image


def augment(
    sample: Sample, *, crop_size: int, color_jitter: bool = True, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Resize the shortest edge to the crop, crop at random, distort colours, flip with chance one half, pad.

    An image that already has the crop's shortest edge is not resized. Padding (image 128, mask 255) is at the right
    and at the bottom and only occurs where an image is more elongated than 1333 : 384.

    Args:
        sample: image (3, H, W) uint8 and mask (H, W) uint8.
        crop_size: side S of the crop in pixels.
        color_jitter: distort colours.
        generator: source of all randomness; nothing else is drawn from.

    Returns:
        image (3, S, S) float32 in [0, 1] and mask (S, S) uint8.
    """
    require("augment", "torchvision")
    from torchvision import tv_tensors
    from torchvision.transforms.v2 import functional as F

    image: Tensor = tv_tensors.Image(sample.image)
    mask: Tensor = tv_tensors.Mask(sample.mask)
    height, width = mask.shape[-2:]
    size = resized_size(height, width, crop_size)
    if size != (height, width):
        image = F.resize(image, list(size), antialias=True)
        # torchvision's nearest takes the corner of a pixel, half a pixel beside the image
        nearest = torch.nn.functional.interpolate(mask[None, None].as_subclass(Tensor), size, mode="nearest-exact")
        mask = tv_tensors.Mask(nearest[0, 0])
    rows, columns = min(size[0], crop_size), min(size[1], crop_size)
    top = int(torch.randint(size[0] - rows + 1, (), generator=generator))
    left = int(torch.randint(size[1] - columns + 1, (), generator=generator))
    image = F.crop(image, top, left, rows, columns)
    mask = F.crop(mask, top, left, rows, columns)
    pixels = image.as_subclass(Tensor).float() / 255
    label = mask.as_subclass(Tensor)
    if color_jitter:
        pixels = photometric_distortion(pixels, generator)
    if _chance(generator):
        pixels, label = pixels.flip(-1), label.flip(-1)
    padding = [0, crop_size - columns, 0, crop_size - rows]
    if any(padding):
        pixels = torch.nn.functional.pad(pixels, padding, value=PAD_VALUE / 255)
        label = torch.nn.functional.pad(label, padding, value=IGNORE)
    return pixels.contiguous(), label.contiguous()
