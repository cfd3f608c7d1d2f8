# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from drseg_core.models.correlation import correlation, cosine, rotate, rotate_back


def pooled(image: Tensor, cell: int = 4) -> Tensor:
    """An encoder that sees each cell alone, so turning the image turns its features."""
    return torch.cat([F.avg_pool2d(image, cell), F.max_pool2d(image, cell)], dim=1)


def test_rotations_come_back_aligned() -> None:
    image = torch.rand(2, 3, 24, 24)
    text = F.normalize(torch.randn(5, 6), dim=1)
    maps = correlation(pooled(rotate(image, 4)), text, 4)
    assert maps.shape == (2, 4, 5, 6, 6)
    for turn in range(1, 4):
        torch.testing.assert_close(maps[:, turn], maps[:, 0])


def test_rotation_is_quarter_turns_with_the_unturned_batch_first() -> None:
    image = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    turned = rotate(image, 4)
    assert torch.equal(turned[:2], image)
    assert torch.equal(turned[2:4], torch.rot90(image, 1, (2, 3)))
    back = rotate_back(turned, 4)
    for turn in range(4):
        assert torch.equal(back[:, turn], image)


def test_turning_maps_back_equals_turning_features_back() -> None:
    features = torch.randn(8, 6, 5, 5)
    text = torch.randn(3, 6)
    expected = torch.stack(
        [cosine(torch.rot90(part, -turn, (2, 3)), text) for turn, part in enumerate(features.chunk(4))], dim=1
    )
    torch.testing.assert_close(correlation(features, text, 4), expected)


def test_cosine_is_raw_and_bounded() -> None:
    features, text = torch.randn(2, 7, 3, 4) * 50, torch.randn(4, 7) * 0.1
    expected = F.cosine_similarity(features[:, None], text[None, :, :, None, None], dim=2)
    torch.testing.assert_close(cosine(features, text), expected)
    assert cosine(features, text).abs().max() <= 1 + 1e-6
    assert torch.isfinite(cosine(torch.zeros(1, 7, 1, 1), text)).all()


@pytest.mark.promise("C4")
def test_cosine_stays_in_float32_under_autocast() -> None:
    features, text = torch.randn(1, 64, 4, 4), torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        low = cosine(features.bfloat16(), text)
        assert low.dtype == torch.float32
        torch.testing.assert_close(cosine(features, text), cosine(features.double(), text.double()).float())


def test_one_orientation() -> None:
    features, text = torch.randn(2, 6, 4, 3), torch.randn(5, 6)
    assert rotate(features, 1) is features
    torch.testing.assert_close(correlation(features, text, 1)[:, 0], cosine(features, text))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="expected 1 or 4, got 2"):
        rotate(torch.rand(1, 3, 4, 4), 2)
    with pytest.raises(ValueError, match="not square"):
        rotate(torch.rand(1, 3, 4, 5), 4)
    with pytest.raises(ValueError, match="text has a wrong width"):
        cosine(torch.rand(1, 6, 4, 4), torch.rand(2, 5))
