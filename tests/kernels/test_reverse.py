# SPDX-License-Identifier: Apache-2.0
"""Reversed lists: which edges end in a node, in which order, and for how long the answer is kept."""

from __future__ import annotations

import gc

import pytest
import torch
from drseg_kernels import _kept
from drseg_kernels._reverse import reverse_lists


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_every_edge_is_listed_once_in_ascending_order(dtype):
    index = torch.randint(-2, 9, (3, 7, 5), generator=torch.Generator().manual_seed(0)).to(dtype)
    lists = reverse_lists(index)
    end = (index.clamp(0, 6) + 7 * torch.arange(3)[:, None, None]).flatten().tolist()
    for node in range(21):
        edges = lists.edge[lists.begin[node] : lists.begin[node + 1]].tolist()
        assert edges == [edge for edge, to in enumerate(end) if to == node]
    assert lists.begin[0] == 0 and lists.begin[-1] == len(lists.edge) == len(end)
    assert lists.edge.dtype == torch.int32


def test_wild_indices_are_clamped_before_they_are_narrowed():
    index = torch.tensor([[[2**40, -(2**40)], [2**31, 1]]])
    assert reverse_lists(index).begin.tolist() == [0, 1, 4]


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 3, 0), (2, 0, 4)])
def test_nothing_to_list(shape):
    lists = reverse_lists(torch.zeros(shape, dtype=torch.int32))
    assert len(lists.edge) == 0 and lists.begin.tolist() == [0] * (shape[0] * shape[1] + 1)


def test_lists_are_kept_while_their_index_lives_unchanged():
    before = len(_kept.kept)
    index = torch.zeros(1, 3, 2, dtype=torch.int32)
    first = reverse_lists(index)
    assert reverse_lists(index) is first and len(_kept.kept) == before + 1
    assert reverse_lists(index.clone()) is not first
    index[0, 0, 0] = 2
    assert reverse_lists(index).begin.tolist() == [0, 5, 5, 6]
    with torch.inference_mode():
        # changes to such a tensor are not counted
        fixed = torch.zeros(1, 3, 2, dtype=torch.int32)
        assert reverse_lists(fixed) is not reverse_lists(fixed)
    del index, fixed
    gc.collect()
    assert len(_kept.kept) == before
