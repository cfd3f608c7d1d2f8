# SPDX-License-Identifier: Apache-2.0
"""What GIS programs open: Cloud Optimized GeoTIFF, names, colours and styles, scaled values, polygons, areas."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyogrio
import pyogrio.raw
import pytest
import torch

import drseg_core as drseg
from drseg_core.data.dataset import IGNORE, has_control
from drseg_core.data.palette import palette
from drseg_core.data.vocabulary import plain_classes
from drseg_core.errors import ConfigError
from drseg_core.evaluation.inference import Predictor
from drseg_core.scenes import polygons
from drseg_core.scenes.areas import METHOD, ClassAreas, PixelArea
from drseg_core.scenes.predict import predict_scene
from drseg_core.scenes.reader import open_scene
from drseg_core.scenes.style import category_names, write_attributes, write_style
from drseg_core.scenes.writer import raster_like
from tests.evaluation.fake import COLORS, ColorModel, color_image
from tests.scenes.test_predict import NAMES, NORTH_UP, predictor, read, run, scaled, truth, write

rasterio = pytest.importorskip("rasterio")
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
UTM = {"crs": "EPSG:32632", "transform": NORTH_UP}
REAL = Path(__file__).parents[2].parent / "shared" / "data" / "oem_koeln_50.tif"


def blocks() -> torch.Tensor:
    """Areas of 20 x 20 and 10 x 10 pixels and one single pixel."""
    label = torch.zeros(60, 80, dtype=torch.long)
    label[10:30, 10:30], label[40:50, 50:60], label[5, 70] = 1, 2, 3
    return label


def assert_cloud_optimized(path: Path) -> None:
    """What GDAL's own validator looks at first: the mark, tiles, overviews that halve, and directories before data."""
    with rasterio.open(path) as file:
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG" and file.driver == "GTiff"
        assert file.block_shapes[0] == (512, 512)
        if max(file.shape) > 512:
            assert file.overviews(1) == [2**i for i in range(1, len(file.overviews(1)) + 1)]
    head = path.read_bytes()[:300]
    assert b"GDAL_STRUCTURAL_METADATA_SIZE=" in head and b"KNOWN_INCOMPATIBLE_EDITION=NO" in head


@pytest.mark.promise("C36")
def test_rasters_are_cloud_optimized(tmp_path):
    label = truth(40, 50).repeat_interleave(20, 0).repeat_interleave(20, 1)
    image = write(tmp_path / "in.tif", color_image(label).numpy(), **UTM)
    files = run(image, tmp_path / "map.tif", scores=True, probabilities=True)
    for path in (files.classes, files.uncertainty, files.scores, files.probabilities):
        assert_cloud_optimized(path)
    with rasterio.open(files.classes, overview_level=0) as half:
        assert set(np.unique(half.read(1))) <= set(range(4))
        # nearest: no class between two others
        assert np.array_equal(half.read(1), label.numpy()[::2, ::2])
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


def test_names_colours_and_style(tmp_path):
    image = write(tmp_path / "in.tif", color_image(blocks()).numpy(), **UTM)
    names = ["bare & brown", "Straße", "<roof>", "水体"]
    files = run(image, tmp_path / "map.tif", class_names=names)
    assert category_names(files.classes) == names
    with rasterio.open(files.classes) as file:
        table = file.colormap(1)
    assert [table[i][:3] for i in range(4)] == [tuple(c) for c in palette(4).tolist()]
    assert table[IGNORE][3] == 0 and {table[i][:3] for i in range(4, 256)} == {(0, 0, 0)}
    rows = ElementTree.parse(files.attributes).findall(".//Row")
    values = [[field.text for field in row] for row in rows]
    assert [row[2] for row in values] == names and [int(row[1]) for row in values] == [4299, 400, 100, 1]
    assert [[int(v) for v in row[3:6]] for row in values] == palette(4).tolist()
    entries = ElementTree.parse(files.style).findall(".//paletteEntry")
    assert [(e.get("value"), e.get("label")) for e in entries] == [(str(i), name) for i, name in enumerate(names)]
    assert entries[0].get("color") == "#" + bytes(palette(1)[0].tolist()).hex()


