# SPDX-License-Identifier: Apache-2.0
"""Scenes that overlap: which are neighbours, and one blend of their scores on which their maps agree."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drseg_core.data.dataset import IGNORE
from drseg_core.data.ground import PixelArea, projected
from drseg_core.errors import ResourceError
from drseg_core.evaluation.inference import Box
from drseg_core.scenes.block_store import BlockStore
from drseg_core.scenes.outputs import Part

_log = logging.getLogger(__name__)

_APART = 1e-3
"""Share of a pixel by which two grids may differ and still count as one."""
_POINTS = 17
"""Points of a scene, along each side, that are looked for in scenes of other CRSs."""
_HELD = 4
"""Blocks of neighbours that are held at a time."""


class Grid(NamedTuple):
    """Where the pixels of a scene lie."""

    crs: Any
    transform: Any
    height: int
    width: int


class Neighbour(NamedTuple):
    """A scene that overlaps another: the ``folder`` of its blocks, and where it lies in the other's pixels."""

    folder: str
    top: int
    left: int
    height: int
    width: int

    def meets(self, block: Box) -> bool:
        return (
            self.top < block.bottom
            and block.top < self.top + self.height
            and self.left < block.right
            and block.left < self.left + self.width
        )


def neighbours(grids: Sequence[Grid | None], folders: Sequence[Path]) -> list[tuple[Neighbour, ...]]:
    """The neighbours of each scene; a scene that cannot be opened is None, and has none.

    Scenes that overlap on different grids, in different CRSs or without one are left apart, with a warning.
    """
    names = [folder.name.removesuffix(".work") for folder in folders]
    found: list[list[Neighbour]] = [[] for _ in grids]
    unknown, halfway, shifted = (list[tuple[int, int]]() for _ in range(3))
    for (i, one), (j, other) in _near(grids):
        # from the pixels of the other to those of the one
        step = ~one.transform @ other.transform
        if not (_reaches(step, other, one) and _reaches(~step, one, other)):
            continue
        if one.crs is None or other.crs is None:
            (unknown if one.crs == other.crs else halfway).append((i, j))
            continue
        place = round(step.f), round(step.c)
        apart = max(abs(step.f - place[0]), abs(step.c - place[1]))
        # opposite corners alone do not tell a square from the same one stored transposed
        apart = max(apart, *(abs(v) * other.width for v in (step.a - 1, step.d)))
        apart = max(apart, *(abs(v) * other.height for v in (step.b, step.e - 1)))
        if apart > _APART:
            shifted.append((i, j))
            continue
        found[i].append(Neighbour(str(folders[j]), *place, other.height, other.width))
        found[j].append(Neighbour(str(folders[i]), -place[0], -place[1], one.height, one.width))
    warp = "gdalwarp -tap, or --gsd with a multiple of their pixels, makes one grid"
    _say_apart(names, shifted, "on different grids", warp)
    _say_apart(names, unknown, "and have no CRS", "gdal_edit -a_srs says it")
    _say_apart(names, halfway, "and only one of them has a CRS", "gdal_edit -a_srs says that of the other")
    _say_apart(names, _across(grids), "and have different CRSs", "gdalwarp -t_srs -tap makes one grid")
    return [tuple(some) for some in found]


def _say_apart(names: Sequence[str], pairs: Sequence[tuple[int, int]], why: str, cure: str) -> None:
    if pairs:
        more = f" (and {len(pairs) - 1} more pairs)" if len(pairs) > 1 else ""
        one, other = (names[number] for number in pairs[0])
        _log.warning("%s and %s%s overlap %s, so their maps are left apart; %s", one, other, more, why, cure)


