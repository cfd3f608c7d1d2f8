# SPDX-License-Identifier: Apache-2.0
"""From a scene and its labels, as raster or polygons, to a set of tiles for training: ``drseg data tile``."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drseg_core.config.reading import Reading
from drseg_core.data.dataset import IGNORE
from drseg_core.data.folder import check_class_lines
from drseg_core.data.manifest import printable, write_manifest
from drseg_core.data.pairs import some
from drseg_core.data.raster import RasterReader, open_raster, points_elsewhere
from drseg_core.data.values import holds
from drseg_core.data.vector import Shapes, read_shapes
from drseg_core.errors import ConfigError, DatasetError, ResourceError
from drseg_core.extras import require
from drseg_core.files import FULL, disk_is_full, free_bytes, own_prefix, parse_json, remove_dead

RASTERS = (".tif", ".tiff", ".vrt", ".img", ".png")
SMALLEST = 64
"""Side below which the rest at an edge is left out."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TileOptions:
    """How a scene is cut.

    Args:
        size: side of a tile in pixels.
        field: column of polygons with their class; None is ``class``.
        classes: names by the number in a raster of labels, or the order of those of polygons; None takes those of the
            file.
        background: class of pixels that no polygon covers; None leaves them unknown (255).
        val_share: share of the ground that is for validation.
        nodata: value of the scene's pixels without data, besides what the file declares.
    """

    size: int = 512
    field: str | None = None
    classes: tuple[str, ...] | None = None
    background: str | None = None
    val_share: float = 0.2
    nodata: float | None = None


class Tile(NamedTuple):
    """A window of the scene and its place in the grid of tiles."""

    row: int
    column: int
    top: int
    left: int
    height: int
    width: int


class Tiled(NamedTuple):
    """The folder, its class names, tiles by split, and tiles left out between the splits and for want of labels."""

    folder: Path
    class_names: tuple[str, ...]
    tiles: dict[str, int]
    between: int
    unlabelled: int


class RasterLabels:
    """Class ids of a raster, brought onto the grid of a scene, nearest pixel."""

    def __init__(
        self, source: Any, scene: RasterReader, options: TileOptions, path: Path, names: Sequence[str] | None
    ) -> None:
        self.source, self.path = source, path
        if source.count != 1 or source.dtypes[0].startswith(("float", "complex")):
            raise DatasetError(
                f"data tile: {printable(path)} has {source.count} bands of {source.dtypes[0]}; expected one band of "
                "whole numbers"
            )
        self.nodata = source.nodata
        values = self._values(scene)
        names = options.classes or names
        if names is not None and len(names) > max(values, default=0):
            self.class_names, self.ids = tuple(names), {value: value for value in values}
        elif options.classes is not None:
            raise ConfigError(
                f"data tile: --classes are too few; expected a name for each number from 0 to {max(values)}, "
                f"got {len(options.classes)}"
            )
        else:
            self.class_names = tuple(f"class {value}" for value in values)
            self.ids = {value: place for place, value in enumerate(values)}
        check_class_lines(self.class_names, "data tile")

    def _values(self, scene: RasterReader) -> list[int]:
        found: set[int] = set()
        for top in range(0, scene.height, 512):
            rows = self.source.read(1, window=((top, min(top + 512, scene.height)), (0, scene.width)))
            found.update(int(v) for v in np.unique(rows))
        found -= {IGNORE, *(() if self.nodata is None else (int(self.nodata),))}
        if not found or len(found) > IGNORE or min(found) < 0:
            raise DatasetError(
                f"data tile: {printable(self.path)} holds {len(found)} different numbers; expected 1 to {IGNORE}"
            )
        return sorted(found)

    def read(self, tile: Tile) -> NDArray[np.uint8]:
        rows, columns = (tile.top, tile.top + tile.height), (tile.left, tile.left + tile.width)
        value = self.source.read(1, window=(rows, columns))
        result = np.full(value.shape, IGNORE, np.uint8)
        for stored, number in self.ids.items():
            result[value == stored] = number
        return result


def _raster_names(source: Any) -> Sequence[str] | None:
    """Class names that a raster of labels carries: those of a map of ours."""
    try:
        return [str(name) for name in parse_json(source.tags()["class_names"])]
    except (KeyError, ValueError, TypeError):
        return None


