# SPDX-License-Identifier: Apache-2.0
"""Which loss a configuration asks for."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from drseg_core.config.schema import TrainConfig
from drseg_core.models.segmenter import SegmenterOutput
from drseg_core.training.loss import ALIGNMENT_TEMPERATURE, LossSum, segmentation_loss, softmax_loss, training_loss


def make_output() -> tuple[SegmenterOutput, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    original = torch.rand(2, 3, 4, 4, generator=random).requires_grad_()
    logits = torch.randn(2, 3, 16, 16, generator=random).requires_grad_()
    mask = torch.randint(0, 3, (2, 16, 16), generator=random).to(torch.uint8)
    mask[0, :5] = 255
    return SegmenterOutput(logits, torch.zeros(2, 1, 4, 4), original, None), mask


def mean(parts: tuple[LossSum, ...]) -> torch.Tensor:
    return sum((part.mean() for part in parts), torch.zeros(()))


def test_the_protocol_is_the_binary_loss_alone():
    output, mask = make_output()
    for mode in ("zeros", "masked"):
        loss = training_loss(output, mask, TrainConfig(ignore_mode=mode))
        assert torch.equal(mean(loss), segmentation_loss(output.logits, mask, ignore_mode=mode).mean())


def test_images_without_a_label_are_what_is_asked_for():
    output, mask = make_output()
    mask[0] = 255
    found = {how: mean(training_loss(output, mask, TrainConfig(unlabelled=how))) for how in ("left_out", "negative")}
    assert torch.equal(mean(training_loss(output, mask, TrainConfig())), found["left_out"])
    assert torch.equal(found["negative"], segmentation_loss(output.logits, mask, unlabelled="negative").mean())
    assert found["negative"] != found["left_out"]


def test_softmax():
    output, mask = make_output()
    loss = training_loss(output, mask, TrainConfig(loss="softmax"))
    assert torch.equal(mean(loss), softmax_loss(output.logits, mask).mean())


def test_alignment_adds_its_weighted_mean_and_trains_the_correlation():
    output, mask = make_output()
    train = TrainConfig(alignment_weight=0.5)
    plain = mean(training_loss(output, mask, dataclasses.replace(train, alignment_weight=0.0)))
    extra = softmax_loss(output.original / ALIGNMENT_TEMPERATURE, mask).mean()
    loss = mean(training_loss(output, mask, train))
    torch.testing.assert_close(loss, plain + 0.5 * extra)
    (grad,) = torch.autograd.grad(loss, output.original)
    assert grad.abs().sum() > 0
    # nothing but ignored pixels: no alignment, and no NaN
    empty = mean(training_loss(output, torch.full_like(mask, 255), train))
    (grad,) = torch.autograd.grad(empty, output.original)
    assert empty.isfinite() and not grad.any()


@pytest.mark.promise("C22")
def test_two_processes_with_other_numbers_of_pixels_make_the_loss_of_one():
    output, mask = make_output()
    mask[1, :14] = 255
    train = TrainConfig(alignment_weight=0.5, ignore_mode="masked")
    whole = training_loss(output, mask, train)
    halves = [
        training_loss(
            SegmenterOutput(output.logits[i : i + 1], output.uncertainty, output.original[i : i + 1], None), one, train
        )
        for i, one in enumerate(mask.split(1))
    ]
    joined = tuple(LossSum(a.total + b.total, a.terms + b.terms) for a, b in zip(*halves, strict=True))
    torch.testing.assert_close(mean(joined), mean(whole))
    for one, other in zip(joined, whole, strict=True):
        assert one.terms == other.terms
