# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from drseg_core.training.loss import segmentation_loss


def example(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 5, 6, 7, generator=generator, dtype=torch.float64) * 4
    mask = torch.randint(0, 5, (2, 12, 15), generator=generator)
    mask[0, :4] = 255
    return logits, mask


def by_one_hot(logits: torch.Tensor, mask: torch.Tensor, ignore_mode: str) -> torch.Tensor:
    logits = F.interpolate(logits, mask.shape[-2:], mode="bilinear", align_corners=False)
    target = F.one_hot(mask.clamp(max=5), 6)[..., :5].movedim(-1, 1).to(logits.dtype)
    target = target * (mask != 255)[:, None]
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    if ignore_mode == "zeros":
        return loss.mean()
    return loss.movedim(1, -1)[mask != 255].mean()


@pytest.mark.parametrize("ignore_mode", ["zeros", "masked"])
def test_equals_cross_entropy_with_a_one_hot_target(ignore_mode):
    logits, mask = example()
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = segmentation_loss(ours, mask, ignore_mode=ignore_mode).mean()
    expected = by_one_hot(theirs, mask, ignore_mode)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-14)


def test_the_two_ignore_modes_differ():
    logits, mask = example()
    zeros, masked = (segmentation_loss(logits, mask, ignore_mode=mode).mean() for mode in ("zeros", "masked"))
    assert not torch.isclose(zeros, masked)


@pytest.mark.parametrize("ignore_mode", ["zeros", "masked"])
def test_a_batch_without_labels_is_zero_with_zero_gradients(ignore_mode):
    logits, mask = example()
    logits = logits.requires_grad_()
    loss = segmentation_loss(logits, torch.full_like(mask, 255), ignore_mode=ignore_mode).mean()
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("ignore_mode", ["zeros", "masked"])
def test_an_image_without_labels_has_no_part_in_the_loss(ignore_mode):
    logits, mask = example()
    mask[0] = 255
    assert len(mask) > 1 and (mask[1:] != 255).any()
    both = segmentation_loss(logits, mask, ignore_mode=ignore_mode).mean()
    torch.testing.assert_close(both, segmentation_loss(logits[1:], mask[1:], ignore_mode=ignore_mode).mean())


def test_an_image_without_labels_is_negative_where_asked():
    logits, mask = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.full((2, 4, 4), 255)
    mask[1, 0, 0] = 2
    for kept in (slice(None), slice(0, 1)):
        target = F.one_hot(mask[kept].masked_fill(mask[kept] == 255, 3), 4)[..., :3].permute(0, 3, 1, 2).double()
        expected = F.binary_cross_entropy_with_logits(logits[kept], target)
        found = segmentation_loss(logits[kept], mask[kept], unlabelled="negative")
        torch.testing.assert_close(found.mean(), expected)
    masked = segmentation_loss(logits, mask, ignore_mode="masked", unlabelled="negative")
    assert torch.equal(masked.mean(), segmentation_loss(logits, mask, ignore_mode="masked").mean())


def test_ignored_pixels_are_negative_for_every_class_in_the_protocol():
    logits = torch.full((1, 3, 4, 4), -30.0)
    mask = torch.full((1, 4, 4), 255)
    # one labelled pixel, which is right, among fifteen that are ignored
    mask[0, 0, 0], logits[0, 1, 0, 0] = 1, 30.0
    assert segmentation_loss(logits, mask).mean() < 1e-9
    logits[:, :, 1:] = 30.0
    assert segmentation_loss(logits, mask).mean() == pytest.approx(30 * 12 / 16)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_integer_masks_of_any_width(dtype):
    logits, mask = example()
    expected = segmentation_loss(logits, mask)
    found = segmentation_loss(logits, mask.to(dtype))
    assert torch.equal(found.total, expected.total)


@pytest.mark.promise("C4")
def test_half_precision_is_summed_in_float32():
    logits, mask = example()
    loss = segmentation_loss(logits.bfloat16(), mask)
    assert loss.total.dtype == torch.float32
    torch.testing.assert_close(loss.mean().double(), segmentation_loss(logits, mask).mean(), rtol=2e-2, atol=0)


@pytest.mark.parametrize(
    ("logits", "mask", "options", "error", "message"),
    [
        (torch.zeros(1, 2, 3), torch.zeros(1, 3, 3, dtype=torch.long), {}, ValueError, "mask does not fit"),
        (torch.zeros(2, 2, 3, 3), torch.zeros(1, 3, 3, dtype=torch.long), {}, ValueError, "mask does not fit"),
        (torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3), {}, TypeError, "expected an integer dtype"),
        (
            torch.zeros(1, 2, 3, 3),
            torch.zeros(1, 3, 3, dtype=torch.long),
            {"ignore_mode": "skip"},
            ValueError,
            "'zeros' or 'masked', got 'skip'",
        ),
        (
            torch.zeros(1, 2, 3, 3),
            torch.zeros(1, 3, 3, dtype=torch.long),
            {"unlabelled": "skip"},
            ValueError,
            "'left_out' or 'negative', got 'skip'",
        ),
    ],
)
def test_wrong_arguments_are_named(logits, mask, options, error, message):
    with pytest.raises(error, match=message):
        segmentation_loss(logits, mask, **options)
