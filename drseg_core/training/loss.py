# SPDX-License-Identifier: Apache-2.0
"""The training loss: one binary decision per class and pixel, or that of matched masks where a method proposes them."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from drseg_core.config.schema import TrainConfig
from drseg_core.data import IGNORE
from drseg_core.models.segmenter import Proposals, SegmenterOutput, SupervisedOutput
from drseg_core.training.loss_sum import LossSum
from drseg_core.training.matching import proposal_loss

# About where a dual encoder's learned temperature settles on a few dozen classes.
ALIGNMENT_TEMPERATURE = 0.1


def softmax_loss(logits: Tensor, mask: Tensor) -> LossSum:
    """Sum of softmax cross-entropies over the classes at the resolution of the logits, and the number of terms in it.

    The mask is brought to the size of the logits (nearest), so this loss is cheap. It trains only the dual encoder.
    Pixels of id 255 are left out. If there are no others, the total is 0 with zero gradients.

    Args:
        logits: (B, T, h, w), one score per class; any float dtype, the sum is taken in float32 or wider.
        mask: (B, H, W) class indices 0..T-1, 255 where there is no label; any integer dtype.

    Raises:
        ValueError: sizes that do not belong together.
        TypeError: a mask that holds no integers.
    """
    _check("softmax_loss", logits, mask)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if logits.shape[-2:] != mask.shape[-2:]:
        size = (logits.shape[-2], logits.shape[-1])
        mask = F.interpolate(mask[:, None].float(), size=size, mode="nearest-exact")[:, 0]
    total = F.cross_entropy(logits, mask.long(), ignore_index=IGNORE, reduction="sum")
    return LossSum(total, (mask != IGNORE).sum())


def training_loss(output: SegmenterOutput | SupervisedOutput, mask: Tensor, train: TrainConfig) -> tuple[LossSum, ...]:
    """The loss that ``train`` asks for: binary or softmax, plus the weighted alignment of the original correlation.

    Auxiliary logits have the same loss. Proposals have :func:`~drseg_core.training.matching.proposal_loss` in its
    place, whatever ``train`` asks for.

    Returns:
        Parts whose means add up to the loss. Each has its own terms, so that processes can divide by those of all.
    """
    proposals: tuple[Proposals, ...] = ()
    auxiliary: tuple[Tensor, ...] = ()
    if isinstance(output, SupervisedOutput):
        proposals, auxiliary = output.proposals, output.auxiliary
    if proposals:
        loss = proposal_loss(proposals, mask, unlabelled=train.unlabelled)
    else:
        loss = tuple(_dense_loss(logits, mask, train) for logits in (output.logits, *auxiliary))
    if train.alignment_weight == 0:
        return loss
    alignment = softmax_loss(output.original / ALIGNMENT_TEMPERATURE, mask)
    return *loss, LossSum(train.alignment_weight * alignment.total, alignment.terms)


def _dense_loss(logits: Tensor, mask: Tensor, train: TrainConfig) -> LossSum:
    if train.loss == "softmax":
        return softmax_loss(logits, mask)
    return segmentation_loss(logits, mask, ignore_mode=train.ignore_mode, unlabelled=train.unlabelled)


def segmentation_loss(
    logits: Tensor,
    mask: Tensor,
    *,
    ignore_mode: Literal["zeros", "masked"] = "zeros",
    unlabelled: Literal["left_out", "negative"] = "left_out",
) -> LossSum:
    """Sum of binary cross-entropies with logits, and the number of terms in it.

    ``sum_{b,t,x} softplus(l_btx) - sum_{b,x valid} l_{b,y(b,x),x}``. This is the cross-entropy against the one-hot
    mask, without ever making that mask. The logits are first brought to the size of the mask (bilinear). An image
    without a single labelled pixel tells nothing. It has no part in the loss, unless ``unlabelled`` asks for it.

    Args:
        logits: (B, T, h, w), one score per class; any float dtype, the sum is taken in float32 or wider.
        mask: (B, H, W) class indices 0..T-1, 255 where there is no label; any integer dtype.
        ignore_mode: pixels of id 255 are negative for every class (``zeros``), or left out (``masked``).
        unlabelled: of ``zeros``: images of nothing but id 255 are ``left_out``, or ``negative`` like other such pixels.

    Returns:
        ``LossSum(total, terms)``, two scalars. Kept apart so that processes which hold different numbers of valid
        pixels can divide by the number of all of them. Without a valid pixel the total is 0 with zero gradients.

    Raises:
        ValueError: sizes that do not belong together, or an unknown ``ignore_mode`` or ``unlabelled``.
        TypeError: a mask that holds no integers.
    """
    _check("segmentation_loss", logits, mask)
    if ignore_mode not in ("zeros", "masked"):
        raise ValueError(
            f"segmentation_loss: ignore_mode is unknown; expected 'zeros' or 'masked', got {ignore_mode!r}"
        )
    if unlabelled not in ("left_out", "negative"):
        raise ValueError(
            f"segmentation_loss: unlabelled is unknown; expected 'left_out' or 'negative', got {unlabelled!r}"
        )
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if logits.shape[-2:] != mask.shape[-2:]:
        logits = F.interpolate(logits, size=mask.shape[-2:], mode="bilinear", align_corners=False)
    valid = mask != IGNORE
    label = mask.long().masked_fill(~valid, 0)[:, None]
    positive = (logits.gather(1, label) * valid[:, None]).sum()
    negative = F.softplus(logits)
    if ignore_mode == "zeros":
        counted = labelled(mask) if unlabelled == "left_out" else torch.ones_like(valid[:, 0, 0])
        valid = counted[:, None, None].expand_as(valid)
    return LossSum((negative * valid[:, None]).sum() - positive, valid.sum() * logits.shape[1])


def labelled(mask: Tensor) -> Tensor:
    """(B,) bool: which masks (B, H, W) have a labelled pixel."""
    return (mask != IGNORE).flatten(1).any(1)


def _check(name: str, logits: Tensor, mask: Tensor) -> None:
    if logits.dim() != 4 or mask.dim() != 3 or logits.shape[0] != mask.shape[0]:
        raise ValueError(
            f"{name}: mask does not fit the logits; expected logits (B, T, h, w) and mask (B, H, W), "
            f"got {tuple(logits.shape)} and {tuple(mask.shape)}"
        )
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"{name}: mask has the wrong dtype; expected an integer dtype, got {mask.dtype}")