def test_every_character_that_a_name_may_have_is_one_of_xml(tmp_path):
    allowed = [chr(code) for code in range(0x110000) if not has_control(chr(code))]
    side = -(-len(allowed) // 250)
    names = ["".join(allowed[start : start + side]) for start in range(0, len(allowed), side)]
    legend = plain_classes(names)
    write_attributes(tmp_path / "map.tif.aux.xml", legend, [1] * len(names), None)
    write_style(tmp_path / "map.qml", legend)
    found = ElementTree.parse(tmp_path / "map.tif.aux.xml").findall(".//Category")
    assert [item.text for item in found] == names
    found = ElementTree.parse(tmp_path / "map.qml").findall(".//paletteEntry")
    assert [item.get("label") for item in found] == names


def test_scores_are_scaled(tmp_path):
    data = color_image(blocks()).numpy()
    data[:, :4] = 0
    image = write(tmp_path / "in.tif", data, nodata=0, **UTM)
    files = run(image, tmp_path / "map.tif", scores=True, probabilities=True)
    plain = Predictor(ColorModel(), NAMES, mode="tile", tile_size=32, overlap=8)(torch.from_numpy(data))
    score, _ = scaled(files.scores)
    with rasterio.open(files.scores) as file:
        assert file.dtypes == ("uint8",) and np.isclose(file.scales[0], 0.004) and file.nodata == 255
    assert np.isnan(score[0, :4]).all()
    assert np.allclose(score[0, 4:], plain.score[4:], atol=0.0021)
    each, _ = scaled(files.probabilities)
    with rasterio.open(files.probabilities) as file:
        assert file.count == 4 and file.descriptions == tuple(NAMES)
    assert np.array_equal(each[:, 4:].argmax(0), plain.class_index[4:]) and np.allclose(
        each[:, 4:].max(0), score[0, 4:]
    )
    uncertainty, _ = scaled(files.uncertainty)
    assert np.nanmin(uncertainty) == pytest.approx(float(plain.uncertainty[4:].min()), abs=1e-6)
    assert np.nanmax(uncertainty) == pytest.approx(float(plain.uncertainty[4:].max()), abs=1e-6)


@pytest.mark.parametrize("value", [0, 51, 120, 255])
def test_a_constant_uncertainty_keeps_its_value_and_a_range_that_it_can_have(tmp_path, value):
    image = write(tmp_path / "in.tif", np.full((3, 40, 50), value, np.uint8), **UTM)
    files = run(image, tmp_path / "map.tif", mode="whole")
    uncertainty, file = scaled(files.uncertainty)
    # that of the fake model is the first band
    assert (uncertainty.astype(np.float32) == np.float32(value) / np.float32(255)).all()
    low, high = file.offsets[0], file.offsets[0] + 250 * file.scales[0]
    assert 0 <= low < high <= 1


@pytest.mark.parametrize(
    ("least", "range_", "shown"),
    [
        # what the entropy of a model that is sure or has no idea differs by: rounding
        (0.0, 3e-16, (0.0, 0.0, 1.0)),
        (1e-7, 7e-7, (0.0, 0.0, 1.0)),
        (0.5, 3e-7, (0.5, 0.0, 0.5)),
        (1 - 2**-21, 2**-21, (1.0, 0.0, 1.0)),
        (1e-6, 8e-7, (1.8e-6, 0.0, 1.8e-6)),
        (0.0, 1e-5, (None, 0.0, 1e-5)),
        (0.5, 1e-5, (None, 0.5, 0.50001)),
    ],
)
def test_an_uncertainty_that_differs_by_rounding_alone_is_constant(tmp_path, least, range_, shown):
    share = np.random.default_rng(0).random((60, 70))
    share[0, :2] = 0, 1
    value = (least + range_ * share).astype(np.float32)
    value[1] = np.nan
    image = write(tmp_path / "in.tif", np.zeros((3, 60, 70), np.uint8), **UTM)
    path = tmp_path / "out.tif"
    # its place is taken by an empty file
    path.touch()
    with open_scene(image) as scene:
        how = {"dtype": "float32", "nodata": np.nan, "resampling": "AVERAGE", "stretch": True}
        with raster_like(scene, path, path, **how) as target:
            target.write(value, 1)
    found, file = scaled(path)
    constant, low, high = shown
    known = np.isfinite(value)
    assert np.array_equal(np.isfinite(found[0]), known)
    assert file.offsets[0] == pytest.approx(low, abs=1e-7)
    assert file.offsets[0] + 250 * file.scales[0] == pytest.approx(high, rel=1e-6)
    if constant is None:
        assert np.abs(found[0] - value)[known].max() <= 0.51 * range_ / 250 and len(np.unique(found[0][known])) > 50
    else:
        assert np.unique(found[0][known]) == pytest.approx([constant], rel=1e-6)


@pytest.mark.parametrize("suffix", [".gpkg", ".geojson", ".parquet"])
@pytest.mark.parametrize("min_area", [0.0, 2.0, 20.0])
def test_polygons(tmp_path, suffix, min_area):
    pytest.importorskip("pyogrio")
    import shapely

    data = color_image(blocks()).numpy()
    data[:, :, :3] = 0
    image = write(tmp_path / "in.tif", data, nodata=0, **UTM)
    path = tmp_path / f"map{suffix}"
    files = run(image, tmp_path / "map.tif", polygons=path, min_area=min_area)
    assert files.polygons == path and files.scores is None
    assert sorted(p.name for p in tmp_path.glob(".*")) == []
    geometry, rows = read_polygons(path)
    # a pixel is 0.125 m2
    expected = (
        {(1, 400), (2, 100), (3, 1)} if min_area == 0 else {(1, 400), (2, 100)} if min_area < 12.5 else {(1, 400)}
    )
    found = {(row["class_id"], row["pixels"]) for row in rows}
    assert found == {*expected, (0, 60 * 77 - sum(count for _, count in expected))}
    assert all(row["class"] == NAMES[row["class_id"]] for row in rows)
    assert all(row["area_m2"] == pytest.approx(row["pixels"] * 0.125, rel=2e-3) for row in rows)
    assert all(0 < row["mean_score"] <= 1 for row in rows)
    square = next(shape for shape, row in zip(geometry, rows, strict=True) if row["class_id"] == 1)
    corners = shapely.box(356000.25 + 5, 5645000.5 - 7.5, 356000.25 + 15, 5645000.5 - 2.5)
    if suffix == ".geojson":
        assert square.bounds[0] == pytest.approx(6.95, abs=0.1) and square.bounds[1] == pytest.approx(50.94, abs=0.1)
    else:
        assert square.equals(corners)


POINTS = [
    rasterio.control.GroundControlPoint(row, col, 7 + col / 1e4, 51 - row / 1e4)
    for row, col in ((0, 0), (0, 9), (9, 0))
]
RPCS = rasterio.rpc.RPC(
    **{f"{name}_{kind}": 1.0 for name in ("height", "lat", "long", "line", "samp") for kind in ("off", "scale")},
    **{f"{name}_{kind}_coeff": [1.0] + [0.0] * 19 for name in ("line", "samp") for kind in ("num", "den")},
)
LOCAL = 'ENGCRS["x",EDATUM["y"],CS[Cartesian,2],AXIS["x",east],AXIS["y",north],LENGTHUNIT["metre",1]]'


@pytest.mark.parametrize(
    ("place", "got"),
    [
        ({"crs": "EPSG:32632"}, "no transform"),
        ({"crs": "EPSG:4326"}, "no transform"),
        ({"transform": NORTH_UP}, "no CRS"),
        ({"crs": LOCAL, "transform": NORTH_UP}, "a local CRS"),
        ({"gcps": (POINTS, "EPSG:4326")}, "ground control points alone"),
        ({"rpcs": RPCS}, "RPCs alone"),
    ],
)
def test_geojson_needs_a_whole_place_or_none(tmp_path, place, got):
    image = write(tmp_path / "in.tif", color_image(blocks()).numpy(), **place)
    said = f"polygons as GeoJSON need degrees; expected a CRS and a transform in .*in.tif, .*gpkg, got {got}"
    with pytest.raises(ConfigError, match=said) as caught:
        run(image, tmp_path / "map.tif", polygons=tmp_path / "map.geojson")
    assert "\n" not in str(caught.value) and [path.name for path in tmp_path.iterdir()] == ["in.tif"]
    assert run(image, tmp_path / "map.tif", polygons=tmp_path / "map.gpkg").polygons.is_file()


def read_polygons(path: Path):
    import shapely

    if path.suffix == ".parquet":
        from pyarrow import parquet

        table = parquet.read_table(path)
        meaning = json.loads(table.schema.metadata[b"geo"])
        assert meaning["primary_column"] == "geometry"
        assert meaning["columns"]["geometry"]["crs"]["id"] == {"authority": "EPSG", "code": 32632}
        rows = table.to_pylist()
        return [shapely.from_wkb(row["geometry"]) for row in rows], rows
    from pyogrio.raw import read as read_layer

    meta, _, geometry, columns = read_layer(path)
    assert meta["crs"] == ("EPSG:4326" if path.suffix == ".geojson" else "EPSG:32632")
    rows = [dict(zip(meta["fields"], values, strict=True)) for values in zip(*columns, strict=True)]
    return shapely.from_wkb(geometry).tolist(), rows


def test_a_map_without_a_polygon(tmp_path):
    pytest.importorskip("pyogrio")
    from pyogrio import read_info

    image = write(tmp_path / "in.tif", np.zeros((3, 20, 20), np.uint8), nodata=0, **UTM)
    files = run(image, tmp_path / "map.tif", polygons=tmp_path / "map.gpkg")
    assert read_info(files.polygons)["features"] == 0


def test_polygons_are_refused_before_all_work(tmp_path):
    image = write(tmp_path / "in.tif", color_image(blocks()).numpy(), **UTM)
    with pytest.raises(ConfigError, match=r"polygons have a wrong suffix; expected a path ending in .gpkg, .geojson"):
        run(image, tmp_path / "map.tif", polygons=tmp_path / "map.kml")
    (tmp_path / "map.gpkg").write_text("mine")
    with pytest.raises(ConfigError, match="map.gpkg exists"):
        run(image, tmp_path / "map.tif", polygons=tmp_path / "map.gpkg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.tif", "map.gpkg"]


GRIDS = {
    # one pixel of 10 m: the scale of UTM is 0.9996 in the middle of a zone
    "utm": ("EPSG:32632", (500_000, 5_600_000, 10), 100 / 0.9996**2),
    # web mercator at 51 degrees: a metre on the map is 0.63 m on the ground
    "mercator": ("EPSG:3857", (700_000, 6_621_293.7, 10), 39.66),
    # the equator, over the date line
    "degrees": ("EPSG:4326", (179.999, 0.0005, 0.0001), 11.1319 * 11.0574),
    "equal_area": ("EPSG:3035", (4_000_000, 3_000_000, 10), 100.0),
}


@pytest.mark.parametrize("name", GRIDS)
def test_areas_are_those_on_the_ground(name):
    from rasterio.crs import CRS
    from rasterio.transform import from_origin

    crs, (x, y, side), expected = GRIDS[name]
    pixel = PixelArea(CRS.from_user_input(crs), from_origin(x, y, side, side))
    assert pixel.known and np.allclose(pixel.of([(0, 0, 10, 20), (3, 5, 1, 1)]), expected, rtol=1e-3)
    # as exact for pixels of a centimetre
    small = PixelArea(CRS.from_user_input(crs), from_origin(x, y, side / 1000, side / 1000))
    assert np.allclose(small.of([(0, 0, 1, 1)]), expected / 1e6, rtol=1e-3)


def test_the_table_of_areas(tmp_path):
    image = write(tmp_path / "in.tif", color_image(blocks()).numpy(), **UTM)
    with open(run(image, tmp_path / "map.tif").areas, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == NAMES and [int(row["pixels"]) for row in rows] == [4299, 400, 100, 1]
    assert all(float(row["area_m2"]) == pytest.approx(int(row["pixels"]) * 0.125, rel=2e-3) for row in rows)
    assert {row["method"] for row in rows} == {METHOD} and "EPSG:6933" in METHOD
    plain = write(tmp_path / "plain.tif", color_image(blocks()).numpy())
    with open(run(plain, tmp_path / "map2.tif").areas, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["area_m2"] for row in rows} == {""} and {row["method"] for row in rows} == {"no place known"}


@pytest.mark.parametrize("crs, transform", [(None, NORTH_UP), ("EPSG:32632", rasterio.Affine.identity())])
def test_no_place_no_area(crs, transform):
    areas = ClassAreas(2, PixelArea(crs and rasterio.crs.CRS.from_string(crs), transform))
    areas.add(0, 0, np.array([[0, 1], [1, 255]], np.uint8))
    assert areas.pixels.tolist() == [1, 2] and areas.rows(["a", "b"])[1]["area_m2"] is None


def test_real_image(tmp_path):
    if not REAL.exists():
        pytest.skip(f"{REAL.name} is not here: it is a real aerial image that is not part of this project")
    pyogrio = pytest.importorskip("pyogrio")
    model = Predictor(ColorModel(), list(COLORS), mode="tile", tile_size=384, overlap=128)
    files = predict_scene(
        model, REAL, tmp_path / "map.tif", polygons=tmp_path / "map.gpkg", min_area=50, scores=True, progress=False
    )
    for path in (files.classes, files.uncertainty, files.scores):
        assert_cloud_optimized(path)
    assert category_names(files.classes) == list(COLORS)
    info = pyogrio.read_info(files.polygons)
    assert info["features"] > 0 and info["geometry_type"] == "Polygon"
    with rasterio.open(REAL) as scene:
        assert info["crs"] == str(scene.crs)
    data, _ = read(files.classes)
    assert predictor().class_names == tuple(COLORS) and set(np.unique(data)) <= {0, 1, 2, 3, 255}


def _labels(path, values):
    transform = rasterio.Affine(0.5, 0, 355000, 0, -0.5, 5640000)
    profile = {"driver": "GTiff", "count": 1, "dtype": "uint8", "crs": "EPSG:32632", "nodata": 255}
    with rasterio.open(path, "w", height=len(values), width=len(values[0]), transform=transform, **profile) as file:
        file.write(values, 1)
    return path


def test_every_polygon_of_geojson_is_in_degrees(tmp_path, monkeypatch):
    monkeypatch.setattr(polygons, "AT_A_TIME", 2)
    values = np.arange(12, dtype=np.uint8).repeat(4).reshape(6, 8) % 3
    labels = _labels(tmp_path / "map.tif", values)
    path = tmp_path / "map.geojson"
    part = tmp_path / "part.geojson"
    part.touch()
    count = polygons.write_polygons(labels, labels, part, path, ["a", "b", "c"])
    written = part if part.exists() else path
    assert count > 4 and pyogrio.read_info(written)["features"] == count
    west, south, east, north = pyogrio.read_bounds(written)[1]
    assert 6 < west.min() and east.max() < 8 and 50 < south.min() and north.max() < 52


@pytest.mark.parametrize("wrong", [-1, -1e-9, math.nan, math.inf])
def test_a_smallest_area_is_a_finite_number_from_0_on(tmp_path, wrong):
    image, path = write(tmp_path / "in.tif", color_image(truth()).numpy()), tmp_path / "map.gpkg"
    words = {"polygons": path, "min_area": wrong, "progress": False}
    said = f"min_area is out of range; expected a finite number, at least 0, got {wrong}"
    for refused in (
        # before the model is looked for
        lambda: drseg.predict("absent", image, out=tmp_path / "map.tif", **words),
        lambda: predict_scene(predictor(), image, tmp_path / "map.tif", **words),
        lambda: drseg.zero_shot("tiny").write(image, "roof; road", tmp_path / "map.tif", **words),
        lambda: polygons.write_polygons(image, image, tmp_path / "part.gpkg", path, ["a"], min_area=wrong),
    ):
        with pytest.raises(ConfigError, match=said):
            refused()
    for refused in (
        lambda: drseg.predict("absent", image, out=tmp_path / "map.tif", min_area=2.5),
        lambda: drseg.zero_shot("tiny").write(image, "roof; road", tmp_path / "map.tif", min_area=2.5),
    ):
        with pytest.raises(ConfigError, match="min_area is for polygons; expected polygons beside it, got 2.5 alone"):
            refused()
    assert [path.name for path in tmp_path.iterdir()] == ["in.tif"]


def test_a_small_area_within_nodata_stays(tmp_path):
    values = np.full((50, 50), 255, np.uint8)
    values[5:7, 5:7], values[20:35, 20:35] = 1, 0
    labels = _labels(tmp_path / "map.tif", values)
    path, part = tmp_path / "map.gpkg", tmp_path / "part.gpkg"
    part.touch()
    polygons.write_polygons(labels, labels, part, path, ["a", "b"], min_area=2.5)
    _, _, _, columns = pyogrio.raw.read(part if part.exists() else path)
    assert sorted(columns[0]) == [0, 1]
