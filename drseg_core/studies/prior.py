# SPDX-License-Identifier: Apache-2.0
"""A prior that knows structure, where no published one can be had: the random one, taught on scenes of its own.

Its tokens learn to be alike where they show the same thing and unlike where they do not, from synthetic scenes that no
study trains on or scores. It stands for what a large self-supervised encoder brings from elsewhere, and is no part of
any method: all that have a prior get the same one, frozen.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from drseg_core.config.schema import DinoConfig
from drseg_core.data import IGNORE, open_dataset
from drseg_core.models.dino import DinoPrior
from drseg_core.models.weights import save_weights
from drseg_core.studies.setting import fingerprint
from drseg_core.training.rank_channels import label_on_grid

BATCH, RATE, DECAY, TEMPERATURE = 8, 1e-3, 1e-2, 0.1
_log = logging.getLogger(__name__)


def prior_file(config: DinoConfig, data: str, steps: int, out: Path) -> Path:
    """Where a taught prior is kept: named by all that decides it."""
    teaching = {"steps": steps, "batch": BATCH, "rate": RATE, "decay": DECAY, "temperature": TEMPERATURE}
    # only the encoder is taught, whatever is taken from it later
    encoder = dataclasses.replace(config, layer=None, features="tokens", guidance_blocks=(0, 1))
    content = {"config": dataclasses.asdict(encoder), "data": fingerprint(data, "train"), **teaching}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return out / "runs" / f"prior-{digest[:12]}.safetensors"


def teach_prior(config: DinoConfig, data: str, steps: int, out: Path) -> Path:
    """Teach the random prior of ``config`` where that has not been done.

    Args:
        config: architecture, image size and seed; its weights are random.
        data: scenes with masks; only where two tokens of one image have the same label is learned, never which.
        steps: AdamW steps of eight images.
        out: folder of the studies.

    Returns:
        A weight file for ``model.dino.weights``.
    """
    path = prior_file(config, data, steps, out)
    if path.is_file():
        return path
    dataset = open_dataset(data, "train")
    prior = DinoPrior(config)
    prior.encoder.requires_grad_(True)
    optimizer = torch.optim.AdamW(prior.encoder.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=max(steps, 1))
    generator = torch.Generator().manual_seed(config.seed)
    for step in range(steps):
        samples = [dataset[int(i)] for i in torch.randint(len(dataset), (BATCH,), generator=generator)]
        turn = int(torch.randint(4, (), generator=generator))
        image = torch.rot90(torch.stack([s.image for s in samples]), turn, (2, 3)).float() / 255
        mask = torch.rot90(torch.stack([s.mask for s in samples]), turn, (1, 2))
        side = (config.image_size, config.image_size)
        image = F.interpolate(image, size=side, mode="bilinear", align_corners=False)
        pixels = (image - prior.pixel_mean) / prior.pixel_deviation
        tokens = prior.encoder.forward_intermediates(pixels, indices=1, norm=True, intermediates_only=True)[-1]
        loss = structure_loss(tokens, label_on_grid(mask, (tokens.shape[2], tokens.shape[3])))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 200 == 0:
            _log.info("prior: step %d of %d, loss %.3f", step + 1, steps, float(loss.detach()))
    save_weights(path, prior.encoder.state_dict(), {"steps": steps, "data": data})
    return path


def structure_loss(tokens: Tensor, label: Tensor) -> Tensor:
    """Supervised contrast inside each image: every token picks those of its own label among all others.

    ``-mean_i mean_{j: label_j = label_i} log softmax_j(cos_ij / 0.1)`` over tokens with a label and a partner
    (arXiv 2004.11362, Eq. 2, within images).

    Args:
        tokens: (B, D, h, w).
        label: (B, h, w), 255 where there is none.
    """
    unit = F.normalize(tokens.flatten(2).transpose(1, 2), dim=-1)
    flat = label.flatten(1)
    itself = torch.eye(flat.shape[1], dtype=torch.bool, device=flat.device)
    logit = (unit @ unit.mT / TEMPERATURE).masked_fill(itself, -torch.inf)
    same = (flat[:, :, None] == flat[:, None, :]) & (flat != IGNORE)[:, :, None] & ~itself
    partners = same.sum(-1)
    chosen = logit.log_softmax(-1).masked_fill(~same, 0).sum(-1) / partners.clamp(min=1)
    return -chosen[partners > 0].mean() if bool((partners > 0).any()) else 0 * tokens.sum()
