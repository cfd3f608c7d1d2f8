# SPDX-License-Identifier: Apache-2.0
"""From a scene and its labels to tiles, and large images that are read in windows."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from drseg_core.config.reading import Reading
from drseg_core.config.schema import ReadingConfig
from drseg_core.data import pairs
from drseg_core.data.check import check_data
from drseg_core.data.folder import FolderDataset
from drseg_core.data.own_images import read_part
from drseg_core.data.tile import Tile, TileOptions, split_tiles, tile_scene
from drseg_core.data.vector import read_shapes
from drseg_core.errors import ConfigError, DatasetError, ResourceError
from drseg_core.scenes.reader import open_scene
from tests.data.test_own_images import write

rasterio = pytest.importorskip("rasterio")
from rasterio.transform import from_origin  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
RNG = np.random.default_rng(0)
PLACE = {"crs": "EPSG:32632", "transform": from_origin(500_000, 5_600_000, 1, 1)}
H, W = 320, 640


def scene(path: Path, **options) -> Path:
    data = RNG.integers(300, 3000, size=(4, H, W)).astype(np.uint16)
    return write(path, data, descriptions=["B02", "B03", "B04", "B08"], **{**PLACE, **options})


def label() -> np.ndarray:
    """Stripes of three classes."""
    return (np.indices((H, W))[0] // 8 % 3).astype(np.uint8)


def ids(folder: Path) -> dict[str, set[tuple[int, int]]]:
    return {
        split: {(int(p.name[1:5]), int(p.name[7:11])) for p in (folder / split / "masks").iterdir()}
        for split in ("train", "val")
    }


def test_a_scene_with_a_raster_of_labels(tmp_path):
    path = scene(tmp_path / "scene.tif")
    write(tmp_path / "labels.tif", label()[None], nodata=255, **PLACE)
    done = tile_scene(path, tmp_path / "labels.tif", tmp_path / "set", TileOptions(64, classes=("a", "b", "c")))
    assert done.class_names == ("a", "b", "c") and done.tiles["val"] > 0 and done.unlabelled == 0
    assert sum(done.tiles.values()) + done.between == 5 * 10
    data = FolderDataset(tmp_path / "set")
    assert data.reading.depth == "uint16" and data.reading.scale is not None
    with rasterio.open(path) as source:
        for split in ("train", "val"):
            for image in (tmp_path / "set" / split / "images").iterdir():
                with rasterio.open(image) as tile, rasterio.open(str(image).replace("images", "masks")) as mask:
                    window = source.window(*tile.bounds)
                    assert np.array_equal(tile.read(), source.read(window=window)) and tile.crs == source.crs
                    rows, columns = window.round_offsets().round_lengths().toslices()
                    assert np.array_equal(mask.read(1), label()[rows, columns])
                    assert tile.descriptions == source.descriptions
    assert check_data("folder", tmp_path / "set").problems == []


def test_no_tile_for_validation_touches_one_for_training(tmp_path):
    write(tmp_path / "labels.tif", label()[None], **PLACE)
    tile_scene(scene(tmp_path / "scene.tif"), tmp_path / "labels.tif", tmp_path / "set", TileOptions(64))
    found = ids(tmp_path / "set")
    assert found["train"] and found["val"]
    assert all(max(abs(r - y), abs(c - x)) > 1 for r, c in found["train"] for y, x in found["val"])
    # one piece of ground
    rows, columns = zip(*found["val"], strict=True)
    assert len(found["val"]) == (max(rows) - min(rows) + 1) * (max(columns) - min(columns) + 1)


def test_the_strip_whose_classes_are_most_like_the_whole():
    tiles = [Tile(row, column, 0, 0, 1, 1) for row in range(6) for column in range(2)]
    counts = np.array([[1, 0] if tile.row != 2 else [1, 1] for tile in tiles])
    counts[[tile.row == 4 for tile in tiles]] = [5, 1]
    splits, between = split_tiles(tiles, counts, 0.2)
    assert {tile.row for tile in splits["val"]} == {4} and between == 4
    assert {tile.row for tile in splits["train"]} == {0, 1, 2}
    assert split_tiles(tiles[:2], counts[:2], 0.2) == ({"train": tiles[:2], "val": []}, 0)
    assert split_tiles(tiles, counts, 0.0)[0]["val"] == []


@pytest.mark.parametrize("crs", ["EPSG:32632", "EPSG:4326"])
def test_labels_on_another_grid(tmp_path, crs):
    from rasterio.warp import calculate_default_transform, reproject

    wide = np.kron(np.arange(6).reshape(2, 3), np.ones((160, 214)))[:, :W].astype(np.uint8) % 4
    if crs == "EPSG:32632":
        coarse, place = wide[::4, ::4].copy(), from_origin(500_000, 5_600_000, 4, 4)
    else:
        corners = (500_000, 5_599_680, 500_640, 5_600_000)
        place, width, height = calculate_default_transform(PLACE["crs"], crs, W, H, *corners)
        coarse = np.full((height, width), 255, np.uint8)
        grids = {"src_transform": PLACE["transform"], "src_crs": PLACE["crs"], "dst_transform": place, "dst_crs": crs}
        reproject(wide, coarse, dst_nodata=255, src_nodata=255, **grids)
    write(tmp_path / "labels.tif", coarse[None], crs=crs, transform=place, nodata=255)
    tile_scene(scene(tmp_path / "scene.tif"), tmp_path / "labels.tif", tmp_path / "set", TileOptions(64, val_share=0))
    with rasterio.open(tmp_path / "set/train/masks/r0001_c0004.tif") as mask:
        assert (mask.read(1) == wide[64:128, 256:320]).mean() > 0.95


@pytest.mark.parametrize("suffix", [".gpkg", ".geojson", ".shp"])
def test_polygons_of_labels(tmp_path, suffix):
    pytest.importorskip("pyogrio")
    import shapely
    from pyogrio.raw import write as write_layer

    boxes = [shapely.box(500_000 + x, 5_599_680, 500_000 + x + 100, 5_600_000) for x in (0, 100, 400)]
    kind = np.array(["road", "Straße", "road"], object)
    path = tmp_path / f"labels{suffix}"
    driver = {".gpkg": "GPKG", ".geojson": "GeoJSON", ".shp": "ESRI Shapefile"}[suffix]
    options = {"RFC7946": "YES"} if suffix == ".geojson" else {}
    shapes = np.array([shapely.to_wkb(box) for box in boxes], object)
    write_layer(
        path, shapes, [kind], fields=["kind"], geometry_type="Polygon", crs="EPSG:32632", driver=driver, **options
    )
    image = scene(tmp_path / "scene.tif")
    done = tile_scene(image, path, tmp_path / "set", TileOptions(64, "kind", background="rest", val_share=0))
    assert done.class_names == ("rest", "Straße", "road")
    expected = np.zeros((H, W), np.uint8)
    expected[:, :100], expected[:, 100:200], expected[:, 400:500] = 2, 1, 2
    found = np.zeros_like(expected)
    for mask in (tmp_path / "set/train/masks").iterdir():
        row, column = int(mask.name[1:5]) * 64, int(mask.name[7:11]) * 64
        with rasterio.open(mask) as file:
            found[row : row + 64, column : column + 64] = file.read(1)
    assert (found == expected).mean() > 0.995
    unknown = tile_scene(image, path, tmp_path / "other", TileOptions(64, "kind", val_share=0))
    assert unknown.class_names == ("Straße", "road") and unknown.unlabelled == 5 * 4
    with pytest.raises(DatasetError, match="has no column 'class'; expected one of kind"):
        tile_scene(image, path, tmp_path / "no", TileOptions(64))
    assert not (tmp_path / "no").exists() and list(tmp_path.glob(".*")) == []


def test_polygons_far_larger_than_the_scene(tmp_path):
    pytest.importorskip("pyogrio")

    def feature(west, east, kind):
        ring = [[west, 20], [east, 20], [east, 70], [west, 70], [west, 20]]
        return {
            "type": "Feature",
            "properties": {"class": kind},
            "geometry": {"type": "Polygon", "coordinates": [ring]},
        }

    # two countries that meet at 9.004 degrees, and one far away whose class is kept
    content = [feature(-10, 9.004, "west"), feature(9.004, 40, "east"), feature(100, 120, "far")]
    path = tmp_path / "labels.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": content}))
    done = tile_scene(scene(tmp_path / "scene.tif"), path, tmp_path / "set", TileOptions(64, val_share=0))
    assert done.class_names == ("east", "far", "west") and done.tiles["train"] == 50
    with rasterio.open(tmp_path / "set/train/masks/r0000_c0004.tif") as mask:
        from rasterio.warp import transform

        rows, columns = np.indices((64, 64)) + 0.5
        lon, _ = transform(mask.crs, "EPSG:4326", *(mask.transform @ (columns.ravel(), rows.ravel())))
        expected = np.where(np.reshape(lon, (64, 64)) > 9.004, 0, 2)
        assert (mask.read(1) == expected).mean() > 0.999 and len(np.unique(expected)) == 2


def columns(path: Path, *strips: tuple) -> Path:
    """Polygons of labels, each from one column of the scene to another, with a class."""
    content = []
    for west, east, kind in strips:
        ring = [[500_000 + x, 5_600_000 - y] for x, y in ((west, 0), (west, H), (east, H), (east, 0), (west, 0))]
        shape = {"type": "Polygon", "coordinates": [ring]}
        content.append({"type": "Feature", "properties": {"class": kind}, "geometry": shape})
    crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32632"}}
    path.write_text(json.dumps({"type": "FeatureCollection", "crs": crs, "features": content}))
    return path


@pytest.mark.parametrize("background", [None, "rest"])
def test_polygons_without_a_class_are_unknown(tmp_path, caplog, background):
    pytest.importorskip("pyogrio")
    # over a known one and beside it, written before and after it
    strips = [(0, 20, None), (10, 40, 7), (30, 50, None)]
    path = columns(tmp_path / "labels.geojson", *strips)
    options = TileOptions(64, background=background, val_share=0)
    done = tile_scene(scene(tmp_path / "scene.tif"), path, tmp_path / "set", options)
    assert done.class_names == (("7",) if background is None else ("rest", "7"))
    with rasterio.open(first_tile(tmp_path / "set", "masks")) as mask:
        (row,) = np.unique(mask.read(1), axis=0)
    known, rest = (0, 255) if background is None else (1, 0)
    assert row.tolist() == [255] * 10 + [known] * 30 + [255] * 10 + [rest] * 14
    assert caplog.messages == ["labels.geojson: 2 of its polygons have no value in 'class' and are unknown"]


def test_classes_of_polygons_are_names_in_order(tmp_path):
    pytest.importorskip("pyogrio")
    image = scene(tmp_path / "scene.tif")
    path = columns(tmp_path / "labels.geojson", (0, 20, "a"), (20, 40, "b"), (40, 50, "c"))
    for background, names, ids in ((None, "cxba", [3, 2, 0, 255]), ("r", "rcxba", [4, 3, 1, 0])):
        out = tmp_path / names
        options = TileOptions(64, classes=tuple("cxba"), background=background, val_share=0)
        assert tile_scene(image, path, out, options).class_names == tuple(names)
        with rasterio.open(first_tile(out, "masks")) as mask:
            assert (mask.read(1) == np.repeat(ids, [20, 20, 10, 14])).all()
    for options, said in (
        (
            TileOptions(classes=("b",)),
            "--classes lack 'a'; 'c' of the polygons; expected all of their classes, got 'b'",
        ),
        (TileOptions(classes=("a", "b"), background="b"), "--background is one of --classes; .* another name, got 'b'"),
    ):
        with pytest.raises(ConfigError, match=f"data tile: {said}$"):
            tile_scene(image, path, tmp_path / "no", options)
    many = columns(tmp_path / "many.geojson", *((i, i + 1, f"c{i:02}") for i in range(20)))
    with pytest.raises(
        ConfigError, match="'c09', and 10 more of the polygons; expected all of their classes, got 'x'$"
    ):
        tile_scene(image, many, tmp_path / "no", TileOptions(64, classes=("x",)))
    assert not (tmp_path / "no").exists()


def labelled(tmp_path: Path) -> Path:
    return write(tmp_path / "labels.tif", label()[None], **PLACE)


def first_tile(folder: Path, part: str = "images") -> Path:
    return folder / "train" / part / "r0000_c0000.tif"


@pytest.mark.promise("C35")
@pytest.mark.parametrize("name", ["#1 road", "road ", "\u00a0road", "\ufeffroad"])
def test_names_that_classes_txt_would_not_give_back_are_refused(tmp_path, name):
    """A line that begins with # is left out when it is read, and every name after it would move by one."""
    path = scene(tmp_path / "scene.tif")
    write(tmp_path / "labels.tif", label()[None], nodata=255, **PLACE)
    with pytest.raises(DatasetError, match="class name cannot be a line of classes.txt; .*got '") as caught:
        tile_scene(path, tmp_path / "labels.tif", tmp_path / "set", TileOptions(64, classes=(name, "field", "water")))
    assert "\n" not in str(caught.value) and not (tmp_path / "set").exists()
    pytest.importorskip("pyogrio")
    square = {"type": "Polygon", "coordinates": [[[0, 0], [9, 0], [9, 9], [0, 0]]]}
    shapes = {
        "type": "FeatureCollection",
        "features": [
            {"type": "Feature", "properties": {"class": each}, "geometry": square} for each in (name, "field")
        ],
    }
    (tmp_path / "labels.geojson").write_text(json.dumps(shapes))
    with pytest.raises(DatasetError, match="class name cannot be a line of classes.txt"):
        tile_scene(path, tmp_path / "labels.geojson", tmp_path / "set", TileOptions(64))
    with pytest.raises(DatasetError, match="class name cannot be a line of classes.txt"):
        tile_scene(path, tmp_path / "labels.geojson", tmp_path / "set", TileOptions(64, background=name))
    assert not (tmp_path / "set").exists()


