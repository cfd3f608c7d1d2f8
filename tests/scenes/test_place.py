# SPDX-License-Identifier: Apache-2.0
"""A scene in part, at another resolution, and planned but not mapped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from drseg_core.checkpoints.run import load_run
from drseg_core.config.reading import Reading
from drseg_core.errors import ConfigError, DatasetError
from drseg_core.scenes import reader
from drseg_core.scenes.reader import open_scene
from tests.cli.conftest import data, folder, run
from tests.evaluation.fake import color_image
from tests.scenes.test_predict import read, truth, write
from tests.scenes.test_predict import run as mapped

__all__ = ["data", "folder", "run"]
rasterio = pytest.importorskip("rasterio")
from rasterio.transform import Affine, from_origin  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
PLACE = {"crs": "EPSG:32632", "transform": from_origin(500_000, 5_600_000, 0.5, 0.5)}


def polygon(path: Path, *boxes: tuple[float, float, float, float], crs: str = "EPSG:32632") -> Path:
    """GeoJSON of boxes in metres from the scene's corner (west, north, east, south)."""
    from rasterio.warp import transform_geom

    features = []
    for west, north, east, south in boxes:
        ring = [(west, -north), (east, -north), (east, -south), (west, -south), (west, -north)]
        ring = [(500_000 + x, 5_600_000 + y) for x, y in ring]
        shape = transform_geom("EPSG:32632", crs, {"type": "Polygon", "coordinates": [ring]}, precision=9)
        features.append({"type": "Feature", "properties": {}, "geometry": shape})
    content = {"type": "FeatureCollection", "features": features}
    if crs != "EPSG:4326":
        content["crs"] = {"type": "name", "properties": {"name": f"urn:ogc:def:crs:{crs.replace(':', '::')}"}}
    path.write_text(json.dumps(content))
    return path


def test_another_resolution(tmp_path):
    label = truth(30, 40).repeat_interleave(4, 0).repeat_interleave(4, 1)
    image = write(tmp_path / "in.tif", color_image(label).numpy(), **PLACE)
    # in the middle of a zone of UTM a metre on the map is 1.0004 m
    files = mapped(image, tmp_path / "map.tif", gsd=2.0)
    found, raster = read(files.classes)
    assert np.array_equal(found[0], label[::4, ::4])
    assert raster.transform == PLACE["transform"] @ Affine.scale(4) and raster.crs == PLACE["crs"]
    finer, raster = read(mapped(image, tmp_path / "finer.tif", gsd=0.25).classes)
    assert finer.shape == (1, 240, 320) and raster.bounds == rasterio.open(image).bounds
    # a border between two classes is somewhere else by half a pixel at most
    inner = finer[0].reshape(30, 8, 40, 8)[:, 2:6, :, 2:6]
    assert (inner == label.numpy()[::4, ::4][:, None, :, None]).all()


def test_windows_of_another_resolution_fit_together(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 90, 101)).astype(np.uint8)
    image = write(tmp_path / "in.tif", pixels, **PLACE)
    for gsd in (0.85, 1.3):
        with open_scene(image, gsd=gsd) as scene:
            whole, _ = scene.window(0, scene.height, 0, scene.width)
            middle = scene.height // 2, scene.width // 3
            upper = [scene.window(0, middle[0], *c)[0] for c in ((0, middle[1]), (middle[1], scene.width))]
            assert np.abs(np.concatenate(upper, 2).astype(int) - whole[:, : middle[0]].numpy()).max() <= 1


