# SPDX-License-Identifier: Apache-2.0
"""A stand-in for CLIP that learned as CLIP did: from whole images and their captions, never from pixels.

The other stand-in (``--start dense``) is trained on pixel labels. So it lacks the flaw that DR-Seg repairs: patches
that were never asked for a class of their own. Here crops of the training images are matched with captions of the
classes that occur in them (arXiv 2103.00020, Fig. 3). Only the class token is compared with the text.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drseg_core.checkpoints.run import model_of, plain_config
from drseg_core.config.schema import Config
from drseg_core.data import IGNORE, SegmentationDataset, open_dataset
from drseg_core.errors import ConfigError
from drseg_core.models.clip import ClipEncoder
from drseg_core.models.weights import save_weights

CROP = 48
"""Side of a crop in pixels: a part of a landscape with a few of its classes."""
STEPS, BATCH, RATE, DECAY, WARM = 2000, 64, 1e-3, 0.1, 100
LARGEST_SCALE = 100.0
# raised when the same configuration and data would give other weights
VERSION = 1
_log = logging.getLogger(__name__)


class Crops(NamedTuple):
    """What the training sees of a batch: ``image`` (B, 3, S, S) uint8, and the ``names`` of the classes in each."""

    image: Tensor
    names: list[list[str]]


def contrast_content(config: Config, data: str, steps: int) -> dict[str, object]:
    """All that decides the weights, as JSON has it; ``data`` is the fingerprint of the training set."""
    recipe = {"steps": steps, "batch": BATCH, "rate": RATE, "decay": DECAY, "warm": WARM, "crop": CROP}
    clip = {key: value for key, value in plain_config(config)["model"]["clip"].items() if key != "trainable"}
    return {"version": VERSION, "clip": clip, "seed": config.seed, "data": data, **recipe}


def contrast_file(config: Config, data: str, steps: int, out: Path) -> Path:
    """Where the weights of a configuration are kept: named by all that decides them."""
    content = contrast_content(config, data, steps)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return out / "runs" / f"contrast-{config.seed}-{digest[:12]}.safetensors"


def pretrain(config: Config, data: str, steps: int, path: Path) -> Path:
    """Train the dual encoder of ``config`` from crops and captions, where that has not been done.

    Args:
        config: of the dual encoder alone (``setting.BARE``); its seed decides initial weights, crops and captions.
        data: training images; of their masks only which classes occur in a crop is read, never where.
        steps: AdamW steps of 64 crops.
        path: weight file to write, with a checksum.

    Returns:
        ``path``: all tensors of the model, as ``train(init=)`` and :func:`load_into` read them.
    """
    if path.is_file():
        return path
    dataset = open_dataset(data, "train")
    torch.manual_seed(config.seed)
    model = model_of(config)
    native = coarse_positions(model.clip, CROP)
    learned = nn.Parameter(torch.tensor(1 / 0.07).log())
    # the class token needs the queries and keys of the last block, which the value path leaves out
    model.clip.requires_grad_(True).train()
    # word vectors stay random: most parameters are theirs, and nearly all of words that no caption has
    model.clip.text.token_embedding.requires_grad_(False)
    parameters = [*(one for one in model.clip.parameters() if one.requires_grad), learned]
    groups = [
        {"params": [one for one in parameters if one.dim() > 1], "weight_decay": DECAY},
        {"params": [one for one in parameters if one.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), eps=1e-6)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_share(step, steps))
    generator = torch.Generator().manual_seed(config.seed)
    for step in range(steps):
        crops = draw_crops(dataset, generator)
        tokens = model.clip.tokenize([caption(names, model.clip, generator) for names in crops.names], "{}")
        loss = contrastive_loss(_class_token(model.clip, crops.image), model.clip.encode_text(tokens), learned)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            learned.clamp_(max=torch.tensor(LARGEST_SCALE).log())
        if (step + 1) % 200 == 0:
            _log.info("contrast: step %d of %d, loss %.3f", step + 1, steps, float(loss.detach()))
    restore_positions(model.clip, native)
    save_weights(path, model.state_dict(), {"steps": steps, "data": data, "seed": config.seed, "stands for": "CLIP"})
    return path


def _class_token(clip: ClipEncoder, image: Tensor) -> Tensor:
    pixels = (image.float() / 255 - clip.pixel_mean) / clip.pixel_deviation
    return F.normalize(clip.visual.forward_ordinary(pixels), dim=-1)


def rate_share(step: int, steps: int) -> float:
    """Share of the rate at a step: up to 1 in ``WARM`` steps, then down to 0 by half a cosine."""
    warm = min(WARM, steps // 4)
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(steps - warm, 1))


def contrastive_loss(image: Tensor, text: Tensor, log_scale: Tensor) -> Tensor:
    """InfoNCE in both directions (arXiv 2103.00020, Fig. 3).

    Args:
        image: (B, C), each of length 1.
        text: (B, C), each of length 1; row i belongs to image i.
        log_scale: logarithm of what cosines are multiplied by.
    """
    logit = log_scale.exp() * image @ text.T
    own = torch.arange(len(logit))
    return (F.cross_entropy(logit, own) + F.cross_entropy(logit.T, own)) / 2


def draw_crops(dataset: SegmentationDataset, generator: torch.Generator, count: int = BATCH) -> Crops:
    """``count`` crops of random images, each at a random place, turned by a random multiple of 90 degrees."""
    images, names = [], []
    for place in torch.randint(len(dataset), (count,), generator=generator).tolist():
        sample = dataset[place]
        height, width = sample.mask.shape
        top, left = (int(torch.randint(max(size - CROP, 0) + 1, (), generator=generator)) for size in (height, width))
        turn = int(torch.randint(4, (), generator=generator))
        window = (..., slice(top, top + CROP), slice(left, left + CROP))
        images.append(torch.rot90(sample.image[window], turn, (1, 2)))
        names.append(present(sample.mask[window], dataset.class_names))
    return Crops(torch.stack(images), names)


def present(mask: Tensor, class_names: Sequence[str]) -> list[str]:
    """The names of the classes that occur in a mask, in their own order: all that is ever read of it."""
    return [class_names[index] for index in mask.unique().tolist() if index != IGNORE]


def caption(names: Sequence[str], clip: ClipEncoder, generator: torch.Generator) -> str:
    """What is written below a picture of these classes: the prompt of one of them, or as many names as can be read.

    A prompt says little of a picture with eight classes, and a list is nothing that a model is asked with later. So
    half of the captions are of either kind. Names are in random order.
    """
    if not names:
        return clip.config.template.format("ground")
    order = [names[place] for place in torch.randperm(len(names), generator=generator).tolist()]
    if int(torch.randint(2, (), generator=generator)):
        return clip.config.template.format(order[0])
    while len(order) > 1 and not _readable(" ".join(order), clip):
        order.pop()
    return " ".join(order)


def _readable(text: str, clip: ClipEncoder) -> bool:
    try:
        clip.tokenize([text], "{}")
    except ConfigError:
        return False
    return True


def coarse_positions(clip: ClipEncoder, side: int) -> tuple[int, int]:
    """Give the image tower a table of positions for crops of ``side`` pixels; returns the grid of the one it had.

    A table that is larger than the grid would be read by interpolation, and half of it would never be learned.
    """
    visual = clip.visual
    native = visual.native_grid
    grid = (side // visual.patch_size[0], side // visual.patch_size[1])
    visual.positional_embedding = nn.Parameter(visual.position(grid).detach().clone())
    visual.native_grid = grid
    return native


def restore_positions(clip: ClipEncoder, native: tuple[int, int]) -> None:
    """Undo :func:`coarse_positions` by interpolation, as CLIP is read at another size."""
    visual = clip.visual
    visual.positional_embedding = nn.Parameter(visual.position(native).detach().clone())
    visual.native_grid = native
