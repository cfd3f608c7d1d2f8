# SPDX-License-Identifier: Apache-2.0
"""The loss of methods that propose masks: proposals are matched with true segments, one to one, and learn them.

SAN and SCAN train so (arXiv 2302.12242, 2312.04089), after Mask2Former (arXiv 2112.01527). The Hungarian method matches
by the classes, the binary cross-entropy and the dice loss of the masks. The latter two are taken at points drawn where
masks are uncertain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from drseg_core.data import IGNORE
from drseg_core.extras import require
from drseg_core.models.segmenter import Proposals
from drseg_core.training.loss_sum import LossSum

CLASS_WEIGHT, MASK_WEIGHT, DICE_WEIGHT = 2.0, 5.0, 5.0
NO_OBJECT_WEIGHT = 0.1
POINTS, OVERSAMPLED, IMPORTANT = 112 * 112, 3, 0.75


class Segments(NamedTuple):
    """The classes that an image has: ``label`` (S,) int64, and ``mask`` (S, H, W) float, 1 inside."""

    label: Tensor
    mask: Tensor


def segments(mask: Tensor) -> list[Segments]:
    """One segment per class and image of a mask (B, H, W); pixels of id 255 are in none."""
    found = []
    for image in mask.long():
        label = image.unique()
        label = label[label != IGNORE]
        found.append(Segments(label, (image == label[:, None, None]).float()))
    return found


def proposal_loss(
    proposals: Sequence[Proposals], mask: Tensor, *, unlabelled: Literal["left_out", "negative"] = "left_out"
) -> tuple[LossSum, ...]:
    """Class, mask and dice loss of every supervised layer.

    Args:
        proposals: of each supervised layer.
        mask: (B, H, W) class indices 0..T-1, 255 where there is no label; any integer dtype.
        unlabelled: images without a label are ``left_out``, or ``negative``: all their proposals are no object.

    Returns:
        Three weighted parts per layer: cross-entropies divided by the weights of their classes, and the two losses of
        matched masks divided by their number.
    """
    truth = segments(mask)
    return tuple(part for layer in proposals for part in _layer_loss(layer, truth, unlabelled == "negative"))


def match(proposals: Proposals, image: int, truth: Segments) -> tuple[Tensor, Tensor]:
    """Which proposal of an image learns which of its segments: two index tensors of equal length (on the CPU)."""
    require("match", "scipy")
    from scipy.optimize import linear_sum_assignment

    with torch.no_grad():
        # the same points for all pairs
        point = torch.rand(1, min(POINTS, truth.mask[0].numel()), 2, device=truth.mask.device)
        logit = sample(proposals.mask[image].float(), point)
        inside = sample(truth.mask, point)
        cost = -CLASS_WEIGHT * proposals.score[image].float().softmax(dim=-1)[:, truth.label]
        # softplus(x) - x y, summed over points for all pairs at once
        entropy = F.softplus(logit).sum(dim=1, keepdim=True) - logit @ inside.T
        cost = cost + MASK_WEIGHT * entropy / point.shape[1] + DICE_WEIGHT * dice(logit, inside)
        # a NaN would stop the matching before the training loop could see the loss
        first, second = linear_sum_assignment(cost.nan_to_num(nan=1e6, posinf=1e6, neginf=-1e6).cpu().numpy())
    return torch.from_numpy(first), torch.from_numpy(second)


def dice(logit: Tensor, inside: Tensor) -> Tensor:
    """Dice losses of all pairs of masks at the same points, (Q, P) and (S, P) to (Q, S)."""
    share = logit.sigmoid()
    both = 2 * share @ inside.T
    return 1 - (both + 1) / (share.sum(dim=1)[:, None] + inside.sum(dim=1) + 1)


def sample(maps: Tensor, point: Tensor) -> Tensor:
    """Maps (M, h, w) at points (M or 1, P, 2) in [0, 1], x before y: (M, P), bilinear."""
    grid = (2 * point - 1)[:, None].expand(len(maps), -1, -1, -1)
    return F.grid_sample(maps[:, None], grid, mode="bilinear", align_corners=False)[:, 0, 0]


def uncertain_points(mask: Tensor, count: int) -> Tensor:
    """Points (M, count, 2) of mask logits (M, h, w): three quarters where they are nearest to 0, of three times as
    many drawn; the others anywhere."""
    drawn = torch.rand(len(mask), OVERSAMPLED * count, 2, device=mask.device)
    important = int(IMPORTANT * count)
    nearest = sample(mask, drawn).abs().topk(important, dim=1, largest=False).indices
    chosen = drawn.gather(1, nearest[..., None].expand(-1, -1, 2))
    return torch.cat((chosen, torch.rand(len(mask), count - important, 2, device=mask.device)), dim=1)


def _layer_loss(layer: Proposals, truth: Sequence[Segments], negative: bool) -> tuple[LossSum, LossSum, LossSum]:
    score, classes = layer.score.float(), layer.score.shape[2] - 1
    target = torch.full(score.shape[:2], classes, device=score.device)
    chosen, inside = [], []
    for image, own in enumerate(truth):
        if len(own.label):
            first, second = match(layer, image, own)
            target[image, first] = own.label[second]
            chosen.append(layer.mask[image, first].float())
            inside.append(own.mask[second])
    counted = torch.tensor([negative or bool(len(own.label)) for own in truth], device=score.device)
    weight = torch.ones(classes + 1, device=score.device)
    weight[-1] = NO_OBJECT_WEIGHT
    entropy = F.cross_entropy(score.transpose(1, 2), target, weight, reduction="none") * counted[:, None]
    terms = (weight[target] * counted[:, None]).sum()
    known = LossSum(CLASS_WEIGHT * entropy.sum(), terms)
    if not chosen:
        nothing = LossSum(0 * layer.mask.sum(), terms.new_zeros(()))
        return known, nothing, nothing
    logits, true = torch.cat(chosen), torch.cat(inside)
    with torch.no_grad():
        point = uncertain_points(logits, min(POINTS, true[0].numel()))
        label = sample(true, point)
    logit = sample(logits, point)
    number = terms.new_tensor(len(logits))
    binary = F.binary_cross_entropy_with_logits(logit, label, reduction="none").mean(dim=1).sum()
    share = logit.sigmoid()
    overlap = (1 - (2 * (share * label).sum(1) + 1) / (share.sum(1) + label.sum(1) + 1)).sum()
    return known, LossSum(MASK_WEIGHT * binary, number), LossSum(DICE_WEIGHT * overlap, number)
