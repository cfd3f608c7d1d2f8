# SPDX-License-Identifier: Apache-2.0
"""The neighbours of a scene's cells in parts, the rows of one graph, that several processes can choose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drseg_core.nn.label_propagation import choose_neighbours
from drseg_core.ops import prepare_prior
from drseg_core.scenes.block_store import BlockStore

__all__ = ["choose_parts", "row_parts"]

PART_NODES = 4096
"""Nodes of a part, rounded to whole bands of cells. Each part reads the prior of all nodes, which takes 30 ms where the
choice takes 400 (a quarter of 16000 nodes, 768 channels, one core of an AMD EPYC, November 2026)."""

_BAND = 8
"""Rows of cells that the native kernel searches together."""


class Neighbours(NamedTuple):
    """Of the nodes from ``first`` on: ``neighbour`` (n, K) int32 and the ``score`` (n, K) by which each was chosen."""

    first: int
    neighbour: Tensor
    score: Tensor


def row_parts(grid: tuple[int, int]) -> list[tuple[int, int]]:
    """First node and end of each part: whole bands of cells, as alike as they can be. Only the grid decides.

    Examples:
        >>> from drseg_core.scenes.graph_rows import row_parts
        >>> row_parts((60, 100)), row_parts((40, 100))
        ([(0, 3200), (3200, 6000)], [(0, 4000)])
    """
    h, w = grid
    count = max(-(-h * w // PART_NODES), 1)
    height = -(-h // (count * _BAND)) * _BAND
    return [(top * w, min(top + height, h) * w) for top in range(0, h, height)]


def choose_parts(
    prior: Tensor,
    grid: tuple[int, int],
    options: dict[str, Any],
    numbers: Sequence[int],
    *,
    store: BlockStore | None = None,
    chosen: Callable[[int], object] = lambda nodes: None,
) -> Iterator[Neighbours]:
    """Parts of :func:`row_parts` by number: kept ones, and new ones, which are kept if there is a store.

    Args:
        prior: (N, D).
        grid: (h, w) with ``h * w = N``.
        options: of ``choose_neighbours``.
        numbers: of the parts.
        store: of this graph.
        chosen: called with the number of nodes after each part.

    Examples:
        >>> import torch
        >>> from drseg_core.scenes.graph_rows import choose_parts, join_parts
        >>> prior = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> parts = choose_parts(prior, (2, 2), {"k": 1}, range(1))
        >>> join_parts(parts, 4, prior.device)[0].flatten().tolist()
        [1, 0, 3, 2]
    """
    parts = row_parts(grid)
    prepared = None
    for number in numbers:
        first, end = parts[number]
        kept = None if store is None else store.load(_name(number))
        if kept is not None:
            neighbour, score = (torch.from_numpy(kept[name]) for name in ("neighbour", "score"))
        else:
            prepared = prepare_prior(prior) if prepared is None else prepared
            rows = None if len(parts) == 1 else (first, end)
            neighbour, score = choose_neighbours(prepared, grid, **options, rows=rows)
            if store is not None:
                store.save(_name(number), {"neighbour": neighbour.cpu().numpy(), "score": score.cpu().numpy()})
        chosen(end - first)
        yield Neighbours(first, neighbour, score)


def missing_parts(store: BlockStore, numbers: Sequence[int]) -> list[int]:
    """Those parts that are not kept."""
    return [number for number in numbers if store.load(_name(number)) is None]


def join_parts(parts: Iterator[Neighbours], nodes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Neighbours and scores (N, K) of all nodes. One part at a time is in memory besides."""
    neighbour = score = torch.empty(0)
    for part in parts:
        end = part.first + len(part.neighbour)
        if len(part.neighbour) == nodes:
            return part.neighbour.to(device), part.score.to(device)
        if part.first == 0:
            neighbour, score = (
                value.new_empty(nodes, value.shape[1], device=device) for value in (part.neighbour, part.score)
            )
        neighbour[part.first : end] = part.neighbour
        score[part.first : end] = part.score
    return neighbour, score


def _name(number: int) -> str:
    return f"rows-{number}"