def _across(grids: Sequence[Grid | None]) -> list[tuple[int, int]]:
    """Pairs of different CRSs that share ground.

    They do if points of one lie inside the other by more than a pixel, so what only touches does not.
    """
    placed = [
        (n, g) for n, g in enumerate(grids) if g is not None and g.crs is not None and not g.transform.is_identity
    ]
    system, systems = _systems([grid for _, grid in placed])
    if len(systems) < 2:
        return []
    share = np.linspace(0, 1, _POINTS)
    row, column = (side.ravel() for side in np.meshgrid(share, share, indexing="ij"))
    points = np.array([g.transform @ (column * g.width, row * g.height) for _, g in placed])
    # on a sphere of radius 1, which has no date line and no poles
    sphere = np.full((len(placed), 3, row.size), np.nan)
    for kind, crs in enumerate(systems):
        here = np.flatnonzero(system == kind)
        # a local system lies nowhere on Earth
        if PixelArea(crs, placed[here[0]][1].transform).known:
            east, north = np.radians(_brought(crs, "EPSG:4326", points[here]))
            sphere[here] = np.stack([np.cos(north) * np.cos(east), np.cos(north) * np.sin(east), np.sin(north)], 1)
    # the ground between two points is no farther from them than they are from each other
    square = sphere.reshape(-1, 3, _POINTS, _POINTS)
    steps = (np.linalg.norm(np.diff(square, axis=axis), axis=1) for axis in (2, 3))
    reach = np.fmax(*(np.fmax.reduce(step, axis=(1, 2)) for step in steps))[:, None]
    low, high = np.fmin.reduce(sphere, axis=2) - reach, np.fmax.reduce(sphere, axis=2) + reach
    near: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for one in range(len(placed)):
        meets = ((low <= high[one]) & (low[one] <= high)).all(1) & (system != system[one])
        for other in np.flatnonzero(meets).tolist():
            near.setdefault((system[one], system[other]), []).append((one, other))
    found = set()
    for (source, target), pairs in near.items():
        ones = sorted({one for one, _ in pairs})
        brought = dict(zip(ones, _brought(systems[source], systems[target], points[ones]).swapaxes(0, 1), strict=True))
        for one, other in pairs:
            grid = placed[other][1]
            x, y = ~grid.transform @ tuple(brought[one])
            if ((x > 1) & (x < grid.width - 1) & (y > 1) & (y < grid.height - 1)).any():
                found.add((placed[min(one, other)][0], placed[max(one, other)][0]))
    return sorted(found)