def test_lines_are_no_labels(tmp_path, caplog):
    pytest.importorskip("pyogrio")
    content = []
    for kind, low in (("Polygon", 100), ("LineString", 5)):
        ring = [[500_000 + x, 5_600_000 - y] for x, y in ((low, low), (low, 300), (300, 300), (300, low), (low, low))]
        shape = {"type": kind, "coordinates": [ring] if kind == "Polygon" else ring}
        content.append({"type": "Feature", "properties": {"class": kind}, "geometry": shape})
    crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32632"}}
    path = tmp_path / "labels.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "crs": crs, "features": content}))
    scene = write(tmp_path / "scene.tif", np.ones((3, H, W), np.uint8), **PLACE)
    tiled = tile_scene(scene, path, tmp_path / "out", TileOptions(size=64, field="class", val_share=0))
    assert tiled.class_names == ("Polygon",)
    assert caplog.messages == ["labels.geojson: 1 of its shapes are no polygons and left out (LineString)"]


@pytest.mark.parametrize("bits", [1, 4])
def test_a_scene_of_few_bits_stays_one(tmp_path, bits):
    pixels = np.random.default_rng(0).integers(0, 2**bits, (3, H, W)).astype(np.uint8)
    path = write(tmp_path / "scene.tif", pixels, nbits=bits, **PLACE)
    tile_scene(path, labelled(tmp_path), tmp_path / "set", TileOptions(64, val_share=0, nodata=1))
    with open_scene(path) as scene, open_scene(first_tile(tmp_path / "set")) as tile:
        assert torch.equal(tile.rows(0, 64)[0], scene.window(0, 64, 0, 64)[0])


