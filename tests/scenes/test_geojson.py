# SPDX-License-Identifier: Apache-2.0
"""Polygons in degrees of maps of the world, around poles, and with long edges."""

from __future__ import annotations

import json

import numpy as np
import pytest

from drseg_core.data.ground import projected
from drseg_core.scenes import degrees, polygons
from tests.scenes.test_predict import write

rasterio = pytest.importorskip("rasterio")
shapely = pytest.importorskip("shapely")
from rasterio.transform import from_origin  # noqa: E402

SIDE, DEGREE = 400_750, 111_319.49


def classes(height: int, width: int, *boxes: tuple[int, int, int, int], around: int = 255) -> np.ndarray:
    """Boxes (top, bottom, left, right) of class 1 in a map of another."""
    value = np.full((height, width), around, np.uint8)
    for top, bottom, left, right in boxes:
        value[top:bottom, left:right] = 1
    return value


PACIFIC = ("EPSG:3832", from_origin(-50 * SIDE, 50 * SIDE, SIDE, SIDE))
EQC = "+proj=eqc +lon_0=180 +datum=WGS84"
ROBINSON = "+proj=robin +lon_0=180 +datum=WGS84"
NORTH = "EPSG:3413"
CASES = {
    "world from the Pacific": (*PACIFIC, classes(100, 100, around=0)),
    "0 to 200 degrees": (*PACIFIC, classes(100, 100, (30, 70, 9, 64))),
    "hole over 180": (
        EQC,
        from_origin(-120 * DEGREE, 30 * DEGREE, DEGREE, DEGREE),
        classes(60, 240, (20, 40, 100, 140), around=0),
    ),
    "280 degrees": (
        EQC,
        from_origin(-180 * DEGREE, 90 * DEGREE, 10 * DEGREE, 10 * DEGREE),
        classes(18, 36, (4, 10, 2, 30)),
    ),
    "Robinson": (ROBINSON, from_origin(-12e6, 4.5e6, 1e5, 1e5), classes(90, 240, around=0)),
    "0 to 360": ("EPSG:4322", from_origin(0, 90, 2, 2), classes(90, 180, around=0)),
    "grads": ("EPSG:4807", from_origin(0, 90, 10, 5), classes(36, 40, around=0)),
    "below the pole": (NORTH, from_origin(-5e5, 0, 1e4, 1e4), classes(50, 100, around=0)),
    "above the pole": (NORTH, from_origin(-5e5, 5e5, 1e4, 1e4), classes(50, 100, around=0)),
    "a corner at the pole": (NORTH, from_origin(-1e5, 1e5, 1e4, 1e4), classes(20, 20, (10, 20, 10, 20), around=0)),
    "beside the south pole": (
        "EPSG:3031",
        from_origin(-100.3, 100, 10, 10),
        classes(20, 30, (10, 20, 0, 30), around=0),
    ),
    "over the pole": (NORTH, from_origin(-5e5, 5e5, 1e4, 1e4), classes(100, 100, (40, 60, 40, 60), around=0)),
    "a tile": ("EPSG:32632", from_origin(600_000, 6_700_020, 100, 100), classes(1098, 1098, around=0)),
    "around another pole": (
        "+proj=ob_tran +o_proj=longlat +o_lon_p=0 +o_lat_p=39 +lon_0=18",
        from_origin(-18, 18, 1, 1),
        classes(36, 36, (5, 20, 9, 30), around=0),
    ),
}


def area(shape) -> float:
    """On the ellipsoid; edges are straight in degrees."""
    pole = shape.bounds[3] > 80 or shape.bounds[1] < -80
    target = ("EPSG:6931" if shape.bounds[3] > 80 else "EPSG:6932") if pole and shape.bounds[2] > 170 else "EPSG:6933"
    even = shapely.segmentize(shape, 0.1)
    return shapely.transform(even, lambda p: np.column_stack(projected("EPSG:4326", target, *p.T.tolist()))).area


