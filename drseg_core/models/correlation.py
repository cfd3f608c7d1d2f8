# SPDX-License-Identifier: Apache-2.0
"""Cosine maps between dense image features and class embeddings, in four orientations (Eq. 10-11)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rotate(image: Tensor, rotations: int) -> Tensor:
    """(B, 3, S, S) to (R*B, 3, S, S): the image turned by 0, 90, ... degrees, the unturned batch first.

    Raises:
        ValueError: ``rotations`` is not 1 or 4, or the image is not square.
    """
    if rotations == 1:
        return image
    if rotations != 4:
        raise ValueError(f"rotate: rotations is not supported; expected 1 or 4, got {rotations}")
    if image.shape[2] != image.shape[3]:
        raise ValueError(f"rotate: image is not square; expected (B, 3, S, S), got {tuple(image.shape)}")
    return torch.cat([image, *(torch.rot90(image, turn, (2, 3)) for turn in range(1, rotations))])


def rotate_back(maps: Tensor, rotations: int) -> Tensor:
    """(R*B, T, h, w) maps of :func:`rotate`'s images to (B, R, T, h, w), each turned back."""
    if rotations == 1:
        return maps[:, None]
    first, *others = maps.chunk(rotations)
    turned = [first, *(torch.rot90(part, -turn, (2, 3)) for turn, part in enumerate(others, 1))]
    # the orientations innermost: the convolution over them takes this as it lies
    return torch.stack(turned, dim=-1).movedim(-1, 1)


def cosine(features: Tensor, text: Tensor) -> Tensor:
    """``cos(f(x), t_c)`` at every place, in float32 whatever autocast says: raw cosines, no scale.

    Args:
        features: (B, C, h, w).
        text: (T, C).

    Returns:
        (B, T, h, w) in [-1, 1].
    """
    if features.shape[1] != text.shape[1]:
        raise ValueError(
            f"cosine: text has a wrong width; expected {features.shape[1]} channels, got {tuple(text.shape)}"
        )
    with torch.autocast(features.device.type, enabled=False):
        kind = torch.promote_types(features.dtype, torch.float32)
        # dense features are tokens seen as a map, so this is a view
        token = F.normalize(features.permute(0, 2, 3, 1).to(kind), dim=-1)
        return (token @ F.normalize(text.to(kind), dim=-1).T).permute(0, 3, 1, 2)


def correlation(features: Tensor, text: Tensor, rotations: int) -> Tensor:
    """Original maps of Eq. 10: (R*B, C, h, w) features of turned images and (T, C) text to (B, R, T, h, w).

    The cosine looks at one place at a time, so turning the maps back equals turning the features back, with T
    channels to move where the features have C.
    """
    return rotate_back(cosine(features, text), rotations)