@pytest.mark.parametrize("kind, value", [(np.uint8, 256), (np.uint8, -1), (np.uint8, 0.5), (np.uint16, -9999)])
def test_a_nodata_value_that_the_type_has_not(tmp_path, kind, value):
    path = write(tmp_path / "scene.tif", np.ones((3, H, W), kind), **PLACE)
    said = f"--nodata does not fit .*scene.tif; expected a value of {np.dtype(kind)}, got {value}"
    with pytest.raises(ConfigError, match=said) as caught:
        tile_scene(path, labelled(tmp_path), tmp_path / "set", TileOptions(64, nodata=value))
    assert "\n" not in str(caught.value) and sorted(p.name for p in tmp_path.iterdir()) == ["labels.tif", "scene.tif"]


@pytest.mark.parametrize(
    "kind, value",
    [(np.uint8, 255), (np.int16, -9999), (np.float32, -9999.5), (np.float32, np.nan), (np.float32, -3.4028235e38)],
)
def test_a_nodata_value_is_kept(tmp_path, kind, value):
    data = RNG.integers(1, 200, (3, H, W)).astype(kind)
    data[:, :, :40] = value
    path = write(tmp_path / "scene.tif", data, **PLACE)
    tile_scene(path, labelled(tmp_path), tmp_path / "set", TileOptions(64, nodata=value, val_share=0))
    with rasterio.open(first_tile(tmp_path / "set")) as tile, rasterio.open(first_tile(tmp_path / "set", "masks")) as m:
        assert np.array_equal(kind(tile.nodata), kind(value), equal_nan=True)
        assert np.array_equal(tile.read(), data[:, :64, :64], equal_nan=True)
        assert (tile.dataset_mask()[:, :40] == 0).all() and (tile.dataset_mask()[:, 40:] == 255).all()
        assert (m.read(1)[:, :40] == 255).all() and (m.read(1)[:, 40:] == label()[:64, 40:64]).all()


