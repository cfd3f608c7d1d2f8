# SPDX-License-Identifier: Apache-2.0
"""Polygons of a vector file, in the CRS of a scene."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from drseg_core.data.manifest import printable
from drseg_core.errors import DatasetError
from drseg_core.extras import require


class Shapes:
    """Shapes in the CRS of a scene, with the value of one column each."""

    def __init__(self, shapes: list[Any], values: list[str]) -> None:
        import shapely

        self.shapes, self.values = shapes, values
        self._tree = shapely.STRtree(shapes)

    def bounds(self) -> tuple[float, float, float, float]:
        """West, south, east and north of all of them."""
        import shapely

        west, south, east, north = shapely.total_bounds(self.shapes)
        return float(west), float(south), float(east), float(north)

    def within(self, west: float, south: float, east: float, north: float) -> list[int]:
        """Which shapes touch a box, in the order of the file."""
        import shapely

        return sorted(int(i) for i in self._tree.query(shapely.box(west, south, east, north)))


def read_shapes(path: Path, field: str | None, crs: Any) -> Shapes:
    """Read a vector file that GDAL reads, such as GeoPackage, GeoJSON or Shapefile.

    Args:
        path: the file.
        field: column whose values are kept; None keeps none.
        crs: of the scene; shapes in another one are transformed.

    Raises:
        DatasetError: no such file, no shape, no such column, or no CRS to go by.
    """
    require("read_shapes", "vectors")
    import shapely
    from pyogrio.errors import DataLayerError, DataSourceError
    from pyogrio.raw import read
    from rasterio.crs import CRS
    from rasterio.warp import transform_geom

    if not path.is_file():
        raise DatasetError(f"read_shapes: {printable(path)} is not a file; expected polygons")
    try:
        meta, _, geometry, columns = read(path.absolute())
    except (DataSourceError, DataLayerError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DatasetError(f"read_shapes: {printable(path)} cannot be read as polygons: {reason}") from None
    fields = list(meta["fields"])
    if field is not None and field not in fields:
        raise DatasetError(
            f"read_shapes: {printable(path)} has no column {field!r}; expected one of {', '.join(fields) or 'none'} "
            "(--field)"
        )
    values = [""] * len(geometry) if field is None else [str(value) for value in columns[fields.index(field)]]
    shapes = shapely.from_wkb(geometry)
    kept = [i for i, shape in enumerate(shapes) if shape is not None and not shape.is_empty]
    if not kept:
        raise DatasetError(f"read_shapes: {printable(path)} has no shape; expected polygons")
    own = meta["crs"]
    if own and crs and CRS.from_user_input(own) != crs:
        moved = transform_geom(own, crs, [shapely.geometry.mapping(shapes[i]) for i in kept])
        return Shapes([shapely.geometry.shape(shape) for shape in moved], [values[i] for i in kept])
    if bool(own) != bool(crs):
        which = "the scene" if own else printable(path)
        raise DatasetError(f"read_shapes: {which} has no CRS; expected one, so that both lie in one place")
    return Shapes([shapes[i] for i in kept], [values[i] for i in kept])
