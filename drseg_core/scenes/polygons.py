# SPDX-License-Identifier: Apache-2.0
"""A class map as polygons: GeoPackage, GeoJSON or GeoParquet, written as they are found."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drseg_core.data.dataset import IGNORE
from drseg_core.data.ground import PixelArea
from drseg_core.errors import ConfigError, ResourceError
from drseg_core.extras import require

DRIVERS = {".gpkg": "GPKG", ".geojson": "GeoJSON", ".parquet": "Parquet"}
AT_A_TIME = 5000
_BLOCK = 1024
_FIELDS = ("class_id", "class", "pixels", "area_m2", "mean_score")


class Found(NamedTuple):
    """A polygon in the CRS of the map as WKB, with its class, size and mean score."""

    geometry: bytes
    label: int
    pixels: int
    area: float
    score: float


def check_suffix(path: Path) -> str:
    """The format of a file of polygons.

    Raises:
        ConfigError: none that is written.
    """
    if path.suffix.lower() not in DRIVERS:
        raise ConfigError(
            f"predict_scene: polygons have a wrong suffix; expected a path ending in {', '.join(DRIVERS)}, got {path}"
        )
    return DRIVERS[path.suffix.lower()]


def write_polygons(
    classes: Path,
    scores: Path,
    temporary: Path,
    path: Path,
    names: Sequence[str],
    *,
    min_area: float = 0.0,
) -> int:
    """Trace the areas of a class map and write them.

    Areas below ``min_area`` join the neighbour they share the longest border with, as GDAL's sieve has it. Borders are
    simplified by at most a pixel. The scene is never in memory; the polygons are traced by GDAL from the file.

    Args:
        classes: the class raster.
        scores: raster of the best scores, in steps with a scale.
        temporary: where the result is put.
        path: what messages call it.
        names: of the classes.
        min_area: in m2, or in pixels where the map has no place.

    Returns:
        How many there are.

    Raises:
        ResourceError: it cannot be written.
    """
    require("write_polygons", "vectors")
    import rasterio

    with rasterio.open(classes) as labels, rasterio.open(scores) as score:
        pixel = PixelArea(labels.crs, labels.transform)
        found = _found(labels, score, pixel, min_area, temporary)
        try:
            if DRIVERS[path.suffix.lower()] == "Parquet":
                return _parquet(temporary, found, names, labels.crs)
            return _layers(temporary, path, found, names, labels.crs)
        except OSError as error:
            raise ResourceError(f"predict_scene: {path} cannot be written: {' '.join(str(error).split())}") from None


def _found(labels: Any, scores: Any, pixel: PixelArea, min_area: float, temporary: Path) -> Iterator[Found]:
    import shapely
    from affine import Affine
    from rasterio import band, features
    from shapely.affinity import affine_transform

    t = labels.transform
    matrix = [t.a, t.b, t.d, t.e, t.c, t.f]
    size = labels.height, labels.width
    own = temporary.with_name(f"{temporary.stem}.sieve")
    try:
        # a file in the place of memory
        source = np.memmap(own, np.uint8, "w+", shape=size)
        if min_area > 0:
            each = float(pixel.of([(0, 0, *size)])[0]) if pixel.known else 1.0
            features.sieve(band(labels, 1), max(1, int(np.ceil(min_area / each))), out=source)
        for _, window in labels.block_windows(1):
            part, own_labels = source[window.toslices()], labels.read(1, window=window)
            if min_area > 0:
                # what the sieve joined to nodata is itself again, and nodata stays nodata
                changed = (part == IGNORE) | (own_labels == IGNORE)
                part[changed] = own_labels[changed]
            else:
                part[...] = own_labels
        for shape, value in features.shapes(source, transform=Affine.identity()):
            if int(value) == IGNORE:
                continue
            polygon = shapely.geometry.shape(shape)
            pixels, area, mean = _measured(shape, polygon.bounds, scores, pixel)
            smooth = affine_transform(polygon.simplify(1.0), matrix)
            yield Found(shapely.to_wkb(smooth), int(value), pixels, area, mean)
    finally:
        own.unlink(missing_ok=True)


def _measured(
    shape: Any, bounds: tuple[float, float, float, float], scores: Any, pixel: PixelArea
) -> tuple[int, float, float]:
    """Pixels, m2 and mean score of a polygon in pixel coordinates; some of it at a time."""
    from affine import Affine
    from rasterio.features import rasterize
    from rasterio.windows import Window

    left, top, right, bottom = (int(v) for v in bounds)
    pixels, area, total, scored = 0, 0.0, 0.0, 0
    for row in range(top, bottom, _BLOCK):
        for column in range(left, right, _BLOCK):
            height, width = min(_BLOCK, bottom - row), min(_BLOCK, right - column)
            place = Affine.translation(column, row)
            inside = rasterize([shape], out_shape=(height, width), transform=place, dtype="uint8") != 0
            count = int(inside.sum())
            if not count:
                continue
            value = scores.read(1, window=Window(column, row, width, height))[inside]
            value = value[value != IGNORE]
            pixels, total, scored = pixels + count, total + float(value.sum()), scored + len(value)
            if pixel.known:
                area += count * float(pixel.of([(row, column, height, width)])[0])
    mean = total / scored * scores.scales[0] + scores.offsets[0] if scored else float("nan")
    return pixels, area if pixel.known else float("nan"), mean


def _chunks(found: Iterator[Found], *, empty: bool = False) -> Iterator[list[Found]]:
    """Some at a time; ``empty`` gives one empty list where there is nothing, so that a file is written."""
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


def _geographic(some: Sequence[Found], crs: Any) -> Any:
    """Polygons in longitude and latitude: the driver would turn those of the first write alone."""
    import shapely
    from rasterio.warp import transform

    def turned(points: Any) -> Any:
        return np.column_stack(transform(crs, "EPSG:4326", points[:, 0], points[:, 1]))

    found = shapely.from_wkb(np.array([item.geometry for item in some], object))
    return shapely.to_wkb(shapely.transform(found, turned))


def _layers(temporary: Path, path: Path, found: Iterator[Found], names: Sequence[str], crs: Any) -> int:
    from pyogrio.errors import DataSourceError
    from pyogrio.raw import write

    driver = check_suffix(path)
    # GeoJSON is in longitude and latitude, says its standard
    options = {"RFC7946": "YES"} if driver == "GeoJSON" and crs else {}
    count = 0
    temporary.unlink()
    try:
        for some in _chunks(found, empty=True):
            write(
                temporary,
                _geographic(some, crs) if options else np.array([item.geometry for item in some], object),
                _columns(some, names),
                fields=_FIELDS,
                layer=path.stem,
                geometry_type="Polygon",
                crs="EPSG:4326" if options else crs.to_wkt() if crs else None,
                driver=driver,
                append=temporary.exists(),
                **options,
            )
            count += len(some)
    except DataSourceError as error:
        raise OSError(str(error)) from None
    return count


def _parquet(temporary: Path, found: Iterator[Found], names: Sequence[str], crs: Any) -> int:
    """GeoParquet 1.1: WKB in a column, and what it means in the metadata."""
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    column: dict[str, Any] = {"encoding": "WKB", "geometry_types": ["Polygon"]}
    column["crs"] = crs.to_dict(projjson=True) if crs else None
    meaning = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
    kinds = (pyarrow.int32(), pyarrow.string(), pyarrow.int64(), pyarrow.float64(), pyarrow.float64())
    fields = [*zip(_FIELDS, kinds, strict=True), ("geometry", pyarrow.binary())]
    schema = pyarrow.schema(fields, metadata={"geo": json.dumps(meaning)})
    count = 0
    with ParquetWriter(temporary, schema) as writer:
        for some in _chunks(found):
            columns = [*_columns(some, names), np.array([item.geometry for item in some], object)]
            arrays = [pyarrow.array(list(c), kind) for c, (_, kind) in zip(columns, fields, strict=True)]
            writer.write_table(pyarrow.table(arrays, schema=schema))
            count += len(some)
    return count