def test_a_palette_is_kept(tmp_path):
    data = RNG.integers(0, 7, (1, H, W)).astype(np.uint8)
    colors = {i: (i * 30, 200 - i * 20, i * i, 255) for i in range(7)}
    path = write(tmp_path / "scene.tif", data, photometric="palette", **PLACE)
    with rasterio.open(path, "r+") as file:
        file.write_colormap(1, colors)
    tile_scene(path, labelled(tmp_path), tmp_path / "set", TileOptions(64, val_share=0))
    with rasterio.open(first_tile(tmp_path / "set")) as tile:
        assert tile.colorinterp[0].name == "palette" and {i: tile.colormap(1)[i] for i in range(7)} == colors
        assert np.array_equal(tile.read(), data[:, :64, :64])
    # a training sees the colours that a map sees
    image = FolderDataset(tmp_path / "set", reading=ReadingConfig())[0].image.numpy()
    assert np.array_equal(image, np.array([colors[i][:3] for i in range(7)])[data[0, :64, :64]].transpose(2, 0, 1))


@pytest.mark.parametrize("internal", [True, False])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_a_mask_of_the_scene_is_kept(tmp_path, internal, kind):
    data = RNG.integers(1, 200, (3, H, W)).astype(kind)
    valid = RNG.random((H, W)) < 0.7
    path = write(tmp_path / "scene.tif", data, **PLACE)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal), rasterio.open(path, "r+") as file:
        file.write_mask(valid)
    assert path.with_name("scene.tif.msk").exists() != internal
    tile_scene(path, labelled(tmp_path), tmp_path / "set", TileOptions(64, val_share=0))
    with rasterio.open(first_tile(tmp_path / "set")) as tile:
        assert np.array_equal(tile.read(), data[:, :64, :64])
        assert np.array_equal(tile.dataset_mask() != 0, valid[:64, :64])
    assert not list(tmp_path.rglob("set/**/*.msk"))
    found = FolderDataset(tmp_path / "set", reading=ReadingConfig())[0]
    assert np.array_equal(found.mask.numpy(), np.where(valid[:64, :64], label()[:64, :64], 255))
    assert check_data("folder", tmp_path / "set").problems == []