@pytest.mark.parametrize("case", CASES)
def test_edges_follow_the_pixels(tmp_path, case):
    crs, transform, value = CASES[case]
    crs = rasterio.crs.CRS.from_user_input(crs)
    labels = write(tmp_path / "labels.tif", value[None], nodata=255, crs=crs, transform=transform)
    path = tmp_path / "map.geojson"
    polygons.write_polygons(labels, labels, path, path, ["a", "b"])
    features = json.loads(path.read_text())["features"]
    shapes = [shapely.geometry.shape(feature["geometry"]) for feature in features]
    assert shapely.is_valid(shapes).all() and len(shapes) == len(np.unique(value[value != 255]))
    bounds = shapely.total_bounds(shapes)
    assert (bounds[:2] >= (-180, -90)).all() and (bounds[2:] <= (180, 90)).all()
    row, column = (index[:: max(1, len(value) // 100)].ravel() for index in np.indices(value.shape))
    x, y = transform @ (column + 0.5, row + 0.5)
    east, north = projected(crs, "EPSG:4326", x.tolist(), y.tolist())
    east = (east + 180) % 360 - 180
    for shape, feature in zip(shapes, features, strict=True):
        properties = feature["properties"]
        shapely.prepare(shape)
        own = value[row, column] == properties["class_id"]
        # the cut at 180 may go through the middle of a pixel
        assert shapely.intersects_xy(shape, east, north)[own].all()
        assert not shapely.contains_xy(shape, east, north)[~own].any()
        if case not in ("Robinson", "world from the Pacific", "0 to 360"):
            assert area(shape) == pytest.approx(properties["area_m2"], rel=0.02)


def written(path, value, crs, transform):
    """The polygons of a map in degrees, and for each the pixels whose middle it holds."""
    crs = rasterio.crs.CRS.from_user_input(crs)
    labels = write(path / "labels.tif", value[None], nodata=255, crs=crs, transform=transform)
    polygons.write_polygons(labels, labels, path / "part", path / "map.geojson", list("abc"))
    features = json.loads((path / "part").read_text())["features"]
    shapes = [shapely.geometry.shape(feature["geometry"]) for feature in features]
    row, column = (index.ravel() for index in np.indices(value.shape))
    # beside the middle, where the cut at 180 degrees may be
    x, y = transform @ (column + 0.453, row + 0.532)
    east, north = projected(crs, "EPSG:4326", x.tolist(), y.tolist())
    held = [shapely.contains_xy(shape, (east + 180) % 360 - 180, north).reshape(value.shape) for shape in shapes]
    return features, shapes, held


POLE = {"EPSG:5041": 2e6, "EPSG:3413": 0.0, "EPSG:3031": 0.0}


@pytest.mark.parametrize("crs", POLE)
def test_blocks_at_and_around_a_pole(tmp_path, crs):
    rng = np.random.default_rng(2)
    for number in range(12):
        n, block, side = (int(rng.choice(some)) for some in ((12, 18, 24, 27), (2, 3, 4), (100, 10_000, 100_000)))
        # the pole is a corner of pixels, a hair beside one, or anywhere
        off = rng.integers(0, n + 1, 2) + [(0, 0), (0, 0), (0.005, -0.003), rng.random(2)][number % 4]
        few = rng.choice([0, 1, 2, 255], (-(-n // block),) * 2)
        value = np.kron(few, np.ones((block, block)))[:n, :n].astype(np.uint8)
        transform = from_origin(POLE[crs] - off[0] * side, POLE[crs] + off[1] * side, side, side)
        features, shapes, held = written(tmp_path, value, crs, transform)
        assert shapely.is_valid(shapes).all()
        assert (np.sum(held, 0) == (value != 255)).all()
        for feature, inside in zip(features, held, strict=True):
            assert (value[inside] == feature["properties"]["class_id"]).all()


@pytest.mark.parametrize("crs", POLE)
@pytest.mark.parametrize("quarters", [(0, 1, 2, 255), (0, 0, 1, 1), (2, 0, 2, 0), (1, 1, 255, 1)])
def test_ground_beside_a_pole_is_that_of_its_pixel(tmp_path, crs, quarters):
    """Corners at the pole, and edges through it, to a tenth of a pixel."""
    value = np.kron(np.reshape(quarters, (2, 2)), np.ones((6, 6))).astype(np.uint8)
    transform = from_origin(POLE[crs] - 6e3, POLE[crs] + 6e3, 1e3, 1e3)
    features, shapes, _ = written(tmp_path, value, crs, transform)
    # none along 180 degrees, where polygons are cut
    turn = np.radians(np.arange(7, 360, 18))
    for far in (0.1, 0.3):
        column, row = 6 + far * np.cos(turn), 6 + far * np.sin(turn)
        east, north = projected(rasterio.crs.CRS.from_user_input(crs), "EPSG:4326", *transform @ (column, row))
        own = value[row.astype(int), column.astype(int)]
        for number in range(3):
            mine = [shape for shape, f in zip(shapes, features, strict=True) if f["properties"]["class_id"] == number]
            held = np.any([shapely.contains_xy(shape, east, north) for shape in mine or [shapely.Polygon()]], 0)
            assert (held == (own == number)).all()


def test_an_edge_whose_first_third_is_the_pole(tmp_path):
    value = classes(80, 80, (24, 32, 60, 64), (32, 36, 44, 64), (36, 40, 36, 48), (36, 44, 60, 64))
    _, _, held = written(tmp_path, value, "EPSG:5041", from_origin(-2e6, 6e6, 1e5, 1e5))
    assert (held[0] == (value == 1)).all()


def test_a_ring_around_a_pole_may_begin_where_it_goes_back(tmp_path):
    value = classes(12, 12, (0, 3, 3, 6), (6, 9, 6, 9), (9, 12, 3, 12), around=0)
    value[value == 1] = 255
    _, _, held = written(tmp_path, value, "EPSG:3031", from_origin(-700, 200, 100, 100))
    assert (held[0] == (value == 0)).all()


@pytest.mark.parametrize("pole", [-90, 90])
@pytest.mark.parametrize("name", ["aeqd", "laea"])
def test_a_ring_around_a_pole_may_lie_beyond_the_equator(tmp_path, name, pole):
    radius = {"aeqd": 19.9e6, "laea": 12.7e6}[name]
    row, column = np.indices((40, 40))
    far = np.hypot(row - 19.5, column - 19.5) / 20
    value = np.select([far < 0.2, far < 0.4, far < 0.75], [2, 255, 1], 255).astype(np.uint8)
    transform = from_origin(-radius, radius, radius / 20, radius / 20)
    features, shapes, held = written(tmp_path, value, f"+proj={name} +lat_0={pole} +datum=WGS84", transform)
    assert shapely.is_valid(shapes).all()
    for feature, inside in zip(features, held, strict=True):
        assert (inside == (value == feature["properties"]["class_id"])).all()


WHOLE = {
    "sinusoidal": "ESRI:54008",
    "Mollweide": "ESRI:54009",
    "Equal Earth": "EPSG:8857",
    "Bonne": "+proj=bonne +lat_1=45",
    "equidistant": "+proj=aeqd +lat_0=40",
    "orthographic": "+proj=ortho +lat_0=30",
}


@pytest.mark.parametrize("name", WHOLE)
def test_beyond_the_edge_of_the_earth(tmp_path, name, caplog):
    crs = rasterio.crs.CRS.from_user_input(WHOLE[name])
    side = 4e5 if name == "orthographic" else 1.1e6
    transform = from_origin(-20 * side, 12 * side, side, side)
    value = np.kron(np.random.default_rng(1).integers(0, 3, (6, 10)), np.ones((4, 4))).astype(np.uint8)
    value[::8], value[:, ::8] = 0, 1
    features, shapes, held = written(tmp_path, value, crs, transform)
    assert shapely.is_valid(shapes).all()
    row, column = (index.ravel() for index in np.indices(value.shape))
    x, y = transform @ (column + 0.453, row + 0.532)
    degree = projected(crs, "EPSG:4326", x.tolist(), y.tolist())
    back = np.column_stack(projected("EPSG:4326", crs, *np.nan_to_num(degree).tolist()))
    earth = (np.hypot(*(back - np.column_stack([x, y])).T) < 1).reshape(value.shape)
    assert np.sum(held, 0)[earth].max() == 1
    for feature, inside in zip(features, held, strict=True):
        own = inside & earth
        assert (value[own] == feature["properties"]["class_id"]).all()
        assert own.sum() == feature["properties"]["pixels"]
    assert features and "a corner is not on Earth" in caplog.text


def test_a_sinusoidal_map_of_one_class_is_left_out(tmp_path, caplog):
    value = classes(20, 40, around=0)
    features, _, _ = written(tmp_path, value, "ESRI:54008", from_origin(-20e6, 10e6, 1e6, 1e6))
    assert not features and "1 of 1 polygons (800 pixels) are left out" in caplog.text


def test_rows_beyond_a_pole_are_left_out(tmp_path, caplog):
    few = np.random.default_rng(1).integers(0, 3, (23, 45))
    value = np.kron(few, np.ones((4, 4))).astype(np.uint8)
    value[1], value[2], value[-2] = 0, 1, 0
    _, shapes, _ = written(tmp_path, value, "EPSG:4326", from_origin(-181, 92, 2, 2))
    assert shapely.is_valid(shapes).all() and len(shapes) > 300 and "are left out" in caplog.text


@pytest.mark.parametrize("block", [4, 40])
def test_the_world_in_another_datum_up_to_the_poles(tmp_path, block):
    few = np.random.default_rng(1).integers(0, 3, (-(-36 // block), 40 // block))
    value = np.kron(few, np.ones((block, block)))[:36].astype(np.uint8)
    _, shapes, held = written(tmp_path, value, "EPSG:4807", from_origin(-200, 100, 10, 200 / 36))
    assert shapely.is_valid(shapes).all() and (np.sum(held, 0) == 1).all()


def test_a_map_that_goes_around_the_earth_twice(tmp_path):
    value = classes(8, 60, (2, 6, 4, 8), (2, 6, 50, 56))
    features, shapes, _ = written(tmp_path, value, "EPSG:3857", from_origin(-3e7, 4e6, 1e6, 1e6))
    assert len(features) == 2
    assert shapes[0].centroid.x == pytest.approx((-24 / 20.0375 * 180) % 360, abs=0.1)


def test_the_middle_of_a_long_edge_is_on_it(tmp_path):
    crs, transform, value = CASES["a tile"]
    labels = write(tmp_path / "labels.tif", value[None], nodata=255, crs=crs, transform=transform)
    path = tmp_path / "map.geojson"
    polygons.write_polygons(labels, labels, path, path, ["a"])
    ring = np.array(json.loads(path.read_text())["features"][0]["geometry"]["coordinates"][0])
    middle = (ring[1:] + ring[:-1]) / 2
    x, y = projected("EPSG:4326", crs, *middle.T.tolist())
    column, row = ~transform @ (x, y)
    off = np.min([abs(column), abs(column - 1098), abs(row), abs(row - 1098)], 0)
    assert off.max() < 0.3 and len(ring) < 100


def test_neighbours_have_the_same_points_between_them(tmp_path):
    # the same edge in two directions
    value = classes(100, 100, (0, 100, 0, 50), around=0)
    labels = write(
        tmp_path / "labels.tif", value[None], nodata=255, crs=NORTH, transform=from_origin(1e6, 1e6, 1e4, 1e4)
    )
    path = tmp_path / "map.geojson"
    polygons.write_polygons(labels, labels, path, path, ["a", "b"])
    one, other = (shapely.geometry.shape(f["geometry"]) for f in json.loads(path.read_text())["features"])
    shared = set(one.exterior.coords) & set(other.exterior.coords)
    assert len(shared) > 5 and one.intersection(other).area == 0


def test_a_usual_map_gets_no_points(tmp_path, monkeypatch):
    value = np.kron(np.random.default_rng(0).integers(0, 3, (30, 30)), np.ones((10, 10))).astype(np.uint8)
    place = {"crs": "EPSG:32632", "transform": from_origin(355_000, 5_640_000, 0.5, 0.5)}
    labels = write(tmp_path / "labels.tif", value[None], nodata=255, **place)
    asked = []
    monkeypatch.setattr(
        degrees, "_places", lambda pixel, grid, own=degrees._places: asked.append(len(pixel)) or own(pixel, grid)
    )
    path, whole = tmp_path / "map.geojson", tmp_path / "map.parquet"
    for file in (path, whole):
        polygons.write_polygons(labels, labels, file, file, list("abc"))
    from pyarrow import parquet

    shapes = shapely.from_wkb(parquet.read_table(whole)["geometry"].to_pylist())
    found = [shapely.geometry.shape(f["geometry"]) for f in json.loads(path.read_text())["features"]]
    assert [shapely.get_num_coordinates(s) for s in found] == shapely.get_num_coordinates(shapes).tolist()
    assert sum(asked) == 0