class VectorLabels:
    """Class ids of polygons, burnt into a tile; if two overlap, the later one counts, but one without a class never."""

    def __init__(self, shapes: Shapes, scene: RasterReader, options: TileOptions) -> None:
        self.shapes, self.transform = shapes, scene.transform
        # those of the whole file: several scenes with one file of labels have the same classes
        names: Sequence[str] = shapes.all_values if options.classes is None else options.classes
        if options.background is not None:
            if options.background in (options.classes or ()):
                raise ConfigError(
                    f"data tile: --background is one of --classes; expected another name, got {options.background!r}"
                )
            names = [options.background, *(name for name in names if name != options.background)]
        self.class_names = check_class_lines(names, "data tile")
        if missing := [name for name in shapes.all_values if name not in names]:
            raise ConfigError(
                f"data tile: --classes lack {some(map(repr, missing))} of the polygons; expected all of their classes, "
                f"got {some(map(repr, names))}"
            )
        self.fill = IGNORE if options.background is None else 0

    def read(self, tile: Tile) -> NDArray[np.uint8]:
        from affine import Affine
        from rasterio.features import rasterize

        place = self.transform @ Affine.translation(tile.left, tile.top)
        corners = [place @ (x, y) for x in (0, tile.width) for y in (0, tile.height)]
        west, south = np.min(corners, axis=0)
        east, north = np.max(corners, axis=0)
        inside = self.shapes.within(west, south, east, north)
        size = tile.height, tile.width
        if not inside:
            return np.full(size, self.fill, np.uint8)
        numbers = {"": IGNORE, **{name: number for number, name in enumerate(self.class_names)}}
        # those without a class come first: they lie over the background alone
        inside.sort(key=lambda i: bool(self.shapes.values[i]))
        burnt = [(self.shapes.shapes[i], numbers[self.shapes.values[i]]) for i in inside]
        return rasterize(burnt, out_shape=size, transform=place, fill=self.fill, dtype="uint8")


def tile_scene(scene: str | Path, labels: str | Path, out: str | Path, options: TileOptions | None = None) -> Tiled:
    """Cut a scene and its labels into ``OUT/{train,val}/{images,masks}/*.tif`` with ``OUT/classes.txt``.

    Tiles keep the stored values, bands and georeference of the scene. The tiles for validation are one strip of ground.
    Of all such strips it is the one whose classes are most like those of the whole scene. The tiles beside it are in
    neither part, so that no tile for validation touches one for training. Tiles without a label or without data are
    left out.

    Args:
        scene: a raster that GDAL reads.
        labels: raster of class numbers, or polygons with a column of class names. From another grid or CRS they are
            brought onto that of the scene.
        out: new or empty folder; it appears complete or not at all.
        options: how the scene is cut.

    Raises:
        ConfigError: an option does not fit, or ``out`` is in use.
        DatasetError: scene or labels cannot be read, or have nothing in common.
        ResourceError: the tiles cannot be written.
    """
    options = options or TileOptions()
    require("tile_scene", "maps")
    from rasterio._err import CPLE_BaseError

    scene, labels, target = Path(scene), Path(labels), Path(out)
    if options.size < SMALLEST:
        raise ConfigError(f"data tile: --size is out of range; expected at least {SMALLEST}, got {options.size}")
    if not 0 <= options.val_share < 1:
        raise ConfigError(f"data tile: --val-share is out of range; expected 0 to below 1, got {options.val_share}")
    for path in (scene, labels):
        if points_elsewhere(path):
            raise ConfigError(f"data tile: {path} points to something remote; expected files")
    for name, value in (("field", options.field), ("background", options.background)):
        if value is not None and labels.suffix.lower() in RASTERS:
            raise ConfigError(
                f"data tile: --{name} is for polygons; expected none with the raster {printable(labels)}, got {value!r}"
            )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"data tile: --out is not empty; expected a new or empty folder, got {target}")
    with open_raster(scene, origin="data tile") as source:
        reader = RasterReader(source, scene, Reading(nodata=options.nodata, scale=((0.0, 1.0),)), origin="data tile")
        stored = _stored(reader, options)
        with _labels(labels, reader, options) as truth:
            tiles, counts, unlabelled = _counted(reader, truth, options)
            splits, between = split_tiles(tiles, counts, options.val_share)
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_dead(target)
            temporary = Path(tempfile.mkdtemp(prefix=own_prefix(target), suffix=".part", dir=target.parent))
            try:
                _write(temporary, reader, truth, splits, stored)
                if target.exists():
                    target.rmdir()
                temporary.chmod(0o755)
                os.replace(temporary, target)
            except (OSError, CPLE_BaseError) as error:
                reason = " ".join(str(error.__cause__ or getattr(error, "strerror", None) or error).split())
                if getattr(error, "errno", None) in FULL or disk_is_full(target):
                    reason = f"the disk is full ({reason})"
                raise ResourceError(f"data tile: {target} cannot be written: {reason}") from None
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    written = {split: len(some) for split, some in splits.items() if some}
    return Tiled(target, truth.class_names, written, between, unlabelled)


