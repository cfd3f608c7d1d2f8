# SPDX-License-Identifier: Apache-2.0
"""The quick variants of the channel studies, against the slow ones written down."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional.classification import binary_auroc

from drseg_core.config.schema import EvaluationConfig
from drseg_core.data.synthetic import SyntheticDataset, SyntheticOptions
from drseg_core.models.segmenter import SegmenterOutput
from drseg_core.studies.maps import reliance, roc_area
from drseg_core.studies.zero_shot import SubsetScores, pixels_below, sampled


def test_pixels_below_counts_every_known_pixel_once():
    mask = torch.randint(0, 3, (37, 50), dtype=torch.uint8)
    mask[:5] = 255
    pixels = pixels_below(mask, (4, 6), 3)
    assert pixels.shape == (24, 3) and pixels.sum() == (mask != 255).sum()
    assert torch.equal(pixels.sum(0), torch.bincount(mask[mask != 255].long(), minlength=3).double())
    # a multiple of the grid: the token of a pixel is the cell it lies in
    mask = torch.randint(0, 3, (8, 12), dtype=torch.uint8)
    pixels = pixels_below(mask, (4, 6), 3)
    for token in range(24):
        y, x = divmod(token, 6)
        cell = mask[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].flatten().long()
        assert torch.equal(pixels[token], torch.bincount(cell, minlength=3).double())


def test_a_sample_is_always_the_same_and_not_the_first_ones():
    dataset = SyntheticDataset(SyntheticOptions(scenes=50, size=32))
    found = sampled(dataset, 10)
    assert found == sampled(dataset, 10) == sorted(set(found)) and len(found) == 10 and found != list(range(10))
    assert sampled(dataset, 60) == list(range(50))


def test_subsets_against_slicing_and_normalising_again():
    torch.manual_seed(0)
    channels, classes, grid = 12, 4, (5, 7)
    text = F.normalize(torch.randn(classes, channels), dim=1)
    subsets = torch.rand(6, channels) < 0.5
    subsets[:, 0] = True
    subsets[0] = True
    scores = SubsetScores(subsets, text)
    expected = torch.zeros(6, classes, classes, dtype=torch.float64)
    for _ in range(3):
        feature = torch.randn(channels, grid[0] * grid[1])
        mask = torch.randint(0, classes, grid, dtype=torch.uint8)
        scores.update(feature, pixels_below(mask, grid, classes))
        for place, subset in enumerate(subsets):
            cosine = F.normalize(text[:, subset], dim=1) @ F.normalize(feature[subset], dim=0)
            for guess, truth in zip(cosine.argmax(0), mask.flatten().long(), strict=True):
                expected[place, truth, guess] += 1
    assert torch.equal(scores.counts, expected)
    hit = expected.diagonal(dim1=1, dim2=2)
    iou = hit / (expected.sum(1) + expected.sum(2) - hit)
    assert scores.mean_iou() == pytest.approx((100 * iou.mean(1)).tolist())


def test_roc_area_against_torchmetrics():
    torch.manual_seed(0)
    mask = torch.randint(0, 3, (24, 24), dtype=torch.uint8)
    mask[0] = 255
    # few different values: ties count half
    value = (torch.randn(24, 24) + (mask == 1) * 0.7).mul(2).round()
    known = mask != 255
    expected = 100 * binary_auroc(value[known].sigmoid(), (mask[known] == 1).long())
    assert roc_area(value, mask, 1) == pytest.approx(float(expected), abs=1e-3)
    assert roc_area(torch.ones(24, 24), mask, 1) == 50
    assert roc_area((mask == 2).float(), mask, 2) == 100 and roc_area(-(mask == 2).float(), mask, 2) == 0


def test_roc_area_of_a_class_that_is_nowhere_or_everywhere():
    mask = torch.zeros(8, 8, dtype=torch.uint8)
    assert roc_area(torch.rand(4, 4), mask, 1) is None and roc_area(torch.rand(4, 4), mask, 0) is None


def test_reliance_is_on_the_map_that_is_used():
    """A model that looks at one map loses everything without it, and nothing without the other."""

    class Fusion(torch.nn.Module):
        def forward(self, original, refined):
            return refined

    class OneMap(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fusion = Fusion()

        def tokenize(self, names):
            return torch.zeros(len(names), 1, dtype=torch.long)

        def encode_text(self, tokens):
            return torch.zeros(len(tokens), 1)

        def forward(self, image, text):
            # the second class where the map says so, the first otherwise
            used = self.fusion(torch.ones(len(image), 1, 8, 8), torch.ones(len(image), 1, 8, 8))
            logits = torch.cat([0.5 - used, used - 0.5], dim=1)
            return SegmenterOutput(logits, torch.zeros(len(image), 1, 8, 8), logits, None)

    class AllSecond(SyntheticDataset):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return sample._replace(mask=torch.ones_like(sample.mask))

    data = AllSecond(SyntheticOptions(scenes=2, size=32))
    data.class_names = ("first", "second")
    found = reliance(OneMap(), data, EvaluationConfig(batch_size=1))
    assert found == {"mIoU": 100, "mIoU without refined": 0, "mIoU without original": 100}
