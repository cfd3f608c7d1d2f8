# SPDX-License-Identifier: Apache-2.0
"""Union lists: every patch names every node that it has to do with, once, and every edge finds its place."""

from __future__ import annotations

import pytest
import torch
from drseg_kernels._patches import Patches
from drseg_kernels._union import patches_of, union_lists


@pytest.mark.parametrize("incoming", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("nodes,height,rows", [(36, 4, 16), (64, 8, 64), (35, 4, 16), (1, 2, 16), (49, 1, 32)])
def test_every_patch_lists_the_other_ends_of_its_edges_once(nodes, height, rows, dtype, incoming):
    index = torch.randint(-1, nodes + 1, (2, nodes, 5), generator=torch.Generator().manual_seed(0)).to(dtype)
    lists = union_lists(index, height, rows, incoming)
    patches = lists.member.shape[0]
    members = [[node for node in patch if node >= 0] for patch in lists.member.tolist()]
    assert sorted(sum(members, [])) == list(range(nodes)) and lists.member.shape[1] == rows
    end, place = index.clamp(0, nodes - 1), lists.place.view(index.shape)
    for sample in range(2):
        for patch, own in enumerate(members):
            group = sample * patches + patch
            begin, count = int(lists.begin[group]), int(lists.count[group])
            listed = lists.node[begin : begin + count].tolist()
            inside = torch.isin(end[sample], torch.tensor(own))
            start = torch.arange(nodes)[:, None].expand(nodes, 5)
            edges = inside if incoming else torch.isin(start, torch.tensor(own))
            other = (start if incoming else end[sample])[edges]
            assert listed == sorted(set(other.tolist()))
            assert torch.equal(torch.tensor(listed)[place[sample][edges].long()], other)
    assert {lists.member.dtype, lists.node.dtype, lists.place.dtype} == {torch.int32}
    assert {lists.begin.dtype, lists.count.dtype} == {torch.int64}


def test_more_nodes_than_32_bits_count_by_patches():
    nodes = 300_000
    index = torch.randint(0, nodes, (1, nodes, 2), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    lists = union_lists(index, 1, 16, False)
    assert lists.member.shape[0] * nodes > 2**31
    for patch in (0, 9_999, lists.member.shape[0] - 1):
        begin, count = int(lists.begin[patch]), int(lists.count[patch])
        other = index[0, 16 * patch : 16 * (patch + 1)]
        assert lists.node[begin : begin + count].tolist() == sorted(set(other.flatten().tolist()))


@pytest.mark.parametrize("nodes,height,rows", [(16, 16, 16), (49, 32, 32), (64, 1, 16), (5, 16, 16)])
def test_kernels_can_read_the_lists_as_they_lie(nodes, height, rows):
    lists = union_lists(torch.zeros(1, nodes, 2, dtype=torch.int32), height, rows, False)
    values = (lists.member, lists.begin, lists.count, lists.node, lists.place)
    assert all(value.is_contiguous() for value in values)


def test_a_square_is_cut_into_patches_and_the_rest_into_runs():
    assert patches_of(64, 4, 16) == Patches((8, 8), 4, 4)
    assert patches_of(65, 4, 16) == Patches((1, 65), 1, 16)
    assert patches_of(64, 1, 16) == Patches((8, 8), 1, 16)


def test_wild_indices_are_clamped_before_they_are_narrowed():
    lists = union_lists(torch.tensor([[[2**40, -(2**40)], [2**31, 1]]]), 1, 16, False)
    assert lists.node[:2].tolist() == [0, 1] and lists.count.tolist() == [2]
    assert lists.place.tolist() == [1, 0, 1, 1]


def test_lists_are_kept_apart_by_what_they_are():
    index = torch.zeros(1, 4, 2, dtype=torch.int32)
    one = union_lists(index, 2, 16, False)
    assert union_lists(index, 2, 16, False) is one
    others = [union_lists(index, *sizes) for sizes in ((2, 32, False), (1, 16, False), (2, 16, True))]
    assert all(other is not one for other in others)
    index[0, 0, 0] = 3
    assert union_lists(index, 2, 16, False).count.tolist() == [2]