class Stored(NamedTuple):
    """How the images of tiles are stored: type, nodata value, colour table, whether with a mask, options of GDAL."""

    dtype: str
    nodata: float | None
    colors: Mapping[int, tuple[int, ...]] | None
    masked: bool
    options: Mapping[str, int]


def _stored(scene: RasterReader, options: TileOptions) -> Stored:
    """The storage of the scene, so that tiles are read as it is.

    Raises:
        ConfigError: its type cannot hold ``options.nodata``.
    """
    source = scene.source
    dtype = np.result_type(*source.dtypes)
    if options.nodata is not None and not holds(dtype, options.nodata):
        raise ConfigError(
            f"data tile: --nodata does not fit {printable(scene.path)}; expected a value of {dtype}, "
            f"got {options.nodata:.10g}"
        )
    declared = source.nodata if source.nodata is not None and holds(dtype, source.nodata) else None
    nodata = declared if options.nodata is None else options.nodata
    colors = None
    with contextlib.suppress(ValueError):
        colors = source.colormap(1)
    flags = [flag.name for flag in source.mask_flag_enums[0]]
    # a file declares only one value; if the scene has another one, the pixels themselves say it
    given = options.nodata
    two = given is not None and declared is not None and not np.array_equal(given, declared, equal_nan=True)
    masked = two or "per_dataset" in flags and "alpha" not in flags
    # values of fewer than 8 bits fill 0 to 255 where they are read
    bits = {source.tags(band, ns="IMAGE_STRUCTURE").get("NBITS") for band in source.indexes}
    few = {"nbits": int(bits.pop() or 8)} if dtype == "uint8" and colors is None and len(bits) == 1 else {}
    return Stored(str(dtype), None if masked else nodata, colors, masked, few)


@contextlib.contextmanager
def _labels(path: Path, scene: RasterReader, options: TileOptions) -> Iterator[RasterLabels | VectorLabels]:
    """The labels of a file, raster or vector."""
    if path.suffix.lower() not in RASTERS:
        shapes = read_shapes(path, "class" if options.field is None else options.field, scene)
        for hint in shapes.hints:
            _log.warning("%s", hint)
        yield VectorLabels(shapes, scene, options)
        return
    with open_raster(path, origin="data tile") as source, _on_grid(source, scene, path) as placed:
        yield RasterLabels(placed, scene, options, path, _raster_names(source))


@contextlib.contextmanager
def _on_grid(source: Any, scene: RasterReader, path: Path) -> Iterator[Any]:
    from rasterio.enums import Resampling
    from rasterio.vrt import WarpedVRT

    size = scene.height, scene.width
    same = (source.crs, source.transform, source.shape) == (scene.crs, scene.transform, size)
    if same or (not source.crs or not scene.crs) and source.shape == size:
        yield source
        return
    if not source.crs or not scene.crs:
        raise DatasetError(
            f"data tile: {printable(path)} does not lie on the scene; expected its CRS, or {size[0]} x {size[1]} "
            f"pixels, got {source.height} x {source.width}"
        )
    grid = {"crs": scene.crs, "transform": scene.transform, "height": scene.height, "width": scene.width}
    nodata = IGNORE if source.nodata is None else source.nodata
    with WarpedVRT(source, resampling=Resampling.nearest, src_nodata=source.nodata, nodata=nodata, **grid) as placed:
        yield placed


def tiles_of(height: int, width: int, size: int) -> Iterator[Tile]:
    """Tiles side by side; the rest at the right and at the bottom is a smaller tile, or left out if it is tiny."""
    for row, top in enumerate(range(0, height, size)):
        for column, left in enumerate(range(0, width, size)):
            tile = Tile(row, column, top, left, min(size, height - top), min(size, width - left))
            if min(tile.height, tile.width) >= min(SMALLEST, height, width):
                yield tile


def _counted(
    scene: RasterReader, labels: RasterLabels | VectorLabels, options: TileOptions
) -> tuple[list[Tile], NDArray[np.int64], int]:
    """Tiles with labels, and how many pixels of each class each has."""
    tiles, counts, unlabelled = [], [], 0
    for tile in tiles_of(scene.height, scene.width, options.size):
        count = np.bincount(_mask(scene, labels, tile).ravel(), minlength=IGNORE + 1)[: len(labels.class_names)]
        if count.any():
            tiles.append(tile)
            counts.append(count)
        else:
            unlabelled += 1
    if not tiles:
        raise DatasetError(
            "data tile: no tile has a label; expected labels that lie on the scene (are CRS and place right?)"
        )
    return tiles, np.array(counts), unlabelled