def _brought(crs: Any, target: Any, points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points (n, 2, m) in another system, as (2, n, m)."""
    found = projected(crs, target, points[:, 0].ravel().tolist(), points[:, 1].ravel().tolist())
    return np.stack(found).reshape(2, len(points), -1)


def _systems(grids: Sequence[Grid]) -> tuple[NDArray[np.int64], list[Any]]:
    """The number of each grid's CRS, and the CRSs: those that are spelled otherwise but equal are one."""
    systems: list[Any] = []
    for grid in grids:
        if grid.crs not in systems:
            systems.append(grid.crs)
    return np.array([systems.index(grid.crs) for grid in grids]), systems


def _near(grids: Sequence[Grid | None]) -> Iterator[tuple[tuple[int, Grid], tuple[int, Grid]]]:
    """Pairs of one CRS whose boxes meet: few of thousands of tiles, and only these are compared closely.

    A scene that lacks the name of its CRS is taken to be in that of each scene that has a place.
    """
    # a photograph has no place; what only lacks the name of its CRS may lie beside another
    known = [(number, grid) for number, grid in enumerate(grids) if grid is not None]
    placed = [(n, grid) for n, grid in known if grid.crs is not None or not grid.transform.is_identity]
    system, _ = _systems([grid for _, grid in placed])
    nameless = np.array([grid.crs is None for _, grid in placed], bool)
    sited = np.array([not grid.transform.is_identity for _, grid in placed], bool)
    corner = np.array([_corners(grid) for _, grid in placed]).reshape(-1, 4, 2)
    low, high = corner.min(1), corner.max(1)
    for row, scene in enumerate(placed):
        rest = slice(row + 1, None)
        same = (system[rest] == system[row]) | (nameless[rest] != nameless[row]) & sited[rest] & sited[row]
        meets = ((low[rest] <= high[row]) & (low[row] <= high[rest])).all(1) & same
        yield from ((scene, placed[row + 1 + other]) for other in np.flatnonzero(meets))


def _reaches(step: Any, grid: Grid, into: Grid) -> bool:
    """Whether the box of a grid, in the pixels of another, meets that one; if both reach so, none lies between them."""
    corner = np.array([step @ place for place in itertools.product((0, grid.width), (0, grid.height))])
    left, top = corner.min(0)
    right, bottom = corner.max(0)
    return bool(max(0.0, left) < min(into.width, right) and max(0.0, top) < min(into.height, bottom))


def _corners(grid: Grid) -> list[tuple[float, float]]:
    return [grid.transform @ corner for corner in itertools.product((0, grid.width), (0, grid.height))]


class _Layer(NamedTuple):
    """The values of one scene in a block."""

    weight: NDArray[np.float32]
    scores: NDArray[np.float32]
    uncertainty: NDArray[np.float32]


class Mosaic:
    """Blends the parts of a map with those of its neighbours.

    If two or more scenes are valid in a pixel, the scores of each class and the uncertainty are their mean. The weight
    of a scene is the distance to its edge in pixels. The sums have one order, so all maps have the same bits there.

    Args:
        folder: folder of the scene's own blocks.
        size: (H, W) of the scene.
        others: its neighbours.
        blocks: gives the places of the blocks of a scene by its size.
    """

    def __init__(
        self,
        folder: str,
        size: tuple[int, int],
        others: Sequence[Neighbour],
        blocks: Callable[[int, int], list[Box]],
    ) -> None:
        self._own = Neighbour(folder, 0, 0, *size)
        self._others, self._blocks = others, blocks
        self._load = functools.lru_cache(maxsize=_HELD)(_load)

    def blended(self, part: Part) -> tuple[NDArray[np.bool_], NDArray[np.float32], NDArray[np.float32]] | None:
        """The shared pixels of a part, with their scores (T, n, m) and uncertainty (n, m); None if none is shared."""
        block = Box(part.top, part.top + part.label.shape[0], part.left, part.left + part.label.shape[1])
        met = [other for other in self._others if other.meets(block)]
        if not met or part.class_scores is None:
            return None
        own = _Layer(
            np.where(part.label == IGNORE, 0, _weight(self._own, block)).astype(np.float32),
            part.class_scores,
            np.nan_to_num(part.uncertainty),
        )
        layers = {self._own.folder: own, **{other.folder: self._layer(other, block, own) for other in met}}
        shared = (own.weight > 0) & (sum((layer.weight > 0).astype(np.int32) for layer in layers.values()) > 1)
        if not shared.any():
            return None
        ordered = [layers[name] for name in sorted(layers)]
        total = functools.reduce(np.add, (layer.weight for layer in ordered)).clip(1)
        scores = functools.reduce(np.add, (layer.weight * layer.scores for layer in ordered)) / total
        uncertainty = functools.reduce(np.add, (layer.weight * layer.uncertainty for layer in ordered)) / total
        return shared, scores, uncertainty

    def _layer(self, other: Neighbour, block: Box, like: _Layer) -> _Layer:
        found = _Layer(*(np.zeros_like(value) for value in like))
        for number, place in self._met(other, block):
            part = self._load(other.folder, number)
            top, left = max(place.top, block.top), max(place.left, block.left)
            bottom, right = min(place.bottom, block.bottom), min(place.right, block.right)
            here = slice(top - block.top, bottom - block.top), slice(left - block.left, right - block.left)
            there = slice(top - place.top, bottom - place.top), slice(left - place.left, right - place.left)
            weight = _weight(other, Box(top, bottom, left, right))
            found.weight[here] = np.where(part.label[there] == IGNORE, 0, weight)
            found.scores[:, here[0], here[1]] = part.class_scores[:, there[0], there[1]]
            found.uncertainty[here] = np.nan_to_num(part.uncertainty[there])
        return found

    def _met(self, other: Neighbour, block: Box) -> Iterator[tuple[int, Box]]:
        """The blocks of a neighbour that meet one, by number, in this scene's pixels."""
        for number, box in enumerate(self._blocks(other.height, other.width)):
            place = Box(box.top + other.top, box.bottom + other.top, box.left + other.left, box.right + other.left)
            if Neighbour("", place.top, place.left, box.bottom - box.top, box.right - box.left).meets(block):
                yield number, place


def _load(folder: str, number: int) -> Any:
    arrays = BlockStore.at(folder).load(f"block-{number}")
    if arrays is None or "class_scores" not in arrays:
        raise ResourceError(f"predict: block {number} in {folder} is missing; expected it, as a neighbour needs it")
    return Part.of(arrays)


def _weight(scene: Neighbour, block: Box) -> NDArray[np.float32]:
    """Pixels from each pixel of a block to the nearest edge of a scene that holds it, from 1."""
    row = np.arange(block.top, block.bottom) - scene.top
    column = np.arange(block.left, block.right) - scene.left
    down = np.minimum(row, scene.height - 1 - row)
    across = np.minimum(column, scene.width - 1 - column)
    return (np.minimum(down[:, None], across) + 1).astype(np.float32)
