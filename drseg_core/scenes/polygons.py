# SPDX-License-Identifier: Apache-2.0
"""A class map as polygons: GeoPackage, GeoJSON or GeoParquet, written as they are found."""

from __future__ import annotations

import json
import logging
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drseg_core.data.dataset import IGNORE
from drseg_core.data.ground import PixelArea
from drseg_core.data.vector import plain_path
from drseg_core.errors import ConfigError
from drseg_core.extras import require
from drseg_core.scenes.degrees import decimals_of, in_degrees, on_ground
from drseg_core.scenes.regions import find_regions, passes
from drseg_core.scenes.writer import written

SUFFIXES = (".gpkg", ".geojson", ".parquet")
AT_A_TIME = 5000
HALF_PIXEL = 0.5
_log = logging.getLogger(__name__)
_FIELDS = ("class_id", "class", "pixels", "area_m2", "mean_score")


class Found(NamedTuple):
    """A polygon in the CRS of the map as WKB, with its class, size and mean score."""

    geometry: bytes
    label: int
    pixels: int
    area: float
    score: float


def check_suffix(path: Path) -> str:
    """The suffix of a file of polygons, which decides the format.

    Raises:
        ConfigError: a suffix of no format that is written.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"predict_scene: polygons have a wrong suffix; expected a path ending in {', '.join(SUFFIXES)}, got {path}"
        )
    return path.suffix.lower()


def check_degrees(path: Path, scene: Any) -> None:
    """Refuse GeoJSON, which is in degrees, of a scene with half a place. Of one without any it has pixels.

    Raises:
        ConfigError: a CRS without a transform, a transform without a CRS, a CRS that lies nowhere on Earth, or ground
            control points or RPCs alone.
    """
    if check_suffix(path) != ".geojson":
        return
    # a map keeps them, but its pixels are not where they say before it is warped
    points = "ground control points alone" if scene.gcps[0] else "RPCs alone" if scene.rpcs else ""
    if not scene.crs and scene.transform.is_identity and not points:
        return
    if not PixelArea(scene.crs, scene.transform).known:
        lacks = "no CRS" if not scene.crs else "no transform" if scene.transform.is_identity else "a local CRS"
        lacks = points if points and scene.transform.is_identity else lacks
        raise ConfigError(
            f"predict_scene: polygons as GeoJSON need degrees; expected a CRS and a transform in {scene.path}, or a "
            f"path ending in .gpkg, got {lacks}"
        )


def check_min_area(name: str, min_area: float, polygons: str | Path | None) -> None:
    """Check the area below which polygons join a neighbour.

    Raises:
        ConfigError: it is not a finite number from 0 on, or there are no polygons for it.
    """
    if not 0 <= min_area < math.inf:
        raise ConfigError(f"{name}: min_area is out of range; expected a finite number, at least 0, got {min_area}")
    if min_area and polygons is None:
        raise ConfigError(f"{name}: min_area is for polygons; expected polygons beside it, got {min_area} alone")


def write_polygons(
    classes: Path,
    scores: Path,
    temporary: Path,
    path: Path,
    names: Sequence[str],
    *,
    min_area: float = 0.0,
    progress: bool = False,
) -> int:
    """Trace the areas of a class map and write them.

    An area below ``min_area`` joins the neighbour with which it shares the longest border. This goes on until all areas
    are large enough or have no neighbour but nodata. Borders are simplified by at most half a pixel, which changes no
    area. Each polygon is simplified by itself, so two neighbours may overlap there, or leave a gap. GDAL traces the
    polygons from a file, so the scene is never in memory. GeoJSON leaves out those with a corner that is not on Earth,
    and a warning counts them.

    Args:
        classes: the class raster.
        scores: raster of the best scores, in steps with a scale.
        temporary: where the result is put.
        path: its name in messages.
        names: names of the classes.
        min_area: in m2, or in pixels if the map has no georeference.
        progress: show a progress bar.

    Returns:
        The number of polygons written.

    Raises:
        ConfigError: ``min_area`` is out of range.
        ResourceError: it cannot be written.
    """
    check_min_area("write_polygons", min_area, path)
    require("write_polygons", "vectors")
    import rasterio

    own = temporary.with_name(f"{temporary.stem}.areas.tif")
    writer = {".gpkg": _geopackage, ".geojson": _geojson, ".parquet": _parquet}[check_suffix(path)]
    with warnings.catch_warnings(), rasterio.open(classes) as labels, rasterio.open(scores) as score:
        # the areas need no place
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        # a photograph has no place on a map, and need not have one
        warnings.filterwarnings("ignore", message="'crs' was not provided", category=UserWarning)
        try:
            with written(path):
                return writer(temporary, _found(labels, score, own, min_area, progress), names, labels, path)
        finally:
            own.unlink(missing_ok=True)


def _found(labels: Any, scores: Any, own: Path, min_area: float, progress: bool) -> Iterator[Found]:
    import rasterio
    import shapely
    from affine import Affine
    from rasterio.features import shapes
    from tqdm import tqdm

    total = labels.height * labels.width * passes(min_area)
    with tqdm(total=total, desc="areas", unit="px", unit_scale=True, disable=not progress) as bar:
        regions = find_regions(labels, scores, own, min_area, bar.update)
    count = int((regions.label != IGNORE).sum())
    with (
        rasterio.open(own) as numbers,
        tqdm(total=count, desc="polygons", disable=not progress) as bar,
    ):
        traced = shapes(rasterio.band(numbers, 1), transform=Affine.identity())
        while some := list(islice(traced, AT_A_TIME)):
            number = np.array([value for _, value in some], np.int64)
            inside = np.flatnonzero(regions.label[number] != IGNORE)
            exact = np.array([shapely.geometry.shape(some[i][0]) for i in inside], object)
            # within half a pixel lie only the two ends of a step and the line through its middle: the area stays
            smooth = shapely.transform(shapely.simplify(exact, HALF_PIXEL), partial(on_ground, labels.transform))
            for place, geometry in zip(number[inside], shapely.to_wkb(smooth), strict=True):
                area, score = float(regions.area[place]), float(regions.score[place])
                yield Found(geometry, int(regions.label[place]), int(regions.pixels[place]), area, score)
            count -= len(inside)
            bar.update(len(inside))
    if count:
        raise OSError("the areas are not stored in full")


def _chunks(found: Iterator[Found], *, empty: bool = False) -> Iterator[list[Found]]:
    """Some at a time; ``empty`` gives one empty list if there are none, so that a file is written."""
    some = list(islice(found, AT_A_TIME))
    if empty or some:
        yield some
    while some := list(islice(found, AT_A_TIME)):
        yield some


def _columns(some: Sequence[Found], names: Sequence[str]) -> list[NDArray[Any]]:
    return [
        np.array([item.label for item in some], np.int32),
        np.array([names[item.label] for item in some], object),
        np.array([item.pixels for item in some], np.int64),
        np.array([item.area for item in some], np.float64),
        np.array([item.score for item in some], np.float64),
    ]


def _geojson(temporary: Path, found: Iterator[Found], names: Sequence[str], labels: Any, path: Path) -> int:
    """GeoJSON as in RFC 7946. Not by GDAL, which reads the whole file again for each part that is added."""
    import shapely

    decimals = decimals_of(labels) if labels.crs else 0
    count = lost = pixels = 0
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(f'{{"type": "FeatureCollection", "name": {json.dumps(path.stem)}, "features": [')
        for some in _chunks(found):
            shapes = shapely.from_wkb(np.array([item.geometry for item in some], object))
            if labels.crs:
                shapes, seen = in_degrees(shapes, labels, decimals)
                lost, pixels = lost + int((~seen).sum()), pixels + sum(some[i].pixels for i in np.flatnonzero(~seen))
                some = [some[i] for i in np.flatnonzero(seen)]
            shapes = [_oriented(shape) for shape in shapes]
            rows = zip(*(column.tolist() for column in _columns(some, names)), strict=True)
            for row, shape in zip(rows, shapely.to_geojson(shapes), strict=True):
                known = {name: None if value != value else value for name, value in zip(_FIELDS, row, strict=True)}
                properties = json.dumps(known, ensure_ascii=False)
                begin = ",\n" if count else "\n"
                file.write(f'{begin}{{"type": "Feature", "properties": {properties}, "geometry": {shape}}}')
                count += 1
        file.write("\n]}\n")
    if lost:
        _log.warning(
            "%s: %d of %d polygons (%d pixels) are left out: a corner is not on Earth, or outside of the projection; "
            ".gpkg has all",
            path.name,
            lost,
            lost + count,
            pixels,
        )
    return count


def _oriented(shape: Any) -> Any:
    """Outer rings run counter-clockwise, as RFC 7946 wants."""
    import shapely

    parts = [shapely.geometry.polygon.orient(part) for part in shapely.get_parts(shape)]
    return parts[0] if len(parts) == 1 else shapely.MultiPolygon(parts)


def _geopackage(temporary: Path, found: Iterator[Found], names: Sequence[str], labels: Any, path: Path) -> int:
    from pyogrio.errors import DataLayerError, DataSourceError
    from pyogrio.raw import write

    count = 0
    temporary.unlink()
    try:
        with plain_path(temporary) as plain:
            for some in _chunks(found, empty=True):
                write(
                    plain,
                    np.array([item.geometry for item in some], object),
                    _columns(some, names),
                    fields=_FIELDS,
                    layer=_layer_name(path.stem),
                    geometry_type="Polygon",
                    crs=labels.crs.to_wkt() if labels.crs else None,
                    driver="GPKG",
                    append=plain.exists(),
                )
                count += len(some)
    except (DataSourceError, DataLayerError) as error:
        raise OSError(str(error)) from None
    return count


def _layer_name(stem: str) -> str:
    """A name that GeoPackage takes: it begins with a letter or number, and with no word that SQLite or GDAL keeps."""
    name = re.sub(r"^\W+", "", "".join(c if c.isprintable() else "_" for c in stem))
    if not name.strip("_ "):
        return "classes"
    return f"classes_{name}" if name.lower().startswith(("gpkg", "sqlite_", "rtree_", "ogr_empty_table")) else name


def _parquet(temporary: Path, found: Iterator[Found], names: Sequence[str], labels: Any, path: Path) -> int:
    """GeoParquet 1.1: WKB in a column, described in the metadata."""
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    column: dict[str, Any] = {"encoding": "WKB", "geometry_types": ["Polygon"]}
    column["crs"] = labels.crs.to_dict(projjson=True) if labels.crs else None
    meaning = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
    kinds = (pyarrow.int32(), pyarrow.string(), pyarrow.int64(), pyarrow.float64(), pyarrow.float64())
    fields = [*zip(_FIELDS, kinds, strict=True), ("geometry", pyarrow.binary())]
    schema = pyarrow.schema(fields, metadata={"geo": json.dumps(meaning)})
    count = 0
    # an open file: pyarrow takes some names for addresses
    with open(temporary, "wb") as file, ParquetWriter(file, schema) as writer:
        for some in _chunks(found):
            columns = [*_columns(some, names), np.array([item.geometry for item in some], object)]
            arrays = [pyarrow.array(list(c), kind) for c, (_, kind) in zip(columns, fields, strict=True)]
            writer.write_table(pyarrow.table(arrays, schema=schema))
            count += len(some)
    return count
