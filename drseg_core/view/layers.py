# SPDX-License-Identifier: Apache-2.0
"""What lies on top of each other on a page: the scene, its map, and what is known of every pixel or cell."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drseg_core.data.dataset import IGNORE
from drseg_core.data.ground import PixelArea
from drseg_core.data.raster import open_raster
from drseg_core.errors import ConfigError, RasterError
from drseg_core.scenes.areas import ClassAreas
from drseg_core.scenes.reader import SceneReader
from drseg_core.scenes.tags import names_in, words_in
from drseg_core.scenes.writer import LEVELS
from drseg_core.view.pyramid import CELLS, CLASSES, PICTURE, VALUES, Level, Read, pyramid


class Layer(NamedTuple):
    """One thing to see.

    ``key`` names it on the page, and ``title`` names it for people. ``kind`` is ``picture`` (colours), ``classes``
    (numbers of classes) or ``values`` (0 to 250 are ``low`` to ``high``). ``scales`` has the tiles of one raster, or
    ``by_class`` of one for each class, of which the page shows the chosen one; a class of a threshold may have none.
    ``step`` is the side of its pixels in scene pixels.
    """

    key: str
    title: str
    kind: str
    scales: list[list[Level]]
    low: float = 0.0
    high: float = 1.0
    step: int = 1
    by_class: bool = False

    @property
    def size(self) -> int:
        return sum(level.size for levels in self.scales for level in levels)

    @property
    def finest(self) -> int:
        """Pixels of the scene along the smallest pixel that is here."""
        return self.scales[0][0].scale

    @property
    def can_be_coarser(self) -> bool:
        return len(self.scales[0]) > 1

    def coarser(self) -> Layer:
        """Without the finest scale."""
        return self._replace(scales=[levels[1:] for levels in self.scales])


class MapReader(NamedTuple):
    """An open class raster with its ``names`` and (T, 3) ``colors``.

    ``words`` are all words of each class that the model was asked for, in id order. A class that only a threshold made
    comes after them. ``threshold`` is the score below which pixels are of the class "other". Maps of earlier versions
    name neither: None.
    """

    path: Path
    source: Any
    names: tuple[str, ...]
    colors: NDArray[np.uint8]
    words: tuple[tuple[str, ...], ...] | None
    threshold: float | None

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.source.height), int(self.source.width)

    def beside(self, word: str) -> Path:
        """The raster of the same map that is called so, such as ``map_scores.tif``."""
        return self.path.with_name(f"{self.path.stem}_{word}.tif")


@contextlib.contextmanager
def open_map(path: Path) -> Iterator[MapReader]:
    """Open what ``drseg predict`` wrote.

    Raises:
        RasterError: no such file, or no class raster with names.
    """
    with open_raster(path, origin="view") as source:
        tags = source.tags()
        names = names_in(tags)
        try:
            table = source.colormap(1)
            colors = np.array([table[i][:3] for i in range(len(names))], np.uint8)
        except (ValueError, KeyError):
            names = ()
        if not names or source.count != 1 or source.dtypes[0] != "uint8":
            raise RasterError(f"view: {path} is no map; expected a class raster with names as drseg predict writes it")
        yield MapReader(path, source, names, colors, words_in(tags, len(names)), _threshold(tags))


def _threshold(tags: dict[str, str]) -> float | None:
    try:
        value = float(tags["threshold"])
    except (ValueError, KeyError):
        return None
    return value if 0 <= value <= 1 else None


def class_layer(found: MapReader) -> tuple[Layer, ClassAreas]:
    """The classes, and the area of each."""
    areas = ClassAreas(len(found.names), PixelArea(found.source.crs, found.source.transform))

    def read(top: int, bottom: int, left: int, right: int) -> NDArray[np.uint8]:
        label = _read(found.path, found.source, 1, (top, bottom, left, right))
        if not ((label < len(found.names)) | (label == IGNORE)).all():
            raise RasterError(f"view: {found.path} has classes without a name; expected below {len(found.names)}")
        areas.add(top, left, label)
        return label[..., None]

    return Layer("classes", "Classes", "classes", [pyramid(read, *found.shape, CLASSES)]), areas


def value_layers(found: MapReader) -> list[Layer]:
    """Uncertainty, scores and probabilities, as far as they lie beside the map."""
    titles = {"uncertainty": "Uncertainty", "scores": "Score", "probabilities": "Score of the chosen class"}
    layers = []
    for word, title in titles.items():
        path = found.beside(word)
        if not path.is_file():
            continue
        with open_raster(path, origin="view") as source:
            if (int(source.height), int(source.width)) != found.shape:
                raise RasterError(
                    f"view: {path} does not fit the map; expected {found.shape[1]} x {found.shape[0]} pixels, "
                    f"got {source.width} x {source.height}"
                )
            wanted = ("uint8",) * (len(found.names) if word == "probabilities" else 1)
            if tuple(source.dtypes) != wanted:
                raise RasterError(
                    f"view: {path} is not what drseg predict writes beside a map; expected {_bands(wanted)}, "
                    f"got {_bands(source.dtypes)}"
                )
            low, step = float(source.offsets[0]), float(source.scales[0])
            # earlier versions gave a constant the step 1, but none of these is above 1
            high = low + LEVELS * step if step < 1 else 1.0
            scales = [pyramid(_values(path, source, band), *found.shape, VALUES) for band in range(1, source.count + 1)]
        layers.append(Layer(word, title, "values", scales, low, high, by_class=word == "probabilities"))
    return layers


def _bands(dtypes: Sequence[str]) -> str:
    return f"{len(dtypes)} band{'s' * (len(dtypes) > 1)} of {' and '.join(dict.fromkeys(dtypes))}"


def _values(path: Path, source: Any, band: int) -> Read:
    def read(*window: int) -> NDArray[np.uint8]:
        value = _read(path, source, band, window)
        return np.stack([value, np.where(value == IGNORE, 0, 255).astype(np.uint8)], axis=2)

    return read


def _read(path: Path, source: Any, band: int, window: tuple[int, ...]) -> NDArray[np.uint8]:
    import rasterio
    from rasterio.windows import Window

    top, bottom, left, right = window
    try:
        return source.read(band, window=Window(left, top, right - left, bottom - top))
    except rasterio.errors.RasterioError as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise RasterError(f"view: {path} is damaged or incomplete; expected to read all of it: {reason}") from None


def picture_layer(scene: SceneReader, found: MapReader) -> Layer:
    """The scene, which is on the grid of the map."""

    def read(*window: int) -> NDArray[np.uint8]:
        image, valid = scene.window(*window)
        known = np.where(valid, 255, 0).astype(np.uint8)
        return np.concatenate([image.numpy().transpose(1, 2, 0), known[..., None]], axis=2)

    return Layer("image", "Image", "picture", [pyramid(read, *found.shape, PICTURE)])


def on_grid_of(scene: SceneReader, found: MapReader) -> None:
    """Read a scene as it was read for its map: with the map's pixel size, and the part that the map covers.

    Raises:
        ConfigError: the map is not of this scene.
    """
    elsewhere = ConfigError(
        f"view: --image is not what the map was made of; expected the scene of {found.path} "
        f"({found.shape[1]} x {found.shape[0]} pixels), got {scene.path} ({scene.width} x {scene.height})"
    )
    scene.within = lambda *window: _read(found.path, found.source, 1, window) != IGNORE
    grid = found.source.transform
    if found.source.crs != scene.crs:
        raise elsewhere
    if grid == scene.transform:
        if found.shape != (scene.height, scene.width):
            raise elsewhere
        return
    # (column, row) of the map to those of the scene
    way = ~scene.transform @ grid
    factor = way.e, way.a
    corner = round(way.f / way.e) if way.e else 0, round(way.c / way.a) if way.a else 0
    turned = max(abs(way.b), abs(way.d)) > 1e-6
    between = turned or any(abs(c * f - o) > 0.01 for c, f, o in zip(corner, factor, (way.f, way.c), strict=True))
    ends = [(c + n) * f for c, n, f in zip(corner, found.shape, factor, strict=True)]
    # the last pixel of another size may reach over the edge
    beyond = min(corner) < 0 or any(
        e > n + f for e, n, f in zip(ends, (scene.height, scene.width), factor, strict=True)
    )
    if between or min(factor) <= 0 or beyond:
        raise elsewhere
    scene.part(grid, found.shape, factor, corner)


def cell_layers(key: str, title: str, cells: NDArray[np.float32], step: int) -> Layer:
    """Values of cells, such as correlations, one raster for each class.

    Args:
        key: name on the page.
        title: for people.
        cells: (T, h, w), NaN where nothing is known.
        step: pixels along a cell.
    """
    known = np.isfinite(cells)
    low, high = (float(cells[known].min()), float(cells[known].max())) if known.any() else (0.0, 1.0)
    share = (np.where(known, cells, low) - low) / max(high - low, 1e-12)
    value = np.stack([(share * LEVELS).round(), known * 255], axis=3).astype(np.uint8)

    def read_of(part: NDArray[np.uint8]) -> Read:
        return lambda top, bottom, left, right: part[top:bottom, left:right]

    _, height, width = cells.shape
    scales = [pyramid(read_of(part), height, width, CELLS, scale=step) for part in value]
    return Layer(key, title, "values", scales, low, high, step, by_class=True)