@pytest.mark.parametrize("gsd", [0.2, 0.37, 0.85, 1.0, 1.3, 5.0])
@pytest.mark.parametrize("kind", ["option", "declared", "nan", "mask"])
def test_no_pixel_takes_a_share_of_nodata(tmp_path, gsd, kind):
    rng = np.random.default_rng(0)
    empty = rng.random((90, 101)) < 0.3
    pixels = np.full((3, 90, 101), 200, np.float32 if kind == "nan" else np.uint16)
    value = {"option": 9999, "declared": 0, "nan": np.nan, "mask": 1}[kind]
    pixels[:, empty] = value
    # nodata is where all bands have the value
    pixels[0, 50:60, 50:60] = 200
    empty[50:60, 50:60] = kind == "mask"
    if kind in ("option", "declared"):
        pixels[1:, 50:60, 50:60] = value
    else:
        pixels[:, 50:60, 50:60] = value if kind == "mask" else 200
    profile = {"nodata": 0} if kind == "declared" else {}
    image = write(tmp_path / "in.tif", pixels, **PLACE, **profile)
    if kind == "mask":
        with rasterio.open(image, "r+") as file:
            file.write_mask(~empty)
    reading = Reading(nodata=9999 if kind == "option" else None, scale=((0, 255),))
    with open_scene(image, gsd=gsd, reading=reading) as scene:
        found, valid = scene.window(0, scene.height, 0, scene.width)
        side = 90 / scene.height, 101 / scene.width
        nearest = np.ix_(*(((np.arange(n) + 0.5) * s).astype(int) for n, s in zip(valid.shape, side, strict=True)))
    assert np.array_equal(valid, ~empty[nearest])
    assert (found[0].numpy()[valid] == 200).all()
    if kind not in ("option", "declared"):
        assert (found.numpy()[:, valid] == 200).all()


def test_pixels_are_means_of_what_they_cover(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 60, 84)).astype(np.uint8)
    image = write(tmp_path / "in.tif", pixels, **PLACE)
    with open_scene(image, gsd=2.001) as scene:
        found, _ = scene.window(0, scene.height, 0, scene.width)
    assert np.array_equal(found, pixels.reshape(3, 15, 4, 21, 4).mean((2, 4)).round())
    # 1.5 pixels: one and the half of its neighbour
    with open_scene(image, gsd=0.7503) as scene:
        found, _ = scene.window(0, 1, 0, 2)
    weights = np.array([1, 0.5, 0]), np.array([0, 0.5, 1])
    expected = [[np.einsum("i,j,bij->b", weights[0], w, pixels[:, :3, :3]) / 2.25 for w in weights]]
    assert np.allclose(found, np.array(expected).transpose(2, 0, 1), atol=0.51)
    # half a pixel: a linear interpolation
    with open_scene(image, gsd=0.2501) as scene:
        found, _ = scene.window(0, 1, 1, 3)
    first, second = pixels[:, 0, 0].astype(float), pixels[:, 0, 1].astype(float)
    assert np.allclose(found[:, 0].T, [0.75 * first + 0.25 * second, 0.25 * first + 0.75 * second], atol=0.51)


def test_the_scale_is_that_of_the_part(tmp_path):
    pytest.importorskip("pyogrio")
    pixels = np.full((3, 60, 80), 40_000, np.uint16)
    pixels[:, 10:20, 10:30] = np.linspace(100, 300, 200).reshape(10, 20)
    image = write(tmp_path / "in.tif", pixels, **PLACE)
    area = polygon(tmp_path / "area.geojson", (5, 5, 15, 10))
    for gsd in (None, 0.25, 1.0):
        with open_scene(image, aoi=area, gsd=gsd) as scene:
            low, high = scene.pairs()[0]
            value, valid = scene.sample()
            assert 100 < low < 110 and 290 < high < 300 and value.max() <= 300 and valid.all()
    image = write(tmp_path / "flat.tif", np.where(pixels == 40_000, 0, 7).astype(np.uint8), **PLACE)
    with open_scene(image, aoi=area) as scene:
        assert scene.extreme_value() is None and scene.sample()[0].shape == (3, 10, 20)


@pytest.mark.parametrize("crs", ["EPSG:32632", "EPSG:4326"])
def test_a_part(tmp_path, crs):
    pytest.importorskip("pyogrio")
    label = truth(60, 80)
    image = write(tmp_path / "in.tif", color_image(label).numpy(), **PLACE)
    area = polygon(tmp_path / "area.geojson", (5, 5, 15, 10), (20, 10, 30, 20), crs=crs)
    found, raster = read(mapped(image, tmp_path / "map.tif", aoi=area).classes)
    expected = np.full((60, 80), 255)
    expected[10:20, 10:30], expected[20:40, 40:60] = label[10:20, 10:30], label[20:40, 40:60]
    top, left = round((5_600_000 - raster.transform.f) / 0.5), round((raster.transform.c - 500_000) / 0.5)
    assert abs(top - 10) <= 1 and abs(left - 10) <= 1 and abs(found.shape[1] - 30) <= 2
    rows, columns = found.shape[1:]
    assert (found[0] == expected[top : top + rows, left : left + columns]).mean() > 0.98
    assert raster.crs == PLACE["crs"]