def test_a_declared_value_stays_beside_another(tmp_path):
    data = RNG.integers(1, 200, (3, H, W)).astype(np.uint16)
    data[:, :, :20], data[:, :, 20:40] = 0, 65535
    path = write(tmp_path / "scene.tif", data, nodata=0, **PLACE)
    tile_scene(path, labelled(tmp_path), tmp_path / "set", TileOptions(64, nodata=65535, val_share=0))
    with rasterio.open(first_tile(tmp_path / "set")) as tile:
        assert np.array_equal(tile.read(), data[:, :64, :64])
        assert (tile.dataset_mask()[:, :40] == 0).all() and (tile.dataset_mask()[:, 40:] == 255).all()


def test_alpha_is_kept(tmp_path):
    data = RNG.integers(1, 200, (4, H, W)).astype(np.uint8)
    data[3] = np.where(np.indices((H, W))[1] < 40, 0, 255)
    path = write(tmp_path / "scene.tif", data, ["red", "green", "blue", "alpha"], photometric="rgb", **PLACE)
    tile_scene(path, labelled(tmp_path), tmp_path / "set", TileOptions(64, val_share=0))
    with rasterio.open(first_tile(tmp_path / "set")) as tile:
        assert np.array_equal(tile.read(), data[:, :64, :64]) and tile.colorinterp[3].name == "alpha"
    found = FolderDataset(tmp_path / "set", reading=ReadingConfig())[0]
    assert np.array_equal(found.image.numpy(), data[:3, :64, :64])
    assert (found.mask.numpy()[:, :40] == 255).all() and (found.mask.numpy()[:, 40:] != 255).all()


