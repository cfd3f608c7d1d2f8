# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from drseg_core.studies.graph import NEIGHBOURS, PurityCounts, _best_first, _graphs


def test_purity_by_hand():
    label = torch.tensor([0, 0, 1, 255, 0])
    # of node 0: 0, 1; of 1: 0, 255; of 2: 0, 0; of 4: 0, 0
    graph = torch.tensor([[1, 2], [0, 3], [0, 1], [0, 1], [0, 1]])
    counts = PurityCounts(3)
    counts.add(graph, label)
    share = counts.shares()[str(NEIGHBOURS[0])]
    # class 0: mean of 1/2, 1/2 and 1; class 1: 0; class 2 has no node
    assert abs(share - 100 * (2 / 3 + 0) / 2) < 1e-9
    everything = PurityCounts(3)
    everything.add(None, label)
    assert abs(everything.shares()["4"] - 100 * (2 / 4 + 0) / 2) < 1e-9


def test_smaller_k_are_the_best_of_larger_ones():
    torch.manual_seed(0)
    features = torch.randn(1, 8, 6, 7)
    best = _best_first(features, (6, 7), 0.5)
    nodes = torch.nn.functional.normalize(features.flatten(2)[0].T, dim=1)
    y, x = torch.arange(42) // 7, torch.arange(42) % 7
    distance = torch.hypot((y[:, None] - y).float(), (x[:, None] - x).float())
    score = (nodes @ nodes.T - 0.5 * distance / distance.max()).fill_diagonal_(-torch.inf)
    assert torch.equal(best[:, :4], score.topk(4).indices) and best.shape == (42, 41)


def test_distance_alone_takes_what_is_near():
    label = torch.arange(25).view(5, 5) % 2
    graphs = _graphs(torch.randn(1, 8, 5, 5), torch.randn(1, 4, 5, 5), label)
    near = graphs["distance alone"]
    assert sorted(near[12, :4].tolist()) == [7, 11, 13, 17] and graphs["any node"] is None
    truth = graphs["the labels themselves"]
    assert torch.equal(label.flatten()[truth[:, :11]], label.flatten()[:, None].expand(25, 11))


def test_features_that_are_the_labels_connect_nothing_else():
    label = torch.arange(64) // 8 % 2
    features = torch.nn.functional.one_hot(label).float().T.reshape(1, 2, 8, 8)
    counts = PurityCounts(2)
    counts.add(_best_first(features, (8, 8), 0.5), label)
    assert counts.shares()["16"] == 100
