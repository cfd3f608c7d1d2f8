# SPDX-License-Identifier: Apache-2.0
"""The nodes that a patch of neighbouring nodes has to do with, each named once.

Nodes that are close to each other share most of their neighbours: 64 of a square patch have a few hundred instead of
64 K. A program that computes a whole patch loads each of them once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from drseg_kernels._kept import once_per_graph
from drseg_kernels._patches import Patches


@dataclass(frozen=True)
class Union:
    """Of each patch of each sample, the other ends of the edges that leave its nodes (or that end in them).

    Args:
        member: (patches, nodes of a patch) int32: the nodes of each, -1 where there is none.
        begin: (B * patches,) int64: where in ``node`` a patch's list begins. count: (B * patches,) int64: its length.
        node: (B * N * K,) int32: the lists, ascending; undefined beyond their ends.
        place: (B * N * K,) int32: of each edge, the place of its other end in the list of its patch.
    """

    member: Tensor
    begin: Tensor
    count: Tensor
    node: Tensor
    place: Tensor


def patches_of(nodes: int, height: int, rows: int) -> Patches:
    """A cut of N nodes into patches of ``rows``, so many grid rows high.

    An op on a graph does not know the grid that its nodes lie in. As many as fill a square are taken for one, all
    others are cut into runs. Both are right whatever the grid is, only less compact where it is another.
    """
    side = math.isqrt(nodes)
    return Patches((side, side), height, rows // height) if side * side == nodes else Patches((1, nodes), 1, rows)


def _build(index: Tensor, patches: Patches, incoming: bool) -> Union:
    batch, nodes, slots = index.shape
    device, groups = index.device, batch * patches.count
    member = patches.order(device)
    # of each node, its patch; what lies beyond the grid goes to a place of its own
    spot = torch.where(member < 0, nodes, member).long().flatten()
    owner = torch.empty(nodes + 1, dtype=torch.int64, device=device)
    owner.scatter_(0, spot, torch.arange(patches.count, device=device).repeat_interleave(member.shape[1]))
    own = torch.arange(nodes, device=device)[None, :, None].expand(index.shape)
    other = index.clamp(0, nodes - 1).long()
    if incoming:
        own, other = other, own
    first = torch.arange(batch, device=device)[:, None, None] * patches.count
    key = ((owner[own] + first) * nodes + other).flatten()
    # half as wide, half as long to sort
    key, edge = torch.sort(key.int() if groups * nodes < 2**31 else key)
    new = torch.ones_like(key, dtype=torch.int64)
    new[1:] = key[1:] != key[:-1]
    # names up to and including each edge
    total = torch.cumsum(new, 0)
    group = key.long() // nodes
    begin = torch.searchsorted(group, torch.arange(groups + 1, device=device))
    before = torch.nn.functional.pad(total, (1, 0))[begin]
    place = total - 1 - before[group]
    node = torch.empty(key.shape, dtype=torch.int32, device=device)
    # one name writes one value, however many edges have it
    node.scatter_(0, begin[group] + place, (key % nodes).int())
    places = torch.empty_like(node).scatter_(0, edge, place.int())
    return Union(member, begin[:-1].contiguous(), (before[1:] - before[:-1]).contiguous(), node, places)


def union_lists(index: Tensor, height: int, rows: int, incoming: bool) -> Union:
    """Lists of a graph's patches, made once for as long as its index lives unchanged; no host synchronisation.

    Args:
        index: (B, N, K) int32 or int64, N and K at least 1; values outside [0, N) are clamped into it.
        height, rows: of a patch, grid rows and nodes, powers of two.
        incoming: list where the edges that end in a patch come from, instead of where those of its nodes lead.
    """
    patches = patches_of(index.shape[1], height, rows)
    return once_per_graph(index, ("union", height, rows, incoming), lambda: _build(index, patches, incoming))