def test_refusals(tmp_path):
    image = scene(tmp_path / "scene.tif")
    elsewhere = {**PLACE, "transform": from_origin(0, 0, 1, 1), "nodata": 255}
    write(tmp_path / "far.tif", label()[None], **elsewhere)
    with pytest.raises(DatasetError, match="expected 1 to 255|no tile has a label"):
        tile_scene(image, tmp_path / "far.tif", tmp_path / "set")
    write(tmp_path / "float.tif", label()[None].astype(np.float32), **PLACE)
    with pytest.raises(DatasetError, match="float.tif has 1 bands of float32; expected one band of whole numbers"):
        tile_scene(image, tmp_path / "float.tif", tmp_path / "set")
    write(tmp_path / "labels.tif", label()[None], **PLACE)
    with pytest.raises(ConfigError, match="--classes are too few; expected a name for each number from 0 to 2, got 2"):
        tile_scene(image, tmp_path / "labels.tif", tmp_path / "set", TileOptions(classes=("a", "b")))
    for options, said in ((TileOptions(8), "--size"), (TileOptions(val_share=1), "--val-share")):
        with pytest.raises(ConfigError, match=said):
            tile_scene(image, tmp_path / "labels.tif", tmp_path / "set", options)
    with pytest.raises(ConfigError, match="--out is not empty"):
        tile_scene(image, tmp_path / "labels.tif", tmp_path)
    (tmp_path / "labels.txt").write_text("x")
    with pytest.raises(DatasetError, match="labels.txt cannot be read as polygons"):
        tile_scene(image, tmp_path / "labels.txt", tmp_path / "set")


