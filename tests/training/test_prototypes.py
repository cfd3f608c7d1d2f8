# SPDX-License-Identifier: Apache-2.0
"""How class prototypes are chosen: pixels, image means, centroids; and the label of a grid cell."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from drseg_core.config.load import load_config
from drseg_core.data import open_dataset
from drseg_core.models.build import build_model
from drseg_core.training.rank_channels import class_centroids, class_means, label_on_grid, rank_channels


def test_majority_needs_more_than_half_of_a_cell():
    mask = torch.tensor([[[0, 0, 1, 1], [0, 2, 1, 2], [2, 2, 255, 255], [1, 1, 255, 3]]], dtype=torch.uint8)
    assert label_on_grid(mask, (2, 2), "majority").tolist() == [[[0, 1], [255, 255]]]
    assert label_on_grid(mask, (4, 4), "majority").tolist() == mask.tolist()
    assert label_on_grid(mask, (4, 4)).tolist() == mask.tolist()


def test_class_means():
    row = torch.tensor([[3.0, 0.0], [0.0, 2.0], [5.0, 0.0], [1.0, 1.0]])
    means, label = class_means(row, torch.tensor([4, 4, 1, 255]))
    assert label.tolist() == [1, 4]
    torch.testing.assert_close(means, torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    assert class_means(row, torch.full((4,), 255))[0].shape == (0, 2)


def test_centroids_find_the_clusters_of_each_class():
    random = torch.Generator().manual_seed(0)
    truth = F.normalize(torch.eye(8)[:4] + 0.0, dim=1)
    noisy = F.normalize(truth.repeat(50, 1) + 0.05 * torch.randn(200, 8, generator=random), dim=1)
    label = torch.tensor([0, 0, 1, 1]).repeat(50)
    centroid, owner = class_centroids(noisy, label, 2)
    assert owner.tolist() == [0, 0, 1, 1]
    best = centroid @ truth.T
    assert (best.max(1).values > 0.99).all() and best.argmax(1).sort().values.tolist() == [0, 1, 2, 3]
    few, _ = class_centroids(noisy[:2], label[:2], 5)
    assert torch.equal(few, noisy[:2])


def test_every_way_ranks_the_channels():
    config = load_config("tiny")
    model = build_model(
        dataclasses.replace(config.model, fusion=dataclasses.replace(config.model.fusion, kind="cosine"), rotations=1)
    )
    dataset = open_dataset("synthetic:seed=0,scenes=4,vocabulary=seen")
    scores = {}
    for sampling in ("random", "image_mean", "kmeans"):
        for rule in ("nearest", "majority"):
            options = dataclasses.replace(
                config.model.spsd, sampling=sampling, label_to_grid=rule, prototypes_per_class=3
            )
            ranking = rank_channels(model, dataset, options, backbone="drseg-tiny", weights_hash="0")
            assert ranking.metadata["sampling"] == sampling and ranking.score.isfinite().all()
            scores[sampling, rule] = ranking.score
    assert not torch.equal(scores["random", "nearest"], scores["kmeans", "nearest"])