def _mask(scene: RasterReader, labels: RasterLabels | VectorLabels, tile: Tile) -> NDArray[np.uint8]:
    mask = labels.read(tile)
    mask[~_valid(scene, tile)] = IGNORE
    return mask


def _valid(scene: RasterReader, tile: Tile) -> NDArray[np.bool_]:
    return scene.window(tile.top, tile.top + tile.height, tile.left, tile.left + tile.width)[1]


def split_tiles(
    tiles: Sequence[Tile], counts: NDArray[np.int64], val_share: float
) -> tuple[Mapping[str, list[Tile]], int]:
    """Tiles for training and for validation, and how many lie between them and are in neither.

    The strip consists of whole rows or columns of tiles. Its share of each class is the nearest to that of all tiles.
    """
    total = counts.sum(0) / counts.sum()
    best: tuple[float, str, int, int] | None = None
    for axis in ("row", "column"):
        place = np.array([getattr(tile, axis) for tile in tiles])
        lines = int(place.max()) + 1
        wide = max(1, round(lines * val_share))
        # a line is lost on each side of the strip that is not the scene's edge
        if val_share == 0 or lines < wide + 2:
            continue
        for first in range(lines - wide + 1):
            inside = (place >= first) & (place < first + wide)
            outside = (place < first - 1) | (place > first + wide)
            if not inside.any() or not outside.any() or not counts[inside].sum():
                continue
            share = counts[inside].sum(0) / counts[inside].sum()
            lost = 1 - (inside.sum() + outside.sum()) / len(tiles)
            distance = float(np.abs(share - total).sum() + lost)
            if best is None or distance < best[0]:
                best = distance, axis, first, wide
    if best is None:
        return {"train": list(tiles), "val": []}, 0
    _, axis, first, wide = best
    val = [tile for tile in tiles if first <= getattr(tile, axis) < first + wide]
    train = [tile for tile in tiles if not first - 1 <= getattr(tile, axis) <= first + wide]
    return {"train": train, "val": val}, len(tiles) - len(val) - len(train)


@contextlib.contextmanager
def _new_tile(path: Path, **profile: Any) -> Iterator[Any]:
    """A new raster, made in memory: on a full disk GDAL would write lines of its own to the terminal."""
    from rasterio.io import MemoryFile
    from rasterio.shutil import copyfiles

    with MemoryFile(ext=path.suffix) as memory:
        with memory.open(**profile) as file:
            yield file
        if free_bytes(path) < len(memory):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        copyfiles(memory.name, str(path))


def _write(
    folder: Path,
    scene: RasterReader,
    labels: RasterLabels | VectorLabels,
    splits: Mapping[str, Sequence[Tile]],
    stored: Stored,
) -> None:
    import rasterio
    from rasterio.windows import Window, transform

    source = scene.source
    shared: dict[str, Any] = {"driver": "GTiff", "compress": "deflate", "crs": source.crs}
    files = []
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in labels.class_names), encoding="utf-8")
    for split, tiles in splits.items():
        for tile in tiles:
            window = Window(tile.left, tile.top, tile.width, tile.height)
            profile = {**shared, "height": tile.height, "width": tile.width}
            if not source.transform.is_identity:
                profile["transform"] = transform(window, source.transform)
            name = f"r{tile.row:04d}_c{tile.column:04d}.tif"
            image, mask = (folder / split / part / name for part in ("images", "masks"))
            for path in (image, mask):
                path.parent.mkdir(parents=True, exist_ok=True)
            kept = {"dtype": stored.dtype, "nodata": stored.nodata, **stored.options, **profile}
            with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), _new_tile(image, count=source.count, **kept) as file:
                file.colorinterp = source.colorinterp
                if stored.colors is not None:
                    file.write_colormap(1, stored.colors)
                file.write(source.read(window=window))
                if stored.masked:
                    file.write_mask(_valid(scene, tile))
                for band, text in enumerate(source.descriptions, 1):
                    if text:
                        file.set_band_description(band, text)
            with _new_tile(mask, count=1, dtype="uint8", nodata=IGNORE, **profile) as file:
                file.write(_mask(scene, labels, tile), 1)
            files += [image, mask]
    write_manifest(folder, files)
