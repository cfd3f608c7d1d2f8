# SPDX-License-Identifier: Apache-2.0
"""The columns of a graph: which edges end in a node, in which order, and for how long the answer is kept."""

from __future__ import annotations

import gc

import pytest
import torch
from drseg_kernels import _csc
from drseg_kernels._csc import csc_of


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_every_edge_is_listed_once_in_ascending_order(dtype):
    index = torch.randint(-2, 9, (3, 7, 5), generator=torch.Generator().manual_seed(0)).to(dtype)
    lists = csc_of(index)
    end = (index.clamp(0, 6) + 7 * torch.arange(3)[:, None, None]).flatten().tolist()
    for node in range(21):
        edges = lists.perm[lists.indptr[node] : lists.indptr[node + 1]].tolist()
        assert edges == [edge for edge, to in enumerate(end) if to == node]
    assert lists.indptr[0] == 0 and lists.indptr[-1] == len(lists.perm) == len(end)
    assert lists.perm.dtype == torch.int32


def test_wild_indices_are_clamped_before_they_are_narrowed():
    index = torch.tensor([[[2**40, -(2**40)], [2**31, 1]]])
    assert csc_of(index).indptr.tolist() == [0, 1, 4]


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 3, 0), (2, 0, 4)])
def test_nothing_to_list(shape):
    lists = csc_of(torch.zeros(shape, dtype=torch.int32))
    assert len(lists.perm) == 0 and lists.indptr.tolist() == [0] * (shape[0] * shape[1] + 1)


def test_lists_are_kept_while_their_index_lives_unchanged():
    before = len(_csc.kept)
    index = torch.zeros(1, 3, 2, dtype=torch.int32)
    first = csc_of(index)
    assert csc_of(index) is first and len(_csc.kept) == before + 1
    assert csc_of(index.clone()) is not first
    index[0, 0, 0] = 2
    assert csc_of(index).indptr.tolist() == [0, 5, 5, 6]
    with torch.inference_mode():
        # changes to such a tensor are not counted
        fixed = torch.zeros(1, 3, 2, dtype=torch.int32)
        assert csc_of(fixed) is not csc_of(fixed)
    del index, fixed
    gc.collect()
    assert len(_csc.kept) == before
