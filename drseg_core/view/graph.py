# SPDX-License-Identifier: Apache-2.0
"""The graphs behind a map, as a page keeps them: some nodes with their edges, as plain numbers."""

from __future__ import annotations

import base64
import zlib
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

EDGE_BYTES = 14
"""What an edge takes on a page, packed and as text: measured on graphs of DINO features, where it is 11 to 13."""

GRAPH_BYTES = 12_000_000
"""What the edges of all graphs take on a page at most."""

_ROWS = 256


class Part(NamedTuple):
    """A graph on a grid of cells, of which some nodes have their edges here.

    ``top`` and ``left`` are the first pixel, ``cell`` is the height and width of a cell in pixels, ``grid`` is (h, w).
    ``stride`` is the distance of kept nodes, down and across.

    For each of the n kept nodes ``neighbour`` (n, K) has the neighbours, ascending, and ``weight`` (n, K) the weights.
    ``forth`` (n, K) are the coefficients of Eq. 9 that bring the neighbour's features here. ``back`` (n, K) bring these
    to the neighbour (0 if this node is none of its neighbours). ``degree`` (N,) are the sums of all nodes' weights.
    ``real`` (n, K) is False in padded slots.
    """

    top: int
    left: int
    cell: tuple[float, float]
    grid: tuple[int, int]
    stride: int
    neighbour: NDArray[np.int32]
    weight: NDArray[np.float32]
    forth: NDArray[np.float32]
    back: NDArray[np.float32]
    degree: NDArray[np.float32]
    real: NDArray[np.bool_]


class Beneath(NamedTuple):
    """What lies beneath a map.

    ``parts`` are the graphs; if there are none, ``why_not`` says why. ``original`` and ``refined`` (T, h, w) float32
    are the correlations of Eq. 10 and 11 in cells of ``step`` pixels. They are NaN in unknown cells, or None if there
    are none. ``words`` say what the coefficients are, and ``note`` what a reader must know.
    """

    parts: list[Part]
    why_not: str
    step: int
    original: NDArray[np.float32] | None
    refined: NDArray[np.float32] | None
    words: str = ""
    note: str = ""


def make_part(
    index: Tensor,
    weight: Tensor,
    coefficient: Tensor,
    real: Tensor,
    grid: tuple[int, int],
    *,
    place: tuple[int, int],
    cell: tuple[float, float],
    stride: int,
) -> Part:
    """A part of a page from a graph.

    Args:
        index: (N, K) neighbours.
        weight: (N, K) of Eq. 8.
        coefficient: (N, K) of Eq. 9.
        real: (N, K) False in padded slots.
        grid: (h, w) with ``h * w = N``.
        place: top and left pixel.
        cell: height and width of a cell in pixels.
        stride: every so many rows and columns of nodes are kept.
    """
    index, weight, coefficient, real = (part.detach().cpu() for part in (index, weight, coefficient, real))
    node = torch.arange(grid[0] * grid[1]).view(grid)[::stride, ::stride].flatten()
    back = torch.cat([_back(index, coefficient, real, some) for some in node.split(_ROWS)])
    degree = torch.where(real, weight, 0).sum(-1).float()
    return Part(
        top=place[0],
        left=place[1],
        cell=cell,
        grid=grid,
        stride=stride,
        neighbour=index[node].numpy(),
        weight=weight[node].numpy(),
        forth=coefficient[node].numpy(),
        back=back.numpy(),
        degree=degree.numpy(),
        real=real[node].numpy(),
    )


def _back(index: Tensor, coefficient: Tensor, real: Tensor, node: Tensor) -> Tensor:
    """(n, K) coefficients of the edges from the neighbours of ``node`` to it; 0 where there is none."""
    neighbour = index[node].long()
    found = (index[neighbour] == node[:, None, None]) & real[neighbour]
    return torch.where(found, coefficient[neighbour], 0).sum(-1)


def stride_for(nodes: int, k: int, room: int) -> int:
    """Every how many rows and columns of nodes are kept, so that their edges take at most ``room`` bytes."""
    stride = 1
    while nodes // stride**2 * k * EDGE_BYTES > room:
        stride += 1
    return stride


def packed(parts: list[Part]) -> dict[str, Any]:
    """What the script of a page reads: the shapes of the parts, and their numbers in turn, deflated, as base64.

    Of every part these are ``neighbour`` as int32, -1 in padded slots, and ``weight``, ``forth``, ``back`` and
    ``degree`` as float32, all little-endian.
    """
    deflate = zlib.compressobj(6)
    pieces = []
    for part in parts:
        numbers = [np.where(part.real, part.neighbour, -1).astype("<i4")]
        numbers += [value.astype("<f4") for value in (part.weight, part.forth, part.back, part.degree)]
        pieces += [deflate.compress(value.tobytes()) for value in numbers]
    pieces.append(deflate.flush())
    shapes = [
        {
            "top": part.top,
            "left": part.left,
            "cell": part.cell,
            "grid": part.grid,
            "stride": part.stride,
            "k": part.neighbour.shape[1],
        }
        for part in parts
    ]
    return {"parts": shapes, "numbers": base64.b64encode(b"".join(pieces)).decode()}
