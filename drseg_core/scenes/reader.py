# SPDX-License-Identifier: Apache-2.0
"""Scenes as they are read, in part or at another resolution, and lines that say how."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from drseg_core.config.reading import Reading, scale_text
from drseg_core.data.ground import pixel_side, pixel_sides
from drseg_core.data.raster import RasterReader, open_raster
from drseg_core.data.values import nodata_hint, spread
from drseg_core.data.vector import Shapes, read_shapes
from drseg_core.errors import ConfigError, RasterError

PIECE = 1024
"""Side in stored pixels of a piece that is averaged at a time."""

NEAR = 1.5
"""Factor by which a scene's pixels may differ from those of the training without a word."""

_log = logging.getLogger(__name__)


class SceneReader(RasterReader):
    """A raster on its own grid, or on the part and at the resolution that :meth:`place` chooses.

    Windows, height, width and transform are then those of the chosen grid. At another resolution a pixel is the average
    of the valid ones it covers, or is interpolated if it is smaller. Validity and palette colours are the nearest.
    """

    _grid: Any = None
    _factor = (1.0, 1.0)
    _corner = (0, 0)
    _area: Shapes | None = None
    # what else a pixel must be in: of (top, bottom, left, right), those that are (n, m)
    within: Callable[[int, int, int, int], NDArray[np.bool_]] | None = None

    @property
    def gsd(self) -> float | None:
        """Side of a pixel in metres; None if the scene has no georeference."""
        return pixel_side(self.crs, self.transform, self.height, self.width)

    @property
    def sides(self) -> tuple[float, float] | None:
        """Sides of a pixel in metres, across and down; None if the scene has no georeference."""
        return pixel_sides(self.crs, self.transform, self.height, self.width)

    @property
    def transform(self) -> Any:
        return self.source.transform if self._grid is None else self._grid

    @property
    def gcps(self) -> Any:
        return self.source.gcps if self._grid is None else ([], None)

    @property
    def rpcs(self) -> Any:
        return self.source.rpcs if self._grid is None else None

    @property
    def area_hints(self) -> list[str]:
        """Warnings of what of an area is not taken as its file has it."""
        return [] if self._area is None else self._area.hints

    def place(self, *, gsd: float | None = None, aoi: str | Path | None = None) -> None:
        """Choose resolution and part.

        Args:
            gsd: side of a pixel in metres.
            aoi: vector file. Pixels outside its shapes are invalid, and the grid ends at the box of the shapes.

        Raises:
            ConfigError: the scene has no georeference, or ``aoi`` lies elsewhere or holds no pixel.
            DatasetError: ``aoi`` cannot be read.
        """
        from affine import Affine

        if gsd is None and aoi is None:
            return
        own = self.gsd
        if own is None:
            option = "--gsd" if gsd is not None else "--aoi"
            raise ConfigError(f"open_scene: {option} needs a place; expected a CRS and a transform in {self.path}")
        if gsd is not None:
            if not 0 < gsd < math.inf:
                raise ConfigError(f"open_scene: --gsd is out of range; expected metres above 0, got {gsd}")
            height, width = (max(1, round(n * own / gsd)) for n in (self.height, self.width))
            self._factor = self.height / height, self.width / width
            self._grid = self.source.transform @ Affine.scale(self._factor[1], self._factor[0])
            self.height, self.width = height, width
        if aoi is not None:
            self._crop(read_shapes(Path(aoi), None, self), Path(aoi))

    def part(self, grid: Any, size: tuple[int, int], factor: tuple[float, float], corner: tuple[int, int]) -> None:
        """Take the grid of a map that was made of this scene.

        Args:
            grid: transform of the map.
            size: (H, W) of the map.
            factor: stored pixels along one of the map, down and across.
            corner: row and column of the map's first pixel, in pixels of that size.
        """
        self._grid, self._factor, self._corner = grid, factor, corner
        self.height, self.width = size

    def _crop(self, area: Shapes, path: Path) -> None:
        from affine import Affine

        elsewhere = ConfigError(f"open_scene: --aoi lies elsewhere; expected a part of {self.path}, got {path}")
        if not area.shapes:
            raise elsewhere
        west, south, east, north = area.bounds()
        grid = self.transform
        corners = np.array([~grid @ (x, y) for x in (west, east) for y in (south, north)])
        # the bends of a line may add a hundredth of a pixel, which makes no row
        left, top = np.maximum(np.floor(corners.min(0) + 0.01), 0).astype(int)
        right, bottom = np.minimum(np.ceil(corners.max(0) - 0.01), (self.width, self.height)).astype(int)
        if left >= right or top >= bottom:
            raise elsewhere
        self._corner = int(top), int(left)
        self.height, self.width = int(bottom - top), int(right - left)
        self._grid, self._area = grid @ Affine.translation(left, top), area
        if not self._holds_pixels():
            raise ConfigError(
                f"open_scene: --aoi holds no pixel; expected the centre of one of {self.path}, got {path}"
            )

    def _holds_pixels(self) -> bool:
        """Whether a pixel is within the shapes; block by block until one is, as a mask of all may be large."""
        blocks = ((top, left) for top in range(0, self.height, PIECE) for left in range(0, self.width, PIECE))
        sizes = ((block, (min(PIECE, self.height - block[0]), min(PIECE, self.width - block[1]))) for block in blocks)
        return any(self._inside(block, size).any() for block, size in sizes)

    def window(self, top: int, bottom: int, left: int, right: int) -> tuple[Tensor, NDArray[np.bool_]]:
        row, column = self._corner
        whole = top + row, bottom + row, left + column, right + column
        image, valid = super().window(*whole) if self._factor == (1.0, 1.0) else self._resampled(*whole)
        valid = valid & self._inside((top, left), (bottom - top, right - left))
        return image, valid if self.within is None else valid & self.within(top, bottom, left, right)

    def _resampled(self, top: int, bottom: int, left: int, right: int) -> tuple[Tensor, NDArray[np.bool_]]:
        """A part of the whole scene at the chosen resolution. Piece by piece, as it may cover many stored pixels."""
        side = [max(1, int(PIECE / factor)) for factor in self._factor]
        rows = []
        for row in range(top, bottom, side[0]):
            pieces = [
                self._piece(row, min(row + side[0], bottom), column, min(column + side[1], right))
                for column in range(left, right, side[1])
            ]
            rows.append([np.concatenate(part, -1) for part in zip(*pieces, strict=True)])
        value, valid = (np.concatenate(part, -2) for part in zip(*rows, strict=True))
        return self._rgb(value), valid

    def _piece(self, top: int, bottom: int, left: int, right: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Values (B, n, m) not yet scaled, and which are valid. GDAL knows no nodata value but that of the file."""
        from rasterio.windows import Window

        rows = Lines.of(top, bottom, self._factor[0], self.source.height)
        columns = Lines.of(left, right, self._factor[1], self.source.width)
        window = Window(columns.first, rows.first, columns.last - columns.first, rows.last - rows.first)
        with self._explained(f"rows {rows.first} to {rows.last}"):
            value = self.source.read(list(self.bands), window=window)
            valid = (self.source.dataset_mask(window=window) != 0) & self._present(value)
        value = spread(value, self._highest)
        nearest = np.ix_(rows.nearest, columns.nearest)
        plain = value[:, nearest[0], nearest[1]]
        if self._colors is not None:
            return plain, valid[nearest]
        share = columns.summed(rows.summed(valid.astype(np.float64), -2), -1)
        total = columns.summed(rows.summed(np.where(valid, value, 0).astype(np.float64), -2), -1)
        mean = total / np.maximum(share, 1e-12)
        if value.dtype.kind in "iu":
            mean = mean.round()
        return np.where(share > 1e-9, mean, plain).astype(value.dtype), valid[nearest]

    def sample(self) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        if self._sample is None:
            value, valid = super().sample()
            self._sample = value, valid & self._inside((0, 0), (self.height, self.width), valid.shape)
        return self._sample

    def _extent(self) -> Any:
        from rasterio.windows import Window

        (top, left), (row, column) = self._corner, self._factor
        return Window(left * column, top * row, self.width * column, self.height * row)

    def _inside(
        self, corner: tuple[int, int], size: tuple[int, int], shape: tuple[int, ...] | None = None
    ) -> NDArray[np.bool_]:
        """Which pixels of a part of the grid are within the shapes; of ``shape`` pixels for a reduced copy."""
        from affine import Affine
        from rasterio.features import geometry_mask

        shape = shape or size
        if self._area is None:
            return np.ones(shape, bool)
        reduced = Affine.scale(size[1] / shape[1], size[0] / shape[0])
        place = self._grid @ Affine.translation(corner[1], corner[0]) @ reduced
        corners = np.array([place @ (x, y) for x in (0, shape[1]) for y in (0, shape[0])])
        near = self._area.within(*corners.min(0), *corners.max(0))
        if not near:
            return np.zeros(shape, bool)
        return geometry_mask([self._area.shapes[i] for i in near], shape, place, invert=True)


class Lines(NamedTuple):
    """Rows or columns of another resolution, and their shares of the stored ones ``first`` to ``last`` (exclusive).

    Each takes the stored ones within its own extent. One that is smaller than a stored one takes as much as if it were
    as large. That is a linear interpolation between their middles.
    """

    first: int
    last: int
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    nearest: NDArray[np.int64]

    @classmethod
    def of(cls, begin: int, end: int, factor: float, count: int) -> Lines:
        middle = (np.arange(begin, end) + 0.5) * factor
        half = max(factor, 1.0) / 2
        # an edge that is off by rounding takes no part of the next pixel
        low, high = (np.clip(np.round(middle + side, 9), 0, count) for side in (-half, half))
        first, last = int(low[0]), math.ceil(high[-1])
        nearest = np.clip(middle.astype(np.int64), first, last - 1)
        return cls(first, last, low - first, high - first, nearest - first)

    def summed(self, value: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        """Sums of the stored values along an axis, weighted by the share of each."""
        value = np.moveaxis(value, axis, -1)
        total = np.concatenate([np.zeros((*value.shape[:-1], 1)), np.cumsum(value, -1)], -1)

        def until(edge: NDArray[np.float64]) -> NDArray[np.float64]:
            before = np.minimum(edge.astype(np.int64), value.shape[-1] - 1)
            return total[..., before] + (edge - before) * value[..., before]

        return np.moveaxis(until(self.high) - until(self.low), -1, axis)


@contextlib.contextmanager
def open_scene(
    path: str | Path,
    *,
    bands: Sequence[int] | None = None,
    reading: Reading | None = None,
    gsd: float | None = None,
    aoi: str | Path | None = None,
) -> Iterator[SceneReader]:
    """Open a scene for reading.

    Args:
        path: a raster file that GDAL reads, such as GeoTIFF, PNG, JPEG or VRT. Or its address in one of GDAL's virtual
            file systems, a text that begins with ``/vsi``.
        bands: one or three band numbers from 1, as red, green and blue; by default as the file says.
        reading: nodata, scale and bands.
        gsd: side in metres of the pixels in which it is read; by default its own.
        aoi: vector file of the part that is read; by default the whole scene.

    Raises:
        RasterError: no such file, not an image, or no usable band.
        ConfigError: ``bands`` are not in the file, or ``gsd`` or ``aoi`` is given and it has no georeference.
    """
    reading = reading or Reading()
    if bands is not None:
        reading = dataclasses.replace(reading, bands=tuple(bands))
    # a Path has no two slashes in a row
    remote = str(path).startswith("/vsi")
    with open_raster(Path(path), origin="open_scene", address=str(path) if remote else None) as source:
        scene = SceneReader(source, Path(path), reading)
        scene.place(gsd=gsd, aoi=aoi)
        yield scene


def describe(scene: SceneReader, trained_gsd: float | None = None) -> None:
    """Say how a scene is read: bands and scale, and what may be wrong with them."""
    name = scene.path.name
    order = ", ".join(map(str, scene.bands))
    one = "colours are those of the table of band" if scene.has_color_table else "gray is band"
    label = "red, green, blue are bands" if len(scene.bands) == 3 else one
    _log.info("%s: %s %s (%s)", name, label, order, scene.band_source)
    pairs = scene.pairs()
    if pairs is not None:
        measured = scene.reading.scale is None or scene.scale_warning is not None
        how = "measured, 2 and 98 % of this scene" if measured else "as given or as in training"
        _log.info("%s: %s scaled by %s (%s)", name, scene.dtype, scale_text(pairs), how)
    extreme = None
    # damaged files are reported where they are used
    with contextlib.suppress(RasterError):
        extreme = scene.extreme_value()
    hints = (scene.scale_warning, scene.window_warning(), scene.band_warning(), scene.nodata_warning())
    for message in (
        *scene.area_hints,
        scene.turn_warning(),
        *hints,
        nodata_hint(name, extreme),
        _gsd_hint(scene, trained_gsd),
    ):
        if message is not None:
            _log.warning("%s", message)


def _gsd_hint(scene: SceneReader, trained: float | None) -> str | None:
    own = None if trained is None else scene.gsd
    if trained is None or own is None or 1 / NEAR < own / trained < NEAR:
        return None
    return (
        f"{scene.path.name}: a pixel is {own:.3g} m, those of the training were {trained:.3g} m; "
        f"--gsd {trained:.3g} reads it so"
    )
