# SPDX-License-Identifier: Apache-2.0
"""Polygons of a vector file that lie on a scene, in its CRS."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from drseg_core.data.manifest import printable
from drseg_core.data.raster import points_elsewhere
from drseg_core.errors import DatasetError
from drseg_core.extras import require

_SAMPLES = 21
"""Points a side of a scene by which its place in another CRS is known."""

_STRANGE = re.compile(r"[!;?\x00-\x1f\ud800-\udfff]|^//")
"""What pyogrio takes for a part of an address, such as an archive, or drops."""


class Shapes:
    """Shapes in the CRS of a scene, with the value of one column each; ``all_values`` are those of the whole file."""

    def __init__(self, shapes: list[Any], values: list[str], all_values: list[str]) -> None:
        import shapely

        self.shapes, self.values, self.all_values = shapes, values, all_values
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


@contextlib.contextmanager
def plain_path(path: Path) -> Iterator[Path]:
    """A path of the same file that pyogrio takes as it is: a link in a temporary folder, where this one is none.

    What belongs to the file, such as the ``.dbf`` of a Shapefile, is linked beside it. The file need not exist.
    """
    path = path.absolute()
    if not _STRANGE.search(str(path)):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="drseg-") as temporary:
        folder = Path(temporary, "folder")
        if not _STRANGE.search(path.name):
            folder.symlink_to(path.parent)
            yield folder / path.name
            return
        folder.mkdir()
        others = [other for other in path.parent.iterdir() if other.name.startswith(f"{path.stem}.")]
        for other in {path, *others}:
            (folder / f"file{other.name.removeprefix(path.stem)}").symlink_to(other)
        yield folder / f"file{path.suffix}"


def read_shapes(path: Path, field: str | None, scene: Any) -> Shapes:
    """Read a vector file that GDAL reads, such as GeoPackage, GeoJSON or Shapefile.

    Args:
        path: the file.
        field: column whose values are kept; None keeps none.
        scene: has ``crs``, ``transform``, ``height`` and ``width``. Of shapes in another CRS what is near the scene is
            transformed, as the CRS of a scene may not reach further.

    Returns:
        The shapes; none where all lie elsewhere.

    Raises:
        DatasetError: no such file, no shape, no such column, or no CRS to go by.
    """
    require("read_shapes", "vectors")
    import shapely
    from pyogrio.errors import DataLayerError, DataSourceError
    from pyogrio.raw import read
    from rasterio.crs import CRS

    if not path.is_file():
        raise DatasetError(f"read_shapes: {printable(path)} is not a file; expected polygons")
    if points_elsewhere(path):
        raise DatasetError(f"read_shapes: {printable(path)} points to something remote; expected polygons in a file")
    try:
        with plain_path(path) as plain:
            meta, _, geometry, columns = read(plain)
    except (DataSourceError, DataLayerError, ValueError, OSError) as error:
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
    own = meta["crs"] and CRS.from_user_input(meta["crs"])
    if bool(own) != bool(scene.crs):
        which = "the scene" if own else printable(path)
        raise DatasetError(f"read_shapes: {which} has no CRS; expected one, so that both lie in one place")
    found = [shapes[i] for i in kept]
    if own and own != scene.crs:
        found = _transformed(found, own, scene)
    touching = [(shape, values[i]) for shape, i in zip(found, kept, strict=True) if not shape.is_empty]
    if not all(np.isfinite(shape.bounds).all() for shape, _ in touching):
        raise DatasetError(f"read_shapes: {printable(path)} cannot be brought into the CRS of the scene ({scene.crs})")
    return Shapes([shape for shape, _ in touching], [value for _, value in touching], [values[i] for i in kept])


def _transformed(shapes: list[Any], own: Any, scene: Any) -> list[Any]:
    """What lies near a scene, in its CRS; straight lines in between are lines of many points there."""
    import shapely
    from rasterio.warp import transform

    around = _around(own, scene)
    if around is not None:
        sound = [shape if shape.is_valid else shapely.make_valid(shape) for shape in shapes]
        west, south, east, north = shapely.total_bounds(around)
        length = min(max(box.bounds[2] - box.bounds[0] for box in shapely.get_parts(around)), north - south) / 64
        shapes = list(shapely.segmentize(shapely.intersection(sound, around), length))

    def moved(points: Any) -> Any:
        return np.column_stack(transform(own, scene.crs, points[:, 0], points[:, 1]))

    return list(shapely.transform(shapes, moved))


def _around(own: Any, scene: Any) -> Any:
    """A box around a scene, with a margin, in another CRS; two at the date line; None where the CRS ends within it."""
    import shapely
    from rasterio.warp import transform

    column, row = (v.ravel() for v in np.meshgrid(*(np.linspace(0, n, _SAMPLES) for n in (scene.width, scene.height))))
    x, y = (np.array(v) for v in transform(scene.crs, own, *(scene.transform @ (column, row))))
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return None
    if own.is_geographic and np.ptp(x) > 180:
        x = x % 360
        if np.ptp(x) > 180:
            return None
    margin = np.array([max(np.ptp(x), np.ptp(y)) / _SAMPLES] * 2)
    west, south = np.array([x.min(), y.min()]) - margin
    east, north = np.array([x.max(), y.max()]) + margin
    turns = (0, -360, 360) if own.is_geographic else (0,)
    boxes = [shapely.box(west + turn, south, east + turn, north) for turn in turns]
    if own.is_geographic:
        # longitudes are written from -180 to 180, by some from 0 to 360
        boxes = [box for box in boxes if box.bounds[0] < 360 and box.bounds[2] > -180]
    return shapely.MultiPolygon(boxes)