def rings(path: Path, *corners: tuple[float, float, float, float]) -> Path:
    """GeoJSON of boxes in degrees (west, south, east, north), of four corners each."""
    shapes = [[[w, s], [e, s], [e, n], [w, n], [w, s]] for w, s, e, n in corners]
    features = [
        {"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": [ring]}} for ring in shapes
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def inside(image: Path, area: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which pixels of a scene are mapped, and longitude and latitude of each."""
    from rasterio.warp import transform

    with open_scene(image, aoi=area) as scene:
        valid = scene.window(0, scene.height, 0, scene.width)[1]
        rows, columns = np.indices(valid.shape) + 0.5
        lon, lat = transform(scene.crs, "EPSG:4326", *(scene.transform @ (columns.ravel(), rows.ravel())))
    return valid, np.reshape(lon, valid.shape), np.reshape(lat, valid.shape)


def test_an_area_far_larger_than_the_scene(tmp_path):
    pytest.importorskip("pyogrio")
    wide = {"crs": "EPSG:32632", "transform": from_origin(300_000, 5_800_000, 4000, 4000)}
    image = write(tmp_path / "in.tif", np.full((3, 100, 100), 9, np.uint8), **wide)
    # a country, and nearly all the world
    for corners in ((-20, 30, 40, 70), (-179, -85, 179, 85)):
        valid, _, _ = inside(image, rings(tmp_path / "area.geojson", corners))
        assert valid.all() and valid.shape == (100, 100)
    # a parallel is no straight line in UTM
    valid, _, lat = inside(image, rings(tmp_path / "area.geojson", (-20, 51, 40, 70)))
    assert valid.shape[0] < 50 and (valid == (lat > 51)).mean() > 0.999
    assert (lat > 51).all(0).any() and not (lat > 51).all()


def test_an_area_in_another_projection(tmp_path):
    import pyogrio
    import shapely

    image = write(tmp_path / "in.tif", np.full((3, 60, 80), 9, np.uint8), **PLACE)
    # all of Europe, and a shape that crosses itself
    shapes = [shapely.box(2_500_000, 1_300_000, 7_000_000, 5_600_000)]
    shapes.append(shapely.Polygon([(0, 0), (9e6, 9e6), (9e6, 0), (0, 9e6)]))
    geometry = np.array([shapely.to_wkb(shape) for shape in shapes], object)
    options = {"geometry_type": "Polygon", "crs": "EPSG:3035", "driver": "GPKG"}
    pyogrio.raw.write(tmp_path / "area.gpkg", geometry, [], fields=[], **options)
    assert inside(image, tmp_path / "area.gpkg")[0].shape == (60, 80)
    assert inside(image, tmp_path / "area.gpkg")[0].all()


@pytest.mark.parametrize("corners", [[(179.5, -1, 180, 1), (-180, -1, -179.995, 1)], [(179.5, -1, 180.005, 1)]])
def test_an_area_over_the_date_line(tmp_path, corners):
    pytest.importorskip("pyogrio")
    # the equator at 180 degrees, in the middle of the scene
    place = {"crs": "EPSG:32660", "transform": from_origin(833_979 - 1000, 1000, 20, 20)}
    image = write(tmp_path / "in.tif", np.full((3, 50, 100), 9, np.uint8), **place)
    valid, lon, _ = inside(image, rings(tmp_path / "area.geojson", *corners))
    assert valid.shape[1] < 100 and (lon < 0).any() and (lon > 0).any()
    # two parts may each miss the pixel in whose middle they meet
    assert (valid == ((lon > 0) | (lon < -179.995))).mean() > 0.98


@pytest.mark.parametrize("west", [-172, 188])
@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:4269"])
@pytest.mark.parametrize("corners", [(189, 49, 191, 51), (-171, 49, -169, 51)])
def test_longitudes_beyond_180(tmp_path, west, crs, corners):
    pytest.importorskip("pyogrio")
    place = {"crs": crs, "transform": from_origin(west, 52, 0.05, 0.05)}
    image = write(tmp_path / "in.tif", np.full((3, 80, 80), 9, np.uint8), **place)
    valid, lon, lat = inside(image, rings(tmp_path / "area.geojson", corners))
    assert valid.shape == (40, 40) and valid.all() and lat.min() > 49 and lat.max() < 51
    assert (abs(lon % 360 - 190) < 1).all()


@pytest.mark.parametrize(
    "corners", [[(179, -1, 180, 1), (-180, -1, -179, 1)], [(179, -1, 181, 1)], [(-181, -1, -179, 1)]]
)
@pytest.mark.parametrize("west", [-182, -180, 0, 178])
def test_an_area_over_the_date_line_of_a_scene_in_degrees(tmp_path, corners, west):
    pytest.importorskip("pyogrio")
    whole = west in (-180, 0)
    place = {"crs": "EPSG:4326", "transform": from_origin(west, 2, 0.1, 0.1)}
    image = write(tmp_path / "in.tif", np.full((3, 40, 3600 if whole else 40), 9, np.uint8), **place)
    valid, lon, _ = inside(image, rings(tmp_path / "area.geojson", *corners))
    assert valid.sum() == 400 and np.array_equal(valid.any(0), abs(lon[0] % 360 - 180) < 1)
    assert valid.shape[1] == (3600 if west == -180 else 20)


DISK = "+proj=geos +h=35785831 +lon_0=0 +sweep=y +datum=WGS84 +units=m"


@pytest.mark.parametrize(
    ("crs", "corner", "corners"),
    [
        ("EPSG:3413", 4e6, [(-180, 80, 180, 90)]),
        ("EPSG:3413", 4e6, [(170, 70, 190, 80)]),
        ("EPSG:3031", 4e6, [(-10, -88, 100, -70)]),
        (DISK, 5.5e6, [(-10, -20, 30, 10)]),
        ("EPSG:3857", 20037508.34, [(170, -30, 180, 10), (-180, -30, -170, 10)]),
    ],
)
def test_an_area_around_a_pole_or_on_a_disk(tmp_path, crs, corner, corners):
    pytest.importorskip("pyogrio")
    place = {"crs": rasterio.crs.CRS.from_user_input(crs), "transform": from_origin(-corner, corner, 5e4, 5e4)}
    size = round(corner / 25000)
    image = write(tmp_path / "in.tif", np.full((3, size, size), 9, np.uint8), **place)
    valid, lon, lat = inside(image, rings(tmp_path / "area.geojson", *corners))
    parts = [(lat > s) & (lat < n) & ((lon - w) % 360 < e - w) for w, s, e, n in corners]
    assert valid.any() and (valid == np.any(parts, axis=0)).mean() > 0.97


@pytest.mark.parametrize(
    ("crs", "corners", "said"),
    [
        (DISK, (-179, -85, 179, 85), "expected shapes that end within its projection"),
        ("EPSG:3857", (170, -30, 190, 10), "expected two shapes where one goes over the edge of its projection"),
    ],
)
def test_an_area_that_a_projection_tears_is_refused(tmp_path, crs, corners, said):
    pytest.importorskip("pyogrio")
    corner = 20037508.34 if crs == "EPSG:3857" else 5.5e6
    place = {"crs": rasterio.crs.CRS.from_user_input(crs), "transform": from_origin(-corner, corner, 1e5, 1e5)}
    size = round(corner / 50000)
    image = write(tmp_path / "in.tif", np.full((3, size, size), 9, np.uint8), **place)
    with pytest.raises(
        DatasetError, match=f"area.geojson cannot be brought into the CRS of the scene; {said}"
    ) as caught:
        inside(image, rings(tmp_path / "area.geojson", corners))
    assert "\n" not in str(caught.value)


def test_an_area_elsewhere_is_refused(tmp_path):
    pytest.importorskip("pyogrio")
    image = write(tmp_path / "in.tif", np.full((3, 60, 80), 9, np.uint8), **PLACE)
    # beside the scene, a country, and the other side of the world
    for corners in ((9.01, 50.5, 9.02, 50.6), (-110, 30, -90, 45), (170, -50, 179, -40), (-180, -90, 180, -85)):
        with pytest.raises(ConfigError, match="--aoi lies elsewhere; expected a part of .*in.tif, got .*area.geojson"):
            inside(image, rings(tmp_path / "area.geojson", corners))


@pytest.mark.parametrize("crs", ["EPSG:32632", "EPSG:4326"])
@pytest.mark.parametrize("gsd", [None, 1.0])
def test_an_area_between_the_centres_of_pixels_is_refused(tmp_path, monkeypatch, crs, gsd):
    pytest.importorskip("pyogrio")
    monkeypatch.setattr(reader, "PIECE", 7)
    image = write(tmp_path / "in.tif", np.full((3, 60, 80), 9, np.uint8), **PLACE)
    # two specks far from each other, and a strip between two rows of centres
    boxes = [(2.55, 2.55, 2.6, 2.6), (20.1, 20.1, 20.2, 20.2), (3, 5.05, 30, 5.2)]
    area = polygon(tmp_path / "area.geojson", *boxes, crs=crs)
    with pytest.raises(ConfigError, match="--aoi holds no pixel; expected .*in.tif, got .*area.geojson$"):
        mapped(image, tmp_path / "map.tif", aoi=area, gsd=gsd)
    assert not list(tmp_path.glob("map*"))
    # with a centre in the last block
    area = polygon(tmp_path / "area.geojson", *boxes, (34.4, 25.4, 35.6, 25.9), crs=crs)
    with open_scene(image, aoi=area, gsd=gsd) as scene:
        assert scene.window(0, scene.height, 0, scene.width)[1].sum() == 2


def test_what_is_not_taken_of_an_area_is_said_once(tmp_path, caplog):
    pytest.importorskip("pyogrio")
    label = truth(60, 80)
    image = write(tmp_path / "in.tif", color_image(label).numpy(), **PLACE)
    area = polygon(tmp_path / "area.geojson", (5, 5, 15, 10))
    content = json.loads(area.read_text())
    ring = content["features"][0]["geometry"]["coordinates"][0]
    content["features"].append(
        {"type": "Feature", "geometry": {"type": "LineString", "coordinates": [ring[0], ring[2]]}}
    )
    del ring[-1]
    area.write_text(json.dumps(content))
    found, _ = read(mapped(image, tmp_path / "map.tif", aoi=area).classes)
    assert np.array_equal(found[0], label[10:20, 10:30])
    assert [line.split(";")[0] for line in caplog.messages if "area.geojson" in line] == [
        "area.geojson: it has rings that do not end where they begin",
        "area.geojson: 1 of its shapes are no polygons and left out (LineString)",
    ]


def test_part_and_resolution_together(tmp_path):
    pytest.importorskip("pyogrio")
    label = truth(30, 40).repeat_interleave(2, 0).repeat_interleave(2, 1)
    image = write(tmp_path / "in.tif", color_image(label).numpy(), **PLACE)
    area = polygon(tmp_path / "area.geojson", (5, 4, 20, 15))
    found, raster = read(mapped(image, tmp_path / "map.tif", aoi=area, gsd=1.0).classes)
    assert np.array_equal(found[0], label[::2, ::2][4:15, 5:20])
    assert raster.transform == PLACE["transform"] @ Affine.scale(2) @ Affine.translation(5, 4)


def test_refusals(tmp_path):
    pytest.importorskip("pyogrio")
    image = write(tmp_path / "in.tif", color_image(truth()).numpy(), **PLACE)
    plain = write(tmp_path / "plain.tif", color_image(truth()).numpy())
    area = polygon(tmp_path / "area.geojson", (5, 5, 15, 10))
    far = polygon(tmp_path / "far.geojson", (5000, 5000, 5010, 5010))
    for path, options, said in (
        (plain, {"gsd": 1.0}, "--gsd needs a place; expected a CRS and a transform"),
        (plain, {"aoi": area}, "--aoi needs a place"),
        (image, {"aoi": far}, "--aoi lies elsewhere"),
        (image, {"gsd": -1.0}, "--gsd is out of range; expected metres above 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            mapped(path, tmp_path / "map.tif", **options)
    (tmp_path / "no.geojson").write_text("{}")
    for name in ("no.geojson", "absent.geojson"):
        with pytest.raises(DatasetError, match=name):
            mapped(image, tmp_path / "map.tif", aoi=tmp_path / name)
    assert not list(tmp_path.glob("map*"))


def test_a_box_in_degrees_adds_no_row(tmp_path):
    pytest.importorskip("pyogrio")
    image = write(tmp_path / "in.tif", np.full((3, 60, 80), 9, np.uint8), **PLACE)
    with open_scene(image, aoi=polygon(tmp_path / "a.geojson", (5, 5, 25, 25), crs="EPSG:4326")) as scene:
        valid = scene.window(0, scene.height, 0, scene.width)[1]
    assert valid.shape == (40, 40) and valid.all()


@pytest.mark.parametrize(
    "kind, value, said",
    [
        ("uint8", -9999, True),
        ("uint8", 0.5, True),
        ("int16", -9999, False),
        # as the largest of float32 is written in eight digits, which is beyond it
        ("float32", -3.4028235e38, False),
        ("float32", -1e39, True),
        ("float64", -1e39, False),
    ],
)
def test_a_nodata_value_that_no_pixel_can_have(tmp_path, caplog, kind, value, said):
    image = write(tmp_path / "in.tif", color_image(truth()).numpy().astype(kind), **PLACE)
    mapped(image, tmp_path / "map.tif", reading=Reading(nodata=value))
    assert (f"in.tif: --nodata {value:.10g} is no value of {kind}, so it leaves nothing out" in caplog.text) == said


def test_the_run_knows_its_resolution(tmp_path, drseg, small, caplog):
    from tests.data.test_own_images import folder as write_folder

    root = write_folder(tmp_path / "set", [color_image(truth(40, 40)).numpy()] * 2, **PLACE)
    run = tmp_path / "run"
    assert drseg("train", *small, "--data", f"folder:{root}", "--out", run, "--device", "cpu")[0] == 0
    assert load_run(run).config.reading.gsd == pytest.approx(0.5002, abs=1e-4)
    fine = {**PLACE, "transform": from_origin(500_000, 5_600_000, 0.1, 0.1)}
    image = write(tmp_path / "fine.tif", color_image(truth(60, 60)).numpy(), **fine)
    code, _, errors = drseg("predict", run, image, "--out", tmp_path / "a.tif")
    assert code == 0 and "a pixel is 0.1 m, those of the training were 0.5 m; --gsd 0.5 reads it so" in errors
    code, _, errors = drseg("predict", run, image, "--out", tmp_path / "b.tif", "--gsd", "0.5")
    assert code == 0 and "those of the training" not in errors
    assert read(tmp_path / "b.tif")[0].shape == (1, 12, 12)


def test_a_dry_run_writes_nothing(drseg, run, tmp_path):
    image = write(tmp_path / "in.tif", color_image(truth(100, 150)).numpy(), **PLACE)
    code, text, _ = drseg("predict", run, image, "--out", tmp_path / "map.tif", "--dry-run")
    assert code == 0
    lines = text.splitlines()
    assert lines[0] == "size: 150 x 100 pixels, 0.5 m each" and lines[2] == "bands: 1, 2, 3"
    # tiles of 32 with overlap 8: starts 0, 24, ...
    assert lines[1].startswith("tiles: 24 at most") or lines[1].startswith("tiles: 28 at most")
    starts = ("memory above the model:", "disk while it is written:", "time of the model:")
    assert all(line.startswith(start) for line, start in zip(lines[3:], starts, strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["in.tif"]
