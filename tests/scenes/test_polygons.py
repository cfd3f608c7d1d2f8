# SPDX-License-Identifier: Apache-2.0
"""The areas of a map: how they are numbered, measured, joined and traced."""

from __future__ import annotations

import json
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from drseg_core.data.dataset import IGNORE
from drseg_core.data.ground import projected
from drseg_core.errors import ResourceError
from drseg_core.files import atomic_path
from drseg_core.scenes import polygons, regions
from drseg_core.scenes.regions import find_regions
from tests.scenes.test_predict import write

rasterio = pytest.importorskip("rasterio")
pyogrio = pytest.importorskip("pyogrio")
shapely = pytest.importorskip("shapely")
from rasterio.features import rasterize  # noqa: E402
from rasterio.transform import from_origin  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
NAMES = [f"c{i}" for i in range(6)]


def noise(seed: int, size: tuple[int, int] = (40, 50), classes: int = 3, nodata: float = 0.1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    value = rng.integers(0, classes, size).astype(np.uint8)
    value[rng.random(size) < nodata] = IGNORE
    return value


def opened(path: Path, value: np.ndarray, **profile):
    return rasterio.open(write(path, value[None], nodata=255, **profile))


def found(tmp_path: Path, value: np.ndarray, min_area: float = 0.0, score: np.ndarray | None = None):
    labels, scores = tmp_path / "labels.tif", tmp_path / "scores.tif"
    own = tmp_path / "own.tif"
    with opened(labels, value) as one, opened(scores, value if score is None else score) as other:
        result = find_regions(one, other, own, min_area)
    assert {path.name for path in tmp_path.iterdir()} == {"labels.tif", "scores.tif", "own.tif"}
    with rasterio.open(own) as file:
        return result, file.read(1)


def flooded(value: np.ndarray) -> list[set[tuple[int, int]]]:
    """Areas of one class, pixel by pixel."""
    left = {(int(r), int(c)) for r, c in np.argwhere(value != IGNORE)}
    areas = []
    while left:
        waiting = [left.pop()]
        area = set(waiting)
        while waiting:
            r, c = waiting.pop()
            for near in ((r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)):
                if near in left and value[near] == value[r, c]:
                    left.remove(near)
                    area.add(near)
                    waiting.append(near)
        areas.append(area)
    return areas


@pytest.mark.parametrize("side", [5, 16, 512])
@pytest.mark.parametrize("seed", range(3))
def test_areas_are_those_of_a_flood(tmp_path, monkeypatch, side, seed):
    monkeypatch.setattr(regions, "SIDE", side)
    value = noise(seed)
    score = np.random.default_rng(seed).integers(0, 251, value.shape).astype(np.uint8)
    got, at = found(tmp_path, value, score=score)
    expected = flooded(value)
    inside = np.flatnonzero(got.label != IGNORE)
    assert len(inside) == len(expected)
    for area in expected:
        rows, columns = np.array(sorted(area)).T
        (number,) = set(at[rows, columns].tolist())
        assert got.pixels[number] == len(area) and got.label[number] == value[rows[0], columns[0]]
        assert got.score[number] == pytest.approx(score[rows, columns].mean()) and np.isnan(got.area[number])


def assert_sieved(value: np.ndarray, got, at: np.ndarray, smallest: int) -> None:
    """Nodata is where it was; what is too small has no neighbour; areas of one class do not touch."""
    result = got.label[at]
    assert np.array_equal(result == IGNORE, value == IGNORE)
    areas = flooded(result)
    inside = np.flatnonzero(got.label != IGNORE)
    assert sorted(map(len, areas)) == sorted(got.pixels[inside].tolist())
    for area in areas:
        if len(area) < smallest:
            around = {(r + y, c + x) for r, c in area for y, x in ((1, 0), (-1, 0), (0, 1), (0, -1))} - area
            assert all(
                not (0 <= r < len(result) and 0 <= c < result.shape[1]) or result[r, c] == 255 for r, c in around
            )


@pytest.mark.parametrize("side", [7, 512])
@pytest.mark.parametrize("smallest", [2, 5, 40, 10_000])
@pytest.mark.parametrize("seed", range(3))
def test_no_small_area_with_a_neighbour_is_left(tmp_path, monkeypatch, side, smallest, seed):
    monkeypatch.setattr(regions, "SIDE", side)
    value = noise(seed, nodata=0.25 if smallest == 5 else 0.05)
    assert_sieved(value, *found(tmp_path, value, smallest), smallest)


def test_small_areas_among_small_ones(tmp_path):
    # nothing is large: a sieve that looks for a large neighbour leaves all as it is
    checked = (np.indices((20, 20)).sum(0) % 2).astype(np.uint8)
    got, _ = found(tmp_path, checked, 50)
    assert got.pixels.sum() == 400 and got.pixels.min() >= 50
    # specks of two classes side by side within a large area
    value = np.zeros((20, 20), np.uint8)
    value[5, 5], value[5, 6], value[6, 5], value[6, 6] = 1, 2, 2, 1
    assert found(tmp_path, value, 10)[0].pixels.tolist() == [400]


def test_the_longest_border_counts(tmp_path):
    value = np.zeros((20, 20), np.uint8)
    value[:, 10:], value[8:11, 9:12] = 1, 2
    value[8:11, 9] = 0
    # eight sides with class 1 and three with class 0
    got, _ = found(tmp_path, value, 10)
    assert sorted(zip(got.label.tolist(), got.pixels.tolist(), strict=True)) == [(0, 200), (1, 200)]
    # two areas of one class become one over what lay between them
    value = np.zeros((10, 21), np.uint8)
    value[:, 10] = 1
    assert found(tmp_path, value, 11)[0].pixels.tolist() == [210]


def traced(tmp_path: Path, value: np.ndarray, min_area: float = 0.0, side: float = 0.5, **options):
    place = {"crs": "EPSG:32632", "transform": from_origin(355_000, 5_640_000, side, side)}
    labels = write(tmp_path / "labels.tif", value[None], nodata=255, **place)
    part = tmp_path / "part.gpkg"
    part.touch()
    polygons.write_polygons(labels, labels, part, tmp_path / "map.gpkg", NAMES, min_area=min_area, **options)
    meta, _, geometry, columns = pyogrio.raw.read(part)
    part.unlink()
    return shapely.from_wkb(geometry), dict(zip(meta["fields"], columns, strict=True)), place["transform"]


@pytest.mark.parametrize("side", [0.5, 10.0])
def test_simplification_keeps_areas(tmp_path, side):
    rng = np.random.default_rng(0)
    rows, columns = np.indices((200, 200))
    value = np.zeros((200, 200), np.uint8)
    for number in range(60):
        # turned rectangles and ellipses, also of a few pixels
        angle, (y, x) = rng.random() * np.pi, rng.integers(0, 200, 2)
        u = (rows - y) * np.cos(angle) + (columns - x) * np.sin(angle)
        v = (columns - x) * np.cos(angle) - (rows - y) * np.sin(angle)
        long, short = rng.uniform(1, 25), rng.uniform(1, 8)
        inside = (abs(u) < long) & (abs(v) < short) if number % 2 else (u / long) ** 2 + (v / short) ** 2 < 1
        value[inside] = number % 5 + 1
    shapes, columns_of, transform = traced(tmp_path, value, side=side)
    assert columns_of["pixels"].min() <= 3 and len(shapes) > 60
    assert np.allclose(shapely.area(shapes), columns_of["pixels"] * side**2, rtol=1e-6)
    assert shapely.is_valid(shapes).all()
    plain = sum(shapely.get_num_coordinates(shapely.geometry.shape(s)) for s, _ in rasterio.features.shapes(value))
    assert shapely.get_num_coordinates(shapes).sum() < 0.9 * plain
    # each border stays within half a pixel: the middle of a pixel is on its side of it, but for those on the line
    back = rasterize(zip(shapes, columns_of["class_id"], strict=True), value.shape, transform=transform, fill=9)
    assert (back == value).mean() > 0.97


def test_pixels_area_and_score_of_polygons(tmp_path):
    value = noise(3, (30, 30), classes=2)
    _, columns, _ = traced(tmp_path, value)
    assert sorted(columns["pixels"]) == sorted(map(len, flooded(value)))
    # UTM near its central meridian
    assert np.allclose(columns["area_m2"], columns["pixels"] * 0.25, rtol=2e-3)
    # the labels stand in for the scores
    assert np.array_equal(columns["mean_score"], columns["class_id"])
    _, columns, _ = traced(tmp_path, noise(3, (30, 30), nodata=0), 2.0)
    assert columns["area_m2"].min() >= 2.0


def test_geojson_is_that_of_the_standard(tmp_path, monkeypatch):
    monkeypatch.setattr(polygons, "AT_A_TIME", 2)
    value = np.zeros((20, 30), np.uint8)
    value[5:15, 5:15], value[8:10, 8:10], value[17, 20], value[:, :2] = 1, 2, 1, IGNORE
    # rows from south to north: rings run the other way in pixels
    for turn in (1, -1):
        place = rasterio.Affine(10, 0, 500_000, 0, -10 * turn, 5_600_000)
        labels = write(tmp_path / "labels.tif", value[None], nodata=255, crs="EPSG:32632", transform=place)
        scores = write(tmp_path / "scores.tif", np.full_like(value, 255)[None], crs="EPSG:32632", transform=place)
        path = tmp_path / "map.geojson"
        names = ['a "quoted" name', "Straße", "水"]
        assert polygons.write_polygons(labels, scores, path, path, names) == 4
        content = json.loads(path.read_text(encoding="utf-8"))
        assert content["type"] == "FeatureCollection" and "crs" not in content
        features = content["features"]
        # what has no score has none
        assert all(f["properties"]["mean_score"] is None for f in features)
        assert sorted(f["properties"]["class"] for f in features) == sorted([*names, "Straße"])
        shapes = [shapely.geometry.shape(f["geometry"]) for f in features]
        for shape in shapes:
            assert shape.exterior.is_ccw and not any(ring.is_ccw for ring in shape.interiors)
        assert sorted(len(shape.interiors) for shape in shapes) == [0, 0, 1, 2]
        assert 8.99 < shapely.total_bounds(shapes)[0] and shapely.total_bounds(shapes)[2] < 9.01
        assert max(len(repr(v).partition(".")[2]) for s in shapes for v in s.exterior.coords[0]) <= 7
        meta, _, geometry, columns = pyogrio.raw.read(path)
        assert meta["crs"] == "EPSG:4326" and len(geometry) == 4 and pyogrio.list_layers(path)[0][0] == "map"
    plain = write(tmp_path / "plain.tif", value[None], nodata=255)
    polygons.write_polygons(plain, plain, path, path, names)
    features = json.loads(path.read_text(encoding="utf-8"))["features"]
    assert all(f["properties"]["area_m2"] is None for f in features)


def as_geojson(tmp_path: Path, value: np.ndarray, crs: str, transform) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shapes in degrees, their classes, and their areas in pixels."""
    labels = write(tmp_path / "labels.tif", value[None], nodata=255, crs=crs, transform=transform)
    path = tmp_path / "map.geojson"
    polygons.write_polygons(labels, labels, path, path, NAMES)
    features = json.loads(path.read_text())["features"]
    shapes = np.array([shapely.geometry.shape(f["geometry"]) for f in features])
    return shapes, *(np.array([f["properties"][name] for f in features]) for name in ("class_id", "pixels"))


def middle_classes(shapes, labels, crs, transform, size) -> np.ndarray:
    """The class at the middle of each pixel, as GeoJSON has it."""
    row, column = np.indices(size)
    x, y = projected(crs, "EPSG:4326", *(v.ravel().tolist() for v in transform @ (column + 0.5, row + 0.5)))
    found = np.full(row.size, IGNORE)
    points = shapely.points((x + 180) % 360 - 180, y)
    point, shape = shapely.STRtree(shapes).query(points, "within")
    found[point] = labels[shape]
    return found.reshape(size)


UTM, WORLD = "EPSG:32660", "EPSG:3857"
AROUND = 20_037_508.342789244
ACROSS = {
    "utm": (UTM, rasterio.Affine(500, 0, 691_000, 0, -500, 5_782_000)),
    "turned": (UTM, rasterio.Affine(400, 300, 685_000, 300, -400, 5_776_000)),
    "mercator": (WORLD, rasterio.Affine(500, 0, AROUND - 9_700, 0, -500, 6_800_000)),
    "degrees": ("EPSG:4326", from_origin(179.9, 52, 0.005, 0.005)),
    "from 0 to 360": ("EPSG:4326", from_origin(185, 52, 0.005, 0.005)),
    "world": (WORLD, from_origin(-AROUND, AROUND, AROUND / 20, AROUND / 20)),
    "world in degrees": ("EPSG:4326", from_origin(-180, 90, 9, 4.5)),
    "elsewhere": ("EPSG:32632", from_origin(355_000, 5_640_000, 0.5, 0.5)),
}


@pytest.mark.parametrize("place", ACROSS)
def test_geojson_is_cut_at_the_antimeridian(tmp_path, place):
    crs, transform = ACROSS[place]
    value = np.zeros((40, 40), np.uint8)
    # a hole on both sides, one within another, one that begins on the other side, areas of one side
    value[5:30, 10:35], value[15:25, 15:30], value[18:20, 18:28], value[20:23, 18:20] = 1, 2, 0, 3
    value[33:38, 3:8], value[33:38, 30:36], value[:2] = 4, 5, IGNORE
    shapes, labels, _ = as_geojson(tmp_path, value, crs, transform)
    assert shapely.is_valid(shapes).all() and len(shapes) == 7
    for part in shapely.get_parts(shapes):
        assert part.exterior.is_ccw and not any(ring.is_ccw for ring in part.interiors)
        west, south, east, north = part.bounds
        assert -180 <= west and east <= 180 and -90 <= south and north <= 90
        assert east - west < 1 or "world" in place
    several = sum(shape.geom_type == "MultiPolygon" for shape in shapes)
    assert several > 1 if place in ("utm", "turned", "mercator", "degrees") else several == 0
    found = middle_classes(shapes, labels, crs, transform, value.shape)
    assert np.array_equal(found, value)


@pytest.mark.parametrize(("crs", "pole"), [("EPSG:3413", 90), ("EPSG:3031", -90)])
def test_an_area_around_a_pole_reaches_it(tmp_path, crs, pole):
    row, column = np.indices((40, 40))
    far = np.hypot(row - 19.3, column - 20.2)
    value = np.select([far < 6, far < 12, far < 18], [1, 2, 3], IGNORE).astype(np.uint8)
    transform = from_origin(-20_300, 20_700, 1000, 1000)
    shapes, labels, _ = as_geojson(tmp_path, value, crs, transform)
    assert shapely.is_valid(shapes).all() and sorted(labels) == [1, 2, 3]
    for shape, label in zip(shapes, labels, strict=True):
        west, south, east, north = shape.bounds
        assert (west, east) == (-180, 180) and (pole in (south, north)) == (label == 1)
    # a straight line in degrees bends on the map
    assert (middle_classes(shapes, labels, crs, transform, value.shape) == value).mean() > 0.97


DISK = "+proj=geos +h=35785831 +lon_0=0 +sweep=y +datum=WGS84 +units=m"
PARTLY_ON_EARTH = {
    "disk": (DISK, from_origin(-5.5e6, 5.5e6, 2e5, 2e5)),
    "part of it": (DISK, from_origin(-5.5e6, 3e6, 8e4, 8e4)),
    "orthographic": ("+proj=ortho +lat_0=40 +lon_0=10 +datum=WGS84", from_origin(-6.5e6, 6.5e6, 2e5, 2e5)),
    "Mollweide": ("ESRI:54009", from_origin(-1.81e7, 9.1e6, 6.5e5, 3e5)),
    "interrupted": ("+proj=igh +datum=WGS84", from_origin(-2.01e7, 9e6, 7e5, 3e5)),
    "nowhere": ("EPSG:32632", from_origin(5e7, 9e9, 10, 10)),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("place", PARTLY_ON_EARTH)
def test_polygons_off_the_earth_are_left_out_of_geojson(tmp_path, caplog, monkeypatch, place):
    monkeypatch.setattr(polygons, "AT_A_TIME", 50)
    name, transform = PARTLY_ON_EARTH[place]
    crs = rasterio.crs.CRS.from_user_input(name)
    value = noise(2, (56, 56), nodata=0)
    # a long one over the whole map, and one of four points from the left side to the right
    value[30:], value[40:42] = 1, 2
    shapes, labels, pixels = as_geojson(tmp_path, value, crs, transform)
    corners = shapely.get_coordinates(shapes)
    assert np.isfinite(corners).all() and (abs(corners) <= (180, 90)).all()
    whole = tmp_path / "map.gpkg"
    whole.touch()
    count = polygons.write_polygons(tmp_path / "labels.tif", tmp_path / "labels.tif", whole, whole, NAMES)
    assert count == len(flooded(value)) > len(shapes) and bool(len(shapes)) == (place != "nowhere")
    lost = f"{count - len(shapes)} of {count} polygons ({value.size - pixels.sum():.0f} pixels) are left out"
    assert [record.getMessage() for record in caplog.records] == [
        f"map.geojson: {lost}: a corner is not on Earth, or outside of the projection; .gpkg has all"
    ]
    # what is there is where it was
    if place == "disk":
        found = middle_classes(shapes, labels, crs, transform, value.shape)
        assert (found == value)[found != IGNORE].mean() > 0.97


def test_polygons_end_at_the_poles(tmp_path, caplog):
    # half a pixel beyond them, as grids have whose outer pixels have their middle there
    value = np.arange(37, dtype=np.uint8)[:, None].repeat(72, 1) % 3
    shapes, _, pixels = as_geojson(tmp_path, value, "EPSG:4326", from_origin(-180, 92.5, 5, 5))
    assert shapely.total_bounds(shapes).tolist() == [-180, -90, 180, 90]
    assert pixels.sum() == value.size and not caplog.records


@pytest.mark.parametrize("side", [10.0, 0.5, 0.01, 0.0001])
@pytest.mark.parametrize("angle", [0, 30])
def test_degrees_are_as_fine_as_the_pixels(tmp_path, side, angle):
    transform = rasterio.Affine.translation(355_000, 7_640_000) @ rasterio.Affine.rotation(angle)
    transform = transform @ rasterio.Affine.scale(side, -side)
    shapes, _, pixels = as_geojson(tmp_path, noise(1, (20, 20)), "EPSG:32632", transform)
    assert shapely.is_valid(shapes).all()
    # the ground of a pixel in degrees, which is nearly the same all over the map
    areas = shapely.area(shapes) / pixels
    assert np.allclose(areas, np.median(areas), rtol=0.03)
    digits = max(len(np.format_float_positional(v).partition(".")[2]) for v in shapely.get_coordinates(shapes).ravel())
    assert digits == {10.0: 7, 0.5: 8, 0.01: 9, 0.0001: 11}[side]


STEMS = {
    "map": "map",
    "(1) map": "1) map",
    "[x": "x",
    "+m-1": "m-1",
    ".hidden": "hidden",
    "~": "classes",
    '"quoted" m': 'quoted" m',
    "map!": "map!",
    "a;b?": "a;b?",
    "two\nlines": "two_lines",
    "Gebäude 水": "Gebäude 水",
    "gpkg_map": "classes_gpkg_map",
    "SQLite_x": "classes_SQLite_x",
    "ogr_empty_table": "classes_ogr_empty_table",
    "ogr_x": "ogr_x",
}


@pytest.mark.parametrize("folder", ["plain", "Fotos!", "a\n;b"])
@pytest.mark.parametrize("suffix", [".gpkg", ".geojson", ".parquet"])
def test_a_file_of_polygons_has_any_name(tmp_path, monkeypatch, folder, suffix):
    """GeoPackage takes fewer names of layers than the system names of files, and pyogrio fewer paths."""
    monkeypatch.setattr(polygons, "AT_A_TIME", 2)
    place = {"crs": "EPSG:32632", "transform": from_origin(355_000, 5_640_000, 0.5, 0.5)}
    value = noise(0, (6, 6))
    labels = write(tmp_path / "labels.tif", value[None], nodata=255, **place)
    (tmp_path / folder).mkdir()
    stems = STEMS if folder == "plain" else {"(1) map!": "1) map!", "map": "map"}
    for stem, layer in stems.items():
        path = tmp_path / folder / f"{stem}{suffix}"
        with atomic_path(path) as temporary:
            count = polygons.write_polygons(labels, labels, temporary, path, NAMES)
        assert count == len(flooded(value)) and [file.name for file in path.parent.iterdir()] == [path.name]
        found = path.rename(tmp_path / f"found{suffix}")
        if suffix != ".parquet":
            assert pyogrio.read_info(found)["features"] == count
        if suffix == ".gpkg":
            assert pyogrio.list_layers(found)[:, 0].tolist() == [layer]


@pytest.mark.parametrize("suffix", [".gpkg", ".geojson", ".parquet"])
def test_a_disk_that_is_full_while_polygons_are_written(tmp_path, monkeypatch, suffix):
    # Python leaves what it compiled cut short there, for all that import it later
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    value = noise(0, (100, 120))
    place = {"crs": "EPSG:32632", "transform": from_origin(355_000, 5_640_000, 1, 1)}
    labels = write(tmp_path / "labels.tif", value[None], nodata=255, **place)
    path, part = tmp_path / f"map{suffix}", tmp_path / f"part{suffix}"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for allowed in (1000, 40_000, 60_000, 120_000):
            part.touch()
            resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, limits[1]))
            with pytest.raises(ResourceError, match=f"map{suffix} cannot be written: ") as caught:
                polygons.write_polygons(labels, labels, part, path, NAMES)
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert "\n" not in str(caught.value)
            assert {p.name for p in tmp_path.iterdir()} - {part.name} <= {"labels.tif", f"{part.name}-journal"}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    part.unlink(missing_ok=True)
    part.touch()
    assert polygons.write_polygons(labels, labels, part, path, NAMES) == len(flooded(value))


@pytest.mark.parametrize("name", ["part.areas.parts.tif", "part.areas.tif"])
def test_areas_that_are_lost_on_the_disk_are_noticed(tmp_path, monkeypatch, name):
    """As GDAL leaves a file whose last block found no room: what is not there is read as zeros."""
    make = regions._numbers
    value = noise(0, (600, 30))
    place = {"crs": "EPSG:32632", "transform": from_origin(355_000, 5_640_000, 1, 1)}
    labels = write(tmp_path / "labels.tif", value[None], nodata=255, **place)

    class Lost:
        def __init__(self, path, size):
            self.file, self.lost = make(path, size), path.name == name

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, values, band, window):
            if not self.lost or window[0][0] == 0:
                self.file.write(values, band, window=window)

    monkeypatch.setattr(regions, "_numbers", Lost)
    part = tmp_path / "part.gpkg"
    part.touch()
    with pytest.raises(ResourceError, match="map.gpkg cannot be written: the areas are not stored in full"):
        polygons.write_polygons(labels, labels, part, tmp_path / "map.gpkg", NAMES)
    assert {path.name for path in tmp_path.iterdir()} <= {"labels.tif", "part.gpkg"}


def test_the_tracing_is_said(tmp_path, capsys):
    traced(tmp_path, noise(0), 1.0, progress=True)
    said = capsys.readouterr().err
    assert "areas: 100%" in said and "polygons: 100%" in said
    traced(tmp_path, noise(0))
    assert capsys.readouterr().err == ""
