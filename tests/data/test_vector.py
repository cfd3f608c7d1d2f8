# SPDX-License-Identifier: Apache-2.0
"""Vector files are read whatever they are called."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from drseg_core.data.vector import plain_path, read_shapes
from drseg_core.errors import DatasetError

rasterio = pytest.importorskip("rasterio")
pyogrio = pytest.importorskip("pyogrio")
shapely = pytest.importorskip("shapely")

SCENE = SimpleNamespace(crs=rasterio.crs.CRS.from_epsg(32632), transform=rasterio.Affine.identity(), height=9, width=9)
# pyogrio looks for an archive before "!", and drops line breaks and what follows ";"
NAMES = ["ao!i", "a\nb", "a;b", "a?", "caf\udce9", "Fotos!/area", "Fotos\n;/ao!i", "(1) area", " area"]


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = np.array([shapely.to_wkb(shapely.box(2, 3, 5, 7))], object)
    kinds = {".shp": "ESRI Shapefile", ".gpkg": "GPKG", ".geojson": "GeoJSON"}
    known = {"crs": "EPSG:32632", "geometry_type": "Polygon", "driver": kinds[path.suffix]}
    pyogrio.raw.write(path, shape, [np.array(["a"], object)], fields=["name"], **known)


@pytest.mark.parametrize("name", NAMES)
def test_names_that_look_like_addresses(tmp_path, name):
    for suffix in (".gpkg", ".geojson", ".shp"):
        write(tmp_path / f"plain{suffix}")
        path = tmp_path / f"{name}{suffix}"
        path.parent.mkdir(exist_ok=True)
        # a Shapefile is several files
        for part in tmp_path.glob("plain.*"):
            part.rename(path.with_name(path.stem + part.suffix))
        shapes = read_shapes(path, "name", SCENE)
        assert shapes.bounds() == (2, 3, 5, 7) and shapes.values == ["a"]


def test_a_path_with_two_slashes_is_no_server(tmp_path):
    write(tmp_path / "area.gpkg")
    assert read_shapes(Path(f"/{tmp_path}/area.gpkg"), None, SCENE).bounds() == (2, 3, 5, 7)


def test_links_go_when_the_file_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "in").mkdir()
    with plain_path(tmp_path / "in" / "area.gpkg") as plain:
        assert plain == tmp_path / "in" / "area.gpkg"
    for name in ("a!.gpkg", "b!/area.gpkg"):
        path = tmp_path / "in" / name
        path.parent.mkdir(exist_ok=True)
        with plain_path(path) as plain:
            plain.write_text("x")
            assert "!" not in str(plain) and path.read_text() == "x"
    assert os.listdir(tmp_path) == ["in"]


def test_a_name_that_cannot_be_helped_is_one_line(tmp_path):
    (tmp_path / "area.g!pkg").write_text("x")
    with pytest.raises(DatasetError, match="read_shapes: .*area.g!pkg cannot be read as polygons: ") as caught:
        read_shapes(tmp_path / "area.g!pkg", None, SCENE)
    assert "\n" not in str(caught.value)


def near(path: Path, shapes: list, crs: str, scene: tuple) -> list:
    """What ``read_shapes`` finds of polygons near a scene (CRS, west, north, side of a pixel, columns, rows)."""
    own, west, north, side, width, height = scene
    transform = rasterio.Affine(side, 0, west, 0, -side, north)
    place = SimpleNamespace(crs=rasterio.crs.CRS.from_user_input(own), transform=transform, height=height, width=width)
    geometry = np.array([shapely.to_wkb(shape) for shape in shapes], object)
    pyogrio.raw.write(path, geometry, [], fields=[], crs=crs, geometry_type="Unknown", driver="GPKG")
    window = shapely.box(west, north - side * height, west + side * width, north)
    found = read_shapes(path, None, place).shapes
    return [cut for cut in (shapely.make_valid(shape) & window for shape in found) if cut.area]


GLOBE, TURN = (("EPSG:4326", west, 90, 1, 360, 180) for west in (-180, 0))
DATE_LINE = ("EPSG:4326", 175, 5, 0.01, 1000, 1000)
WORLD = ("EPSG:3857", -20037508.34, 20037508.34, 1e5, 401, 401)
POLE = ("EPSG:3413", -5e6, 5e6, 1e4, 1000, 1000)
DISK = ("+proj=geos +h=35785831 +lon_0=0 +sweep=y +datum=WGS84 +units=m", -5.5e6, 5.5e6, 1e4, 1100, 1100)


@pytest.mark.parametrize(
    ("crs", "corners", "scene", "bounds", "area"),
    [
        ("EPSG:3857", (-1e6, 0, 1e6, 1e6), TURN, (0, 0, 360, 8.95), 160.8),
        ("EPSG:3857", (-9e6, 0, -7e6, 1e6), TURN, (279.15, 0, 297.12, 8.95), 160.8),
        ("EPSG:32601", (300_000, 0, 400_000, 400_000), DATE_LINE, (181.2, 0, 182.1, 3.62), 3.252),
        ("EPSG:32660", (722_000, 221_000, 1_022_000, 321_000), DATE_LINE, (179, 1.99, 181.69, 2.9), 2.433),
    ],
)
def test_metres_beside_degrees_beyond_180(tmp_path, crs, corners, scene, bounds, area):
    (found,) = near(tmp_path / "area.gpkg", [shapely.box(*corners)], crs, scene)
    assert found.bounds == pytest.approx(bounds, abs=0.02) and found.area == pytest.approx(area, rel=2e-3)


def test_a_hole_stays_in_its_ring_over_the_date_line(tmp_path):
    ring = shapely.box(722_000, 221_000, 1_022_000, 321_000)
    path = tmp_path / "area.gpkg"
    (whole,) = near(path, [ring], "EPSG:32660", DATE_LINE)
    path.unlink()
    (found,) = near(path, [ring - shapely.box(900_000, 250_000, 1_000_000, 300_000)], "EPSG:32660", DATE_LINE)
    assert found.area == pytest.approx(whole.area * 5 / 6, rel=2e-3)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:32632"])
def test_a_corner_that_is_no_number(tmp_path, value, crs):
    # the second of two: all are asked
    shapes = [shapely.box(9, 50, 10, 51), shapely.Polygon([(9, 49), (10, value), (10, 49), (9, 49.5)])]
    scene = (crs, 8, 52, 1e-3, 4000, 4000) if crs == "EPSG:4326" else (crs, 5e5, 56e5, 10, 1000, 1000)
    with pytest.raises(DatasetError, match="read_shapes: .*area.gpkg has a corner that is no number"):
        near(tmp_path / "area.gpkg", shapes, "EPSG:4326", scene)


def test_a_polygon_that_crosses_itself_over_the_date_line(tmp_path):
    crossed = shapely.Polygon([(170, 0), (190, 10), (190, 0), (170, 10)])
    (found,) = near(tmp_path / "area.gpkg", [crossed], "EPSG:4326", GLOBE)
    assert found.bounds == (-180, 0, 180, 10) and found.area == pytest.approx(100)


def test_what_is_behind_the_earth_is_elsewhere(tmp_path):
    seen, hidden = shapely.box(-8, 37, 0, 43), shapely.box(76, 55, 79, 58)
    for name, shapes in (("a", [seen, hidden]), ("b", [shapely.MultiPolygon([seen, hidden])])):
        (found,) = near(tmp_path / f"{name}.gpkg", shapes, "EPSG:4326", DISK)
        assert found.area == pytest.approx(2.7e11, rel=0.2)
    for name, corners in (("c", (60, 0, 90, 20)), ("d", (-179, -85, 179, 85))):
        with pytest.raises(DatasetError, match="expected shapes that end within its projection"):
            near(tmp_path / f"{name}.gpkg", [seen, shapely.box(*corners)], "EPSG:4326", DISK)


def test_a_pole_that_mercator_does_not_reach(tmp_path):
    shapes = [shapely.box(-180, -90, 180, -60), shapely.box(0, 40, 10, 50)]
    south, north = near(tmp_path / "area.gpkg", shapes, "EPSG:4326", WORLD)
    assert south.bounds == pytest.approx((-20037508, -20062492, 20037508, -8399738), abs=1)
    assert north.bounds == pytest.approx((0, 4865942, 1113195, 6446276), abs=1)
    (all_of_it,) = near(tmp_path / "world.gpkg", [shapely.box(-180, -90, 180, 90)], "EPSG:4326", WORLD)
    assert all_of_it.area > 0.99 * 401e5**2


def test_a_small_scene_around_a_pole(tmp_path):
    for side in (100, 2.5, 0.1):
        scene = ("EPSG:3413", -500 * side, 500 * side, side, 1000, 1000)
        path = tmp_path / f"{side}.gpkg"
        (found,) = near(path, [shapely.box(-180, 60, 180, 90)], "EPSG:4326", scene)
        assert found.area == pytest.approx((1000 * side) ** 2)
        edge = 90 - side / 400  # degrees, about a quarter of the scene from the pole
        path.unlink()
        (found,) = near(path, [shapely.box(-180, edge, 180, 90)], "EPSG:4326", scene)
        radius = (found.bounds[2] - found.bounds[0]) / 2
        assert found.area == pytest.approx(np.pi * radius**2, rel=1e-3)
        assert shapely.get_num_coordinates(found) < 10_000


def test_the_other_pole_is_elsewhere(tmp_path):
    south = shapely.box(-1e6, -1e6, 1e6, 1e6)
    assert near(tmp_path / "area.gpkg", [south], "EPSG:3031", POLE) == []
    assert near(tmp_path / "north.gpkg", [south], "EPSG:3995", POLE)[0].area == pytest.approx(4e12, rel=0.02)


@pytest.mark.parametrize("west", [-180, 0])
def test_many_shapes_are_turned_at_once(tmp_path, monkeypatch, west):
    corner = np.random.default_rng(0).uniform([-179, -80], [179, 80], (500, 2))
    shapes = list(shapely.box(*corner.T, *(corner + 0.01).T))
    calls = []
    plain = shapely.transform
    monkeypatch.setattr(shapely, "transform", lambda *given, **how: [calls.append(1), plain(*given, **how)][1])
    assert len(near(tmp_path / "area.gpkg", shapes, "EPSG:4326", ("EPSG:4326", west, 90, 1, 360, 180))) == 500
    assert len(calls) < 10


def geojson(path: Path, *shapes: dict) -> Path:
    """A file of GeoJSON geometries as they are written, right or wrong, in metres."""
    features = [{"type": "Feature", "properties": {"name": "a"}, "geometry": shape} for shape in shapes]
    crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32632"}}
    path.write_text(json.dumps({"type": "FeatureCollection", "crs": crs, "features": features}))
    return path


def rings(*corners: list) -> dict:
    return {"type": "Polygon", "coordinates": list(corners)}


SQUARE = [[2, 3], [5, 3], [5, 7], [2, 7], [2, 3]]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("hole", [[], [[3, 4], [4, 4], [4, 5]]], ids=["outer", "hole"])
def test_a_ring_that_is_not_closed_is(tmp_path, hole):
    path = geojson(tmp_path / "area.geojson", rings(SQUARE if hole else SQUARE[:-1], *([hole] if hole else [])))
    found = read_shapes(path, None, SCENE)
    assert [shape.area for shape in found.shapes] == [11.5 if hole else 12]
    (line,) = found.hints
    assert line == "area.geojson: it has rings that do not end where they begin; a straight line closes each"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("corners", [[SQUARE[:2]], [SQUARE[:1]], [SQUARE, SQUARE[:2]]], ids=["two", "one", "hole"])
def test_a_ring_of_too_few_corners_is_one_line(tmp_path, corners):
    path = geojson(tmp_path / "area.geojson", rings(SQUARE), rings(*corners))
    expected = "read_shapes: .*area.geojson has .* a ring of fewer than three corners; expected polygons$"
    with pytest.raises(DatasetError, match=expected):
        read_shapes(path, "name", SCENE)


LINE = {"type": "LineString", "coordinates": SQUARE}
POINT = {"type": "Point", "coordinates": [3, 4]}


def collection(*shapes: dict) -> dict:
    return {"type": "GeometryCollection", "geometries": list(shapes)}


@pytest.mark.parametrize("shapes", [[LINE], [LINE, LINE, POINT], [collection(LINE, collection(POINT))]])
def test_a_file_without_polygons_is_one_line(tmp_path, shapes):
    path = geojson(tmp_path / "area.geojson", *shapes)
    kinds = "LineString" if shapes == [LINE] else "LineString, Point"
    with pytest.raises(DatasetError, match=f"area.geojson has no polygon; expected one or more, got {kinds}$"):
        read_shapes(path, None, SCENE)


def test_points_and_lines_beside_polygons_are_left_out_with_a_word(tmp_path):
    inner = rings([[3, 3], [6, 3], [6, 7], [3, 7], [3, 3]])
    shapes = [rings(SQUARE), LINE, collection(rings(SQUARE), POINT, collection(inner, LINE)), POINT, None]
    found = read_shapes(geojson(tmp_path / "area.geojson", *shapes), "name", SCENE)
    # a collection of two that overlap is the ground of both
    assert [shape.area for shape in found.shapes] == [12, 16]
    assert found.values == ["a", "a"] and found.all_values == ["a"]
    (line,) = found.hints
    assert line == "area.geojson: 4 of its shapes are no polygons and left out (LineString, Point)"


def test_what_is_left_of_a_cut_polygon_is_no_line(tmp_path):
    # a square with a spike, as GeoPackages of digitised fields have
    spike = shapely.Polygon([(2, 3), (5, 3), (5, 7), (9, 7), (5, 7), (2, 7)])
    (shape,) = near(tmp_path / "area.gpkg", [spike], "EPSG:25832", ("EPSG:32632", 0, 9, 1, 9, 9))
    assert shape.geom_type == "Polygon" and abs(shape.area - 12) < 1e-3


def column(path: Path, values: list) -> tuple[list, list]:
    """What ``read_shapes`` finds in a column of these values: those of the shapes, and those of the file."""
    shape = geojson(path, *[rings(SQUARE)] * len(values))
    content = json.loads(shape.read_text())
    for feature, value in zip(content["features"], values, strict=True):
        feature["properties"] = {"name": value}
    path.write_text(json.dumps(content))
    found = read_shapes(path, "name", SCENE)
    missing = found.values.count("")
    hint = f"area.geojson: {missing} of its polygons have no value in 'name' and are unknown"
    assert found.hints == ([hint] if missing else [])
    return found.values, found.all_values


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        (["b", "a"], ["b", "a"]),
        ([2, 1], ["2", "1"]),
        # a column of whole numbers of which one is missing is one of floats in pandas, and so in its files
        ([2.0, 1.0], ["2", "1"]),
        ([1.5, 0.25], ["1.5", "0.25"]),
        ([True, False], ["True", "False"]),
        (["2026-05-01", "2025-05-01"], ["2026-05-01", "2025-05-01"]),
        (["10:00:00", "09:00:00"], ["10:00:00", "09:00:00"]),
    ],
)
def test_a_missing_value_is_no_class_and_changes_no_other(tmp_path, values, texts):
    path = tmp_path / "area.geojson"
    assert column(path, values) == (texts, texts[::-1])
    assert column(path, [*values, None]) == ([*texts, ""], texts[::-1])
    if texts == ["b", "a"]:
        assert column(path, [*values, "", " \t"]) == ([*texts, "", ""], texts[::-1])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([None, None], "has no value in column 'name'; expected class names$"),
        (["", " "], "has no value in column 'name'; expected class names$"),
        ([[1, 2], [3]], "has lists or bytes in column 'name'; expected text or numbers$"),
        ([["a"], None], "has lists or bytes in column 'name'; expected text or numbers$"),
    ],
)
def test_a_column_without_names_is_one_line(tmp_path, values, said):
    with pytest.raises(DatasetError, match=f"read_shapes: .*area.geojson {said}"):
        column(tmp_path / "area.geojson", values)


def test_numbers_are_in_order_by_size_and_text_by_letters(tmp_path):
    path = tmp_path / "area.geojson"
    for missing in ([], [None]):
        assert column(path, [10, 2, -1, 2, *missing])[1] == ["-1", "2", "10"]
        assert column(path, [10.5, 2.0, *missing])[1] == ["2", "10.5"]
        assert column(path, ["10", "2", *missing])[1] == ["10", "2"]
        assert column(path, ["b", "C", "a", *missing])[1] == ["C", "a", "b"]