@pytest.mark.promise("C53")
def test_what_points_to_a_network_is_not_asked(tmp_path):
    image = scene(tmp_path / "scene.tif")
    write(tmp_path / "labels.tif", label()[None], **PLACE)
    pixels = "<SourceFilename>/vsicurl/http://host/a.tif</SourceFilename>"
    band = f'<VRTRasterBand dataType="Byte" band="1"><SimpleSource>{pixels}</SimpleSource></VRTRasterBand>'
    for name in ("far.vrt", "far.tif"):
        (tmp_path / name).write_text(f'<VRTDataset rasterXSize="4" rasterYSize="4">{band}</VRTDataset>')
        for given in ((tmp_path / name, tmp_path / "labels.tif"), (image, tmp_path / name)):
            with pytest.raises(ConfigError, match=f"data tile: .*{name} points to something remote; expected files"):
                tile_scene(*given, tmp_path / "set")
    layer = '<OGRVRTLayer name="a"><SrcDataSource>/vsicurl/http://host/a.gpkg</SrcDataSource></OGRVRTLayer>'
    (tmp_path / "shapes.vrt").write_text(f"<OGRVRTDataSource>{layer}</OGRVRTDataSource>")
    with open_scene(image) as near, pytest.raises(DatasetError, match="shapes.vrt points to something remote"):
        read_shapes(tmp_path / "shapes.vrt", None, near)
    assert not (tmp_path / "set").exists()


def test_numbers_with_gaps_become_classes(tmp_path):
    write(tmp_path / "labels.tif", label()[None] * 10 + 10, **PLACE)
    done = tile_scene(scene(tmp_path / "scene.tif"), tmp_path / "labels.tif", tmp_path / "set", TileOptions(64))
    assert done.class_names == ("class 10", "class 20", "class 30")
    assert set(np.unique(FolderDataset(tmp_path / "set")[0].mask)) == {0, 1, 2}


