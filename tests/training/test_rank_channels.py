# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from drseg_core.config.schema import SPSDConfig
from drseg_core.data import Sample, SegmentationDataset
from drseg_core.errors import CheckpointError, DatasetError
from drseg_core.nn.spsd import rank_by_prototypes
from drseg_core.training.rank_channels import Reservoir, label_on_grid, rank_channels


class Blocks(SegmentationDataset):
    """Images whose red value says the class of the left and of the right half."""

    class_names = ("left", "right", "absent")

    def __init__(self, images: int = 6, size: int = 16) -> None:
        self.images, self.size = images, size

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> Sample:
        side = self.size + 4 * (index % 2)
        generator = torch.Generator().manual_seed(index)
        mask = torch.zeros(side, side, dtype=torch.uint8)
        mask[:, side // 2 :] = 1
        mask[0] = 255
        image = torch.randint(0, 50, (3, side, side), generator=generator, dtype=torch.uint8)
        image[0] += 100 * (mask == 1).to(torch.uint8)
        return Sample(image, mask, str(index))

    def fingerprint(self) -> str:
        return "f" * 64


class Pooled:
    """Features of 8 channels: much red, little red, and noise that does not know the class."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def dense_features(self, image: torch.Tensor) -> torch.Tensor:
        self.calls.append(tuple(image.shape))
        pooled = F.adaptive_avg_pool2d(image, 4)
        red, rest = pooled[:, :1], pooled[:, 1:]
        return torch.cat(((red - 0.3).relu(), (0.3 - red).relu(), rest, rest.flip(-1), rest.flip(-2)), dim=1)


def rank(**options):
    settings = SPSDConfig(prototypes_per_class=20)
    return rank_channels(Pooled(), Blocks(), settings, backbone="pooled", weights_hash="0" * 64, **options)


def test_channels_that_know_the_class_come_first():
    found = rank()
    assert set(found.score.topk(2).indices.tolist()) == {0, 1}
    assert set(found.semantic_index.tolist()) | set(found.structural_index.tolist()) == set(range(8))
    assert len(found.semantic_index) == 4
    assert found.metadata["prototypes"] == 40
    assert found.metadata["class_names"] == ["left", "right", "absent"]


def test_missing_classes_are_named(caplog):
    rank()
    assert "1 of 3 classes have no labelled pixel: absent" in caplog.text


def test_the_same_seed_gives_the_same_ranking_for_any_batch_size():
    one, two = rank(seed=3, batch_size=1), rank(seed=3, batch_size=4)
    assert torch.allclose(one.score, two.score) and one.metadata == two.metadata
    assert not torch.equal(one.entropy, rank(seed=4).entropy)


def test_every_image_is_seen_once_in_batches_of_one_size():
    model = Pooled()
    rank_channels(model, Blocks(5), SPSDConfig(), backbone="", weights_hash="", batch_size=3)
    assert sum(shape[0] for shape in model.calls) == 5
    assert {shape[2] for shape in model.calls} == {16, 20}


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([255, 255], "no mask of train has a labelled pixel; expected labelled pixels of at least 2 classes"),
        (
            [0, 255],
            "masks of train have one class; expected labelled pixels of at least 2 classes, or "
            "model.spsd.semantic_ratio 0, got those of left",
        ),
        (
            [0, 1],
            "masks of train have too few pixels for the grid of the features; expected labelled pixels of at least "
            "2 classes, or model.spsd.semantic_ratio 0, got those of left",
        ),
    ],
)
def test_too_few_classes_are_refused(ids, said):
    class Few(Blocks):
        split = "train"

        def __getitem__(self, index: int) -> Sample:
            sample = super().__getitem__(index)
            mask = torch.full_like(sample.mask, ids[0])
            # at no centre of a cell
            mask[0, 0] = ids[1]
            return sample._replace(mask=mask)

    with pytest.raises(DatasetError) as caught:
        rank_channels(Pooled(), Few(), SPSDConfig(), backbone="", weights_hash="")
    assert caught.value.exit_code == 3 and str(caught.value) == f"rank: {said}"


def test_the_ranking_is_that_of_the_sampled_prototypes():
    everything = SPSDConfig(prototypes_per_class=10_000)
    found = rank_channels(Pooled(), Blocks(), everything, backbone="", weights_hash="")
    feature, label = [], []
    for index in range(6):
        sample = Blocks()[index]
        one = Pooled().dense_features(sample.image[None] / 255.0)[0].flatten(1).T
        feature.append(F.normalize(one, dim=1))
        label.append(label_on_grid(sample.mask[None], (4, 4)).flatten())
    prototype, ids = torch.cat(feature), torch.cat(label)
    expected = rank_by_prototypes(prototype[ids != 255], ids[ids != 255], 3, options=everything)
    torch.testing.assert_close(found.score, expected.score)
    torch.testing.assert_close(found.entropy, expected.entropy)


def test_the_reservoir_is_a_fair_sample_of_bounded_size():
    chosen: Counter[int] = Counter()
    value = torch.arange(12, dtype=torch.float32)
    row = torch.stack((value + 1, torch.full((12,), 5.0)), dim=1)
    for seed in range(600):
        reservoir = Reservoir(2, 3, seed)
        for start in (0, 5, 6):
            part = slice(start, {0: 5, 5: 6, 6: 12}[start])
            reservoir.add(row[part], torch.ones(12, dtype=torch.long)[part])
        kept, label = reservoir.content()
        assert kept.shape == (3, 2) and label.tolist() == [1, 1, 1]
        torch.testing.assert_close(kept.norm(dim=1), torch.ones(3))
        chosen.update(int(round(float(r[0] / r[1] * 5) - 1)) for r in kept)
    # 150 expected of each, with a deviation of 10.6
    assert len(chosen) == 12 and all(100 < count < 200 for count in chosen.values())


def test_masks_come_to_the_grid_by_the_centre_of_each_cell():
    mask = torch.arange(36).view(1, 6, 6)
    assert label_on_grid(mask, (2, 2)).tolist() == [[[7, 10], [25, 28]]]
    assert label_on_grid(mask, (6, 6)).equal(mask)


class TestNorm:
    """CLIP's own norm, and the weight of a LayerNorm that gives it."""

    def test_energy_is_the_mean_square_of_every_place(self):
        found, blocks, pooled = rank(), Blocks(), Pooled()
        feature = torch.cat([pooled.dense_features(blocks[i].image[None] / 255.0) for i in range(6)]).double()
        torch.testing.assert_close(found.energy, feature.square().mean(dim=(0, 2, 3)), rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(rank(batch_size=2).energy, found.energy)

    def test_a_layer_norm_of_that_weight_has_that_norm(self):
        found = rank()
        structural = len(found.structural_index)
        weight = torch.full((structural,), found.norm_scale)
        output = F.layer_norm(torch.randn(10, structural), (structural,), weight, eps=0.0)
        torch.testing.assert_close(output.norm(dim=1), torch.full((10,), found.structural_norm))

    def test_shares(self):
        found = rank()
        whole, own = found.energy.sum(), found.energy[found.structural_index].sum()
        assert found.structural_share() == pytest.approx(float(own / whole))
        assert found.structural_share(2.0) == pytest.approx(float(4 / (whole - own + 4)))
        # of another share of the channels, from the same measure
        other = found.split_again(0.25)
        expected = float(found.energy[other.structural_index].sum().sqrt())
        assert other.structural_norm == pytest.approx(expected)

    def test_a_ranking_without_norms_says_so(self):
        with pytest.raises(CheckpointError, match="the ranking has no norms; expected one made by this version"):
            _ = dataclasses.replace(rank(), energy=None).norm_scale
