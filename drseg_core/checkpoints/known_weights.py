# SPDX-License-Identifier: Apache-2.0
"""What is known of published weights, and from where; and the pictures and prompts that they are asked about."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drseg_core.checkpoints.packaged import DINOV2
from drseg_core.config.schema import ClipConfig, DinoConfig
from drseg_core.errors import CheckpointError
from drseg_core.models.weights import load_weights


class Known(NamedTuple):
    """A value, and how far numbers may be from it."""

    value: Any
    tolerance: float = 1e-3


def red_circle(side: int) -> Tensor:
    """(3, side, side) RGB in [0, 1]: a red disc on white."""
    y, x = _places(side)
    return _drawn(torch.hypot(x, y) < 0.6, (0.85, 0.1, 0.1))


def blue_square(side: int) -> Tensor:
    """(3, side, side) RGB in [0, 1]: a blue square on white."""
    y, x = _places(side)
    return _drawn(torch.maximum(x.abs(), y.abs()) < 0.55, (0.1, 0.2, 0.85))


def _places(side: int) -> tuple[Tensor, Tensor]:
    line = (torch.arange(side) + 0.5) * 2 / side - 1
    return line[:, None].expand(side, side), line[None].expand(side, side)


def _drawn(inside: Tensor, color: tuple[float, float, float]) -> Tensor:
    return torch.where(inside, torch.tensor(color)[:, None, None], torch.ones(3, 1, 1))


PICTURES: dict[str, Callable[[int], Tensor]] = {"the red circle": red_circle, "the blue square": blue_square}
# the first ones are of the pictures, in their order
PROMPTS = (
    "a red circle on a white background",
    "a blue square on a white background",
    "a photo of a dog",
    "an aerial image of a forest",
)

# of CLIP's byte pairs: begin 49406, end 49407; the words are entries of the vocabulary that OpenAI published
TOKEN_IDS = {
    "a diagram": [49406, 320, 22697, 49407],
    "a dog": [49406, 320, 1929, 49407],
    "a photo of a cat": [49406, 320, 1125, 539, 320, 2368, 49407],
}

# github.com/openai/CLIP, README: ViT-B/32 on CLIP.png, "a diagram", "a dog", "a cat"; in half precision there
_OPENAI_README = {"scores of CLIP.png": Known([0.9927937, 0.00421068, 0.00299572], 0.01)}
_CLIP: dict[tuple[str, str], dict[str, Known]] = {
    (name, "openai"): _OPENAI_README for name in ("ViT-B-32", "ViT-B-32-quickgelu")
}

# block 8 through the last norm, in onnxruntime 1.32 on the file as it was published, at 518 pixels
_DINOV2_VITS14 = {
    "prior feature of the red circle": Known(
        [-0.00581, 0.31861, -0.02178, -0.00808, -0.03116, 0.01517, -0.00474, -0.02343]
    ),
    "prior feature of the blue square": Known(
        [-0.01227, 0.21553, -0.02984, -0.0152, -0.01511, -0.0653, -0.00689, 0.02555]
    ),
}


def known_values(clip: ClipConfig, prior: DinoConfig) -> dict[str, Known]:
    """What is committed for two encoders, by the names that :mod:`drseg_core.checkpoints.check_weights` uses."""
    found = {f"token ids of {prompt!r}": Known(ids) for prompt, ids in TOKEN_IDS.items()}
    found |= _CLIP.get((clip.name, clip.weights or ""), {})
    if prior.layer == DINOV2.layer and _is_packaged(prior):
        found |= _DINOV2_VITS14
    return found


def _is_packaged(prior: DinoConfig) -> bool:
    """Whether a file says that it was made of the package by ``make real``."""
    if prior.name != DINOV2.name or prior.weights is None or not Path(prior.weights).is_file():
        return False
    try:
        return load_weights(prior.weights)[1].get("wheel_sha256") == DINOV2.sha256
    except CheckpointError:
        return False


def published_hash(clip: ClipConfig, described: str) -> str | None:
    """The SHA-256 in the address of OpenAI's own files, which open_clip has; None for any other file.

    Args:
        clip: of a tag of open_clip, or of a file.
        described: what was read, ``ARCHITECTURE, WEIGHTS``; a file is taken for a published one by its name.
    """
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    file = described.rpartition(", ")[2]
    for tag in list_pretrained_tags_by_model(clip.name):
        url = get_pretrained_cfg(clip.name, tag).get("url", "")
        found = re.search(r"/([0-9a-f]{64})/([^/]+)$", url)
        if found and found[2] == file:
            return found[1]
    return None
