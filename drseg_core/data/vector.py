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

from drseg_core.data.ground import projected
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
        try:
            found = _transformed(found, own, scene)
        except ValueError as error:
            raise DatasetError(
                f"read_shapes: {printable(path)} cannot be brought into the CRS of the scene; {error} ({scene.crs})"
            ) from None
    if own and own.is_geographic and scene.crs.is_geographic:
        found = [_turned(shape, scene) for shape in found]
    touching = [(shape, values[i]) for shape, i in zip(found, kept, strict=True) if not shape.is_empty]
    if not all(np.isfinite(shape.bounds).all() for shape, _ in touching):
        raise DatasetError(f"read_shapes: {printable(path)} has a corner that is no number; expected coordinates")
    return Shapes([shape for shape, _ in touching], [value for _, value in touching], [values[i] for i in kept])


def _transformed(shapes: list[Any], own: Any, scene: Any) -> list[Any]:
    """What lies near a scene, in its CRS; straight lines in between are lines of many points there."""
    import shapely

    around = _around(own, scene)
    if around is not None:
        sound = [shape if shape.is_valid else shapely.make_valid(shape) for shape in shapes]
        west, south, east, north = shapely.total_bounds(around)
        length = min(max(box.bounds[2] - box.bounds[0] for box in shapely.get_parts(around)), north - south) / 64
        shapes = list(shapely.segmentize(shapely.intersection(sound, around), length))
    there = np.column_stack(projected(own, scene.crs, *shapely.get_coordinates(shapes).T.tolist()))
    if not np.isfinite(there).all():
        raise ValueError("expected shapes that end within its projection")
    moved = shapely.set_coordinates(np.array(shapes, object), there)
    if around is not None and _torn(moved, scene):
        raise ValueError("expected two shapes where one goes over the edge of its projection")
    return list(moved)


def _torn(shapes: Any, scene: Any) -> bool:
    """Whether a line whose points were near each other goes over half of a scene: from one edge of a map to another."""
    import shapely

    points, ring = shapely.get_coordinates(
        shapely.get_rings(shapely.get_parts(shapely.get_parts(shapes))), return_index=True
    )
    step = np.abs(np.diff(points, axis=0))[np.diff(ring) == 0]
    return bool(len(step)) and bool((step.max(0) > np.ptp(_corners(scene), axis=0).max() / 2).any())


def _corners(scene: Any) -> Any:
    places = [(0, 0), (scene.width, 0), (scene.width, scene.height), (0, scene.height)]
    return np.array([scene.transform @ place for place in places])


def _turned(shape: Any, scene: Any) -> Any:
    """A shape in degrees where it meets a scene: longitudes are written from -180 to 180, by some from 0 to 360."""
    import shapely

    x = _corners(scene)[:, 0]
    # what only touches, but for rounding, does not meet it
    west, east = x.min() + np.ptp(x) * 1e-6, x.max() - np.ptp(x) * 1e-6
    turn = 2 * np.pi / scene.crs.units_factor[1]
    copies = [shapely.transform(shape, lambda points, by=by: points + (by * turn, 0)) for by in (-1, 0, 1)]
    near = [copy for copy in copies if not copy.is_empty and copy.bounds[0] < east and copy.bounds[2] > west]
    return near[0] if len(near) == 1 else shapely.union_all(near) if near else shape


def _around(own: Any, scene: Any) -> Any:
    """A box around a scene, with a margin, in another CRS; two at the date line; None where it lies nowhere in that."""
    import shapely

    column, row = (v.ravel() for v in np.meshgrid(*(np.linspace(0, n, _SAMPLES) for n in (scene.width, scene.height))))
    x, y = projected(scene.crs, own, *(v.tolist() for v in scene.transform @ (column, row)))
    x, y = x[np.isfinite(x)], y[np.isfinite(x)]
    if not len(x):
        return None
    if own.is_geographic and np.ptp(x) > 180:
        x = x % 360
        if np.ptp(x) > 180:
            # around a pole or the whole Earth only latitudes bound it
            beside = 2 * np.ptp(y) / _SAMPLES
            return shapely.MultiPolygon([shapely.box(-360, max(y.min() - beside, -90), 360, min(y.max() + beside, 90))])
    margin = np.array([max(np.ptp(x), np.ptp(y)) / _SAMPLES] * 2)
    west, south = np.array([x.min(), y.min()]) - margin
    east, north = np.array([x.max(), y.max()]) + margin
    turns = (0, -360, 360) if own.is_geographic else (0,)
    boxes = [shapely.box(west + turn, south, east + turn, north) for turn in turns]
    if own.is_geographic:
        # longitudes are written from -180 to 180, by some from 0 to 360
        boxes = [box for box in boxes if box.bounds[0] < 360 and box.bounds[2] > -180]
    return shapely.MultiPolygon(boxes)