@pytest.mark.parametrize("free", [10**12, 1000])
def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capfd, free):
    image, labels = scene(tmp_path / "scene.tif"), labelled(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    # also a disk that says it has room, and takes no more than this of a file
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(ResourceError) as caught:
            tile_scene(image, labels, tmp_path / "set", TileOptions(256))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    full = re.escape(f"the disk is full ({os.strerror(errno.ENOSPC)})")
    reason = full if free == 1000 else ".* error while writing into target file"
    assert re.fullmatch(f"data tile: .*set cannot be written: {reason}", str(caught.value))
    # libtiff would write to the terminal
    assert capfd.readouterr() == ("", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels.tif", "scene.tif"]


def test_a_crs_that_a_tiff_cannot_hold_is_kept(tmp_path):
    path = scene(tmp_path / "scene.tif", crs="+proj=tpers +h=5500000 +lat_0=40")
    assert path.with_name("scene.tif.aux.xml").exists()
    write(tmp_path / "labels.tif", label()[None])
    tile_scene(path, tmp_path / "labels.tif", tmp_path / "set", TileOptions(64, val_share=0))
    with rasterio.open(path) as source, rasterio.open(first_tile(tmp_path / "set")) as tile:
        assert tile.crs == source.crs


@pytest.fixture
def large(tmp_path, monkeypatch) -> Path:
    """One image of 200 x 330, which counts as large, and a small one."""
    monkeypatch.setattr(pairs, "LARGE_PIXELS", 5000)
    for name, size in (("large", (200, 330)), ("small", (40, 50))):
        image = RNG.integers(1, 256, size=(3, *size)).astype(np.uint8)
        write(tmp_path / f"train/images/{name}.tif", image)
        (tmp_path / "train/masks").mkdir(exist_ok=True)
        Image.fromarray(RNG.integers(0, 2, size).astype(np.uint8)).save(tmp_path / f"train/masks/{name}.png")
    (tmp_path / "classes.txt").write_text("a\nb\n")
    return tmp_path


def test_large_images_are_read_in_windows(large):
    whole, parts = FolderDataset(large), FolderDataset(large, window=64)
    image, mask, _ = whole[0]
    assert len(whole) == 2 and len(parts) == 3 * 5 + 1
    seen = np.zeros(mask.shape, int)
    for index in range(15):
        part = parts[index]
        top, bottom, left, right = box(parts.sample_name(index))
        seen[top:bottom, left:right] += 1
        assert bool((part.image == image[:, top:bottom, left:right]).all())
        assert bool((part.mask == mask[top:bottom, left:right]).all())
    assert seen.max() == 1 and seen[:192, :320].min() == 1
    assert bool((parts[15].image == whole[1].image).all()) and parts.fingerprint() != whole.fingerprint()


def box(name: str) -> tuple[int, int, int, int]:
    numbers = [int(word) for word in name.replace(",", "").split() if word.isdigit()]
    return numbers[-4], numbers[-3], numbers[-2], numbers[-1]


def test_larger_than_what_is_decoded_at_a_time(large, monkeypatch):
    for module in ("images", "pairs", "own_images", "folder"):
        monkeypatch.setattr(f"drseg_core.data.{module}.MAX_PIXELS", 10_000)
    data = FolderDataset(large, max_pixels=10_000, window=64)
    assert len(data) == 16 and data[3].image.shape == (3, 64, 64)
    with pytest.raises(DatasetError, match="large.tif is too large"):
        FolderDataset(large, max_pixels=10_000)[0]


@pytest.mark.parametrize("bands, kind", [(3, np.uint8), (1, np.uint16)])
def test_the_mask_of_a_large_image_has_one_8_bit_band(large, bands, kind):
    data = FolderDataset(large)
    mask = write(large / "train/masks/large.tif", np.zeros((bands, 200, 330), kind))
    with pytest.raises(DatasetError, match=f"large.tif has {bands} bands of {np.dtype(kind)}; expected one 8-bit band"):
        read_part(data.pairs[0].image, mask, Reading(), (0, 64, 0, 64))


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_large_images_are_scored_in_parts(large, kind):
    from drseg_core.config.schema import EvaluationConfig
    from drseg_core.evaluation.evaluate import evaluate
    from tests.evaluation.fake import ColorModel

    if kind is np.uint16:
        image = RNG.integers(1, 4000, size=(3, 200, 330)).astype(kind)
        image[:, :30] = 0
        (large / "train/images/small.tif").unlink()
        (large / "train/masks/small.png").unlink()
        write(large / "train/images/large.tif", image, nodata=0)
    options = EvaluationConfig(mode="tile", tile_size=32, overlap=8)
    in_parts = FolderDataset(large, reading=ReadingConfig())
    assert in_parts.large(0) == (200, 330)
    as_whole = FolderDataset(large, reading=ReadingConfig())
    as_whole.large = lambda index: None
    found = [evaluate(ColorModel(), ["red", "blue"], data, options, progress=False) for data in (in_parts, as_whole)]
    assert json.dumps(found[0]) == json.dumps(found[1]) and sum(map(sum, found[0]["confusion"])) > 50_000


def test_the_command(tmp_path, drseg, small):
    write(tmp_path / "labels.tif", label()[None], **PLACE)
    image = scene(tmp_path / "scene.tif")
    words = ["data", "tile", image, tmp_path / "labels.tif", "--out", tmp_path / "set", "--size", 64]
    for classes in ("a; b, c", "a#808080; b; c"):
        code, _, errors = drseg(*words, "--classes", classes)
        assert code == 2 and "--classes has synonyms or colours; expected one name for each class" in errors
    code, text, _ = drseg(*words, "--classes", "a; b; c")
    assert code == 0 and "classes: a; b; c" in text and "next: drseg data check folder" in text
    data = f"folder:{tmp_path / 'set'}"
    assert drseg("data", "check", "folder", tmp_path / "set")[0] == 0
    assert drseg("train", *small, "--data", data, "--out", tmp_path / "run", "--device", "cpu")[0] == 0
    assert drseg("evaluate", tmp_path / "run", "--data", data, "--out", tmp_path / "m.json")[0] == 0
    code, _, errors = drseg(*words)
    assert code == 2 and "--out is not empty" in errors
