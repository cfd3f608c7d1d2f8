# SPDX-License-Identifier: Apache-2.0
"""Which loss a configuration asks for."""

from __future__ import annotations

import dataclasses

import torch

from drseg_core.config.schema import TrainConfig
from drseg_core.models.drseg import DRSegOutput
from drseg_core.training.loss import ALIGNMENT_TEMPERATURE, segmentation_loss, softmax_loss, training_loss


def make_output() -> tuple[DRSegOutput, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    original = torch.rand(2, 3, 4, 4, generator=random).requires_grad_()
    logits = torch.randn(2, 3, 16, 16, generator=random).requires_grad_()
    mask = torch.randint(0, 3, (2, 16, 16), generator=random).to(torch.uint8)
    mask[0, :5] = 255
    return DRSegOutput(logits, torch.zeros(2, 1, 4, 4), original, None), mask


def test_the_protocol_is_the_binary_loss_alone():
    output, mask = make_output()
    for mode in ("zeros", "masked"):
        loss = training_loss(output, mask, TrainConfig(ignore_mode=mode))
        assert torch.equal(loss.mean(), segmentation_loss(output.logits, mask, ignore_mode=mode).mean())


def test_softmax():
    output, mask = make_output()
    loss = training_loss(output, mask, TrainConfig(loss="softmax"))
    assert torch.equal(loss.mean(), softmax_loss(output.logits, mask).mean())


def test_alignment_adds_its_weighted_mean_and_trains_the_correlation():
    output, mask = make_output()
    train = TrainConfig(alignment_weight=0.5)
    plain = training_loss(output, mask, dataclasses.replace(train, alignment_weight=0.0)).mean()
    extra = softmax_loss(output.original / ALIGNMENT_TEMPERATURE, mask).mean()
    loss = training_loss(output, mask, train).mean()
    torch.testing.assert_close(loss, plain + 0.5 * extra)
    (grad,) = torch.autograd.grad(loss, output.original)
    assert grad.abs().sum() > 0
    # nothing but ignored pixels: no alignment, and no NaN
    empty = training_loss(output, torch.full_like(mask, 255), train).mean()
    (grad,) = torch.autograd.grad(empty, output.original)
    assert empty.isfinite() and not grad.any()
