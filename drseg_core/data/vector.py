# SPDX-License-Identifier: Apache-2.0
"""Polygons of a vector file that lie on a scene, in its CRS."""

from __future__ import annotations

import contextlib
import re
import tempfile
import warnings
from collections import Counter
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

_POINTS = 2048
"""Most points along a parallel of what lies around a scene."""

_STRANGE = re.compile(r"[!;?\x00-\x1f\ud800-\udfff]|^//")
"""What pyogrio takes for a part of an address, such as an archive, or drops."""


class Shapes:
    """Shapes in the CRS of a scene, with the value of one column each; it is empty where a shape has none.

    ``all_values`` are those of the whole file, each once, by size where they are numbers, else by letters. ``hints``
    are warnings of what is not taken as the file has it.
    """

    def __init__(self, shapes: list[Any], values: list[str], all_values: list[str], hints: list[str]) -> None:
        import shapely

        self.shapes, self.values, self.all_values, self.hints = shapes, values, all_values, hints
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
    """Read the polygons of a vector file that GDAL reads, such as GeoPackage, GeoJSON or Shapefile.

    Points and lines are left out, and a hint counts them.

    Args:
        path: the file.
        field: column whose values are kept; None keeps none.
        scene: has ``crs``, ``transform``, ``height`` and ``width``. Of shapes in another CRS what is near the scene is
            transformed, as the CRS of a scene may not reach further.

    Returns:
        The shapes; none where all lie elsewhere.

    Raises:
        DatasetError: no such file, no polygon, no such column, one without a value or of lists, or no CRS to go by.
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
        with plain_path(path) as plain, warnings.catch_warnings():
            # said below, with the name of the file
            warnings.filterwarnings("ignore", "Non closed ring", RuntimeWarning)
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
    values, kind = [""] * len(geometry), "object"
    if field is not None:
        place = fields.index(field)
        kind = meta["dtypes"][place]
        values = [_text(value, kind, path, field) for value in columns[place]]
    hints: list[str] = []
    shapes = _decoded(geometry, path, hints)
    kept = [i for i, shape in enumerate(shapes) if shape is not None and not shape.is_empty]
    if not kept:
        raise DatasetError(f"read_shapes: {printable(path)} has no shape; expected polygons")
    if not np.isfinite(shapely.get_coordinates(shapes)).all():
        raise DatasetError(f"read_shapes: {printable(path)} has a corner that is no number; expected coordinates")
    shapes, others = _polygons(shapes)
    kinds = ", ".join(sorted(others))
    kept = [i for i in kept if not shapes[i].is_empty]
    if not kept:
        raise DatasetError(f"read_shapes: {printable(path)} has no polygon; expected one or more, got {kinds}")
    if others:
        name = printable(Path(path.name))
        hints.append(f"{name}: {others.total()} of its shapes are no polygons and left out ({kinds})")
    numbers = kind.startswith(("int", "uint", "float"))
    all_values = sorted({values[i] for i in kept} - {""}, key=float if numbers else str)
    if field is not None and not all_values:
        raise DatasetError(f"read_shapes: {printable(path)} has no value in column {field!r}; expected class names")
    if field is not None and (empty := sum(not values[i] for i in kept)):
        name = printable(Path(path.name))
        hints.append(f"{name}: {empty} of its polygons have no value in {field!r} and are unknown")
    own = meta["crs"] and CRS.from_user_input(meta["crs"])
    if bool(own) != bool(scene.crs):
        which = "the scene" if own else printable(path)
        raise DatasetError(f"read_shapes: {which} has no CRS; expected one, so that both lie in one place")
    found = shapes[kept]
    if own:
        try:
            if own != scene.crs:
                found = _transformed(found, own, scene)
            if scene.crs.is_geographic:
                found = _turned(found, scene)
        except ValueError as error:
            raise DatasetError(
                f"read_shapes: {printable(path)} cannot be brought into the CRS of the scene; {error} ({scene.crs})"
            ) from None
    # where one is cut, or a line of it crosses itself, a line may be left of it
    found, _ = _polygons(found)
    touching = [(shape, values[i]) for shape, i in zip(found, kept, strict=True) if not shape.is_empty]
    return Shapes([shape for shape, _ in touching], [value for _, value in touching], all_values, hints)


def _text(value: Any, kind: str, path: Path, field: str) -> str:
    """A value of a column as text; empty where there is none, or blanks alone."""
    if isinstance(value, bytes | np.ndarray):
        raise DatasetError(
            f"read_shapes: {printable(path)} has lists or bytes in column {field!r}; expected text or numbers"
        )
    # NaN and NaT are not equal to themselves
    if value is None or value != value:
        return ""
    # where one value is missing, pyogrio has whole numbers and booleans as floats
    if kind == "bool":
        return str(bool(value))
    if isinstance(value, np.floating) and value.is_integer():
        return str(int(value))
    return str(value) if str(value).strip() else ""


def _decoded(geometry: Any, path: Path, hints: list[str]) -> Any:
    """Shapes of WKB; a ring of three corners or more that does not end where it begins is closed."""
    import shapely

    try:
        return shapely.from_wkb(geometry)
    except shapely.errors.ShapelyError:
        shapes = shapely.from_wkb(geometry, on_invalid="fix")
    lost = any(shape is None and wkb is not None for shape, wkb in zip(shapes, geometry, strict=True))
    rings = shapely.get_rings(shapely.get_parts(shapely.get_parts(shapes)))
    if lost or (shapely.get_num_coordinates(rings) < 4).any():
        raise DatasetError(
            f"read_shapes: {printable(path)} has a shape that is damaged or a ring of fewer than three corners; "
            "expected polygons"
        )
    name = printable(Path(path.name))
    hints.append(f"{name}: it has rings that do not end where they begin; a straight line closes each")
    return shapes


def _polygons(shapes: Any) -> tuple[Any, Counter[str]]:
    """The polygons of shapes, and how many there are of each other kind; what has none becomes empty."""
    import shapely

    def parts(shape: Any) -> list[Any]:
        return [p for s in shape.geoms for p in parts(s)] if shape.geom_type == "GeometryCollection" else [shape]

    areas = "Polygon", "MultiPolygon"
    shapes, others = shapes.copy(), Counter[str]()
    for i, shape in enumerate(shapes):
        if shape is not None and shape.geom_type not in areas:
            found = [part for part in parts(shape) if part.geom_type in areas]
            others.update(part.geom_type for part in parts(shape) if part.geom_type not in areas)
            shapes[i] = shapely.union_all(_sound(np.array(found, object)))
    return shapes, others


def _sound(shapes: Any) -> Any:
    """The same where no line crosses itself, which nothing can be cut out of or joined to."""
    import shapely

    crossed = ~shapely.is_valid(shapes)
    shapes = shapes.copy()
    shapes[crossed] = shapely.make_valid(shapes[crossed])
    return shapes


def _transformed(shapes: Any, own: Any, scene: Any) -> Any:
    """What lies near a scene, in its CRS; straight lines in between are lines of many points there."""
    import shapely

    places = _places(own, scene)
    if not np.isfinite(places).any():
        return _moved(shapes, own, scene, places)
    around = _around(own, scene, places)
    shapely.prepare(around)
    shapes = _sound(shapes)
    near = shapely.intersects(around, shapes)
    shapes[~near] = shapely.Polygon()
    over = near & ~shapely.contains_properly(around, shapes)
    shapes[over] = shapely.intersection(shapes[over], around)
    west, south, east, north = shapely.total_bounds(around)
    width, height = max(box.bounds[2] - box.bounds[0] for box in shapely.get_parts(around)), north - south
    length = min(width, height) / 64
    # around a pole it is as flat as a thread: powers of two, as they round nothing
    flat = (min(1.0, 2.0 ** np.floor(np.log2(_POINTS * length / width))), 1.0)
    many = shapely.segmentize(shapely.transform(shapes, lambda p: p * flat), length)
    moved = _moved(shapely.transform(many, lambda p: p / flat), own, scene, places)
    if scene.crs.is_geographic:
        moved = _unwrapped(moved, _turn(scene.crs))
    torn = _torn(moved, scene)
    if len(torn):
        if not _elsewhere(shapes[torn], own, scene, places):
            raise ValueError("expected two shapes where one goes over the edge of its projection")
        moved[torn] = shapely.Polygon()
    return moved


def _moved(shapes: Any, own: Any, scene: Any, places: Any) -> Any:
    """Shapes in the CRS of a scene, without those of their parts that lie nowhere in it."""
    import shapely

    there = np.column_stack(projected(own, scene.crs, *shapely.get_coordinates(shapes).T.tolist()))
    if not np.isfinite(there).all():
        shapes = _seen(shapes, own, there, places)
        there = np.column_stack(projected(own, scene.crs, *shapely.get_coordinates(shapes).T.tolist()))
    return shapely.set_coordinates(shapes.copy(), there)


def _seen(shapes: Any, own: Any, there: Any, places: Any) -> Any:
    """Shapes without the parts all of whose corners lie nowhere, as behind the Earth; ``there`` are all corners."""
    import shapely

    parts, shape = shapely.get_parts(shapes, return_index=True)
    _, part = shapely.get_coordinates(parts, return_index=True)
    known = np.bincount(part, np.isfinite(there).all(1), len(parts))
    lost = known == 0
    points = places[np.isfinite(places).all(-1)]
    turns = np.array([-1, 0, 1])[:, None, None] * (_turn(own) if own.is_geographic else 0, 0)
    inner = shapely.MultiPoint((points + turns).reshape(-1, 2))
    if (known[~lost] < np.bincount(part, minlength=len(parts))[~lost]).any() or (
        shapely.intersects(inner, parts[lost]).any()
    ):
        raise ValueError("expected shapes that end within its projection")
    shapes = shapes.copy()
    for i in np.unique(shape[lost]):
        shapes[i] = shapely.union_all(parts[(shape == i) & ~lost])
    return shapes


def _turn(crs: Any) -> float:
    """A full turn in the units of a CRS that has longitudes."""
    return float(2 * np.pi / crs.units_factor[1])


def _unwrapped(shapes: Any, turn: float) -> Any:
    """Shapes in degrees whose longitudes go on along each line, where they fell back by a turn."""
    import shapely

    points, of = shapely.get_coordinates(shapes, return_index=True)
    fallen = (np.abs(np.diff(points[:, 0])) > turn / 2) & (np.diff(of) == 0)
    for i in np.unique(of[1:][fallen]):
        parts = [_unwrapped_part(part, turn) for part in shapely.get_parts(shapely.get_parts(shapes[i]))]
        shapes[i] = parts[0] if len(parts) == 1 else shapely.union_all(_sound(np.array(parts, object)))
    return shapes


def _unwrapped_part(part: Any, turn: float) -> Any:
    import shapely

    if part.geom_type != "Polygon":
        return shapely.transform(part, lambda p: np.column_stack([np.unwrap(p[:, 0], period=turn), p[:, 1]]))
    lines: list[Any] = []
    for ring in shapely.get_rings(part):
        x, y = shapely.get_coordinates(ring).T
        x = np.unwrap(x, period=turn)
        if abs(x[-1] - x[0]) > turn / 2:
            raise ValueError("expected two shapes where one goes around a pole")
        if lines:
            # a hole lies in its ring
            x = x + turn * np.ceil((lines[0][:, 0].min() - x.min()) / turn - 1e-9)
        lines.append(np.column_stack([x, y]))
    return shapely.Polygon(lines[0], lines[1:])


def _torn(shapes: Any, scene: Any) -> Any:
    """Which shapes have a line that goes over half of a scene, as from one edge of a map to another.

    Its points were near each other.
    """
    import shapely

    parts, shape = shapely.get_parts(shapes, return_index=True)
    pieces, part = shapely.get_parts(parts, return_index=True)
    rings, piece = shapely.get_rings(pieces, return_index=True)
    points, ring = shapely.get_coordinates(rings, return_index=True)
    step = np.abs(np.diff(points, axis=0)).max(1, initial=0)
    far = (step > np.ptp(_corners(scene), axis=0).max() / 2) & (np.diff(ring) == 0)
    return np.unique(shape[part[piece[ring[1:][far]]]])


def _elsewhere(shapes: Any, own: Any, scene: Any, places: Any) -> bool:
    """Whether no shape holds a place of a scene, and all lie in other latitudes."""
    import shapely
    from rasterio.crs import CRS

    inner = shapely.MultiPoint(places[np.isfinite(places).all(-1)])
    west, south, east, north = shapely.total_bounds(shapes)
    many = shapely.segmentize(shapes, max(east - west, north - south) / 64)
    degrees = CRS.from_epsg(4326)
    _, latitude = projected(own, degrees, *shapely.get_coordinates(many).T.tolist())
    there = _places(degrees, scene)
    _, south, _, north = _around(degrees, scene, there).bounds if np.isfinite(there).any() else (0, -90, 0, 90)
    other = (latitude < south).all() or (latitude > north).all()
    return bool(other) and not shapely.intersects(inner, shapes).any()


def _corners(scene: Any) -> Any:
    places = [(0, 0), (scene.width, 0), (scene.width, scene.height), (0, scene.height)]
    return np.array([scene.transform @ place for place in places])


def _turned(shapes: Any, scene: Any) -> Any:
    """Shapes in degrees where they meet a scene: longitudes are written from -180 to 180, by some from 0 to 360."""
    import shapely

    x = _corners(scene)[:, 0]
    # what only touches, but for rounding, does not meet it
    west, east = x.min() + np.ptp(x) * 1e-6, x.max() - np.ptp(x) * 1e-6
    turn = _turn(scene.crs)
    turns = turn * np.array([-1, 0, 1])
    first, _, last, _ = shapely.bounds(shapes).T[..., None]
    near = (first + turns < east) & (last + turns > west)
    shapes = shapes.copy()
    several = near.sum(1) > 1
    for by, here in zip(turns[[0, 2]], near[:, [0, 2]].T, strict=True):
        alone = here & ~several
        shapes[alone] = shapely.transform(shapes[alone], lambda p, by=by: p + (by, 0))
    for i in np.flatnonzero(several):
        copies = np.array([shapely.transform(shapes[i], lambda p, by=by: p + (by, 0)) for by in turns[near[i]]], object)
        shapes[i] = shapely.union_all(_sound(copies))
    return shapes


def _places(own: Any, scene: Any) -> Any:
    """Where (N, N) points of a scene are in another CRS; NaN where that has no place for one."""
    column, row = np.meshgrid(*(np.linspace(0, n, _SAMPLES) for n in (scene.width, scene.height)))
    x, y = projected(scene.crs, own, *(v.tolist() for v in scene.transform @ (column.ravel(), row.ravel())))
    return np.stack([x, y], axis=-1).reshape(_SAMPLES, _SAMPLES, 2)


def _around(own: Any, scene: Any, places: Any) -> Any:
    """A box around the places of a scene, with a margin; in longitudes, one for each turn in which they are written."""
    import shapely

    x, y = places[np.isfinite(places).all(-1)].T
    if not own.is_geographic:
        margin = max(np.ptp(x), np.ptp(y)) / _SAMPLES
        return shapely.MultiPolygon(
            [shapely.box(x.min() - margin, y.min() - margin, x.max() + margin, y.max() + margin)]
        )
    turn = _turn(own)
    poles = _poles(own, scene)
    if np.ptp(x) > turn / 2:
        x = x % turn
    whole = bool(np.ptp(x) > turn / 2 or any(poles))
    # around a pole or the whole Earth only latitudes bound it
    margin = 2 * np.ptp(y) / _SAMPLES if whole else max(np.ptp(x), np.ptp(y)) / _SAMPLES
    # a pole may be nowhere in the scene's CRS: what does not reach it has a margin that does not, either
    south, north = (
        side * (turn / 4 if pole else min(far + margin, (far + turn / 4) / 2))
        for side, far, pole in zip((-1, 1), (-y.min(), y.max()), poles, strict=True)
    )
    if whole:
        return shapely.MultiPolygon([shapely.box(-turn, south, turn, north)])
    west, east = x.min() - margin, x.max() + margin
    boxes = [shapely.box(west + by * turn, south, east + by * turn, north) for by in (0, -1, 1)]
    # longitudes are written from -180 to 180, by some from 0 to 360
    return shapely.MultiPolygon([box for box in boxes if box.bounds[0] < turn and box.bounds[2] > -turn / 2])


def _poles(own: Any, scene: Any) -> list[bool]:
    """Whether the south pole and the north pole lie in a scene, or so near that it may reach them."""
    x, y = projected(own, scene.crs, [0, 0], [-_turn(own) / 4, _turn(own) / 4])
    column, row = ~scene.transform @ (x, y)
    beside = scene.width / _SAMPLES, scene.height / _SAMPLES
    return [
        bool(abs(c - scene.width / 2) <= scene.width / 2 + beside[0])
        and bool(abs(r - scene.height / 2) <= scene.height / 2 + beside[1])
        for c, r in zip(column, row, strict=True)
    ]
